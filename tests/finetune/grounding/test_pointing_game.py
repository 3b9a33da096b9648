"""Maps whose figures are known: a box, nothing, the middle; intervals against scipy's."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from finetune.grounding.pointing_game import bootstrap, centre_map, covered, hit, lift, reached, to_cells
from pretrain.data.images import ImageDecoder, visible_box

scipy_stats = pytest.importorskip("scipy.stats")
GRID = (6, 8)


def boxes(*each: tuple[float, float, float, float]) -> np.ndarray:
    return np.array(each, dtype=float).reshape(-1, 4)


def test_a_map_that_is_the_box() -> None:
    where = boxes((2, 1, 5, 3))
    inside, near = covered(where, GRID), reached(where, GRID)
    assert inside.sum() == 6
    assert inside[1:3, 2:5].all()
    assert hit(inside, near) == 1
    assert lift(inside, inside) == pytest.approx(48 / 6)
    assert lift(1 - inside, inside) == 0
    assert hit(1 - near.astype(float), near) == 0


def test_a_map_that_says_nothing_is_chance() -> None:
    where = boxes((2.2, 1.1, 4.9, 2.7), (6, 0, 7.5, 6))
    inside, near = covered(where, GRID), reached(where, GRID)
    for nothing in (np.zeros(GRID), np.full(GRID, 0.3)):
        assert hit(nothing, near) == near.mean()
        assert lift(nothing, inside) == pytest.approx(1)
    random = np.random.default_rng(0).random((4000, *GRID))
    assert np.mean([hit(values, near) for values in random]) == pytest.approx(near.mean(), abs=0.03)


def test_half_a_patch_and_no_more() -> None:
    """A box inside one cell: the eight around it are whole patches away but where it touches their edge."""
    assert reached(boxes((3.2, 2.3, 3.8, 2.9)), GRID).sum() == 1
    near = reached(boxes((3.0, 2.3, 3.8, 2.9)), GRID)
    assert near.sum() == 2
    assert near[2, 2]
    assert reached(boxes((3.2, 2.3, 3.8, 2.9)), GRID, slack=0).sum() == 1
    assert reached(boxes((3.6, 2.3, 3.8, 2.9)), GRID, slack=0).sum() == 0


def test_covered_cells_against_a_fine_raster() -> None:
    random = np.random.default_rng(1)
    corners = np.sort(random.integers(0, 61, (4, 2, 2)) / 10, axis=1)  # overlapping, on a raster of tenths
    where = corners.reshape(4, 4)
    fine = np.zeros((60, 80))
    for x0, y0, x1, y1 in (where * 10).round().astype(int):
        fine[y0:y1, x0:x1] = 1
    np.testing.assert_allclose(covered(where, GRID), fine.reshape(6, 10, 8, 10).mean((1, 3)), atol=1e-12)
    assert covered(boxes(), GRID).sum() == 0


def test_the_centre() -> None:
    values = centre_map((5, 7))
    assert np.unravel_index(values.argmax(), values.shape) == (2, 3)
    np.testing.assert_array_equal(values, values[::-1, ::-1])
    assert hit(centre_map(GRID), reached(boxes((4, 3, 8, 6)), GRID)) == 1  # touches all four middle cells
    assert hit(centre_map(GRID), reached(boxes((4.2, 3.2, 8, 6)), GRID)) == 0.25


@pytest.mark.parametrize("resize", ["crop", "squash"])
@pytest.mark.parametrize(("width", "height"), [(120, 80), (61, 97), (64, 64)])
def test_boxes_follow_the_picture_through_the_decoder(width: int, height: int, resize: str) -> None:
    """A black picture with one white box: the cells that the box covers are those that arrive white."""
    pixels = np.zeros((height, width, 3), np.uint8)
    x0, y0, x1, y1 = width // 3, height // 4, 5 * width // 6, 7 * height // 8
    pixels[y0:y1, x0:x1] = 255
    decoder = ImageDecoder(48, resize=resize)
    arrived = decoder.decode_eval(_png(pixels)).double().mean(0).numpy() / 255
    cells = to_cells(boxes((x0, y0, x1, y1)), visible_box(height, width, 48, resize), GRID)
    np.testing.assert_allclose(covered(cells, GRID), arrived.reshape(6, 8, 8, 6).mean((1, 3)), atol=0.07)


def test_boxes_cut_away_with_the_margin_are_left_out() -> None:
    part = visible_box(100, 300, 50, "crop")
    assert part == pytest.approx((100, 0, 200, 100))
    cells = to_cells(boxes((0, 0, 90, 100), (150, 50, 250, 100)), part, (4, 4))
    np.testing.assert_allclose(cells, [[2, 2, 4, 4]])


def test_intervals_are_scipys_where_pictures_are_independent() -> None:
    random = np.random.default_rng(2)
    values = (random.random(150) < 0.8).astype(float)
    ours = bootstrap(values, np.arange(150), resamples=4000)
    theirs = scipy_stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=random).confidence_interval
    assert ours.mean == values.mean()
    assert ours.low == pytest.approx(theirs.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.high, abs=0.01)


def test_saying_it_ten_times_makes_it_no_surer() -> None:
    random = np.random.default_rng(3)
    values = random.random(80)
    once = bootstrap(values, np.arange(80))
    often = bootstrap(np.repeat(values, 10), np.repeat(np.arange(80), 10))
    assert (often.low, often.high) == pytest.approx((once.low, once.high))
    alone = bootstrap(np.repeat(values, 10), np.arange(800))
    assert alone.high - alone.low < 0.5 * (once.high - once.low)
    assert bootstrap(np.array([0.5, 1.0]), np.array([7, 7])) == (0.75, 0.75, 0.75)


def _png(pixels: np.ndarray) -> bytes:
    import io

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()
