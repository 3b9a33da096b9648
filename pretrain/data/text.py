"""Captions: sample -> text -> token ids, with any tokenizer of transformers. `captions.py` finds the text,
`tokenizer.py` trains a tokenizer.

Ids are padded on the right whatever the tokenizer would do, and a text cut at `length` still ends with the token that ends
texts (EOT, SEP, </s>): that is where towers pool. b = texts in a batch, T = tokens of the longest, rounded up.
"""

from __future__ import annotations

import os
import socket
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pretrain.data.captions import caption_id, normalize_whitespace, read_captions
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

# The tokenizers library warns, and stops using threads, in processes forked after it used some: loaders fork, and have a
# process a core already.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_MAX_CHARS = 1 << 16  # a caption longer than this is cut before it is tokenized; towers read at most thousands of tokens


def load_tokenizer(name: str | Path | None) -> PreTrainedTokenizerBase:
    """A tokenizer by its hub name or its folder, set to pad and cut on the right. Raises ConfigError with one line."""
    if not name:
        raise ConfigError("text.tokenizer is not set: give a hub name, or a folder that `clipfuse tokenizer` made")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _load_from_folder(folder)
    if folder.exists() or folder.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1:
        what = "it is a file, not a folder" if folder.exists() else "there is no such folder"
        raise ConfigError(f"text.tokenizer={name}: {what}; `clipfuse tokenizer SHARDS DIR` makes one")
    try:
        return _from_pretrained(str(name), local_files_only=True)  # what was fetched before needs no network
    except Exception as error:
        if problem := explain_unreachable_hub():
            raise ConfigError(f"text.tokenizer={name}: no folder here, not fetched before, and {problem}") from error
    try:
        return _from_pretrained(str(name))
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ImportError, TypeError, ...
        raise ConfigError(f"text.tokenizer={name}: no folder here, and the hub has none ({_one_line(error)})") from error


def _load_from_folder(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return _from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        files = sorted(path.name for path in folder.iterdir())
        has = ", ".join(files[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else "") or "nothing"
        raise ConfigError(
            f"text.tokenizer={folder}: it holds {has}, no tokenizer that can be loaded ({_one_line(error)})"
        ) from error


def _from_pretrained(name: str, **options: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # what goes wrong is said in our one line
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
    finally:
        logging.set_verbosity(before)
    found.padding_side = found.truncation_side = "right"
    return found


def explain_unreachable_hub() -> str:
    """Why the hub cannot be asked, "" if it can: without network transformers itself tries for most of a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    where = urllib.parse.urlsplit(constants.ENDPOINT)
    if where.hostname is None or urllib.request.getproxies():
        return ""
    try:
        socket.create_connection((where.hostname, where.port or 443), timeout=5).close()
    except OSError as error:
        return f"{where.hostname} cannot be reached ({error.strerror or error})"
    return ""


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]


class TextDecoder:
    """The caption of a sample -> token ids.

    Calling it gives text: in training one caption, drawn where there are several; in evaluation the list of all. `collate`
    turns either into ids (of a list, its first), a batch at a time, because tokenizers are several times faster that way.

    Args:
        tokenizer: any of transformers' tokenizers.
        length: most tokens a text, special ones included.
        caption: "txt", or a json field.
        trim: T follows the longest text of the batch, for towers whose result does not depend on padding; else T = length.
        multiple: T is rounded up to a multiple of it (or to `length`), so that compiled shapes stay few.
        draw: k, captions taken of each sample in training; with more than one, what is collated is (b, k, T).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        caption: str = "txt",
        trim: bool = True,
        multiple: int = 8,
        draw: int = 1,
    ) -> None:
        self.tokenizer, self.length, self.caption, self.trim, self.multiple = tokenizer, length, caption, trim, multiple
        self.draw = draw
        tokenizer.truncation_side = "right"
        probe = _tokenize(tokenizer, ["a"], 64)[0]
        ends = {i for i in (tokenizer.eos_token_id, tokenizer.sep_token_id) if i is not None}
        self.appended_id = tokenizer.eos_token_id if probe[-1:] and probe[-1] not in ends else None
        """An end token that we add, because the tokenizer has one but does not write it (GPT-2, Llama)."""
        special = len(_tokenize(tokenizer, [""], 64)[0]) + (self.appended_id is not None)
        if length <= special:
            raise ConfigError(f"text.length={length} leaves no room for text: this tokenizer adds {special} tokens to each")
        choices = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.unk_token_id, 0)
        self.pad_id = next(i for i in choices if i is not None)
        """Fills up ids where the mask is False. The end token where the tokenizer has no padding: CLIP does so too."""

    def __call__(self, sample: RawSample, rng: np.random.Generator, train: bool) -> str | tuple[str, ...] | list[str]:
        """One caption in training, or a tuple of `draw` different ones, repeated where there are fewer; a list of all of them
        in evaluation. Raises BadSample."""
        found = read_captions(sample.members, self.caption)
        if not train:
            return found
        if self.draw > 1:
            order = rng.permutation(len(found))
            return tuple(found[int(order[i % len(found)])] for i in range(self.draw))
        return found[int(rng.integers(len(found)))] if len(found) > 1 else found[0]

    def collate(self, texts: list[str] | list[tuple[str, ...]] | list[list[str]]) -> tuple[Tensor, Tensor]:
        """(b, T) int64 ids, (b, T) bool mask; (b, k, T) of tuples of k captions; of a list of captions the first."""
        if texts and isinstance(texts[0], tuple):
            ids, mask = self.encode([text for item in texts for text in item])
            return ids.unflatten(0, (len(texts), -1)), mask.unflatten(0, (len(texts), -1))
        return self.encode([text if isinstance(text, str) else text[0] for text in texts])

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """(b, T) int64 ids, padded on the right; (b, T) bool mask, True where there is a token."""
        room = self.length - (self.appended_id is not None)
        rows = _tokenize(self.tokenizer, [normalize_whitespace(text[:_MAX_CHARS]) for text in texts], room) if texts else []
        if self.appended_id is not None:
            rows = [[*row, self.appended_id] for row in rows]
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        longest = max(1, int(lengths.max(initial=0)))
        width = min(self.length, -(-longest // self.multiple) * self.multiple) if self.trim else self.length
        mask = np.arange(width) < lengths[:, None]
        ids = np.full((len(rows), width), self.pad_id, dtype=np.int64)
        ids[mask] = np.fromiter((i for row in rows for i in row), dtype=np.int64, count=int(lengths.sum()))
        return torch.from_numpy(ids), torch.from_numpy(mask)

    def merge(self, parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Pieces of a batch that were collated apart, (b, T) or (b, k, T), -> the batch as collated in one go."""
        width = max(ids.shape[-1] for ids, _ in parts)
        pad = torch.nn.functional.pad
        ids = torch.cat([pad(ids, (0, width - ids.shape[-1]), value=self.pad_id) for ids, _ in parts])
        return ids, torch.cat([pad(mask, (0, width - mask.shape[-1]), value=False) for _, mask in parts])


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int) -> list[list[int]]:
    """Without padding: done by us it needs no pad token and costs less."""
    rows: list[list[int]] = tokenizer(
        texts, truncation=True, max_length=length, padding=False, return_attention_mask=False, return_token_type_ids=False
    )["input_ids"]
    return rows
