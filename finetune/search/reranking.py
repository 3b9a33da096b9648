"""Re-ranking: a fine-tuned retrieval run scores images or sounds with a text, from token features beside the index.

    index_tokens(tuned, source, index, "", pool=1, batch_size=64, device=device)     at indexing
    Reranker(tuned, index, device).fetch(images) -> tokens; .score(tokens, "a red car")

Images without stored features of the same model are read and encoded again. What is said of images holds for sounds, whose
index needs a run that was trained with fusion.context=audio.

Shapes: c = candidates, b = images of a batch, N = tokens of an image, C = width of a token.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from finetune.loading import Finetuned
from finetune.search.item_sources import ItemSource, Location, read_content
from finetune.search.modalities import find_content
from finetune.search.token_store import ItemTokens, Layout, TokenStore, is_store, pool_tokens
from finetune.search.vector_index import IndexedItem, VectorIndex, is_key
from finetune.tasks.retrieval import Retrieval
from pretrain.data import BadSample
from pretrain.embedding.encoder import eval_mode
from pretrain.errors import ConfigError, UserError
from pretrain.model import tower_configs
from pretrain.printable import format_count, get_noun
from pretrain.runtime.console import log_info
from pretrain.towers import TokenSequence

_PAIRS = 32
"""Images that are encoded, and pairs of text and image that are scored, in one forward pass."""
_INCIDENTAL = {"pretrained", "weights", "trainable_blocks", "checkpointing", "patch_dropout", "tokenizer", "static_groups"}
"""Entries of a tower's configuration that change no feature of a trained model."""


def fingerprint_features(tuned: Finetuned) -> str:
    """Return a hash of all that token features of images depend on: tower, projection, preprocessing.

    A fusion that is trained further on the same tower keeps it.
    """
    model, sha256, subject = tuned.model, hashlib.sha256(), tuned.model.subject
    modules: dict[str, nn.Module] = {"tower": model.encoder.tower(subject), "projection": model.encoder.projection(subject)}
    if subject in model.forks:
        modules["copy"] = model.forks[subject]
    for part, module in modules.items():
        tensors = {**dict(module.named_buffers()), **module.state_dict()}
        for name, tensor in sorted(tensors.items(), key=lambda item: item[0]):
            sha256.update(f"{part}.{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            sha256.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    section = cast(Any, tower_configs(tuned.config)[subject])
    config = {k: v for k, v in asdict(section).items() if k not in _INCIDENTAL}
    if config.get("stride") is None:
        config.pop("stride", None)  # features of models that had no such setting stay valid
    sha256.update(json.dumps([config, model.token_sources[subject]], sort_keys=True, default=str).encode())
    return sha256.hexdigest()[:32]


def check_task(tuned: Finetuned, index: VectorIndex) -> None:
    """Raise UserError for a run of another task, or one that reads what the index does not hold."""
    if str(tuned.config.task.name) != "retrieval":
        raise UserError(f"--rerank {tuned.folder} is a run of {tuned.config.task.name}; re-ranking needs one of retrieval")
    check_subject("--rerank", tuned, index)


def check_subject(option: str, tuned: Finetuned, index: VectorIndex) -> None:
    """Raise UserError where a fine-tuned run reads what the index does not hold; option: what named the run."""
    subject, description = tuned.model.subject, index.describe()
    if subject != description.modality:
        raise UserError(
            f"{option} {tuned.folder} reads {get_noun(subject)}s, and {index.place} is an index of "
            f"{description.noun}s: fine-tune with fusion.context={description.modality}"
        )


@torch.no_grad()
def encode_items(tuned: Finetuned, pixels: Sequence[Tensor], device: torch.device) -> ItemTokens:
    """Encode b images (3, H, W) uint8, or sounds (S,) int16, to their tokens and embeddings."""
    tokens, embedding = tuned.model.tokens_and_embedding(tuned.model.subject, torch.stack(list(pixels)).to(device))
    return ItemTokens(tokens, cast(Tensor, embedding))


def describe_layout(items: ItemTokens, fingerprint: str, run: str, step: int, pool: int) -> Layout:
    """Return the layout of a store of such features."""
    N, C = items.tokens.states.shape[1:]
    return Layout(fingerprint, run, step, pool, N, C, items.embedding.shape[1], items.tokens.grid)


def to_device(tokens: TokenSequence, device: torch.device) -> TokenSequence:
    """Return tokens on a device."""
    return tokens._replace(states=tokens.states.to(device), mask=tokens.mask.to(device), pooled=tokens.pooled.to(device))


def join(parts: Sequence[ItemTokens]) -> ItemTokens:
    """Concatenate the tokens of images that have equally many."""
    states, masks = (torch.cat([getattr(part.tokens, name) for part in parts]) for name in ("states", "mask"))
    tokens = TokenSequence(states, masks, parts[0].tokens.grid, states[:, 0])
    return ItemTokens(tokens, torch.cat([part.embedding for part in parts]))


def select(items: ItemTokens, rows: Any) -> ItemTokens:
    """Return the tokens of some images."""
    tokens = items.tokens
    chosen = TokenSequence(tokens.states[rows], tokens.mask[rows], tokens.grid, tokens.states[rows][:, 0])
    return ItemTokens(chosen, items.embedding[rows])


# ---------------------------------------------------------------------------------------------------------------------
# At indexing


@dataclass
class TokenSummary:
    """What was done about token features."""

    run: str
    added: int
    images: int
    """Images that have features now."""
    size: str
    noun: str = "image"

    def __str__(self) -> str:
        return f"token features of {self.run}: {format_count(self.images, self.noun)}, {self.added:,} added; {self.size}"


def check_store(tuned: Finetuned, index: VectorIndex, pool: int) -> None:
    """Raise UserError where features of this run cannot be kept beside an index; before anything is encoded."""
    check_task(tuned, index)
    if index.token_folder is None:
        raise ConfigError(f"--rerank: token features are kept in a folder beside the index, and {index.place} is a server")
    if is_store(index.token_folder):
        with TokenStore(index.token_folder) as store:
            store.check(fingerprint_features(tuned), str(tuned.folder), pool)


def index_tokens(
    tuned: Finetuned,
    source: ItemSource,
    index: VectorIndex,
    name: str,
    pool: int,
    batch_size: int,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TokenSummary:
    """Keep the token features of the images that an index has and whose features are not kept yet.

    Args:
        tuned: the re-ranker, which is moved to the device.
        source: the images.
        index: open for writing, so that no other process changes it.
        name: what precedes the keys; empty = nothing.
        pool: side of the squares of cells that are averaged; 1 = none.
        batch_size: images encoded at a time.
        device: where the tower runs.
        progress: called with images done and images in all.

    Raises:
        UserError: features of another run are there, or the folder cannot be written.
    """
    check_store(tuned, index, pool)
    assert index.token_folder is not None
    fingerprint, run, added, noun = fingerprint_features(tuned), str(tuned.folder), 0, index.describe().noun
    threads = max(2, min(16, len(os.sched_getaffinity(0))))
    tuned.model.to(device)
    store = TokenStore(index.token_folder) if is_store(index.token_folder) else None

    def read(missing: Missing) -> list[tuple[str, Location, Tensor]]:
        """Read one after the other, which shards need, and decode in parallel; without what cannot be used."""
        futures = []
        for i, key, location in missing:
            with suppress(BadSample):  # counted when the image was indexed
                futures.append((key, location, decoding.submit(_decode, tuned, source.read(i))))
        decoded = [(key, location, future.result()) for key, location, future in futures]
        return [(key, location, pixels) for key, location, pixels in decoded if pixels is not None]

    try:
        with eval_mode(tuned.model), ThreadPoolExecutor(1) as reading, ThreadPoolExecutor(threads) as decoding:
            ends = [*range(batch_size, len(source), batch_size), len(source)]
            waiting: Future[list[tuple[str, Location, Tensor]]] | None = None
            for begin, end in zip([0, *ends], [*ends, None], strict=True):  # one batch is read while another is encoded
                batch = waiting.result() if waiting is not None else []
                if end is not None:
                    waiting = reading.submit(read, _find_missing(source, range(begin, end), name, index, store))
                if batch:
                    items = encode_items(tuned, [pixels for _, _, pixels in batch], device)
                    items = ItemTokens(pool_tokens(items.tokens, pool), items.embedding)
                    if store is None:
                        layout = describe_layout(items, fingerprint, run, tuned.step, pool)
                        store = TokenStore.create(index.token_folder, layout)
                    store.put([key for key, _, _ in batch], [location for _, location, _ in batch], items)
                added += len(batch)
                progress(begin, len(source))
        if store is None:
            return TokenSummary(run, 0, 0, "nothing to keep", noun)
        return TokenSummary(run, added, store.count(), store.describe_size(), noun)
    finally:
        if store is not None:
            store.close()


Missing = list[tuple[int, str, Location]]
"""Number in the source, key and location of images without features."""


def _find_missing(source: ItemSource, numbers: range, name: str, index: VectorIndex, store: TokenStore | None) -> Missing:
    """Return the images of a batch that the index has from this location, and the store has not."""
    located = []
    for i in numbers:
        key, location = source.locate(i)
        located.append((i, f"{name}/{key}" if name else key, location))
    located = [(i, key, location) for i, key, location in located if is_key(key)]
    keys, locations = [key for _, key, _ in located], [location for _, _, location in located]
    if store is not None:
        located = [item for item, row in zip(located, store.find(keys, locations), strict=True) if row is None]
    present = index.get([key for _, key, _ in located])
    return [
        (i, key, location)
        for (i, key, location), item in zip(located, present, strict=True)
        if item is not None and locate(item) == location
    ]


def _decode(tuned: Finetuned, members: dict[str, bytes]) -> Tensor | None:
    subject = tuned.model.subject
    try:
        return cast(Tensor, tuned.decoders[subject].decode_eval(find_content(members, subject) or b""))
    except BadSample:
        return None


# ---------------------------------------------------------------------------------------------------------------------
# At search


class Reranker:
    """A retrieval run, and the token features that are kept beside an index, if they are of this run."""

    def __init__(self, tuned: Finetuned, index: VectorIndex, device: torch.device) -> None:
        """Raises UserError for a run of another task or modality, or features that are damaged."""
        check_task(tuned, index)
        self.tuned, self.device, self.store = tuned, device, self._open_store(tuned, index)
        self.task = cast(Retrieval, tuned.task)
        tuned.model.to(device).eval()

    @staticmethod
    def _open_store(tuned: Finetuned, index: VectorIndex) -> TokenStore | None:
        folder = index.token_folder
        if folder is None or not is_store(folder):
            log_info(
                f"{index.place} has no token features beside it: {index.describe().noun}s are encoded again to re-rank them"
            )
            return None
        store = TokenStore(folder)
        if store.layout.fingerprint == fingerprint_features(tuned):
            return store
        noun = index.describe().noun
        log_info(f"{folder} holds token features of {store.layout}, not of {tuned.folder}: {noun}s are encoded again")
        store.close()
        return None

    def close(self) -> None:
        """Release the files."""
        if self.store is not None:
            self.store.close()

    def fetch(self, items: Sequence[IndexedItem], notes: list[str]) -> tuple[list[int], ItemTokens | None]:
        """Return the positions of the images that can be scored, and their tokens. Raises UserError.

        Args:
            items: what the index found.
            notes: is extended by what the user should know.
        """
        rows: list[int | None] = [None] * len(items)
        if self.store is not None:
            rows = self.store.find([item.key for item in items], [locate(item) for item in items])
        stored, others = ([i for i, row in enumerate(rows) if (row is None) == is_missing] for is_missing in (False, True))
        parts, positions = [], list(stored)
        if self.store is not None and stored:
            part = self.store.read([row for row in rows if row is not None])
            parts.append(ItemTokens(to_device(part.tokens, self.device), part.embedding.to(self.device)))
        if others:
            with ThreadPoolExecutor(8) as threads:
                pixels = list(threads.map(self._read, [items[i] for i in others]))
            usable = [(i, item) for i, item in zip(others, pixels, strict=True) if item is not None]
            if self.store is not None:
                notes.append(
                    f"{len(others)} of {len(items)} candidates have no token features in {self.store.folder.name}, and were "
                    "encoded again"
                )
            if len(usable) < len(others):
                notes.append(f"{len(others) - len(usable)} of {len(items)} candidates could not be read, and are not re-ranked")
            pool = self.store.layout.pool if self.store is not None else 1
            for begin in range(0, len(usable), _PAIRS):
                part = encode_items(self.tuned, [item for _, item in usable[begin : begin + _PAIRS]], self.device)
                parts.append(ItemTokens(pool_tokens(part.tokens, pool), part.embedding))
            positions += [i for i, _ in usable]
        return positions, join(parts) if parts else None

    def _read(self, item: IndexedItem) -> Tensor | None:
        """Return an image, decoded; None where that cannot be done."""
        try:
            return cast(Tensor, self.tuned.decoders[self.tuned.model.subject].decode_eval(read_content(locate(item))))
        except (UserError, BadSample) as error:
            log_info(f"{item.key} is not re-ranked: {error}")
            return None

    @torch.no_grad()
    def score(self, items: ItemTokens, text: str) -> Tensor:
        """Return (c,) float64, the scores of images with a text: what the run's evaluation orders by."""
        model = self.tuned.model
        ids, mask = self.tuned.decoders["text"].encode([text])
        tokens, embedding = model.tokens_and_embedding("text", ids.to(self.device), mask.to(self.device))
        scores = []
        for begin in range(0, len(items.embedding), _PAIRS):
            part = select(items, slice(begin, begin + _PAIRS))
            b = len(part.embedding)
            repeated = tokens._replace(
                states=tokens.states.expand(b, -1, -1), mask=tokens.mask.expand(b, -1), pooled=tokens.pooled.expand(b, -1)
            )
            scores.append(self.task.score_pairs(model, (repeated, embedding), part).cpu())
        return torch.cat(scores)


def locate(item: IndexedItem) -> Location:
    """Return where the bytes of an image of an index are."""
    return Location(item.source, item.offset, item.size)
