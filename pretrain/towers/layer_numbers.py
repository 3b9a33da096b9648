"""The layer of each parameter of a timm model, by timm's own groups: stem, blocks of all stages, the rest."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, cast

from torch import nn


def number_layers(model: nn.Module) -> tuple[dict[str, int], int]:
    """Return the layer of each parameter (0 stem, 1..L blocks, L + 1 the rest) by timm's groups, and L."""
    has_groups = hasattr(model, "group_matcher")
    matcher = cast(Any, model).group_matcher(coarse=False) if has_groups else _match_by_stages(model)
    names = [name for name, _ in model.named_parameters()]
    orders = {name: _get_order(name, matcher) for name in names}
    blocks = sorted({order for order in orders.values() if order is not None and order[0] > 0})
    ids = {None: len(blocks) + 1} | {order: i for i, order in enumerate(blocks, 1)}
    return {f"model.{name}": ids[order] if order is None or order[0] > 0 else 0 for name, order in orders.items()}, len(blocks)


def _match_by_stages(model: nn.Module) -> Callable[[str], tuple[int, ...]]:
    """Return a matcher, as timm's, for a model that has none: of its largest list of modules, each item is a stage.

    Its blocks are `stages.0.blocks.1` or `stages.0.1`. What is registered before the list is the stem, the rest follows it.
    """
    lists = [(name, child) for name, child in model.named_children() if isinstance(child, (nn.Sequential, nn.ModuleList))]
    trunk = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()), default=("", model))[0]
    top_names = [name.partition(".")[0] for name, _ in model.named_parameters()]
    is_before = set(top_names[: top_names.index(trunk)]) if trunk in top_names else set()
    pattern = re.compile(rf"{re.escape(trunk)}\.(\d+)(?:\.(?:blocks\.)?(\d+))?")

    def match(name: str) -> tuple[int, ...]:
        if position := pattern.match(name):
            return 1 + int(position[1]), int(position[2] or 0)
        return (0,) if name.partition(".")[0] in is_before else (99999,)

    return match


def _get_order(name: str, matcher: Any) -> tuple[float, ...] | None:
    """Return a parameter's (group, block, ...) by timm's matcher; None for what follows the blocks.

    timm marks the latter by the number 99999 or infinity.
    """
    if callable(matcher):
        group_or_order = matcher(name)
        order = tuple(group_or_order) if isinstance(group_or_order, tuple) else (group_or_order,)
        return None if order[0] in (99999, float("inf")) else tuple(float(o) for o in order)
    for group, spec in enumerate(matcher.values()):
        for pattern, suffix in spec if isinstance(spec, (list, tuple)) else [(spec, None)]:
            match = re.match(pattern, name)
            if match:
                order = (group, *(int(g) for g in match.groups() if g is not None), *(suffix or ()))
                return None if order[-1] == 99999 else tuple(float(o) for o in order)
    return None
