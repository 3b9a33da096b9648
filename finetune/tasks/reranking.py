"""Evaluation of two-stage retrieval: a matching score re-ranks the first k of the contrastive ranking.

    evaluate_reranking(model, shards, setup, match, k, add) -> recall before and after, the ceiling, milliseconds per query

Each image and each caption passes its tower once. Their tokens are stored on the CPU, those of captions without padding, and
only the fusion runs for every pair. Recall at K >= k is that of the contrastive ranking, because re-ranking changes nothing
beyond k. The ceiling is the share of queries with a right answer among the first k. Ties count by expectation, as in
pretrain/evaluation/retrieval.py. Every process holds the whole gallery and ranks for its share of the queries.

Shapes: n = images, m = captions, q = queries, k = candidates, N = tokens, T = tokens of a text, L = tokens of all captions,
p = pairs or requested rows, r = texts per image, C = width of a token, D = width of the shared space.
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
from pretrain.evaluation.chance import CHANCE, with_chance
from pretrain.evaluation.retrieval import TIE, hit_probability, retrieval_metrics
from pretrain.runtime import distributed
from pretrain.runtime.agree import gather_or_raise, on_all, on_main
from pretrain.runtime.progress import report_progress
from pretrain.towers import TokenSequence

KS = (1, 5, 10)
PAIRS = 512
"""Pairs of text and image per forward pass of the fusion."""

Match = Callable[[FusionModel, TokenSequence, TokenSequence], Tensor]
"""(model, texts (r p, T, C), images (p, N, C)) -> (r p,) matching logits; r texts belong to each image."""


@dataclass
class Ranking:
    """The candidates of some queries, in the order of the contrastive ranking, and what re-ranking orders them by."""

    candidates: Tensor
    """(q, k) int64, rows of the gallery, most similar first."""
    similarity: Tensor
    """(q, k) float64, cosines."""
    scores: Tensor
    """(q, k) float64, higher is better."""
    right: Tensor
    """(q, k) bool, whether a candidate is a right answer."""
    seconds: float
    """Time of scoring."""


# ---------------------------------------------------------------------------------------------------------------------
# Candidates and recall


def find_candidates(queries: Tensor, gallery: Tensor, k: int, tile: int = 512) -> tuple[Tensor, Tensor]:
    """Return the k most similar rows of the gallery, (q, k) int64, and their similarity, (q, k) float64.

    The gallery is shuffled first, so that the choice among equal similarities does not depend on their position.

    Args:
        queries: (q, D), L2-normalized.
        gallery: (n, D), L2-normalized.
        k: limited to n.
        tile: queries per matrix product.
    """
    k = min(k, len(gallery))
    order = torch.randperm(len(gallery), generator=torch.Generator().manual_seed(0)).to(gallery.device)
    shuffled = gallery[order].double()
    rows, values = [order.new_zeros(0, k)], [shuffled.new_zeros(0, k)]
    for query in queries.split(tile):
        value, index = (query.double() @ shuffled.T).topk(k, dim=1)
        rows.append(order[index])
        values.append(value)
    return torch.cat(rows), torch.cat(values)


def expected_recall(right: Tensor, scores: Tensor, k: int) -> Tensor:
    """Return (q,) the probability that a right candidate is among the first k.

    `right` (q, k') bool tells which candidates are right, `scores` (q, k') orders them; ties are broken at random.
    """
    scores = scores.double()
    best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    tied = (scores - best).abs() <= TIE * (1 + best.abs())
    better = ((scores > best) & ~tied).sum(dim=1).double()
    tied_right, tied_wrong = (tied & right).sum(dim=1).double(), (tied & ~right).sum(dim=1).double()
    return torch.where(right.any(dim=1), hit_probability(better, tied_right, tied_wrong, k), 0.0)


def reranking_metrics(
    name: str, right: Tensor, scores: Tensor, before: dict[str, float], ks: Sequence[int] = KS
) -> dict[str, float]:
    """Return recall after re-ranking, that of a random order of the candidates, and their ceiling, for one direction.

    Args:
        name: the direction, such as `image_to_text`.
        right: (q, k) bool, whether a candidate is a right answer.
        scores: (q, k) of the candidates.
        before: recall of the contrastive ranking, `{name}_R@{K}`; it also holds after re-ranking for K >= k.
        ks: the values of K.
    """
    k, out = right.shape[1], {}
    for K in ks:
        for prefix, order in (("", scores), (CHANCE, torch.zeros_like(scores))):  # equal scores: all orders are equally likely
            recall = float(expected_recall(right, order, K).mean()) if k > K else before[f"{name}_R@{K}"]
            out[f"{prefix}reranked_{name}_R@{K}"] = recall
    return {**out, f"{name}_ceiling": float(right.any(dim=1).double().mean())}


# ---------------------------------------------------------------------------------------------------------------------
# The gallery: embeddings and tokens of a split


@dataclass
class Gallery:
    """Embeddings and tokens of a split, on the CPU."""

    image: Tensor
    """(n, D) embeddings, L2-normalized."""
    text: Tensor
    """(m, D) embeddings, L2-normalized."""
    image_index: Tensor
    """(m,) int64: the image of each caption."""
    image_states: Tensor
    """(n, N, C) tokens of the images."""
    image_mask: Tensor
    """(n, N) bool, True for real tokens."""
    grid: tuple[int, int] | None
    text_states: Tensor
    """(L, C) tokens of all captions, concatenated without padding."""
    lengths: Tensor
    """(m,) int64: tokens of each caption."""

    def image_tokens(self, rows: Tensor, device: torch.device) -> TokenSequence:
        """Return the tokens (p, N, C) of images `rows` (p,) on the device."""
        states = self.image_states[rows].to(device, non_blocking=True)
        return TokenSequence(states, self.image_mask[rows].to(device), self.grid, states[:, 0])

    def text_tokens(self, rows: Tensor, device: torch.device) -> TokenSequence:
        """Return the tokens (p, T, C) of captions `rows` (p,) on the device; T is the longest of these."""
        lengths = self.lengths[rows]
        position = torch.arange(max(1, int(lengths.max())))
        mask = position < lengths[:, None]
        start = (self.lengths.cumsum(0) - self.lengths)[rows]
        index = (start[:, None] + position).clamp(max=len(self.text_states) - 1)
        states = self.text_states[index].to(device, non_blocking=True)
        return TokenSequence(states, mask.to(device), None, states[:, 0])


def encode_gallery(model: FusionModel, batches: Iterable[Batch], setup: EvalSetup) -> Gallery | None:
    """Encode this process's share of the samples; None where it has none."""
    image, image_states, image_mask, text, text_states, lengths, image_index, count = [], [], [], [], [], [], [], 0
    grid = None
    for batch in batches:
        inputs = batch.inputs[model.subject].to(setup.device, non_blocking=True)
        tokens, embedding = model.tokens_and_embedding(model.subject, inputs)
        assert embedding is not None
        grid = tokens.grid
        image.append(embedding.float().cpu())
        image_states.append(tokens.states.cpu())
        image_mask.append(tokens.mask.cpu())
        captions = batch.targets["captions"]  # a list per image
        image_index += [count + i for i, texts in enumerate(captions) for _ in texts]
        count += len(captions)
        all_captions = [caption for texts in captions for caption in texts]
        for start in range(0, len(all_captions), 256):
            ids, mask = setup.decoders["text"].encode(all_captions[start : start + 256])
            tokens, embedding = model.tokens_and_embedding("text", ids.to(setup.device), mask.to(setup.device))
            assert embedding is not None
            text.append(embedding.float().cpu())
            text_states.append(tokens.states[tokens.mask].cpu())
            lengths.append(tokens.mask.sum(dim=1).cpu())
    if not count:
        return None
    cat = torch.cat
    return Gallery(
        image=cat(image),
        text=cat(text),
        image_index=torch.tensor(image_index, dtype=torch.int64),
        image_states=cat(image_states),
        image_mask=cat(image_mask),
        grid=grid,
        text_states=cat(text_states),
        lengths=cat(lengths),
    )


def _gather_gallery(local: Gallery | None) -> Gallery | None:
    """Concatenate the galleries of all processes in rank order, on every process. Collective."""
    if distributed.world_size() == 1:
        return local
    sizes = distributed.gather_objects(None if local is None else (len(local.image), local.grid))
    known = [size for size in sizes if size is not None]
    if not known:
        return None
    images_before = sum(size[0] for size in sizes[: distributed.rank()] if size is not None)
    rows = {} if local is None else {**vars(local), "image_index": local.image_index + images_before}
    names = ("image", "text", "image_index", "image_states", "image_mask", "text_states", "lengths")
    return Gallery(**{name: _gather_unequal_rows(rows.get(name)) for name in names}, grid=known[0][1])


def _gather_unequal_rows(rows: Tensor | None) -> Tensor:
    """Concatenate unequal numbers of rows of all processes; None stands for no rows. Collective."""
    layouts = distributed.gather_objects(None if rows is None else (rows.shape, rows.dtype))
    shape, dtype = next(layout for layout in layouts if layout is not None)
    counts = [0 if layout is None else layout[0][0] for layout in layouts]
    rows = torch.empty(0, *shape[1:], dtype=dtype) if rows is None else rows
    padded = F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, max(counts) - len(rows)))
    return torch.cat(
        [part[:count] for part, count in zip(distributed.gather_without_grad(padded).chunk(len(counts)), counts, strict=True)]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def evaluate_reranking(model: FusionModel, shards: Any, setup: EvalSetup, match: Match, k: int, add: bool) -> dict[str, float]:
    """Compute the metrics of Retrieval.evaluate on `shards`. Collective.

    Args:
        model: encodes samples; its logit scale weights the similarity.
        shards: what to evaluate on.
        setup: decoders, device and batches.
        match: computes matching logits.
        k: candidates per query.
        add: True to order candidates by contrastive logit + matching logit, False by the matching logit alone.

    Raises:
        UserError: nothing to rank, or embeddings that are not finite.
    """
    batches = setup.batches(shards, {name: setup.decoders[name] for name in (model.subject, "text")})
    with setup.inference_mode(model):
        local = on_all(lambda: encode_gallery(model, batches, setup))
        bad = sum(distributed.gather_objects(batches.bad.total()))
        gallery = _gather_gallery(local)
        if gallery is None:
            raise UserError(f"nothing to rank in {shards}: {bad} samples were left out because of their content")
        device, directions = setup.device, name_directions(model.subject)
        image, text, image_index = gallery.image.to(device), gallery.text.to(device), gallery.image_index
        before = on_main(lambda: retrieval_metrics(image, text, image_index, KS, names=(model.subject, "text")))
        parts = {
            name: gather_or_raise(lambda by_image=by_image: rank_candidates(model, gallery, device, match, k, add, by_image))  # type: ignore[misc]
            for name, by_image in directions
        }
    out = dict(before)
    seconds = 0.0
    for name, rankings in parts.items():
        scores, right = torch.cat([part.scores for part in rankings]), torch.cat([part.right for part in rankings])
        out |= reranking_metrics(name, right, scores, before)
        seconds += sum(part.seconds for part in rankings)
    for prefix in ("", "reranked_", f"{CHANCE}reranked_"):
        out[f"{prefix}R@1"] = sum(out[f"{prefix}{name}_R@1"] for name, _ in directions) / len(directions)
    n, m = len(gallery.image), len(gallery.text)
    counts = {"rerank_k": min(k, n), "rerank_ms": 1000 * seconds / (n + m), "samples": n, "captions": m, "bad_samples": bad}
    return with_chance(out | counts)


def name_directions(subject: str) -> tuple[tuple[str, bool], tuple[str, bool]]:
    """Return the name of each direction, and whether images (or what else texts are about) are the queries."""
    return (f"{subject}_to_text", True), (f"text_to_{subject}", False)


def rank_candidates(
    model: FusionModel,
    gallery: Gallery,
    device: torch.device,
    match: Match,
    k: int,
    add: bool,
    by_image: bool,
    query_rows: Tensor | None = None,
) -> Ranking:
    """Find the candidates of queries by embeddings, and score them.

    Arguments as for evaluate_reranking(); by_image: images are the queries, else captions. query_rows: (q,) int64, which of
    them; None = this process's share of all.
    """
    image, text, image_index = gallery.image.to(device), gallery.text.to(device), gallery.image_index
    queries, targets = (image, text) if by_image else (text, image)
    if query_rows is None:
        first, last = (len(queries) * (distributed.rank() + i) // distributed.world_size() for i in (0, 1))
        query_rows = torch.arange(first, last)
    rows, similarity = (values.cpu() for values in find_candidates(queries[query_rows], targets, k))
    right = image_index[rows] == query_rows[:, None] if by_image else rows == image_index[query_rows][:, None]
    logits, seconds = _score_candidates(model, gallery, match, query_rows, rows, by_image, device)
    scale = float(model.encoder.logit_scale.exp()) if add else 0.0
    return Ranking(rows, similarity, logits.double() + scale * similarity, right, seconds)


def _score_candidates(
    model: FusionModel, gallery: Gallery, match: Match, queries: Tensor, rows: Tensor, by_image: bool, device: torch.device
) -> tuple[Tensor, float]:
    """Return matching logits (q, k) of queries (q,) with candidates `rows` (q, k), and the seconds spent."""
    k = rows.shape[1]
    out = [torch.zeros(0, k)]

    def score(queries: Tensor, rows: Tensor) -> Tensor:
        if by_image:  # an image is passed once for its k captions
            pair = gallery.text_tokens(rows.flatten(), device), gallery.image_tokens(queries, device)
        else:
            pair = gallery.text_tokens(queries.repeat_interleave(k), device), gallery.image_tokens(rows.flatten(), device)
        logits: Tensor = match(model, *pair).float().unflatten(0, (-1, k))
        return logits.cpu()

    if len(queries):
        score(queries[:1], rows[:1])  # warm up: one-time costs are not part of the time per query
    begin = time.perf_counter()
    step = max(1, PAIRS // k)
    for batch in report_progress("re-ranking", -(-len(queries) // step)):
        start = batch * step
        out.append(score(queries[start : start + step], rows[start : start + step]))
    return torch.cat(out), time.perf_counter() - begin
