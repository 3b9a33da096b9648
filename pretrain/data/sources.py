"""What data.train and data.val may say: which shards, in which shares; and how many samples they hold."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from pretrain import dist
from pretrain.config import ConfigError, UserError, closest
from pretrain.data.cache import Cache
from pretrain.data.shards import counts, expand

log = logging.getLogger(__name__)

_NAMED = 20  # shards without samples that are named in the log


class Given(NamedTuple):
    """A source as the configuration gives it."""

    shards: list[str]
    weight: float | None


def sources_of(spec: Any, where: str) -> list[Given]:
    """The sources of data.train or data.val (`where`), with the shards they match. Raises ConfigError."""
    return [Given(expand(shards, where), weight) for shards, weight in entries(spec, where)]


def entries(spec: Any, where: str) -> list[tuple[str | list[str], float | None]]:
    """[(shards, weight)] as written; a plain list of shards is one source. Raises ConfigError for what means nothing."""
    if isinstance(spec, str):
        return [(spec, None)]
    if not isinstance(spec, list) or not spec:
        raise ConfigError(f"{where}={spec!r} must be a string of shards, or a list of strings or of {{shards, weight}}")
    if all(isinstance(entry, str) for entry in spec):
        return [(spec, None)]
    found: list[tuple[str | list[str], float | None]] = []
    for entry in spec:
        if not isinstance(entry, dict) or "shards" not in entry:
            raise ConfigError(f"{where}: {entry!r} must be {{shards: ..., weight: ...}}, as other entries of the list are")
        for name in entry:
            if name not in ("shards", "weight"):
                raise ConfigError(
                    f"{where}: no {name!r} in an entry{closest(str(name), ['shards', 'weight'])}; it has shards and weight"
                )
        shards, weight = entry["shards"], entry.get("weight")
        if not (isinstance(shards, str) or (isinstance(shards, list) and shards and all(isinstance(s, str) for s in shards))):
            raise ConfigError(f"{where}: shards={shards!r} must be a string, or a list of strings")
        if weight is not None and (
            isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf")
        ):
            raise ConfigError(f"{where}: weight={weight!r} of {shards} must be a positive number")
        found.append((shards, weight))
    without = [shards for shards, weight in found if weight is None]
    if 0 < len(without) < len(found):
        raise ConfigError(f"{where}: {without[0]} has no weight, others have: give all a weight, or none")
    return found


def counted(paths: list[str], cache: Cache, where: str) -> list[int]:
    """Samples in each shard, counted once for all processes. Raises UserError."""
    found: list[int] = []
    problem = ""
    if dist.is_main():
        try:
            found = counts(paths, cache)
            for path in [path for path, n in zip(paths, found, strict=True) if n == 0][:_NAMED]:
                log.warning("%s holds no samples", path)
            if sum(found) == 0:
                problem = f"{where}: no samples in {paths[0]}" + (f" nor {len(paths) - 1} others" if len(paths) > 1 else "")
        except UserError as error:
            problem = str(error)
    found, problem = dist.broadcast_object((found, problem))
    if problem:
        raise UserError(problem)
    return found
