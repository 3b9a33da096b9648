"""Search that looks twice: the first k of the contrastive ranking, ordered again by a matching score.

    search(model, shards, setup, match, k, score) -> recall before and after, the ceiling, milliseconds a query

Each picture and each caption passes its tower once; their tokens wait on the host, words without their padding, and only
the fusion runs for every pair. Beyond k nothing changes: recall at K >= k is that of the contrastive ranking, and what is
not among the first k no order of them finds: that recall is the ceiling. Ties count by expectation, as in
pretrain/evaluation/retrieval.py. Every process holds the whole gallery and answers its share of the queries.

Shapes: n = pictures, m = captions, q = queries, k = candidates, N = tokens, T = tokens of a text, L = words of all captions,
C = width of a token, D = width of the shared space.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.model import FusionModel
from finetune.tasks import EvalSetup
from pretrain.data.loader import Batch
from pretrain.errors import UserError
from pretrain.evaluation.retrieval import TIE, hit_probability, retrieval_metrics
from pretrain.runtime import distributed
from pretrain.runtime.agree import gather_or_raise, on_all, on_main
from pretrain.towers import TokenSequence

KS = (1, 5, 10)
PAIRS = 512
"""Pairs of text and picture that are fused at once."""

Match = Callable[[FusionModel, TokenSequence, TokenSequence], Tensor]
"""(model, texts (r p, T, C), r about each of p pictures (p, N, C)) -> (r p,) matching logits."""
Scores = tuple[Tensor, Tensor, float]
"""(q, k) scores, (q, k) bool which candidates are right, seconds that scoring took."""

# ---------------------------------------------------------------------------------------------------------------------
# Figures of given scores


def find_candidates(queries: Tensor, gallery: Tensor, k: int, tile: int = 512) -> tuple[Tensor, Tensor]:
    """(q, D), (n, D) L2-normalised -> the k most similar rows of the gallery (q, k) int64, and their similarity (q, k).

    k is cut to n. Which of equals is taken does not depend on where they stand: the gallery is shuffled first.
    """
    k = min(k, len(gallery))
    order = torch.randperm(len(gallery), generator=torch.Generator().manual_seed(0)).to(gallery.device)
    shuffled = gallery[order].double()
    rows, values = [order.new_zeros(0, k)], [shuffled.new_zeros(0, k)]
    for part in queries.split(tile):
        value, place = (part.double() @ shuffled.T).topk(k, dim=1)
        rows.append(order[place])
        values.append(value)
    return torch.cat(rows), torch.cat(values)


def expected_recall(right: Tensor, scores: Tensor, k: int) -> Tensor:
    """(q, k') bool, which candidates are right, and their scores -> (q,) the chance that one of them is among the first k."""
    scores = scores.double()
    best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    level = (scores - best).abs() <= TIE * (1 + best.abs())
    better = ((scores > best) & ~level).sum(dim=1).double()
    own, wrong = (level & right).sum(dim=1).double(), (level & ~right).sum(dim=1).double()
    return torch.where(right.any(dim=1), hit_probability(better, own, wrong, k), 0.0)


def reranking_metrics(name: str, right: Tensor, scores: Tensor, before: dict[str, float], ks: Sequence[int] = KS) -> dict[str, float]:
    """Recall of one direction (`image_to_text`) after re-ranking, and its ceiling.

    Args:
        right: (q, k) bool, which candidates are right answers.
        scores: (q, k) of the candidates.
        before: the figures of the contrastive ranking, `{name}_R@{K}`; they hold for K from k on.
    """
    out = {
        f"reranked_{name}_R@{at}": float(expected_recall(right, scores, at).mean()) if at < right.shape[1] else before[f"{name}_R@{at}"]
        for at in ks
    }
    return {**out, f"{name}_ceiling": float(right.any(dim=1).double().mean())}


# ---------------------------------------------------------------------------------------------------------------------
# What is kept of a split


@dataclass
class Gallery:
    """A split after the towers, on the host."""

    image: Tensor
    """(n, D) L2-normalised."""
    text: Tensor
    """(m, D) L2-normalised."""
    image_index: Tensor
    """(m,) int64: the picture of each caption."""
    pictures: Tensor
    """(n, N, C), the tokens."""
    seen: Tensor
    """(n, N) bool, which of them are real."""
    grid: tuple[int, int] | None
    words: Tensor
    """(L, C), the tokens of all captions one after the other."""
    lengths: Tensor
    """(m,) int64."""

    def image_tokens(self, rows: Tensor, device: torch.device) -> TokenSequence:
        """(p,) -> (p, N, C) on the device."""
        states = self.pictures[rows].to(device, non_blocking=True)
        return TokenSequence(states, self.seen[rows].to(device), self.grid, states[:, 0])

    def text_tokens(self, rows: Tensor, device: torch.device) -> TokenSequence:
        """(p,) -> (p, T, C) on the device; T is the longest of these."""
        lengths = self.lengths[rows]
        place = torch.arange(max(1, int(lengths.max())))
        mask = place < lengths[:, None]
        start = (self.lengths.cumsum(0) - self.lengths)[rows]
        states = self.words[(start[:, None] + place).clamp(max=len(self.words) - 1)].to(device, non_blocking=True)
        return TokenSequence(states, mask.to(device), None, states[:, 0])


def _encoded(model: FusionModel, batches: Iterable[Batch], setup: EvalSetup) -> Gallery | None:
    """This process's share; None where it has no sample."""
    image, pictures, seen, text, words, lengths, image_index, count = [], [], [], [], [], [], [], 0
    grid = None
    for batch in batches:
        tokens, rows = model.tokens_and_embedding("image", batch.inputs["image"].to(setup.device, non_blocking=True))
        assert rows is not None
        grid = tokens.grid
        image.append(rows.float().cpu())
        pictures.append(tokens.states.cpu())
        seen.append(tokens.mask.cpu())
        captions = batch.targets["captions"]
        image_index += [count + i for i, own in enumerate(captions) for _ in own]
        count += len(captions)
        every = [caption for own in captions for caption in own]
        for start in range(0, len(every), 256):
            ids, mask = setup.decoders["text"].encode(every[start : start + 256])
            tokens, rows = model.tokens_and_embedding("text", ids.to(setup.device), mask.to(setup.device))
            assert rows is not None
            text.append(rows.float().cpu())
            words.append(tokens.states[tokens.mask].cpu())
            lengths.append(tokens.mask.sum(dim=1).cpu())
    if not count:
        return None
    owners = torch.tensor(image_index, dtype=torch.int64)
    cat = torch.cat
    return Gallery(cat(image), cat(text), owners, cat(pictures), cat(seen), grid, cat(words), cat(lengths))


def _everyone(mine: Gallery | None) -> Gallery | None:
    """The shares of all processes, laid end to end, on each of them. Collective."""
    if distributed.world_size() == 1:
        return mine
    sizes = distributed.gather_objects(None if mine is None else (len(mine.image), mine.grid))
    known = [size for size in sizes if size is not None]
    if not known:
        return None
    before = sum(size[0] for size in sizes[: distributed.rank()] if size is not None)
    rows = {} if mine is None else {**vars(mine), "image_index": mine.image_index + before}
    names = ("image", "text", "image_index", "pictures", "seen", "words", "lengths")
    return Gallery(**{name: _stacked(rows.get(name)) for name in names}, grid=known[0][1])


def _stacked(rows: Tensor | None) -> Tensor:
    """(r, ...) of each process -> (sum of r, ...); None stands for no rows."""
    told = distributed.gather_objects(None if rows is None else (rows.shape, rows.dtype))
    shape, dtype = next(each for each in told if each is not None)
    counts = [0 if each is None else each[0][0] for each in told]
    rows = torch.empty(0, *shape[1:], dtype=dtype) if rows is None else rows
    padded = F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, max(counts) - len(rows)))
    return torch.cat(
        [part[:count] for part, count in zip(distributed.gather_without_grad(padded).chunk(len(counts)), counts, strict=True)]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Search


def evaluate_reranking(model: FusionModel, shards: Any, setup: EvalSetup, match: Match, k: int, add: bool) -> dict[str, float]:
    """The figures of Retrieval.evaluate. Collective. `add`: contrastive logit + matching logit, else the latter alone.

    Raises UserError: nothing to rank, embeddings that are not finite.
    """
    batches = setup.batches(shards, {name: setup.decoders[name] for name in ("image", "text")})
    with setup.inference_mode(model):
        mine = on_all(lambda: _encoded(model, batches, setup))
        bad = sum(distributed.gather_objects(batches.bad.total()))
        gallery = _everyone(mine)
        if gallery is None:
            raise UserError(f"nothing to rank in {shards}: {bad} samples were left out because of their content")
        device = setup.device
        image, text, image_index = gallery.image.to(device), gallery.text.to(device), gallery.image_index
        before = on_main(lambda: retrieval_metrics(image, text, image_index, KS))
        scale = float(model.encoder.logit_scale.exp()) if add else 0.0

        def ordered(forth: bool) -> Scores:
            queries, found_in = (image, text) if forth else (text, image)
            first, last = (len(queries) * (distributed.rank() + i) // distributed.world_size() for i in (0, 1))
            asks = torch.arange(first, last)
            rows, similarity = (each.cpu() for each in find_candidates(queries[first:last], found_in, k))
            right = image_index[rows] == asks[:, None] if forth else rows == image_index[asks][:, None]
            logits, seconds = _scored(model, gallery, match, asks, rows, forth, device)
            return logits.double() + scale * similarity, right, seconds

        parts = {name: gather_or_raise(lambda forth=forth: ordered(forth)) for name, forth in WAYS}  # type: ignore[misc]
    out = dict(before)
    seconds = 0.0
    for name, found_by in parts.items():
        scores, right = torch.cat([part[0] for part in found_by]), torch.cat([part[1] for part in found_by])
        out |= reranking_metrics(name, right, scores, before)
        seconds += sum(part[2] for part in found_by)
    for kind in ("", "reranked_"):
        out[f"{kind}R@1"] = sum(out[f"{kind}{name}_R@1"] for name, _ in WAYS) / len(WAYS)
    n, m = len(gallery.image), len(gallery.text)
    counts = {"rerank_k": min(k, n), "rerank_ms": 1000 * seconds / (n + m), "samples": n, "captions": m, "bad_samples": bad}
    return out | counts


WAYS = (("image_to_text", True), ("text_to_image", False))


def _scored(
    model: FusionModel, gallery: Gallery, match: Match, asks: Tensor, rows: Tensor, forth: bool, device: torch.device
) -> tuple[Tensor, float]:
    """(q,) queries and (q, k) candidates -> (q, k) matching logits on the host, and the seconds that took."""
    k = rows.shape[1]
    out = [torch.zeros(0, k)]

    def some(asks: Tensor, rows: Tensor) -> Tensor:
        if forth:  # a picture answers its k captions at once
            pair = gallery.text_tokens(rows.flatten(), device), gallery.image_tokens(asks, device)
        else:
            pair = gallery.text_tokens(asks.repeat_interleave(k), device), gallery.image_tokens(rows.flatten(), device)
        logits: Tensor = match(model, *pair).float().unflatten(0, (-1, k))
        return logits.cpu()

    if len(asks):
        some(asks[:1], rows[:1])  # what happens once is not a query's time
    begin = time.perf_counter()
    step = max(1, PAIRS // k)
    for start in range(0, len(asks), step):
        out.append(some(asks[start : start + step], rows[start : start + step]))
    return torch.cat(out), time.perf_counter() - begin
