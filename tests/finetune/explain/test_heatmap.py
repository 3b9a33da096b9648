"""Figures: the peak is where the map's is, the scale is shared, words fit, the same picture gives the same bytes."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from finetune.explain.heatmap import TILE, figure, png, shortened, stacked, strengths, tile, uri, wrapped

GREY = Image.new("RGB", (96, 96), (128, 128, 128))


def heat(image: Image.Image) -> np.ndarray:
    """How far each pixel is from grey."""
    pixels = np.asarray(image, dtype=np.int64)
    return np.asarray(pixels.max(2) - pixels.min(2))


@pytest.mark.parametrize(("row", "column"), [(0, 0), (2, 5), (5, 7)])
def test_the_heat_is_where_the_map_is(row: int, column: int) -> None:
    values = np.zeros((6, 8))
    values[row, column] = 3.0
    drawn = heat(tile(GREY, values, side=240))
    cells = drawn.reshape(6, 40, 8, 30).mean((1, 3))
    assert np.unravel_index(cells.argmax(), cells.shape) == (row, column)
    assert cells[(row + 3) % 6, (column + 4) % 8] == 0  # elsewhere the grey picture shines through


def test_a_map_of_nothing_leaves_the_picture() -> None:
    assert heat(tile(GREY, np.zeros((6, 8)))).max() == 0


def test_words_share_a_scale() -> None:
    maps = np.zeros((3, 4, 4))
    maps[0, 1, 1], maps[1, 2, 2] = 2.0, 0.1
    np.testing.assert_allclose(strengths(maps), [1, 0.05, 0])
    np.testing.assert_allclose(strengths(0 * maps), [0, 0, 0])
    strong, weak = (heat(tile(GREY, each, float(s))).max() for each, s in zip(maps[:2], strengths(maps)[:2], strict=True))
    assert strong > 2 * weak > 0


def test_boxes_are_outlined() -> None:
    plain, boxed = (tile(GREY, np.zeros((4, 4)), side=100, boxes=boxes) for boxes in ((), [(0.2, 0.3, 0.6, 0.9)]))
    changed = np.argwhere((np.asarray(plain) != np.asarray(boxed)).any(2))
    assert changed.min(0).tolist() == [30, 20]
    assert changed.max(0).tolist() == [89, 59]


@pytest.mark.parametrize("count", [1, 5, 11, 30])
def test_every_word_has_its_tile(count: int) -> None:
    maps = np.random.default_rng(0).random((count, 4, 4))
    words = [f"word{i}" for i in range(count)]
    page = figure(Image.new("RGB", (60, 40), "red"), words, maps, ["a long sentence " * 30, "answer: red, 93 %"])
    bordered = (np.asarray(page) == (200, 203, 208)).all(2)
    corners = bordered[:-1, :-1] & bordered[1:, :-1] & bordered[:-1, 1:] & ~bordered[1:, 1:]
    assert corners.sum() == count + 1  # one upper left corner a tile, the picture's own included
    assert page.width <= 6 * (TILE + 12) + 12
    assert stacked([page, page]).height == 2 * page.height


def test_long_words_and_strange_letters_fit() -> None:
    assert shortened("short", 200, 15) == "short"
    cut = shortened("Donaudampfschifffahrtsgesellschaftskapitän", 120, 15)
    assert cut.endswith("…")
    assert len(cut) > 6
    lines = wrapped("one two three " * 60, 300, 15)
    assert len(lines) == 4
    assert lines[-1].endswith("…")
    assert figure(GREY, ["東京", "naïve", "🚗"], np.ones((3, 2, 2)), ["東京 🚗"]).height > TILE


def test_bytes() -> None:
    page = tile(GREY, np.eye(4))
    assert png(page) == png(page)
    assert Image.open(io.BytesIO(png(page))).size == (TILE, TILE)
    head, _, body = uri(page).partition(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(body))).size == (TILE, TILE)
