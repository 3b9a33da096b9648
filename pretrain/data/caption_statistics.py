"""Lengths of captions, and captions that are hardly meant to be captions: whole documents, lists, markup, placeholders."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pretrain.data.captions import count_lines

LONG_CAPTION = 1000
"""Characters; a longer caption is odd. The text encoder of CLIP reads about 300."""

MANY_CAPTIONS = 20
"""A sample with more captions is odd."""

SEVERAL_LINES = "of several lines, read as one caption"

_MAX_NAMED = 10  # samples named per oddity; all are counted
_PLACEHOLDERS = frozenset({"nan", "none", "null", "n/a", "na", "undefined", "untitled", "no caption", "caption"})
_PATTERNS = {
    "with markup": re.compile(
        r"</?(html|head|body|div|p|br|a|b|i|em|strong|span|img|table|td|li|ul|script)\b[^<>]*>|&[a-z]+;", re.I
    ),
    "with a url": re.compile(r"\bhttps?://|\bwww\.", re.I),
    "that are file names": re.compile(r"^\S+\.(jpe?g|png|webp|gif|bmp|tiff?)$", re.I),
    "with control characters": re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]"),
    "with characters that could not be decoded (U+FFFD)": re.compile("\ufffd"),
}


def find_oddities(caption: str) -> list[str]:
    """Return what is odd about a caption whose white space is normalized, each as the end of "captions ..."."""
    oddities = [name for name, pattern in _PATTERNS.items() if pattern.search(caption[: 1 << 16])]
    if len(caption) > LONG_CAPTION:
        oddities.append(f"longer than {LONG_CAPTION:,} characters")
    if caption.casefold() in _PLACEHOLDERS:
        oddities.append("that are placeholders, such as nan")
    elif not any(character.isalnum() for character in caption):
        oddities.append("without a letter or digit")
    return oddities


@dataclass
class CaptionStatistics:
    """Lengths of captions in characters, and odd captions by kind."""

    lengths: Counter[int] = field(default_factory=Counter)
    """Number of captions of each length."""
    longest: str = ""
    """The sample with the longest caption."""
    odd: Counter[str] = field(default_factory=Counter)
    """Number of odd captions by kind; a caption may have several oddities."""
    names: dict[str, list[str]] = field(default_factory=dict)
    """The first few samples of each kind."""

    def add_sample(self, name: str, captions: Sequence[str], text: bytes | None = None) -> None:
        """Add the captions of a sample.

        Args:
            name: of the sample.
            captions: with white space normalized.
            text: the content of the file that was read as one caption; None if there is none.
        """
        oddities = [oddity for caption in captions for oddity in find_oddities(caption)]
        if text is not None and (lines := count_lines(text)) > 1:
            oddities.append(SEVERAL_LINES)
            name = f"{name} ({lines:,} lines)"
        if len(captions) > MANY_CAPTIONS:
            oddities.append(f"in samples with more than {MANY_CAPTIONS}")
        for caption in captions:
            if len(caption) > max(self.lengths, default=-1):
                self.longest = name
            self.lengths[len(caption)] += 1
        for oddity, count in Counter(oddities).items():
            self.odd[oddity] += count
            self._add_names(oddity, [name])

    def add(self, other: CaptionStatistics) -> None:
        """Add the captions of another collection."""
        if max(other.lengths, default=-1) > max(self.lengths, default=-1):
            self.longest = other.longest
        self.lengths += other.lengths
        self.odd += other.odd
        for oddity, names in other.names.items():
            self._add_names(oddity, names)

    def _add_names(self, oddity: str, names: list[str]) -> None:
        known = self.names.setdefault(oddity, [])
        known += names[: _MAX_NAMED - len(known)]

    def compute_quantile(self, fraction: float) -> int:
        """Return the length that `fraction` of the captions do not exceed."""
        rank, total = fraction * self.lengths.total(), 0
        for length, count in sorted(self.lengths.items()):
            total += count
            if total >= rank:
                return length
        return 0

    def as_dict(self) -> dict[str, Any]:
        """Return the statistics as values of JSON."""
        return {
            "count": self.lengths.total(),
            "shortest": self.compute_quantile(0),
            "median": self.compute_quantile(0.5),
            "p99": self.compute_quantile(0.99),
            "longest": self.compute_quantile(1),
            "longest_sample": self.longest,
            "odd": dict(self.odd),
            "names": self.names,
        }

    def format_lines(self) -> list[str]:
        """Return lines of text for the console; none without captions."""
        if not self.lengths:
            return []
        low, middle, high, top = (self.compute_quantile(q) for q in (0, 0.5, 0.99, 1))
        count = self.lengths.total()
        lines = [
            f"{count:,} {'caption' if count == 1 else 'captions'} of {low:,} to {top:,} characters: "
            f"median {middle:,}, 99% up to {high:,}, the longest in {self.longest}"
        ]
        for oddity, count in self.odd.most_common():
            names = ", ".join(self.names[oddity][:3]) + (", ..." if count > 3 else "")
            lines.append(f"  {count:,} {'caption' if count == 1 else 'captions'} {oddity}: {names}")
        return lines
