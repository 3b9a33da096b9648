"""The repeated blocks of a model: what FSDP2 shards one by one, and what torch.compile compiles one by one.

Blocks that are alike share their graphs, so that a tower of 24 layers compiles one. What lies between blocks (embeddings,
pooling, projections) stays eager: it is a small share of a step.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import nn

from pretrain.errors import ConfigError
from pretrain.strategies.full_copy import disable_length_buckets
from pretrain.towers import Tower

CompileMode = Literal["false", "true", "default", "reduce-overhead", "max-autotune"]
"""The values of train.compile."""
MODES = {
    "true": "default",
    "default": "default",
    "reduce-overhead": "reduce-overhead",
    "max-autotune": "max-autotune-no-cudagraphs",
}
"""train.compile -> mode of torch.compile. CUDA graphs are those of reduce-overhead alone."""
GRAPHS_PER_BLOCK = 256
"""Graphs of one kind of block before torch gives up and runs it eagerly. Blocks that differ in a number, such as their rate of
drop path, have a graph each; so has each group of texts, and the pass without gradient of a cached step."""


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the outermost repeated layers of a model.

    They are the children that have weights of every ModuleList or Sequential with at least two such children.
    """
    if isinstance(model, nn.ModuleList | nn.Sequential):
        repeated = [child for child in model.children() if next(child.parameters(), None) is not None]
        if len(repeated) > 1:
            return repeated
    return [block for child in model.children() for block in find_blocks(child)]


def find_compiled(model: nn.Module) -> list[nn.Module]:
    """Return the modules that are compiled: blocks with modules of their own, and towers without such blocks as a whole."""
    regions = [block for block in find_blocks(model) if next(block.children(), None) is not None]
    inside = {id(module) for region in regions for module in region.modules()}
    towers = [module for module in model.modules() if isinstance(module, Tower)]
    return regions + [tower for tower in towers if not any(id(module) in inside for module in tower.modules())]


def compile_blocks(model: nn.Module, mode: str, backend: str) -> None:
    """Compile the blocks of a model for the shapes of its batches, which must not vary. mode: a value of MODES."""
    disable_length_buckets(model)  # their shapes depend on each batch
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, GRAPHS_PER_BLOCK)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * GRAPHS_PER_BLOCK)
    options = {"mode": mode} if backend == "inductor" else {}
    for module in find_compiled(model):
        module.compile(backend=backend, dynamic=False, **options)


def check_mode(word: str, strategy: str) -> None:
    """Raise ConfigError where train.compile=WORD cannot be combined with the strategy."""
    if word not in get_args(CompileMode):
        raise ConfigError(f"train.compile={word} must be one of {', '.join(get_args(CompileMode))}")
    if word != "false" and strategy == "zero3":
        raise ConfigError(
            f"train.compile={word} cannot be combined with train.strategy=zero3: DeepSpeed gathers weights in hooks of every "
            "module, and each hook would break the graph; use fsdp2 to shard the weights of a compiled model"
        )
    if word == "reduce-overhead" and strategy not in ("single", "ddp"):
        raise ConfigError(
            f"train.compile=reduce-overhead records CUDA graphs, which need weights at fixed addresses: {strategy} moves its "
            "shards; use train.compile=true, or train.strategy=ddp"
        )
