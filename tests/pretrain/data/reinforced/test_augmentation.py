"""Stored augmentations are applied as torchvision applies them, bit for bit, and are checked before."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F
from torchvision.transforms.autoaugment import RandAugment, _apply_op

from pretrain.data import BadSample
from pretrain.data.reinforced.augmentation import (
    OPERATIONS,
    Augmentation,
    apply_augmentation,
    fit_box,
    parse_augmentation,
    read_augmentations,
)
from tests.support.reinforced import pixels


def reference(
    image: np.ndarray, box: list[int], operations: list[tuple[str, float]], size: int, flip: bool = False
) -> np.ndarray:
    """Apply an augmentation with torchvision's own functions."""
    out = F.resized_crop(Image.fromarray(image), *box, [size, size], InterpolationMode.BICUBIC)
    out = F.hflip(out) if flip else out
    for name, magnitude in operations:
        magnitude = magnitude * size / 224 if name.startswith("Translate") else magnitude
        out = _apply_op(out, name, magnitude, InterpolationMode.NEAREST, None)
    return np.array(out)


def magnitudes(name: str) -> list[float]:
    """Return magnitudes that torchvision's RandAugment gives an operation on the images of the teachers."""
    values, is_signed = RandAugment()._augmentation_space(31, (224, 224))[name]
    numbers = [float(values[i]) for i in (0, 9, 20, 30)] if values.ndim else [0.0]
    return numbers + [-number for number in numbers] if is_signed else numbers


@pytest.mark.parametrize("number", range(len(OPERATIONS)), ids=OPERATIONS)
def test_each_operation_is_that_of_torchvision(number: int) -> None:
    image, box, name = pixels(40), [3, 5, 41, 88], OPERATIONS[number]
    for magnitude in magnitudes(name):
        augmentation = parse_augmentation([box, [[number, magnitude]]])
        assert np.array_equal(apply_augmentation(image, augmentation, 224), reference(image, box, [(name, magnitude)], 224))


@pytest.mark.parametrize("flip", [False, True])
def test_crop_flip_and_several_operations(flip: bool) -> None:
    for i, box in enumerate(([0, 0, 51, 62], [10, 20, 30, 16], [2, 0, 224 - 180, 3], [49, 61, 1, 1])):
        image = pixels(2)
        numbers = [(i + 5) % 14, (3 * i + 7) % 14]
        names = [(OPERATIONS[n], magnitudes(OPERATIONS[n])[-1]) for n in numbers]
        operations = [[n, magnitude] for n, (_, magnitude) in zip(numbers, names, strict=True)]
        box = [min(box[0], 50), min(box[1], 60), min(box[2], len(image)), box[3]]
        augmentation = parse_augmentation([box, flip, operations])
        size = 32 + 64 * i
        if any(name.startswith("Translate") for name, _ in names):
            size = 224
        assert np.array_equal(apply_augmentation(image, augmentation, size), reference(image, box, names, size, flip))


def test_translations_are_scaled_to_the_size_of_the_student() -> None:
    image = pixels(9)
    for number, axis in ((3, 1), (4, 0)):
        for magnitude in (30.45317268371582, -101.5):
            moved = apply_augmentation(image, parse_augmentation([[0, 0, 40, 40], [[number, magnitude]]]), 112)
            still = apply_augmentation(image, parse_augmentation([[0, 0, 40, 40]]), 112)
            shift = round(int(magnitude) / 2)
            expected = np.zeros_like(still)
            to, of = (slice(shift, None), slice(None, -shift)) if shift > 0 else (slice(None, shift), slice(-shift, None))
            index = ((slice(None), to), (slice(None), of)) if axis == 1 else ((to,), (of,))
            expected[index[0]] = still[index[1]]
            assert np.array_equal(moved, expected)


def test_all_that_is_stored_is_read_as_text_or_list() -> None:
    # The beginning of a sample as it is published
    entries: list[Any] = [[[32, 291, 657, 709], [[2, -0.09000000357627869], [4, -30.45317268371582]]], [[1, 2, 3, 4], None]]
    for value in (json.dumps(entries), entries):
        read = read_augmentations({"paug.json": json.dumps({"param_aug": value}).encode()})
        assert parse_augmentation(read[0]) == Augmentation(
            (32, 291, 657, 709), False, (("ShearY", -0.09000000357627869), ("TranslateY", -30.45317268371582))
        )
        assert parse_augmentation(read[1]) == Augmentation((1, 2, 3, 4), False, ())
    assert parse_augmentation([[0, 0, 1, 1], True]).is_flipped


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"param_aug": null}',
        b'{"param_aug": []}',
        b'{"param_aug": "[[1"}',
        b'{"param_aug": "{}"}',
        b'{"param_aug": 3}',
        b'{"param_aug": "' + b"[" * 100_000 + b'"}',
        b" " * 300_000,
    ],
)
def test_a_member_that_holds_no_augmentations_is_bad(content: bytes) -> None:
    with pytest.raises(BadSample):
        read_augmentations({"paug.json": content})


@pytest.mark.parametrize(
    "entry",
    [
        3,
        [],
        [[0, 0, 1]],
        [[0, 0, 1, 0]],
        [[-1, 0, 1, 1]],
        [[0, 0, 1, 1.0]],
        [[0, 0, 1, True]],
        [[0, 0, 1, 1], [], []],
        [[0, 0, 1, 1], [[14, 0.0]]],
        [[0, 0, 1, 1], [[-1, 0.0]]],
        [[0, 0, 1, 1], [[1.0, 0.0]]],
        [[0, 0, 1, 1], [["Rotate", 0.0]]],
        [[0, 0, 1, 1], [[5, math.nan]]],
        [[0, 0, 1, 1], [[5, math.inf]]],
        [[0, 0, 1, 1], [[5, None]]],
        [[0, 0, 1, 1], [[10, 9]]],
        [[0, 0, 1, 1], [[0, 0]] * 17],
        [[0, 0, 1, 1], {"a": 1}],
    ],
)
def test_an_augmentation_that_cannot_be_applied_is_bad(entry: Any) -> None:
    with pytest.raises(BadSample, match="augmentation unreadable"):
        parse_augmentation(entry)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | st.text(max_size=3),
    lambda x: st.lists(x, max_size=4),
)


@given(json_values | st.lists(st.lists(st.integers(0, 60), min_size=4, max_size=4) | st.booleans() | json_values, max_size=3))
def test_any_json_is_applied_or_bad(entry: Any) -> None:
    image = pixels(0)
    try:
        augmentation = parse_augmentation(entry)
        box = fit_box(augmentation.box, *image.shape[:2], {})
    except BadSample:
        return
    assert apply_augmentation(image, augmentation._replace(box=box), 16).shape == (16, 16, 3)


def test_boxes_follow_an_image_that_was_stored_smaller() -> None:
    original = {"original_height": 400, "original_width": 800}
    assert fit_box((0, 0, 400, 800), 100, 200, original) == (0, 0, 100, 200)
    assert fit_box((40, 100, 200, 300), 100, 200, original) == (10, 25, 50, 75)
    assert fit_box((399, 799, 1, 1), 100, 200, original) == (99, 199, 1, 1)
    assert fit_box((1, 2, 3, 4), 400, 800, original) == (1, 2, 3, 4)
    assert fit_box((96, 0, 4, 200), 100, 200, {"original_height": None, "original_width": "x"}) == (96, 0, 4, 200)
    for box, fields in (((97, 0, 4, 200), {}), ((0, 1, 100, 200), {}), ((300, 0, 101, 1), original)):
        with pytest.raises(BadSample, match="augmentation outside the image"):
            fit_box(box, 100, 200, fields)
