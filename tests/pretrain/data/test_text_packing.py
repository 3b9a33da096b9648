"""Packed texts: every token in a row of its own text's, in few rows, whose number does not depend on the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pretrain.data.batch import Batch
from pretrain.data.text_packing import TextPacking, pack_texts

HISTOGRAM = (0, 0, 20, 300, 500, 420, 200, 90, 60, 40, 20, 9, 4)
"""Texts of 0 to 12 tokens."""
LONGEST = len(HISTOGRAM) - 1


def draw_lengths(texts: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.repeat(np.arange(LONGEST + 1), HISTOGRAM), texts)


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [([6, 6, 6, 6], 2), ([12, 1, 11], 2), ([7, 5, 4, 4, 4], 2), ([12] * 5, 5), ([1] * 12, 1), ([3], 1), ([], 0)],
)
def test_texts_fill_the_fewest_rows(lengths: list[int], rows: int) -> None:
    assert pack_texts(np.array(lengths, dtype=np.int64), LONGEST)[2] == rows


@pytest.mark.parametrize("texts", [1, 16, 300])
def test_every_token_has_one_place(texts: int) -> None:
    lengths = draw_lengths(texts)
    packed = TextPacking(HISTOGRAM).assign(lengths)
    index, owners, positions = packed.tokens.flatten(1).tolist()
    expected = {(text, position) for text in range(texts) for position in range(lengths[text])}
    places = {(text, position): i for i, (text, position) in enumerate(zip(owners, positions, strict=True)) if text >= 0}
    assert set(places) == expected
    assert len(places) == sum(text >= 0 for text in owners)  # none twice
    for (text, position), place in places.items():
        assert index[place] == text * LONGEST + position
        assert place == packed.starts[text] + position
        assert place // LONGEST == packed.starts[text] // LONGEST  # a text is in one row


def test_the_number_of_rows_is_one_of_three() -> None:
    packing = TextPacking(HISTOGRAM)
    usual, larger, most = packing.row_counts(256)
    counts = [packing.assign(draw_lengths(256, seed)).tokens.shape[1] for seed in range(200)]
    assert set(counts) <= {usual, larger}
    assert counts.count(usual) > 0.9 * len(counts)  # two standard deviations
    assert draw_lengths(256).sum() > 0.9 * usual * LONGEST
    long = np.full(256, 6)
    assert packing.assign(long).tokens.shape[1] == larger or larger < 128
    assert packing.assign(np.full(256, LONGEST)).tokens.shape[1] == most == 256


def test_chunks_are_packed_alone_and_read_nothing_from_the_device() -> None:
    mask = torch.arange(LONGEST) < torch.from_numpy(draw_lengths(24))[:, None]
    lengths = mask.sum(dim=1).numpy()
    packed = TextPacking(HISTOGRAM).assign(lengths)
    keys = [str(i) for i in range(8)]
    batch = Batch({"text": mask.long().view(8, 3, -1)}, {"text": mask.view(8, 3, -1)}, keys, groups={"text": packed})
    for device in ("cpu", "meta"):  # values on the meta device cannot be read
        for number, chunk in enumerate(batch.to(device).chunk(2)):
            part = chunk.groups["text"]
            assert part.row_lengths.tolist() == lengths[12 * number : 12 * (number + 1)].tolist()
            expected = TextPacking(HISTOGRAM).assign(part.row_lengths)
            assert isinstance(part, type(expected))
            assert part.tokens.device.type == device
            assert part.tokens.shape == expected.tokens.shape
            if device == "cpu":
                assert torch.equal(part.tokens, expected.tokens)
