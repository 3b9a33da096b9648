"""Checks of the numbers in a configuration against the intervals that its fields allow."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from pretrain.errors import ConfigError

SEED = f"[0, {2**64 - 1}]"
"""The interval of a seed, for check_numbers."""


FLOAT32_MAX = 3.4028234663852886e38
"""The largest number that a tensor of float32 holds."""


def check_numbers(config: Any, section: str, **intervals: str) -> None:
    """Refuse numbers of a Config that lie outside their interval. Raises ConfigError, which names the key.

    section: the key of the Config. intervals: by field, as in "[0, 1)" or "(0, inf)"; they hold for each item of a list and
    each value of a mapping. Whatever the field, NaN, infinity, numbers beyond float32 and whole numbers of more than 64 bits
    are refused.
    """
    for spec in fields(config):
        value = getattr(config, spec.name)
        interval = intervals.get(spec.name, "(-inf, inf)")
        for number in _numbers(value):
            if not is_inside(number, interval):
                if isinstance(number, float) and math.isfinite(number) and abs(number) > FLOAT32_MAX:
                    interval = interval.replace("inf", f"{FLOAT32_MAX:.2g}")
                key = f"{section}.{spec.name}" if section else spec.name
                noun = "numbers" if isinstance(value, list | dict) else "a number"
                raise ConfigError(f"{key}={value} must be {describe_interval(interval, noun)}")


def _numbers(value: Any) -> Iterator[int | float]:
    """Yield the numbers of a field's value: itself, or those in its lists and mappings."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)


def is_inside(number: int | float, interval: str) -> bool:
    """Return whether a number lies in an interval, and is neither NaN nor beyond float32 or 64 bits."""
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    if not abs(number) <= FLOAT32_MAX if isinstance(number, float) else not -(2**63) <= number < 2**64:
        return False
    above = low <= number if interval[0] == "[" else low < number
    return above and (number <= high if interval[-1] == "]" else number < high)


def describe_interval(interval: str, noun: str) -> str:
    """Describe an interval in words: "[0, 1)" of "a number" is "a number from 0 to below 1"."""
    low, high = (bound.strip() for bound in interval[1:-1].split(","))
    words = [] if low == "-inf" else [f"{'from' if interval[0] == '[' else 'above'} {low}"]
    if high != "inf":
        words.append(f"{'to' if interval[-1] == ']' else 'to below'} {high}")
    elif words and interval[0] == "[":
        words = [f"at least {low}"]
    return f"{noun} {' '.join(words)}" if words else f"{noun}: neither NaN, infinite nor beyond 64 bits"
