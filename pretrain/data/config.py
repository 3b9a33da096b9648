"""The `data` section of the configuration: its shards, source weights and sample counts."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd
from typing import Any, Literal, NamedTuple

from pretrain.config import check_numbers, text_field
from pretrain.data.captions import check_caption_source
from pretrain.data.images import AugmentConfig
from pretrain.data.order import choose_streams
from pretrain.data.sample_filter import parse_keep, read_skip_list
from pretrain.data.shards.cache import ShardCache
from pretrain.data.shards.paths import count_samples, expand_shards, split_patterns
from pretrain.data.shards.stores import is_pattern, is_store
from pretrain.data.shards.transfer import CONNECTIONS, FETCH_SECONDS, MAX_FETCH_SECONDS
from pretrain.data.shards.urls import is_remote
from pretrain.data.teacher_settings import check_teachers
from pretrain.errors import ConfigError, UserError, closest
from pretrain.printable import one_safe_line
from pretrain.runtime import distributed
from pretrain.runtime.agree import on_main

log = logging.getLogger(__name__)

_MAX_NAMED = 20  # empty shards that are named in the log


@dataclass
class DataConfig:
    """Training and validation data: shards, batch size, shuffling, workers, limits on bad samples."""

    train: Any = text_field("synthetic", numbers=("weight",))
    """Training shards: a glob, brace pattern, folder or url, or a list of them. A list of {shards, weight} mixes several
    sources (weight: share of the positions; none = in proportion to their samples). `synthetic` needs no files."""
    val: Any = text_field(None, numbers=("weight",))
    """Shards to evaluate on, in the same notation; none = no evaluation."""
    batch_size: int = 128
    """Samples that share negatives, over all processes; train.chunks divides the part of each process for memory only."""
    workers: int = 1
    """Worker processes per training process, which read and decode; 0 = the training process does it itself."""
    window: int = 16
    """Shards whose samples are shuffled together; 16 mixes shards of 1,000 to 10,000 samples well."""
    streams: int = 0
    """Interleaved parts of the sample sequence, each read by one node if the number of nodes divides it. 0 = 1 for local
    shards; for remote or staged ones up to 48, with windows smaller in proportion, so that each node fetches its own shards.
    It is chosen when a run begins, and kept when it resumes. Changing it changes the order of samples."""
    block: int = 0
    """Consecutive samples of a stream; 0 = as many as a window holds. No effect with one stream."""
    replacement: bool = False
    """Sample with replacement: draw samples independently, instead of each once per epoch."""
    caption: str = "txt"
    """Where captions are: txt, txt:lines (each line of KEY.txt is a caption), the name of a json field (a string, or a list),
    or a field of another member, as syn.json:syn_text. Of several captions one is drawn. Sources joined by + take turns:
    txt+syn.json:syn_text draws of KEY.txt and of the synthetic captions half the time each, with data.draw=2 one of each. A
    sample may lack some of them."""
    draw: int = 1
    """Captions drawn per sample in pretraining. The image is encoded once; the loss is the mean over the captions drawn.
    A sample with fewer captions repeats them."""
    sentences: bool = False
    """Draw sentences: a caption of several stands for itself and for each of them, so that with data.draw=4 a long caption
    gives several texts that match its image (Zheng et al., arXiv:2403.17007). Pretraining only; evaluation reads it whole."""
    weight: str | None = None
    """Field of the json with the weight of a pair, from 0 to 1e9: a number for the sample, or a list of one for each caption.
    None there counts as 1. A pair's loss counts by its weight, divided by the sum over the global batch (Zhu et al.,
    arXiv:2404.08535); one of weight 0 remains a negative of the others. Pretraining only; null = all count alike."""
    negatives: str | None = None
    """Field of the json with captions that are wrong about the image, a list of texts or of {caption: text}. Every image is
    compared with the negatives of the whole global batch (Yuksekgonul et al., arXiv:2210.01936). Samples without any are used
    as well. Pretraining only; null = none."""
    draw_negatives: int = 1
    """Captions drawn per sample from `negatives`; each costs as much as a caption."""
    teachers: Any = text_field(None)
    """Folder that `clipfuse embed` wrote for the training shards, or a list of them: embeddings of teachers, for
    loss.name=distill. They are found by key and caption, and are of the images as stored, not as augmented. null = none.
    `samples` takes them from the samples, in DataCompDR's layout (Vasu et al., arXiv:2311.17049): KEY.npz holds embeddings of
    the augmentations in KEY.paug.json, of KEY.txt and of the captions in KEY.syn.json. Training images then get one of the
    stored augmentations, and data.augment is not used. A folder of this name is ./samples."""
    teacher_widths: list[int] = field(default_factory=list)
    """With data.teachers=samples, numbers of an embedding of each teacher, where those of several stand side by side.
    DataCompDR has [768, 768]; [] = one teacher."""
    incomplete: Literal["bad", "keep"] = "bad"
    """Samples that lack a modality, with three towers or more. bad: they are replaced like unusable ones. keep: they are used
    where they have two at least, and the loss of each pair of modalities is the mean over the samples that have both. What is
    missing is encoded as a black image, an empty text or silence; only BatchNorm sees it. `clipfuse data check` with this
    setting says how many samples have which, and `clipfuse embed` of such a run writes null for what one lacks. Pretraining
    only."""
    val_caption: str | None = None
    """Where evaluation reads captions; null = as `caption`. Of several, each is a caption of the image. Where `txt` holds
    several lines in most samples, each line is one; txt:whole reads them as one."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random changes to training images."""
    decode_on: Literal["cpu", "device"] = "cpu"
    """Where JPEGs are decoded for training. device: workers send baseline JPEGs of up to 1 MiB as they are, and torchvision's
    decoder, nvJPEG on a GPU, decodes them one batch ahead; the workers decode the others. For nodes whose processors feed GPUs
    with a JPEG engine (A100, H100 and later) too slowly. A truncated JPEG is replaced as with cpu, but one that is damaged
    inside is used as far as it can be decoded. Pretraining only."""
    max_bad_rate: float = 0.01
    """Fraction of samples with unusable content above which the run stops; below it they are replaced and counted."""
    max_bad_run: int = 100
    """Consecutive samples with unusable content above which the run stops."""
    keep: str | None = None
    """Train only on samples for which this condition on fields of their json is true: json.similarity > 0.28 and json.width >=
    200. A missing field is null, which no comparison keeps. The others are replaced as bad samples are, and counted apart.
    Epochs stay as long as without, so what is kept is drawn more often. Evaluation reads all samples."""
    skip: str | None = None
    """File of samples to train without, one SHARD/KEY a line, as `clipfuse data check SHARDS --fix FILE` writes it. They are
    replaced without being read, and counted apart; null = none."""
    cache: str | None = None
    """Local folder for fetched shards, and for indices that cannot be written beside their shard; none = clipfuse's folder
    in the user's cache."""
    cache_gib: float = 0.0
    """GiB that fetched shards may take, and one shard more for each process that fetches; above it, the least recently used are
    removed; 0 = as much as leaves 5 GiB or a twentieth of the disk free, whichever is less."""
    fetch_seconds: float = FETCH_SECONDS
    """Seconds that fetching one remote shard may take, however slowly it arrives."""
    connections: int = CONNECTIONS
    """Parallel requests that fetch one remote shard, where the server sends parts of files; one request to an object store
    brings 50 to 100 MB/s."""
    stage: bool = False
    """Copy local shards to the cache folder before they are read, as remote ones: for shards on a network file system."""
    commands: bool = False
    """Allow `pipe:` urls, which run shell commands, and GOPEN_REWRITE, which rewrites urls."""

    def check(self) -> None:
        """Raise ConfigError for a number out of range or an invalid specification of shards."""
        for name, least in (
            ("batch_size", 1),
            ("workers", 0),
            ("window", 1),
            ("streams", 0),
            ("block", 0),
            ("draw", 1),
            ("draw_negatives", 1),
            ("max_bad_run", 0),
            ("connections", 1),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"data.{name}={getattr(self, name)} must be at least {least}")
        if not 0 <= self.max_bad_rate <= 1:
            raise ConfigError(f"data.max_bad_rate={self.max_bad_rate} must be a fraction, 0 to 1")
        if self.cache_gib < 0:
            raise ConfigError(f"data.cache_gib={self.cache_gib} must be 0 (what the disk holds) or more")
        if not 0 < self.fetch_seconds <= MAX_FETCH_SECONDS:
            raise ConfigError(f"data.fetch_seconds={self.fetch_seconds} must be above 0, and at most {MAX_FETCH_SECONDS:.0f}")
        check_caption_source(self.caption, "data.caption")
        check_caption_source(self.val_caption or "", "data.val_caption")
        parse_sources(self.train, "data.train")
        if self.val is not None:
            parse_sources(self.val, "data.val")
        self._check_filters()
        check_teachers(self.teachers, self.teacher_widths, self.caption, self.augment)
        check_numbers(self, "data", cache_gib="[0, inf)")

    def _check_filters(self) -> None:
        needs_shards = ("keep", "skip", "weight", "negatives", "teachers")
        for name, value in ((name, getattr(self, name)) for name in needs_shards):
            if value is not None and self.train == "synthetic":
                raise ConfigError(f"data.{name}={value!r:.200} needs shards, but data.train is synthetic")
        if self.decode_on != "cpu" and self.train == "synthetic":
            raise ConfigError(f"data.decode_on={self.decode_on} needs shards, but data.train is synthetic")
        if self.keep is not None:
            parse_keep(self.keep)
        if self.skip is not None:
            read_skip_list(self.skip)

    def build_cache(self) -> ShardCache:
        """Build the cache of fetched shards that these settings describe."""
        return ShardCache(self.cache, self.commands, self.cache_gib, self.fetch_seconds, self.connections, self.stage)

    def set_streams(self, paths: Sequence[str], shards: int, nodes: int, batch_sizes: Sequence[int] = ()) -> None:
        """Choose `streams`, and `window` with it, where streams=0. Warn where every node will fetch every shard.

        Args:
            paths: all training shards.
            shards: number of shards of the smallest source.
            nodes: number of nodes of the run.
            batch_sizes: further sizes of batches, which the streams must divide as well.
        """
        is_fetched = self.stage or any(map(is_remote, paths))
        if self.streams == 0:
            batch_size = gcd(self.batch_size, *batch_sizes)
            self.streams, self.window = (
                choose_streams(self.window, batch_size, shards, nodes) if is_fetched else (1, self.window)
            )
        if is_fetched and self.streams == 1 and nodes > 1 and distributed.is_main():
            log.warning(
                f"data.streams=1: each of the {nodes} nodes fetches every shard; a new run with data.streams=0, and at least "
                f"{max(nodes, self.window)} shards in each source, fetches each shard on one node"
            )

    def resume_streams(self, saved: Mapping[str, Any]) -> None:
        """Take the number of streams, and the window that was chosen with it, from the `data` section of a checkpoint."""
        if self.streams != 0 or not isinstance(saved, Mapping):
            return
        streams, window = saved.get("streams", 1), saved.get("window")
        if isinstance(streams, int) and streams >= 1:
            self.streams = streams
            if window == -(-self.window // streams):
                self.window = window


def evaluation_caption(data: Mapping[str, Any]) -> str:
    """Return where evaluation reads captions: "txt" or a json field.

    Args:
        data: the `data` section of a run's configuration.

    Raises ConfigError where it is no section.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"data must hold settings, not {data!r:.80}")
    return str(data.get("val_caption") or data.get("caption") or "txt")


class SourceSpec(NamedTuple):
    """One source: its shards, and the weight from the configuration (None where it gives none)."""

    shards: list[str]
    weight: float | None


def resolve_sources(spec: Any, where: str) -> list[SourceSpec]:
    """Return the sources of data.train or data.val with the shards they match.

    Args:
        spec: the value in the configuration.
        where: its key, for error messages.

    Raises:
        ConfigError: an invalid specification, or one that matches no shard.
    """
    return [SourceSpec(expand_shards(shards, where), weight) for shards, weight in parse_sources(spec, where)]


def resolve_sources_once(spec: Any, where: str) -> list[SourceSpec]:
    """Return what `resolve_sources` returns. Collective: shards in object stores are listed by the main process alone.

    Local patterns are expanded by each process, so that nodes whose folders differ are detected.
    """
    patterns = [[shards] if isinstance(shards, str) else shards for shards, _ in parse_sources(spec, where)]
    if any(is_store(part) and is_pattern(part) for shards in patterns for shard in shards for part in split_patterns(shard)):
        return on_main(lambda: resolve_sources(spec, where))
    return resolve_sources(spec, where)


def list_shards_once(spec: Any, where: str) -> list[str]:
    """Return the shards of all sources, as `resolve_sources_once` finds them. Collective."""
    return [path for source in resolve_sources_once(spec, where) for path in source.shards]


def check_sources(train: Any, val: Any) -> None:
    """Find the shards of data.train and data.val, and warn where both have the same file. Collective.

    A path that matches nothing is an error now and not after a tokenizer or the first thousand steps were trained. Raises
    ConfigError.
    """
    train_shards = [] if train == "synthetic" else list_shards_once(train, "data.train")
    if val is None:
        return
    val_shards = list_shards_once(val, "data.val")
    if not distributed.is_main():
        return
    places = set(_real_paths(train_shards))
    shared = [path for path, place in zip(val_shards, _real_paths(val_shards), strict=True) if place in places]
    if shared:
        more = f" and {len(shared) - 1:,} more in data.val are" if len(shared) > 1 else " in data.val is"
        log.warning(one_safe_line(f"{shared[0]}{more} in data.train, too: evaluation sees samples that the run trains on"))


def _real_paths(paths: Sequence[str]) -> list[str]:
    """Return the paths of local shards in their real folders, so that two spellings of one file are equal; urls as they are."""
    folders = {folder: os.path.realpath(folder) for folder in {os.path.dirname(path) for path in paths if not is_remote(path)}}
    return [path if is_remote(path) else os.path.join(folders[os.path.dirname(path)], os.path.basename(path)) for path in paths]


def parse_sources(spec: Any, where: str) -> list[tuple[str | list[str], float | None]]:
    """Return [(shards, weight)] without expanding patterns; a plain list of shards is one source.

    Raises:
        ConfigError: `spec` is neither a string, a list of strings nor a list of {shards, weight}.
    """
    if isinstance(spec, str):
        return [(spec, None)]
    if not isinstance(spec, list) or not spec:
        raise ConfigError(f"{where}={spec!r} must be a string of shards, or a list of strings or of {{shards, weight}}")
    if all(isinstance(entry, str) for entry in spec):
        return [(spec, None)]
    sources: list[tuple[str | list[str], float | None]] = []
    for entry in spec:
        if not isinstance(entry, dict) or "shards" not in entry:
            raise ConfigError(f"{where}: {entry!r} must be {{shards: ..., weight: ...}}, as the other entries of the list are")
        for name in entry:
            if name not in ("shards", "weight"):
                raise ConfigError(
                    f"{where}: an entry has no key {name!r}{closest(str(name), ['shards', 'weight'])}; "
                    "valid keys are shards and weight"
                )
        shards, weight = entry["shards"], entry.get("weight")
        if not (isinstance(shards, str) or (isinstance(shards, list) and shards and all(isinstance(s, str) for s in shards))):
            raise ConfigError(f"{where}: shards={shards!r} must be a string, or a list of strings")
        if weight is not None and (
            isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf")
        ):
            raise ConfigError(f"{where}: weight={weight!r} of {shards} must be a positive number")
        sources.append((shards, weight))
    unweighted = [shards for shards, weight in sources if weight is None]
    if 0 < len(unweighted) < len(sources):
        raise ConfigError(f"{where}: {unweighted[0]} has no weight, but others have: give every entry a weight, or none")
    return sources


def format_patterns(spec: Any, where: str) -> str:
    """Return the patterns of data.train or data.val as one argument of a command: with "::" between them."""
    sources = [[shards] if isinstance(shards, str) else shards for shards, _ in parse_sources(spec, where)]
    return "::".join(pattern for patterns in sources for pattern in patterns)


def count_samples_once(paths: list[str], cache: ShardCache, where: str) -> list[int]:
    """Count the samples of each shard on the main process and return the counts on all. Collective.

    Args:
        paths: shards.
        cache: where fetched shards and indices are kept.
        where: the configuration key that names the shards, for error messages.

    Raises:
        UserError: the shards hold no samples, or one is damaged or cannot be read.
    """

    def count() -> list[int]:
        counts = count_samples(paths, cache)
        for path in [path for path, n in zip(paths, counts, strict=True) if n == 0][:_MAX_NAMED]:
            log.warning(one_safe_line(f"{path} holds no samples"))
        if sum(counts) == 0:
            others = f" nor {len(paths) - 1} others" if len(paths) > 1 else ""
            raise UserError(f"{where}: no samples in {paths[0]}{others}")
        return counts

    return on_main(count)
