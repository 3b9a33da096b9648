"""Groups of texts in fixed shapes: their choice against brute force, and every row in a group that holds it."""

from __future__ import annotations

from itertools import combinations
from math import exp, lgamma
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.data.batch import Batch, collate, merge
from pretrain.data.length_groups import OVERFLOW_RATES, LengthGroups, choose_groups, count_lengths
from pretrain.data.loader import DataConfig, build_loader
from pretrain.data.text import TextDecoder, load_tokenizer
from tests.support import Small

HISTOGRAM = (0, 0, 20, 300, 500, 420, 200, 90, 60, 40, 20, 9, 4)
"""Texts of 0 to 12 tokens."""


def exceeding_rows(histogram: tuple[int, ...], rows: int, length: int, rate: float) -> int:
    """Return the number of rows longer than `length` that a batch exceeds with a probability of at most `rate`.

    The beta-binomial distribution, from its definition by gamma functions.
    """
    longer, samples = sum(histogram[length + 1 :]), sum(histogram)
    a, b, total = longer + 0.5, samples - longer + 0.5, 0.0
    for k in range(rows + 1):
        log_p = lgamma(rows + 1) - lgamma(k + 1) - lgamma(rows - k + 1) + lgamma(k + a) + lgamma(rows - k + b)
        total += exp(log_p - lgamma(rows + a + b) + lgamma(a + b) - lgamma(a) - lgamma(b))
        if total >= 1 - rate:
            return k
    return rows


def count_tokens(shapes: list[tuple[int, int]], rate: float, cost: int) -> tuple[int, float]:
    """Return the tokens of groups, each with `cost`, and those expected where a batch overflows at `rate`."""
    longest = shapes[0][1]
    tokens = sum(n * length + cost for n, length in shapes)
    next_longer = [longest, *(length for _, length in shapes[:-1])]
    return tokens, tokens + rate * sum(n * (b - a) for (n, a), b in zip(shapes, next_longer, strict=True))


@pytest.mark.parametrize("rows", [8, 100])
@pytest.mark.parametrize("max_groups", [2, 3, 4])
def test_the_groups_have_the_fewest_tokens(rows: int, max_groups: int) -> None:
    """All choices of lengths are tried. For each rate the fewest tokens count, then the rate with the fewest expected."""
    longest, cost = len(HISTOGRAM) - 1, 5
    fewest, totals = {}, {}
    for rate in OVERFLOW_RATES:
        reserved = [exceeding_rows(HISTOGRAM, rows, length, rate / (max_groups - 1)) for length in range(longest)]
        choices = []
        for count in range(max_groups):
            for shorter in combinations(range(1, longest), count):
                lengths = [longest, *sorted(shorter, reverse=True)]
                counts = np.diff([0, *(reserved[length] for length in lengths[1:]), rows]).tolist()
                if min(counts) > 0:
                    choices.append(count_tokens(list(zip(counts, lengths, strict=True)), rate, cost))
        fewest[rate] = min(tokens for tokens, _ in choices)
        totals[rate] = max(total for tokens, total in choices if tokens == fewest[rate])  # any of those may be chosen
    shapes = list(choose_groups(HISTOGRAM, rows, max_groups, group_cost=cost))
    assert sum(n for n, _ in shapes) == rows
    assert shapes[0][1] == longest
    results = {rate: count_tokens(shapes, rate, cost) for rate in OVERFLOW_RATES}
    assert any(tokens == fewest[rate] and total <= min(totals.values()) + 1e-9 for rate, (tokens, total) in results.items())
    assert min(total for _, total in results.values()) < 0.9 * rows * longest


def test_few_batches_do_not_fit() -> None:
    """Batches are drawn from the lengths that the shapes are chosen for."""
    rng, lengths = np.random.default_rng(0), np.repeat(np.arange(len(HISTOGRAM)), HISTOGRAM)
    groups = LengthGroups(HISTOGRAM, 4, group_cost=0)
    fits = [groups.assign(rng.choice(lengths, 256)).fit for _ in range(400)]
    assert fits.count("fits") >= 0.7 * len(fits)  # the largest rate that may be chosen is 0.3
    assert fits.count("longest") <= 4


@pytest.mark.parametrize("kind", ["usual", "long", "longest", "one row", "no rows"])
def test_every_row_is_in_one_group_that_holds_it(kind: str) -> None:
    longest, rng = len(HISTOGRAM) - 1, np.random.default_rng(0)
    rows = {
        "usual": np.sort(rng.choice(np.repeat(np.arange(13), HISTOGRAM), 64)),
        "long": np.full(64, 7),
        "longest": np.full(64, longest),
        "one row": np.array([3]),
        "no rows": np.zeros(0, dtype=np.int64),
    }[kind]
    groups = LengthGroups(HISTOGRAM, 4, group_cost=0).assign(rows)
    sections = groups.sections(longest)
    assert sorted(torch.cat([row for row, _ in sections]).tolist()) == list(range(len(rows)))
    for section, tokens in sections:
        assert all(rows[section.numpy()] <= tokens)
    assert [len(section) for section, _ in sections] == [n for n, _ in choose_groups(HISTOGRAM, len(rows), 4, 0)]
    if kind == "usual":
        assert groups.fit == "fits"
        assert sum(len(section) * tokens for section, tokens in sections) < 0.7 * 64 * longest
    if kind == "longest":
        assert groups.fit == "longest"


def test_rows_of_equal_length_stay_in_order() -> None:
    groups = LengthGroups(HISTOGRAM, 3, group_cost=0).assign(np.array([4, 9, 4, 9, 4]))
    assert groups.order.tolist() == [1, 3, 0, 2, 4]


def test_a_longer_batch_takes_the_lengths_of_the_next_longer_groups() -> None:
    source = LengthGroups(HISTOGRAM, 4, group_cost=0)
    shapes = choose_groups(HISTOGRAM, 64, 4, 0)
    counts, lengths = [n for n, _ in shapes], [length for _, length in shapes]
    rows = np.repeat(lengths, counts)
    assert source.assign(rows).fit == "fits"
    rows[-1] += 1  # sorted, it belongs to the last group but one, whose last row becomes the first of the last group
    too_long = rows.copy()
    too_long[-counts[-1] :] = lengths[-2]
    groups = source.assign(too_long)
    assert groups.fit == "longer"
    assert [tokens for _, tokens in groups.sections(12)] == [12, *lengths[:-1]]


# ---------------------------------------------------------------------------------------------------------------------
# Batches


@pytest.fixture(scope="module")
def decoder(small: Small) -> TextDecoder:
    decoder = TextDecoder(load_tokenizer(small.tokenizer), 24)
    texts = ["a red cup", "two small blue boxes left of a lamp on the table", "cup", "a green ball under a chair"] * 20
    decoder.length_groups = LengthGroups(count_lengths(decoder.encode(texts)[1], 24), 3, group_cost=0)
    return decoder


def build_parts(decoder: TextDecoder, texts: int) -> list[Batch]:
    captions = ["a red cup", "a ball", "two small blue boxes left of a lamp on the table", "cup"]
    parts = []
    for part in range(2):
        items: list[object] = [captions[(i + part) % 4] for i in range(8)]
        if texts > 1:
            items = [tuple(captions[(i + k) % 4] for k in range(texts)) for i in range(8)]
        parts.append(collate({"text": items}, {"text": decoder}, [f"{part}/{i}" for i in range(8)]))
    return parts


@pytest.mark.parametrize("texts", [1, 3])
@pytest.mark.parametrize("count", [1, 2])
def test_batches_bring_their_groups(decoder: TextDecoder, texts: int, count: int) -> None:
    batch = merge(build_parts(decoder, texts)[:count], {"text": decoder})
    assert batch.inputs["text"].shape[-1] == 24  # whatever the longest text is
    lengths = batch.masks["text"].sum(dim=-1).flatten()
    assert batch.groups["text"].row_lengths.tolist() == lengths.tolist()
    assert lengths[batch.groups["text"].order].tolist() == sorted(lengths.tolist(), reverse=True)
    moved = batch.to("cpu").groups["text"]
    assert torch.equal(moved.order, batch.groups["text"].order)
    for chunk in batch.chunk(4):  # a chunk's groups are those of its own rows
        own = chunk.masks["text"].sum(dim=-1).flatten()
        assert chunk.groups["text"].row_lengths.tolist() == own.tolist()
        assert sorted(chunk.groups["text"].order.tolist()) == list(range(len(own)))
        assert own[chunk.groups["text"].order].tolist() == sorted(own.tolist(), reverse=True)


def test_a_slice_on_a_device_reads_nothing_from_it(decoder: TextDecoder) -> None:
    batch = merge(build_parts(decoder, 1), {"text": decoder})
    groups = batch.to("meta").slice(4, 9).groups["text"]  # values on the meta device cannot be read
    assert groups.order.device.type == "meta"
    assert (groups.counts, groups.fit) == (batch.slice(4, 9).groups["text"].counts, batch.slice(4, 9).groups["text"].fit)


def test_batches_without_groups_are_trimmed(decoder: TextDecoder) -> None:
    plain = TextDecoder(decoder.tokenizer, 24)
    parts = [collate({"text": ["a red cup", "cup"]}, {"text": plain}, ["a", "b"]) for _ in range(2)]
    batch = merge(parts, {"text": plain})
    assert batch.groups == {}
    assert batch.inputs["text"].shape[1] == 8


def test_the_first_captions_are_read_without_images(small: Small, tmp_path: Path) -> None:
    decoder = TextDecoder(load_tokenizer(small.tokenizer), 24)

    def refuse(*_: object) -> None:
        raise AssertionError("an image was decoded")

    loader = build_loader(DataConfig(train=small.train, batch_size=16, workers=0), {"text": decoder, "image": refuse}, seed=0)  # type: ignore[dict-item]
    batch = loader.first_samples(32, ["text"])
    assert list(batch.inputs) == ["text"]
    assert sum(count_lengths(batch.masks["text"], 24)) == 32
