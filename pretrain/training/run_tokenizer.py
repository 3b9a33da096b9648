"""The tokenizer of a run that names none: it is trained on the captions of the training data.

The result is a function of the shards alone, so that equal runs have equal tokenizers. It is saved in the run folder. A run
that resumes takes the tokenizer of its checkpoint.
"""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from pretrain.checkpoints import loading
from pretrain.data.config import format_patterns, resolve_sources
from pretrain.data.shards.paths import count_samples
from pretrain.data.shards.urls import is_remote
from pretrain.data.train_tokenizer import iterate_captions, train_tokenizer_on
from pretrain.errors import ConfigError
from pretrain.printable import format_count
from pretrain.runtime import distributed
from pretrain.runtime.agree import on_main
from pretrain.runtime.console import log_info

MAX_SAMPLES = 1_000_000
"""Largest training data for which a tokenizer is trained when a run starts: about a minute of reading and training."""
MAX_CAPTIONS = 10_000_000
"""Captions that are read, from the start, where samples have several."""
MIN_VOCABULARY, MAX_VOCABULARY = 512, 32_768
LARGE_VOCABULARY = 49_408
"""That of CLIP, for the command that is suggested where the data is large."""


def needs_tokenizer(config: Any) -> bool:
    """Return whether a run has texts, but neither the configuration nor `init` names a tokenizer."""
    text = config.text
    if text is None or getattr(text, "tokenizer", None) or getattr(text, "name", None):
        return False
    return config.init is None or (isinstance(config.init, dict) and "text" not in config.init)


def choose_vocabulary(samples: int) -> int:
    """Return the size of the vocabulary for this many samples: the power of two that is not above their number.

    So there are about ten times as many tokens in the captions as rows in the table of embeddings. 512 to 32,768.
    """
    return min(MAX_VOCABULARY, max(MIN_VOCABULARY, 1 << max(samples, 1).bit_length() - 1))


def set_tokenizer(config: Any, folder: Path, checkpoint: Path | None) -> None:
    """Set text.tokenizer of a run that names none, to the folder `tokenizer` of its run folder. Collective.

    Args:
        config: the run's configuration; its `text` section is changed.
        folder: the run folder.
        checkpoint: the checkpoint that the run resumes from, whose tokenizer is taken; None = train one.

    Raises:
        ConfigError: the data is too large, or remote; the message has the command that trains a tokenizer.
        UserError: there are no captions, or a shard is damaged.
    """
    if not needs_tokenizer(config):
        return
    path = folder / loading.TOKENIZER
    files = on_main(lambda: _write_tokenizer(config, path, checkpoint))
    if not path.is_dir() and distributed.local_rank() == 0:  # a node that does not share the run folder
        path.mkdir(parents=True)
        for name, content in files.items():
            (path / name).write_bytes(content)
    distributed.barrier()
    config.text.tokenizer = str(path)


@contextmanager
def temporary_tokenizer(config: Any, folder: Path, checkpoint: Path | None) -> Iterator[None]:
    """Set text.tokenizer inside the block as `set_tokenizer` would, and write nothing into the run folder."""
    if not needs_tokenizer(config):
        yield
        return
    text = config.text
    with tempfile.TemporaryDirectory() as temporary:
        saved = checkpoint / loading.TOKENIZER if checkpoint is not None else None
        if saved is not None and saved.is_dir():
            text.tokenizer = str(saved)
        else:
            described = _train(config, Path(temporary))
            log_info(f"text.tokenizer is not set: the run trains {described}, in {folder / loading.TOKENIZER}")
            text.tokenizer = temporary
        try:
            yield
        finally:
            text.tokenizer = ""


def _write_tokenizer(config: Any, path: Path, checkpoint: Path | None) -> dict[str, bytes]:
    """Write the tokenizer to `path` and return the content of its files."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        saved = checkpoint / loading.TOKENIZER if checkpoint is not None else None
        if saved is not None and saved.is_dir():
            shutil.copytree(saved, partial)
        else:
            partial.mkdir(parents=True)
            log_info(f"text.tokenizer is not set: trained {_train(config, partial)}, in {path}")
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}


def _train(config: Any, out: Path) -> str:
    """Train a tokenizer on the captions of data.train, save it to `out`, and describe it."""
    samples = _count_samples(config)
    shards = [path for source in resolve_sources(config.data.train, "data.train") for path in source.shards]
    captions = islice(iterate_captions(shards, _caption_source(config), config.data.build_cache()), MAX_CAPTIONS)
    tokenizer = train_tokenizer_on(
        captions, out, choose_vocabulary(samples), config.text.length, source=f"data.train={config.data.train}"
    )
    return f"one of {len(tokenizer):,} tokens on the captions of {format_count(samples, 'sample')}"


def _count_samples(config: Any) -> int:
    """Return the number of training samples. Raises ConfigError where a tokenizer is not trained on them by itself."""
    if config.data.train == "synthetic":
        raise ConfigError(
            "text.tokenizer is not set, and data.train=synthetic has no captions to train one on: give a hub name or a folder"
        )
    shards = [path for source in resolve_sources(config.data.train, "data.train") for path in source.shards]
    remote = next(filter(is_remote, shards), None)
    if remote is not None:
        raise ConfigError(f"text.tokenizer is not set, and {remote} is not on this machine: {_suggest_command(config)}")
    samples, step = 0, 256
    for i in range(0, len(shards), step):
        samples += sum(count_samples(shards[i : i + step], config.data.build_cache()))
        if samples > MAX_SAMPLES:
            raise ConfigError(
                f"text.tokenizer is not set, and data.train holds more than {MAX_SAMPLES:,} samples: {_suggest_command(config)}"
            )
    return samples


def _suggest_command(config: Any) -> str:
    """Return what to do instead, with the command that trains a tokenizer on this data."""
    source = _caption_source(config)
    caption = [] if source == "txt" else ["--caption", source]
    words = [
        "clipfuse",
        "tokenizer",
        format_patterns(config.data.train, "data.train"),
        "tokenizer",
        "--vocab",
        str(LARGE_VOCABULARY),
        *caption,
    ]
    return f"train one with `{shlex.join(words)}` and set text.tokenizer=tokenizer, or name a published one"


def _caption_source(config: Any) -> str:
    """Return where captions are read; a fine-tuned model may read questions as well."""
    return f"{config.data.caption},questions" if hasattr(config, "task") else str(config.data.caption)
