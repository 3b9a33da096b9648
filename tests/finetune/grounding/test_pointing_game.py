"""Maps with known scores: a box, a uniform map, the center map; intervals compared with scipy."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from finetune.grounding.pointing_game import (
    bootstrap,
    boxes_to_cells,
    build_center_map,
    compute_coverage,
    compute_lift,
    mark_near_cells,
    score_hit,
)
from pretrain.data.images import ImageDecoder, visible_box

scipy_stats = pytest.importorskip("scipy.stats")
GRID = (6, 8)


def boxes(*corners: tuple[float, float, float, float]) -> np.ndarray:
    return np.array(corners, dtype=float).reshape(-1, 4)


def test_scores_of_a_map_that_equals_the_box() -> None:
    box_cells = boxes((2, 1, 5, 3))
    inside, near = compute_coverage(box_cells, GRID), mark_near_cells(box_cells, GRID)
    assert inside.sum() == 6
    assert inside[1:3, 2:5].all()
    assert score_hit(inside, near) == 1
    assert compute_lift(inside, inside) == pytest.approx(48 / 6)
    assert compute_lift(1 - inside, inside) == 0
    assert score_hit(1 - near.astype(float), near) == 0


def test_a_uniform_map_scores_as_chance() -> None:
    box_cells = boxes((2.2, 1.1, 4.9, 2.7), (6, 0, 7.5, 6))
    inside, near = compute_coverage(box_cells, GRID), mark_near_cells(box_cells, GRID)
    for uniform in (np.zeros(GRID), np.full(GRID, 0.3)):
        assert score_hit(uniform, near) == near.mean()
        assert compute_lift(uniform, inside) == pytest.approx(1)
    random = np.random.default_rng(0).random((4000, *GRID))
    assert np.mean([score_hit(values, near) for values in random]) == pytest.approx(near.mean(), abs=0.03)


def test_slack_is_half_a_cell() -> None:
    """For a box inside one cell, a neighboring cell counts only where the box touches their common edge."""
    assert mark_near_cells(boxes((3.2, 2.3, 3.8, 2.9)), GRID).sum() == 1
    near = mark_near_cells(boxes((3.0, 2.3, 3.8, 2.9)), GRID)
    assert near.sum() == 2
    assert near[2, 2]
    assert mark_near_cells(boxes((3.2, 2.3, 3.8, 2.9)), GRID, slack=0).sum() == 1
    assert mark_near_cells(boxes((3.6, 2.3, 3.8, 2.9)), GRID, slack=0).sum() == 0


def test_coverage_equals_that_of_a_fine_raster() -> None:
    random = np.random.default_rng(1)
    corners = np.sort(random.integers(0, 61, (4, 2, 2)) / 10, axis=1)  # overlapping, on a raster of tenths
    box_cells = corners.reshape(4, 4)
    fine = np.zeros((60, 80))
    for x0, y0, x1, y1 in (box_cells * 10).round().astype(int):
        fine[y0:y1, x0:x1] = 1
    np.testing.assert_allclose(compute_coverage(box_cells, GRID), fine.reshape(6, 10, 8, 10).mean((1, 3)), atol=1e-12)
    assert compute_coverage(boxes(), GRID).sum() == 0


def test_the_center_map() -> None:
    values = build_center_map((5, 7))
    assert np.unravel_index(values.argmax(), values.shape) == (2, 3)
    np.testing.assert_array_equal(values, values[::-1, ::-1])
    assert score_hit(build_center_map(GRID), mark_near_cells(boxes((4, 3, 8, 6)), GRID)) == 1  # touches all four middle cells
    assert score_hit(build_center_map(GRID), mark_near_cells(boxes((4.2, 3.2, 8, 6)), GRID)) == 0.25


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
@pytest.mark.parametrize(("width", "height"), [(120, 80), (61, 97), (64, 64)])
def test_boxes_follow_the_image_through_the_decoder(width: int, height: int, resize: str) -> None:
    """In a black image with one white box, the cells under the box are white in the decoder's output."""
    pixels = np.zeros((height, width, 3), np.uint8)
    x0, y0, x1, y1 = width // 3, height // 4, 5 * width // 6, 7 * height // 8
    pixels[y0:y1, x0:x1] = 255
    decoder = ImageDecoder(48, resize=resize, pad_color=(0, 0, 0))
    decoded = decoder.decode_eval(_png(pixels)).double().mean(0).numpy() / 255
    cells = boxes_to_cells(boxes((x0, y0, x1, y1)), visible_box(height, width, 48, resize), GRID)
    np.testing.assert_allclose(compute_coverage(cells, GRID), decoded.reshape(6, 8, 8, 6).mean((1, 3)), atol=0.07)


def test_boxes_outside_the_visible_part_are_left_out() -> None:
    visible = visible_box(100, 300, 50, "crop")
    assert visible == pytest.approx((100, 0, 200, 100))
    cells = boxes_to_cells(boxes((0, 0, 90, 100), (150, 50, 250, 100)), visible, (4, 4))
    np.testing.assert_allclose(cells, [[2, 2, 4, 4]])


def test_intervals_equal_those_of_scipy_for_one_value_per_image() -> None:
    random = np.random.default_rng(2)
    values = (random.random(150) < 0.8).astype(float)
    interval = bootstrap(values, np.arange(150), resamples=4000)
    expected = scipy_stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=random).confidence_interval
    assert interval.mean == values.mean()
    assert interval.low == pytest.approx(expected.low, abs=0.01)
    assert interval.high == pytest.approx(expected.high, abs=0.01)


def test_repeated_values_of_an_image_do_not_narrow_the_interval() -> None:
    random = np.random.default_rng(3)
    values = random.random(80)
    once = bootstrap(values, np.arange(80))
    repeated = bootstrap(np.repeat(values, 10), np.repeat(np.arange(80), 10))
    assert (repeated.low, repeated.high) == pytest.approx((once.low, once.high))
    independent = bootstrap(np.repeat(values, 10), np.arange(800))
    assert independent.high - independent.low < 0.5 * (once.high - once.low)
    assert bootstrap(np.array([0.5, 1.0]), np.array([7, 7])) == (0.75, 0.75, 0.75)


def _png(pixels: np.ndarray) -> bytes:
    import io

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()
