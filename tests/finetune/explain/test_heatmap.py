"""Figures: the heat is at the map's peak, words share a scale, labels fit, bytes are reproducible."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from finetune.explain import heatmap
from finetune.explain.examples import find_visible
from finetune.explain.heatmap import (
    TILE,
    can_draw,
    compute_strengths,
    draw_figure,
    draw_on_picture,
    draw_tile,
    encode_png,
    stack_figures,
    truncate_text,
    wrap_text,
)
from pretrain.data.images import ImageDecoder
from pretrain.data.thumbnails import make_thumbnail

GRAY = Image.new("RGB", (96, 96), (128, 128, 128))


def measure_heat(image: Image.Image) -> np.ndarray:
    """Return how far each pixel is from gray."""
    pixels = np.asarray(image, dtype=np.int64)
    return np.asarray(pixels.max(2) - pixels.min(2))


@pytest.mark.parametrize(("row", "column"), [(0, 0), (2, 5), (5, 7)])
def test_the_heat_is_where_the_map_is(row: int, column: int) -> None:
    values = np.zeros((6, 8))
    values[row, column] = 3.0
    drawn = measure_heat(draw_tile(GRAY, values, side=240))
    cells = drawn.reshape(6, 40, 8, 30).mean((1, 3))
    assert np.unravel_index(cells.argmax(), cells.shape) == (row, column)
    assert cells[(row + 3) % 6, (column + 4) % 8] == 0  # elsewhere the map is transparent over the gray image


def test_a_map_of_zeros_leaves_the_image_gray() -> None:
    assert measure_heat(draw_tile(GRAY, np.zeros((6, 8)))).max() == 0


def test_words_share_a_scale() -> None:
    maps = np.zeros((3, 4, 4))
    maps[0, 1, 1], maps[1, 2, 2] = 2.0, 0.1
    np.testing.assert_allclose(compute_strengths(maps), [1, 0.05, 0])
    np.testing.assert_allclose(compute_strengths(0 * maps), [0, 0, 0])
    strong, weak = (
        measure_heat(draw_tile(GRAY, values, float(s))).max()
        for values, s in zip(maps[:2], compute_strengths(maps)[:2], strict=True)
    )
    assert strong > 2 * weak > 0


def test_boxes_are_outlined() -> None:
    plain, boxed = (draw_tile(GRAY, np.zeros((4, 4)), side=100, boxes=boxes) for boxes in ((), [(0.2, 0.3, 0.6, 0.9)]))
    changed = np.argwhere((np.asarray(plain) != np.asarray(boxed)).any(2))
    assert changed.min(0).tolist() == [30, 20]
    assert changed.max(0).tolist() == [89, 59]


@pytest.mark.parametrize("count", [1, 5, 11, 30])
def test_every_word_has_a_tile(count: int) -> None:
    maps = np.random.default_rng(0).random((count, 4, 4))
    words = [f"word{i}" for i in range(count)]
    page = draw_figure(Image.new("RGB", (60, 40), "red"), words, maps, ["a long sentence " * 30, "answer: red, 93 %"])
    bordered = (np.asarray(page) == (200, 203, 208)).all(2)
    corners = bordered[:-1, :-1] & bordered[1:, :-1] & bordered[:-1, 1:] & ~bordered[1:, 1:]
    assert corners.sum() == count + 1  # one upper left corner per tile, including that of the image itself
    assert page.width <= 6 * (TILE + 12) + 12
    assert stack_figures([page, page]).height == 2 * page.height


def test_long_words_and_characters_beyond_latin_fit() -> None:
    assert truncate_text("short", 200, 15) == "short"
    truncated = truncate_text("Donaudampfschifffahrtsgesellschaftskapitän", 120, 15)
    assert truncated.endswith("…")
    assert len(truncated) > 6
    lines = wrap_text("one two three " * 60, 300, 15)
    assert len(lines) == 4
    assert lines[-1].endswith("…")
    assert draw_figure(GRAY, ["東京", "naïve", "🚗"], np.ones((3, 2, 2)), ["東京 🚗"]).height > TILE


def test_images_encode_to_png() -> None:
    page = draw_tile(GRAY, np.eye(4))
    assert encode_png(page) == encode_png(page)
    assert Image.open(io.BytesIO(encode_png(page))).size == (TILE, TILE)


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
@pytest.mark.parametrize(("width", "height", "x", "y"), [(150, 600, 100, 260), (600, 150, 330, 40), (301, 299, 40, 250)])
def test_maps_lie_on_the_whole_image_where_the_model_saw_it(resize: str, width: int, height: int, x: int, y: int) -> None:
    """The map is the red of the model's input; on the whole image its peak lies on the red square at (x, y)."""
    picture = Image.new("RGB", (width, height), (128, 128, 128))
    picture.paste((255, 0, 0), (x - 12, y - 12, x + 12, y + 12))
    data = encode_png(picture)
    decoder = ImageDecoder(64, resize=resize)
    red, green, _ = decoder.decode_eval(data).double().numpy()
    values = (red - green).clip(0).reshape(16, 4, 16, 4).mean((1, 3))
    thumbnail = make_thumbnail(data)
    assert (thumbnail.height, thumbnail.width) == (height, width)
    visible = find_visible(decoder, thumbnail.height, thumbnail.width)
    gray = thumbnail.open().convert("L").convert("RGB")
    drawn = draw_on_picture(gray, visible, values, side=200)
    heat = measure_heat(drawn).astype(float)
    rows, columns = np.nonzero(heat > 0.7 * heat.max())
    side = max(width, height)
    left, top = ((side - width) // 2, (side - height) // 2) if resize == "pad" else (0, 0)  # borders are drawn, too
    assert columns.mean() == pytest.approx((x + left) * 200 / side, abs=5)
    assert rows.mean() == pytest.approx((y + top) * 200 / side, abs=5)
    expected = (200, 200) if resize == "pad" else (round(200 * width / side), round(200 * height / side))
    assert drawn.size == pytest.approx(expected, abs=1)
    if resize != "pad":  # parts that the model does not see are pale
        pale = (np.asarray(drawn.convert("L")) > 220).mean()
        assert pale == pytest.approx(1 - min(width, height) / side if resize == "crop" else 0, abs=0.06)


def test_words_that_no_font_has_are_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without further fonts: Pillow's own has ASCII, and no accents, Devanagari or Ethiopic."""
    monkeypatch.setattr(heatmap, "FONTS", ())
    assert can_draw("a red car, 3.5 “words”")
    assert not can_draw("naïve")
    assert not can_draw("लाल")
    assert not can_draw("a ቀይ car")
    maps = np.ones((2, 4, 4))
    latin, mixed = (draw_figure(GRAY, ["red", word], maps, ["a line"]) for word in ("car", "गाड़ी"))
    assert mixed.height == latin.height + 22  # one line that says so
    numbered = draw_figure(GRAY, ["red", "word 2"], maps, ["a line"])
    label = (slice(-36, None), slice(None))
    np.testing.assert_array_equal(np.asarray(mixed)[label], np.asarray(numbered)[label])


def test_a_coarse_map_is_drawn_as_its_cells() -> None:
    """3 x 3 regions, as a convolutional tower gives: one color in each cell. 8 x 8 are smooth."""
    values = np.arange(9.0).reshape(3, 3)
    cells = measure_heat(draw_tile(GRAY, values / 8, strength=0.19, side=240)).reshape(3, 80, 3, 80)
    np.testing.assert_array_equal(cells.max(axis=(1, 3)), cells.min(axis=(1, 3)))
    assert len(np.unique(cells)) > 4
    smooth = measure_heat(draw_tile(GRAY, np.kron(values, np.ones((3, 3)))[:8, :8] / 8, strength=0.19, side=240))
    assert len(np.unique(smooth)) > 50
