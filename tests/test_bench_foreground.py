"""What tests/bench/foreground.py takes for the foreground of a picture."""

import numpy as np
import pytest

from tests.bench.foreground import cover_cells, mark_foreground


def test_white_that_the_border_does_not_reach_is_foreground() -> None:
    pixels = np.full((40, 60, 3), 255, np.uint8)
    pixels[10:30, 20:40] = (200, 30, 30)
    pixels[15:25, 25:35] = 255  # a white hole
    pixels[0, :5] = 240  # nearly white
    expected = np.zeros((40, 60), bool)
    expected[10:30, 20:40] = True
    assert np.array_equal(mark_foreground(pixels), expected)


def test_a_thing_that_touches_the_border_does_not_end_the_background() -> None:
    pixels = np.full((20, 20, 3), 255, np.uint8)
    pixels[:, 8:12] = 0  # two halves of white
    expected = np.zeros((20, 20), bool)
    expected[:, 8:12] = True
    assert np.array_equal(mark_foreground(pixels), expected)


def test_cells_are_those_of_the_visible_part() -> None:
    foreground = np.zeros((40, 80), bool)
    foreground[:20, 20:40] = True
    assert cover_cells(foreground, (20, 0, 60, 40), (2, 2)).tolist() == [[1, 0], [0, 0]]
    assert cover_cells(foreground, (0, -20, 80, 60), (1, 1)) == pytest.approx(20 * 20 / 80 / 80)
