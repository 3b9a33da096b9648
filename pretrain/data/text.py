"""The text decoder, captions to token ids with any tokenizer of transformers; tokenizer loading.

Ids are padded on the right, whatever the tokenizer's own setting. A text truncated to `length` still ends with the token that
ends texts (EOT, SEP, </s>), because towers pool there. `captions.py` reads the captions of a sample, `train_tokenizer.py`
trains a tokenizer.

Legend: b = samples in a batch, k = captions per sample, T = tokens of the longest text, rounded up.
"""

from __future__ import annotations

import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pretrain.data.captions import (
    caption_id,
    normalize_whitespace,
    read_caption_groups,
    read_captions,
    split_sentences,
)
from pretrain.data.length_groups import LengthGroups
from pretrain.data.text_packing import TextPacking
from pretrain.data.train_tokenizer import train_tokenizer
from pretrain.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pretrain.data.shards.paths import RawSample

__all__ = [
    "TextDecoder",
    "caption_id",
    "explain_unreachable_hub",
    "load_tokenizer",
    "normalize_whitespace",
    "read_captions",
    "train_tokenizer",
]

# The tokenizers library warns, and stops using threads, in processes that are forked after it used threads. Loaders fork, and
# already run one process per core.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_MAX_EXTRA = 2  # tokens that transformers adds to the special ones of a tokenizer whose vocabulary is missing
_MAX_CHARS = 1 << 16  # longer captions are cut before they are tokenized: towers read at most thousands of tokens


def load_tokenizer(name: str | Path | None) -> PreTrainedTokenizerBase:
    """Load a tokenizer from its hub name or folder, set to pad and truncate on the right.

    Raises:
        ConfigError: there is no such tokenizer, or it cannot be loaded; a message of one line.
    """
    if not name:
        raise ConfigError("text.tokenizer is not set: give a hub name, or a folder that `clipfuse tokenizer` wrote")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _load_from_folder(folder)
    if folder.exists() or folder.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1:
        problem = "it is a file, not a folder" if folder.exists() else "there is no such folder"
        raise ConfigError(f"text.tokenizer={name}: {problem}; `clipfuse tokenizer SHARDS DIR` trains one")
    try:
        return _from_pretrained(str(name), local_files_only=True)  # a tokenizer in the local hub cache needs no network
    except Exception as error:
        if problem := explain_unreachable_hub():
            raise ConfigError(
                f"text.tokenizer={name}: not a folder, not in the local hub cache, and {problem}; text.name and text.tokenizer "
                "take local folders, and `clipfuse tokenizer SHARDS DIR` trains a tokenizer"
            ) from error
    try:
        return _from_pretrained(str(name))
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ImportError, TypeError, ...
        raise ConfigError(
            f"text.tokenizer={name}: not a folder, and it cannot be loaded from the hub ({_one_line(error)})"
        ) from error


def _load_from_folder(folder: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder; the ConfigError lists the first files in it."""
    try:
        return _from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        files = sorted(path.name for path in folder.iterdir())
        listing = ", ".join(files[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else "") or "nothing"
        raise ConfigError(
            f"text.tokenizer={folder}: it holds {listing}, but no tokenizer that can be loaded ({_one_line(error)})"
        ) from error


def _from_pretrained(name: str, **options: bool) -> PreTrainedTokenizerBase:
    """Load with AutoTokenizer, quietly. Raises what transformers raises, and ValueError for one without a vocabulary."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # load_tokenizer reports errors itself, in one line
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
    finally:
        logging.set_verbosity(verbosity)
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)) + _MAX_EXTRA:  # transformers reports no missing file
        raise ValueError(f"its vocabulary has {len(tokenizer)} special tokens alone: is tokenizer.json missing?")
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer


def explain_unreachable_hub() -> str:
    """Return why the hub cannot be reached, or "" where it can.

    Without a network transformers itself retries for most of a minute.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    endpoint = urllib.parse.urlsplit(constants.ENDPOINT)
    if endpoint.hostname is None or urllib.request.getproxies():
        return ""
    try:
        socket.create_connection((endpoint.hostname, endpoint.port or 443), timeout=5).close()
    except OSError as error:
        return f"{endpoint.hostname} cannot be reached ({error.strerror or error})"
    return ""


def _one_line(error: Exception) -> str:
    """Return type and message of an error in one line of at most 160 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]


class TextDecoder:
    """Decoder of the captions of a sample, to token ids.

    Its items are text: in training one caption, drawn where there are several; in evaluation the list of all. `collate`
    tokenizes a whole batch (of a list, the first caption), because tokenizers are several times faster that way.

    Args:
        tokenizer: any tokenizer of transformers.
        length: maximum number of tokens per text, special tokens included.
        caption: "txt", the name of a json field, or several sources (see captions.py).
        trim: T is that of the longest text of the batch, for towers whose output does not depend on padding. False: T = length.
            Where `length_groups` is set, T = length as well, so that every batch has the same shapes.
        multiple: T is rounded up to a multiple of this (at most `length`), so that there are few compiled shapes.
        draw: k, captions drawn per sample in training; with more than one, ids and mask are (b, k, T).
        sentences: in training, a caption of several sentences stands for itself and for each of them, of which one is drawn.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        caption: str = "txt",
        trim: bool = True,
        multiple: int = 8,
        draw: int = 1,
        sentences: bool = False,
    ) -> None:
        self.sentences = sentences
        self.tokenizer, self.length, self.caption, self.trim, self.multiple = tokenizer, length, caption, trim, multiple
        self.draw = draw
        self.length_groups: LengthGroups | TextPacking | None = None
        """Divides each batch into groups of fixed shapes, or packs it; None = neither."""
        tokenizer.truncation_side = "right"
        probe = _tokenize(tokenizer, ["a"], 64)[0]
        end_ids = {i for i in (tokenizer.eos_token_id, tokenizer.sep_token_id) if i is not None}
        self.appended_id = tokenizer.eos_token_id if probe[-1:] and probe[-1] not in end_ids else None
        """End token that is appended here, because the tokenizer has one but does not append it (GPT-2, Llama); or None."""
        num_special = len(_tokenize(tokenizer, [""], 64)[0]) + (self.appended_id is not None)
        if length <= num_special:
            raise ConfigError(
                f"text.length={length} leaves no room for text: this tokenizer adds {num_special} special tokens to each"
            )
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.unk_token_id, 0)
        self.pad_id = next(i for i in candidates if i is not None)
        """Id of padding, where the mask is False. The end token where the tokenizer has no padding token, as in CLIP."""

    @property
    def texts_per_sample(self) -> int:
        """The number of texts of a sample in training."""
        return self.draw

    def __call__(self, sample: RawSample, rng: np.random.Generator, train: bool) -> str | tuple[str, ...] | list[str]:
        """Return the captions of a sample: one in training, a list of all in evaluation.

        With `draw` > 1, training returns a tuple of `draw` different captions, repeated where there are fewer.

        Raises:
            BadSample: the sample has no usable caption.
        """
        groups = [list(captions.values()) for captions in read_caption_groups(sample.members, self.caption)]
        texts = [text for group in groups for text in group]
        if not train:
            return texts
        drawn = self.draw_sentences([texts[i] for i in self.draw_from_sources([*map(len, groups)], rng)], rng)
        return tuple(drawn) if self.draw > 1 else drawn[0]

    def blank(self, train: bool) -> str | tuple[str, ...] | list[str]:
        """Return the item of a sample without a caption: an empty text, or as many as are drawn."""
        if not train:
            return [""]
        return ("",) * self.draw if self.draw > 1 else ""

    def draw_captions(self, count: int, rng: np.random.Generator) -> list[int]:
        """Return which of `count` captions training reads: `draw` different ones, repeated where there are fewer."""
        if self.draw > 1:
            order = rng.permutation(count)
            return [int(order[i % count]) for i in range(self.draw)]
        return [int(rng.integers(count)) if count > 1 else 0]

    def draw_from_sources(self, counts: Sequence[int], rng: np.random.Generator) -> list[int]:
        """Return which captions training reads of a sample with so many of each source, numbered through.

        Sources take turns: with two of them and `draw` = 2, the first caption is of the first source and the second of the
        second. Where `draw` is no multiple of their number, their order is drawn anew for each sample, so that each has the
        same share. A source that the sample lacks takes no turn.
        """
        if len(counts) == 1:
            return self.draw_captions(counts[0], rng)
        starts = np.cumsum([0, *counts])
        sources = [i for i, count in enumerate(counts) if count]
        if self.draw % len(sources):
            sources = [sources[i] for i in rng.permutation(len(sources))]
        orders = {i: rng.permutation(counts[i]) for i in sources}
        turns = [(sources[k % len(sources)], k // len(sources)) for k in range(self.draw)]
        return [int(starts[i] + orders[i][turn % counts[i]]) for i, turn in turns]

    def draw_sentences(self, captions: list[str], rng: np.random.Generator) -> list[str]:
        """With `sentences`, replace each caption by itself or one of its sentences; equal captions by different ones."""
        if not self.sentences:
            return captions
        remaining: dict[str, list[str]] = {}
        drawn = []
        for caption in captions:
            if not remaining.get(caption):
                parts = split_sentences(caption)
                choices = [caption, *parts] if len(parts) > 1 else [caption]
                remaining[caption] = [choices[i] for i in rng.permutation(len(choices))] if len(choices) > 1 else choices
            drawn.append(remaining[caption].pop())
        return drawn

    def collate(self, texts: list[str] | list[tuple[str, ...]] | list[list[str]]) -> tuple[Tensor, Tensor]:
        """Tokenize a batch to ids (b, T) int64 and mask (b, T) bool.

        Tuples of k captions give (b, k, T); of a list of captions the first is used.
        """
        if texts and isinstance(texts[0], tuple):
            ids, mask = self.encode([text for item in texts for text in item])
            return ids.unflatten(0, (len(texts), -1)), mask.unflatten(0, (len(texts), -1))
        return self.encode([text if isinstance(text, str) else text[0] for text in texts])

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Tokenize b texts to ids (b, T) int64, padded on the right, and mask (b, T) bool.

        The mask is True where there is a token.
        """
        max_length = self.length - (self.appended_id is not None)
        rows = (
            _tokenize(self.tokenizer, [normalize_whitespace(text[:_MAX_CHARS]) for text in texts], max_length) if texts else []
        )
        if self.appended_id is not None:
            rows = [[*row, self.appended_id] for row in rows]
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        longest = max(1, int(lengths.max(initial=0)))
        is_trimmed = self.trim and self.length_groups is None
        width = min(self.length, -(-longest // self.multiple) * self.multiple) if is_trimmed else self.length
        mask = np.arange(width) < lengths[:, None]
        ids = np.full((len(rows), width), self.pad_id, dtype=np.int64)
        ids[mask] = np.fromiter((i for row in rows for i in row), dtype=np.int64, count=int(lengths.sum()))
        return torch.from_numpy(ids), torch.from_numpy(mask)

    def merge(self, parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Merge (ids, mask) of partial batches as one `collate` over all samples would; (b, T) or (b, k, T)."""
        width = max(ids.shape[-1] for ids, _ in parts)
        pad = torch.nn.functional.pad
        ids = torch.cat([pad(ids, (0, width - ids.shape[-1]), value=self.pad_id) for ids, _ in parts])
        return ids, torch.cat([pad(mask, (0, width - mask.shape[-1]), value=False) for _, mask in parts])


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int) -> list[list[int]]:
    """Tokenize without padding: padding them here needs no padding token and is faster."""
    rows: list[list[int]] = tokenizer(
        texts, truncation=True, max_length=length, padding=False, return_attention_mask=False, return_token_type_ids=False
    )["input_ids"]
    return rows
