"""The `data` section of the configuration; which shards it means, in which shares, and how many samples they hold."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pretrain.data.images import AugmentConfig
from pretrain.data.shards.cache import ShardCache
from pretrain.data.shards.paths import count_samples, expand_shards
from pretrain.errors import ConfigError, UserError, closest
from pretrain.runtime.agree import on_main

log = logging.getLogger(__name__)

_MAX_NAMED = 20  # shards without samples that are named in the log


@dataclass
class DataConfig:
    """What is read, in which order, by how many."""

    train: Any = "synthetic"
    """Training shards: a glob, brace pattern, folder or url; a list of them; a list of {shards, weight} where several
    sources are mixed (weight: share of the positions; none = in proportion to their samples); or `synthetic`."""
    val: Any = None
    """Shards to evaluate on, in the same words; none = no evaluation."""
    batch_size: int = 128
    """Samples that share negatives, over all processes; train.chunks divides each process's share for memory only."""
    workers: int = 1
    """Processes that read and decode, per training process; 0 does it in the training process."""
    window: int = 16
    """Shards whose samples are shuffled together; with shards of 1,000 to 10,000 samples 16 mixes well."""
    streams: int = 1
    """Parts of the sequence that nodes read on their own, a multiple of the number of nodes; 1 unless many nodes share
    slow storage. Changing it changes the order."""
    block: int = 0
    """Consecutive samples of a stream; 0 = as many as a window holds. Of no effect with one stream."""
    replacement: bool = False
    """Draw samples independently of what was drawn before, instead of each once an epoch."""
    caption: str = "txt"
    """Where captions are: txt, or the name of a json field (a string, or a list of which one is drawn)."""
    draw: int = 1
    """Captions drawn of each sample, for pretraining: the picture is encoded once for all of them, and each has a loss of its
    own, of which the mean is taken. Where a sample has fewer, they are taken again."""
    val_caption: str | None = None
    """Where evaluation finds them; null: as `caption`. A json field with a list of them: each is a caption of the picture."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random changes to training pictures."""
    max_bad_rate: float = 0.01
    """Share of samples with unusable content above which the run stops; below, they are replaced and counted."""
    max_bad_run: int = 100
    """Samples with unusable content in a row above which the run stops."""
    cache: str | None = None
    """Folder of this machine for fetched shards and for indices that cannot lie beside their shard; none = clipfuse's
    folder in the user's cache."""
    cache_gib: float = 0.0
    """GiB that fetched shards may take, then those used longest ago are removed; 0 = no limit."""
    commands: bool = False
    """Allow `pipe:` urls, which run shell commands, and GOPEN_REWRITE, which rewrites urls."""

    def check(self) -> None:
        """Refuses numbers out of range and shards given in words that mean nothing."""
        for name, least in (
            ("batch_size", 1),
            ("workers", 0),
            ("window", 1),
            ("streams", 1),
            ("block", 0),
            ("draw", 1),
            ("max_bad_run", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"data.{name}={getattr(self, name)} must be at least {least}")
        if not 0 <= self.max_bad_rate <= 1:
            raise ConfigError(f"data.max_bad_rate={self.max_bad_rate} must be a share, 0 to 1")
        if self.cache_gib < 0:
            raise ConfigError(f"data.cache_gib={self.cache_gib} must be 0 (no limit) or more")
        parse_sources(self.train, "data.train")
        if self.val is not None:
            parse_sources(self.val, "data.val")

    def build_cache(self) -> ShardCache:
        """Where this machine keeps what it fetched."""
        return ShardCache(self.cache, self.commands, self.cache_gib)


def evaluation_caption(data: Mapping[str, Any]) -> str:
    """Where evaluation finds captions, by the `data` section of a run's configuration."""
    return str(data.get("val_caption") or data.get("caption") or "txt")


class SourceSpec(NamedTuple):
    """A source as the configuration gives it."""

    shards: list[str]
    weight: float | None


def resolve_sources(spec: Any, where: str) -> list[SourceSpec]:
    """The sources of data.train or data.val (`where`), with the shards they match. Raises ConfigError."""
    return [SourceSpec(expand_shards(shards, where), weight) for shards, weight in parse_sources(spec, where)]


def parse_sources(spec: Any, where: str) -> list[tuple[str | list[str], float | None]]:
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


def count_samples_once(paths: list[str], cache: ShardCache, where: str) -> list[int]:
    """Samples in each shard, counted once for all processes. Raises UserError."""

    def count() -> list[int]:
        numbers = count_samples(paths, cache)
        for path in [path for path, n in zip(paths, numbers, strict=True) if n == 0][:_MAX_NAMED]:
            log.warning("%s holds no samples", path)
        if sum(numbers) == 0:
            others = f" nor {len(paths) - 1} others" if len(paths) > 1 else ""
            raise UserError(f"{where}: no samples in {paths[0]}{others}")
        return numbers

    return on_main(count)
