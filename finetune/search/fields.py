"""The fields of samples that an index keeps: their names, their kinds, and their values from a sample's json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pretrain.data.filter_expression import get_value
from pretrain.errors import ConfigError

Kind = Literal["float", "int", "bool", "str"]

TEXT_BYTES = 65535
"""Most bytes of a text in UTF-8: a limit of Milvus."""
BUILT_IN: dict[str, Kind] = {"key": "str", "source": "str", "caption": "str"}
"""Fields that every index has, and that filters may use."""
MODALITIES = ("image", "audio")
"""What an index may hold, by the name of the tower that encodes it."""


@dataclass(frozen=True)
class Field:
    """A field of the samples' json that the index keeps, for filters and results."""

    name: str
    kind: Kind


def parse_fields(text: str) -> tuple[Field, ...]:
    """Parse what --fields takes: price:float,room:str. Raises ConfigError."""
    fields: list[Field] = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        name, _, kind = (piece.strip() for piece in word.rpartition(":"))
        if not name or kind not in get_args(Kind):
            raise ConfigError(f"--fields {word}: write NAME:KIND, with one of the kinds {', '.join(get_args(Kind))}")
        if name in BUILT_IN or name in {item.name for item in fields}:
            raise ConfigError(
                f"--fields {word}: every index has a field {name}" if name in BUILT_IN else f"--fields has {name} twice"
            )
        fields.append(Field(name, kind))  # type: ignore[arg-type]
    return tuple(fields)


def read_fields(fields: Sequence[Field], values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of an image, and the names of those that the json holds in another kind, which become None.

    A whole number is a float, too. A number in quotes is read as one. A list becomes its items with commas between. Numbers
    become texts where a text is wanted.

    Args:
        fields: the fields of the index.
        values: the json of the sample.
    """
    result: dict[str, Any] = {}
    unfit: list[str] = []
    for item in fields:
        value = get_value(values, item.name)
        result[item.name] = None if value is None else _convert(value, item.kind)
        if value is not None and result[item.name] is None:
            unfit.append(item.name)
    return result, unfit


def _convert(value: Any, kind: Kind) -> Any:
    """Return a value of json as a kind; None where it is of another."""
    if kind == "str":
        return _to_text(value)
    if kind == "bool":
        words = {"true": True, "false": False}
        return words.get(value.strip().lower()) if isinstance(value, str) else value if isinstance(value, bool) else None
    number = _to_number(value)
    if number is None or kind == "float":
        return number if number is None else float(number)
    return int(number) if number == int(number) and has_kind(int(number), "int") else None


def _to_text(value: Any) -> str | None:
    if isinstance(value, list) and all(isinstance(item, str | int | float) for item in value):
        value = ", ".join(map(str, value))
    text = str(value) if isinstance(value, str | int | float) else None
    return text if text is not None and fits(text) else None


def _to_number(value: Any) -> int | float | None:
    """Return a finite number, also of a text that is one; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = value if isinstance(value, int) else int(value) if isinstance(value, str) else value
    except ValueError:
        try:
            number = float(value)  # int() refuses "12.5"
        except ValueError:
            return None
    try:
        return number if math.isfinite(number) else None
    except OverflowError:  # a whole number that no float can hold
        return None


def has_kind(value: Any, kind: str) -> bool:
    """Return whether a value can be stored as a kind."""
    if kind == "float":
        return isinstance(value, float) and math.isfinite(value)
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
    return isinstance(value, bool if kind == "bool" else str)


def fits(text: str) -> bool:
    """Return whether a text is short enough, and can be encoded."""
    try:
        return len(text.encode()) <= TEXT_BYTES
    except UnicodeEncodeError:
        return False
