"""Types of command-line options for argparse: numbers within an interval, counts of processes, paths.

    parser.add_argument("--workers", type=workers, metavar="N")

`--workers 0` then ends the command with one line: argument --workers: '0' must be a whole number from 1 to 4096. Numbers are
spelled as in configurations: neither underscores nor digits of other scripts.
"""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

from pretrain.config.numbers import SEED, describe_interval, is_inside
from pretrain.config.spelling import SpellingError, parse_number


class NumberType:
    """A number within an interval, for `type=` of an option.

    Args:
        kind: int or float.
        interval: as check_numbers takes them: "[1, 4096]", "(0, inf)".
    """

    def __init__(self, kind: type[int] | type[float], interval: str) -> None:
        self.kind, self.interval = kind, interval

    def __call__(self, text: str) -> int | float:
        """Return the number that the text of an option stands for. Raises ArgumentTypeError, with what is valid."""
        try:
            number = parse_number(text)
        except SpellingError:
            number = math.nan
        if not is_inside(number, self.interval) or (self.kind is int and isinstance(number, float)):
            raise argparse.ArgumentTypeError(f"{text[:100]!r} must be {self.describe()}")
        return self.kind(number)

    def describe(self) -> str:
        """Describe the valid numbers: "a whole number from 1 to 4096"."""
        return describe_interval(self.interval, "a whole number" if self.kind is int else "a number")


def whole_number(low: int, high: int = 10**9) -> NumberType:
    """Build the type of whole numbers from `low` to `high`."""
    return NumberType(int, f"[{low}, {high}]")


positive_int = whole_number(1)
count = whole_number(0)
workers = whole_number(1, 4096)
"""Processes on a machine: more would exhaust it."""
seed = NumberType(int, SEED)
seconds = NumberType(float, f"[0, {10**6}]")
"""A time, up to eleven days: the operating system's clocks take no infinite ones."""


def process_count(text: str) -> str:
    """Return the processes of a node: a number, or gpus for one per GPU. Raises ArgumentTypeError."""
    if text in ("gpu", "gpus"):
        return text
    try:
        return str(workers(text))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or gpus for one per GPU") from None


def fractions(text: str) -> list[float]:
    """Return numbers from 0 to 1 with commas between them. Raises ArgumentTypeError."""
    fraction = NumberType(float, "[0, 1]")
    try:
        return [float(fraction(word.strip())) for word in text.split(",")]
    except argparse.ArgumentTypeError:
        message = f"{text[:100]!r} must be numbers from 0 to 1 with commas between, for example 0,0.5,1"
        raise argparse.ArgumentTypeError(message) from None


def endpoint(text: str) -> str:
    """Return the HOST:PORT of a server. Raises ArgumentTypeError."""
    port = re.fullmatch(r"[^\s/@]*[^\s/@:]:([0-9]{1,5})", text)
    if port is None or not 1 <= int(port[1]) <= 65535:
        raise argparse.ArgumentTypeError(f"{text[:100]!r} must be HOST:PORT, with a port from 1 to 65535")
    return text


def nonempty(word: str) -> str:
    """Return a word that is not empty: an empty one comes from a variable of the shell that is not set."""
    if not word.strip():
        raise argparse.ArgumentTypeError(f"{word!r} is empty")
    return word


def nonempty_path(word: str) -> Path:
    """Return a path; an empty one would be the current folder. Raises ArgumentTypeError."""
    return Path(nonempty(word))
