"""Towers: one encoder a modality. A tower is ONE file with a Config dataclass and build(config, tokenizer=None) -> Tower.

timm.py encodes pictures (stem.py: convolutions before a vision transformer; pooling.py: how they become one vector; linear.py:
faster products on CPUs), transformers.py texts (hub.py finds its model, lengths.py sorts a batch by length). May import
pretrain.config and registry only. Shapes: b = samples, N = tokens a sample, C = width of a token, P = width of the pooled
vector.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pretrain.errors import ConfigError


class TokenSequence(NamedTuple):
    """What every tower returns."""

    states: Tensor
    """(b, N, C): grid tokens row-major, or words. Class and register tokens are left out."""
    mask: Tensor
    """(b, N) bool, True where a state is valid."""
    grid: tuple[int, int] | None
    """(H, W) with N = H W for pictures; None for words, and where patch dropout has broken the grid."""
    pooled: Tensor
    """(b, P): one vector a sample."""


class Tower(nn.Module):
    """Base of all towers: freezing, layer numbers, checkpointing. A subclass sets the attributes and defines forward()."""

    modality: str
    """The name of its input in a batch: "image", "text", ..."""
    width: int
    """C."""
    pooled_width: int
    """P."""
    depth: int = 0
    """Number of blocks L: layer ids run from 0 to L + 1."""
    trims: bool = False
    """Whether leaving out padding on the right leaves `pooled` and the valid states unchanged."""
    pools_mean: bool = False
    """Whether `pooled` is the masked mean of `states`."""
    pools_max: bool = False
    """Whether `pooled` is the largest of `states`, channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.unused_parameters: frozenset[str] = frozenset()
        """Parameters that the forward never reaches: they stay frozen, so that no strategy waits for their gradient."""
        self._frozen: list[str] = []

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> TokenSequence:
        """inputs (b, ...) and mask (b, N) or None -> TokenSequence."""
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def layer_ids(self) -> dict[str, int]:
        """Parameter name -> 0 for stem and embeddings, 1..L for the blocks, L + 1 for the final norm and the pooler."""
        raise NotImplementedError(f"{type(self).__name__}.layer_ids")

    def settings(self) -> dict[str, Any]:
        """Fields of the Config to change so that it builds this architecture with neither hub nor folder at hand."""
        return {}

    def set_checkpointing(self, on: bool) -> None:
        """Recomputes activations in the backward pass: less memory, a third more time. Raises ConfigError."""
        if on:
            raise ConfigError(f"the {self.modality} tower cannot recompute activations: leave out checkpointing")

    # -----------------------------------------------------------------------------------------------------------------
    # Freezing

    def freeze(self, trainable_blocks: int) -> None:
        """-1 trains everything, 0 nothing, n the last n blocks with final norm and pooler. Raises ConfigError.

        Frozen parts are in eval mode (dropout off, BatchNorm on its running statistics) and stay so after train().
        """
        if trainable_blocks > self.depth:
            raise ConfigError(
                f"{self.modality}.trainable_blocks={trainable_blocks}, but the tower has {self.depth} blocks; "
                "-1 trains everything"
            )
        ids = self.layer_ids()
        first = {-1: 0, 0: self.depth + 2}.get(trainable_blocks, self.depth + 1 - trainable_blocks)
        still = {name for name, layer in ids.items() if layer < first}
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in still and name not in self.unused_parameters)
        frozen = {id(p) for name, p in self.named_parameters() if name in still}
        self._frozen = [""] if first > self.depth + 1 else list(_whole(self, frozen))
        self.train(self.training)

    def train(self, mode: bool = True) -> Tower:
        """Training mode for all but frozen parts."""
        super().train(mode)
        for name in self._frozen:
            module = self.get_submodule(name)
            for part in module.modules():  # not module.eval(): for the tower itself that would come back here
                part.training = False
        return self

    def freeze_unused(self, reached: Iterable[str]) -> None:
        """Freezes every parameter that is not among `reached` for good."""
        self.unused_parameters = frozenset(name for name, _ in self.named_parameters()) - frozenset(reached)
        for name, parameter in self.named_parameters():
            if name in self.unused_parameters:
                parameter.requires_grad_(False)


def _whole(module: nn.Module, frozen: set[int], prefix: str = "") -> Iterable[str]:
    """The largest modules that have parameters, all of them among `frozen` (by id: a tied one has several names)."""
    own = [id(p) for p in module.parameters()]
    if own and frozen.issuperset(own):
        yield prefix.removesuffix(".")
        return
    for name, child in module.named_children():
        yield from _whole(child, frozen, f"{prefix}{name}.")


def used_parameters(output: Tensor, tensors: dict[str, Tensor]) -> list[str]:
    """The names of the leaf tensors that the autograd graph of `output` leads to. Walks the graph, computes nothing."""
    names = {id(tensor): name for name, tensor in tensors.items()}
    found: list[str] = []
    seen: set[Any] = set()
    todo: list[Any] = [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) in names:
            found.append(names[id(leaf)])
        todo.extend(following for following, _ in node.next_functions)
    return found


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """(b, N, C), (b, N) -> (b, C): the mean of the valid states."""
    weight = mask.to(states.dtype).unsqueeze(-1)
    return (states * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


def last_valid(states: Tensor, mask: Tensor) -> Tensor:
    """(b, N, C), (b, N) -> (b, C): the state at each row's last valid position."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (positions * mask).argmax(dim=1)
    return states[torch.arange(states.shape[0], device=states.device), last]
