"""The values that text without quotes stands for: numbers, true, false and null as in YAML 1.2's core schema.

The YAML parser follows YAML 1.1, in which 010 is 8, 1_000 is 1000, 10:30 is 630 and `on` is true. Here 010 is ten, and the
others are text. Source: https://yaml.org/spec/1.2.2/#103-core-schema, but for octal numbers (0o17), which are text.
"""

from __future__ import annotations

import re
from typing import Any

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOLEAN = re.compile(r"true|True|TRUE|false|False|FALSE")
_DECIMAL = re.compile(r"[-+]?[0-9]+")
_HEXADECIMAL = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

_MAX_DIGITS = 1000
"""Python neither reads nor prints more than 4,300."""

_SWITCHES = {"true": True, "yes": True, "on": True, "y": True, "1": True}
_SWITCHES |= {"false": False, "no": False, "off": False, "n": False, "0": False}

_LIKE_A_NUMBER = re.compile(r"[-+.,:_'\s]*\d[-+.,:_'\s\d]*")


class SpellingError(ValueError):
    """A number or a truth value that is not written as one.

    Args:
        value: what was given, for the message.
        note: the end of the message: how it is written.
    """

    def __init__(self, value: Any, note: str = "") -> None:
        super().__init__(value, note)
        self.value, self.note = value, note


def parse_scalar(text: str) -> Any:
    """Return the number, the truth value, None or the text that a text without quotes stands for."""
    if _NULL.fullmatch(text):
        return None
    if _BOOLEAN.fullmatch(text):
        return text.lower() == "true"
    try:
        return parse_number(text)
    except SpellingError:
        return text


def parse_number(text: str) -> int | float:
    """Return the number that a text stands for. Raises SpellingError where it is none.

    Python would also accept underscores and the digits of other scripts.
    """
    is_hexadecimal = _HEXADECIMAL.fullmatch(text) is not None
    if is_hexadecimal or _DECIMAL.fullmatch(text):
        if len(text) > _MAX_DIGITS:
            raise SpellingError(text, f"; it has {len(text):,} digits")
        return int(text, 16 if is_hexadecimal else 10)
    if not _FLOAT.fullmatch(text):
        raise SpellingError(text, "; write numbers in digits 0-9: 1000, 0.5, 1e-3" if _LIKE_A_NUMBER.fullmatch(text) else "")
    return float(re.sub(r"\.(inf|nan)", r"\1", text.lower()))


def parse_boolean(text: str) -> bool:
    """Return the truth value that a text stands for in a field of type bool. Raises SpellingError where it is none."""
    if text.lower() not in _SWITCHES:
        raise SpellingError(text)
    return _SWITCHES[text.lower()]
