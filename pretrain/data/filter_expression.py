r"""Conditions on the fields of a sample, in a small language of their own; nothing in them is run as code.

    price < 900 and room == "living"
    not (color in ["red", 'blue']) or title like "%sofa%" or exists discount

    filter_parser.parse_filter("price < 900", "--filter").matches({"price": 850})  ->  True

Comparisons are == (or =), !=, <, <=, >, >=, between a field and a number, a text, true or false, or between two fields.
`in [...]`, `not in [...]`, `like` and `not like` take lists and patterns: % stands for any text, _ for one character, \% for
a percent sign. A field of true and false may stand alone. Names hold letters, digits and _; a.b is the field b of the object
a; `any other name` goes between backquotes. Texts stand in either kind of quotes, with \", \', \\, \n, \r and \t.

Logic has three values, as in SQL. A comparison with a field that is missing, null, not a finite number, or of another kind
than what it is compared with is neither true nor false. Neither is its negation; `exists` alone sees whether a field is there.
Negations are moved into the comparisons when a text is parsed, which changes no result, so a tree holds none.

filter_parser.py parses the language; this module is the tree, and evaluates it.
"""

from __future__ import annotations

import math
import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeGuard

Value = float | int | str | bool
"""What a field can be compared with."""

OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_NEGATED = {"==": "!=", "!=": "==", "<": ">=", "<=": ">", ">": "<=", ">=": "<"}

# ---------------------------------------------------------------------------------------------------------------------
# The tree


@dataclass(frozen=True)
class Filter(ABC):
    """A condition. Its subclasses are all that `parse_filter` returns."""

    @abstractmethod
    def evaluate(self, values: Mapping[str, Any]) -> bool | None:
        """Return whether the condition holds for these fields; None where it is neither true nor false."""

    def matches(self, values: Mapping[str, Any]) -> bool:
        """Return whether the condition is true for these fields."""
        return self.evaluate(values) is True

    @abstractmethod
    def negate(self) -> Filter:
        """Return the condition that is true where this one is false."""

    @abstractmethod
    def names(self) -> Iterator[str]:
        """Yield the fields that the condition reads."""


@dataclass(frozen=True)
class _OfOneField(Filter):
    """A condition on one field."""

    name: str

    def names(self) -> Iterator[str]:
        yield self.name


@dataclass(frozen=True)
class Comparison(_OfOneField):
    """A field compared with a value."""

    operator: str
    value: Value

    def evaluate(self, values: Mapping[str, Any]) -> bool | None:
        return _compare(self.operator, get_value(values, self.name), self.value)

    def negate(self) -> Comparison:
        return replace(self, operator=_NEGATED[self.operator])


@dataclass(frozen=True)
class FieldComparison(Filter):
    """A field compared with another field."""

    name: str
    operator: str
    other: str

    def evaluate(self, values: Mapping[str, Any]) -> bool | None:
        return _compare(self.operator, get_value(values, self.name), get_value(values, self.other))

    def negate(self) -> FieldComparison:
        return replace(self, operator=_NEGATED[self.operator])

    def names(self) -> Iterator[str]:
        yield from (self.name, self.other)


@dataclass(frozen=True)
class Membership(_OfOneField):
    """A field that is one of several values, or none of them. All values are of one kind."""

    values: tuple[Value, ...]
    is_negated: bool = False

    def evaluate(self, values: Mapping[str, Any]) -> bool | None:
        value = get_value(values, self.name)
        if value is None or (self.values and not have_one_kind(value, self.values[0])):
            return None
        return (value in self.values) != self.is_negated

    def negate(self) -> Membership:
        return replace(self, is_negated=not self.is_negated)


@dataclass(frozen=True)
class Like(_OfOneField):
    """A text that has, or does not have, the form of a pattern."""

    pattern: str
    is_negated: bool = False

    def evaluate(self, values: Mapping[str, Any]) -> bool | None:
        value = get_value(values, self.name)
        if not isinstance(value, str):
            return None
        return (compile_pattern(self.pattern).fullmatch(value) is not None) != self.is_negated

    def negate(self) -> Like:
        return replace(self, is_negated=not self.is_negated)


@dataclass(frozen=True)
class Exists(_OfOneField):
    """A field that has a value, or has none."""

    is_negated: bool = False

    def evaluate(self, values: Mapping[str, Any]) -> bool:
        return (get_value(values, self.name) is not None) != self.is_negated

    def negate(self) -> Exists:
        return replace(self, is_negated=not self.is_negated)


@dataclass(frozen=True)
class _Compound(Filter):
    """Conditions of which one that is `decisive` decides."""

    parts: tuple[Filter, ...]
    decisive: ClassVar[bool]

    def evaluate(self, values: Mapping[str, Any]) -> bool | None:
        results = [part.evaluate(values) for part in self.parts]
        return self.decisive if self.decisive in results else None if None in results else not self.decisive

    def names(self) -> Iterator[str]:
        for part in self.parts:
            yield from part.names()


@dataclass(frozen=True)
class And(_Compound):
    """Conditions that must all be true."""

    decisive = False

    def negate(self) -> Or:
        return Or(tuple(part.negate() for part in self.parts))


@dataclass(frozen=True)
class Or(_Compound):
    """Conditions of which one must be true."""

    decisive = True

    def negate(self) -> And:
        return And(tuple(part.negate() for part in self.parts))


def get_value(values: Mapping[str, Any], name: str) -> Any:
    """Return the value of a field; None where it is missing or null, or a number that is not finite.

    `a.b` is the field of this name, or else the field b of the object a.
    """
    value: Any = values
    if name in values:
        value = values[name]
    else:
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_number(value: Any) -> TypeGuard[int | float]:
    """Return whether a value is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def compile_pattern(pattern: str) -> re.Pattern[str]:
    r"""Return the regular expression of a pattern of `like`, in which a backslash takes %, _ and \ literally."""
    wildcards = {"%": ".*", "_": "."}
    pieces = re.findall(r"\\[%_\\]|.", pattern, re.DOTALL)
    expression = "".join(re.escape(piece[-1]) if len(piece) > 1 else wildcards.get(piece, re.escape(piece)) for piece in pieces)
    return re.compile(expression, re.DOTALL)


def have_one_kind(a: Any, b: Any) -> bool:
    """Return whether two values can be compared: two numbers, two texts, or two of true and false."""
    return (is_number(a) and is_number(b)) or any(isinstance(a, kind) and isinstance(b, kind) for kind in (str, bool))


def _compare(name: str, a: Any, b: Any) -> bool | None:
    if not have_one_kind(a, b) or (isinstance(a, bool) and name not in ("==", "!=")):
        return None
    return OPERATORS[name](a, b)
