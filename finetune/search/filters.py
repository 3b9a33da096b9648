"""Filters of an index: bound to the types of its fields, then translated for a backend.

    bound = bind(parse_filter(text, "--filter"), {"price": "float", "room": "str"}, "--filter")
    to_milvus(bound, {"price": "f_price", ...})    an expression of Milvus, with every value quoted here
    to_mask(bound, table)                          which rows of an Arrow table match

Both find what `Filter.matches` finds, row by row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pretrain.data.filter_expression import (
    And,
    Comparison,
    Exists,
    FieldComparison,
    Filter,
    Like,
    Membership,
    Or,
    Value,
    is_number,
)
from pretrain.errors import ConfigError, closest

FieldKinds = Mapping[str, str]
"""The kind of each field, by name: float, int, bool or str."""

INT64 = (-(2**63), 2**63 - 1)
_NOUNS = {"float": "a number", "int": "a whole number", "bool": "true or false", "str": "a text"}

# ---------------------------------------------------------------------------------------------------------------------
# Binding to types


def bind(condition: Filter, kinds: FieldKinds, where: str) -> Filter:
    """Return the condition with its values in the types of the fields.

    Comparisons of whole numbers with fractions become comparisons of whole numbers, so that no backend rounds.

    Args:
        condition: as parsed.
        kinds: of the index's fields.
        where: the option that holds the condition, for messages.

    Raises:
        ConfigError: it names a field that is not there, or compares a field with a value of another kind.
    """
    for name in condition.names():
        if name not in kinds:
            known = list(kinds)
            raise ConfigError(f"{where}: the index has no field {name!r}{closest(name, known)}; it has {', '.join(known)}")
    return _bind(condition, kinds, where)


def _bind(condition: Filter, kinds: FieldKinds, where: str) -> Filter:
    if isinstance(condition, And | Or):
        return type(condition)(tuple(_bind(part, kinds, where) for part in condition.parts))
    if isinstance(condition, Comparison):
        kind = kinds[condition.name]
        _check_kind(condition.name, kind, condition.value, where)
        return _bind_number(condition, kind) if is_number(condition.value) else condition
    if isinstance(condition, Membership):
        kind = kinds[condition.name]
        for value in condition.values:
            _check_kind(condition.name, kind, value, where)
        values = (_to_kind(value, kind) for value in condition.values)
        return Membership(condition.name, tuple(value for value in values if value is not None), condition.is_negated)
    if isinstance(condition, Like):
        if kinds[condition.name] != "str":
            raise ConfigError(f"{where}: like needs a text, and {condition.name} is {_NOUNS[kinds[condition.name]]}")
        return Like(condition.name, _escape_lone_backslashes(condition.pattern), condition.is_negated)
    if isinstance(condition, FieldComparison):
        pair = kinds[condition.name], kinds[condition.other]
        if pair[0] != pair[1] and not set(pair) <= {"float", "int"}:
            raise ConfigError(f"{where}: {condition.name} ({pair[0]}) and {condition.other} ({pair[1]}) cannot be compared")
        if pair[0] == "bool" and condition.operator not in ("==", "!="):
            raise ConfigError(f"{where}: {condition.name} and {condition.other} are true or false, which have no order")
    return condition


def _check_kind(name: str, kind: str, value: Value, where: str) -> None:
    of_value = "bool" if isinstance(value, bool) else "str" if isinstance(value, str) else "float"
    if of_value != ("float" if kind == "int" else kind):
        shown = str(value).lower() if isinstance(value, bool) else repr(value)
        raise ConfigError(f"{where}: {name} is {_NOUNS[kind]} and cannot be compared with {shown:.60}")


def _to_kind(value: Value, kind: str) -> Value | None:
    """Return a value of a list in the type of its field; None where no value of the field can equal it."""
    if kind == "float":
        return float(value)
    if kind == "int":
        return int(value) if value == int(value) and INT64[0] <= value <= INT64[1] else None
    return value


def _bind_number(condition: Comparison, kind: str) -> Filter:
    name, operator, value = condition.name, condition.operator, condition.value
    assert is_number(value)
    if kind == "float":
        return Comparison(name, operator, float(value))
    if value != int(value):
        if operator in ("==", "!="):
            return Membership(name, (), is_negated=operator == "!=")
        value = math.floor(value) if operator in ("<", "<=") else math.ceil(value)
        operator = "<=" if operator in ("<", "<=") else ">="
    value = int(value)
    if not INT64[0] <= value <= INT64[1]:
        holds = operator == "!=" or ((operator in ("<", "<=")) == (value > 0) and operator != "==")
        return Membership(name, (), is_negated=holds)
    return Comparison(name, operator, value)


def _escape_lone_backslashes(pattern: str) -> str:
    """Return a pattern in which each backslash escapes what follows it."""
    return re.sub(r"\\[%_\\]|\\", lambda match: match[0] if len(match[0]) > 1 else r"\\", pattern)


# ---------------------------------------------------------------------------------------------------------------------
# Milvus


def to_milvus(condition: Filter, columns: Mapping[str, str]) -> str:
    """Translate a bound condition to an expression of Milvus.

    Null is tested for wherever it could make a difference, so that nothing depends on how a version treats it.

    Args:
        condition: bound.
        columns: the column of each field.
    """
    if isinstance(condition, And | Or):
        word = " and " if isinstance(condition, And) else " or "
        return word.join(f"({to_milvus(part, columns)})" for part in condition.parts)
    if isinstance(condition, FieldComparison):
        a, b = columns[condition.name], columns[condition.other]
        return f"{a} is not null and {b} is not null and {a} {condition.operator} {b}"
    assert isinstance(condition, Comparison | Membership | Like | Exists)
    column = columns[condition.name]
    if isinstance(condition, Exists):
        return f"{column} is null" if condition.is_negated else f"{column} is not null"
    if isinstance(condition, Comparison):
        test = f"{column} {condition.operator} {_quote(condition.value)}"
        return f"{column} is not null and {test}" if condition.operator == "!=" else test
    if isinstance(condition, Membership):
        if not condition.values:
            return f"{column} is not null" if condition.is_negated else f"{column} is null and {column} is not null"
        test = f"{column} in [{', '.join(map(_quote, condition.values))}]"
    else:
        test = f"{column} like {_quote(condition.pattern)}"
    return f"{column} is not null and not ({test})" if condition.is_negated else test


_SPECIAL = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def _quote(value: Value) -> str:
    """Return a value as Milvus's expressions write it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + "".join(_SPECIAL.get(character, character) for character in value) + '"'
    return repr(value)


# ---------------------------------------------------------------------------------------------------------------------
# Arrow


def to_mask(condition: Filter, table: pa.Table) -> NDArray[np.bool_]:
    """Return which rows of a table, whose columns have the names of the fields, a bound condition is true for."""
    mask = _evaluate(condition, table)
    filled = pc.fill_null(mask, False)
    array = filled.combine_chunks() if isinstance(filled, pa.ChunkedArray) else filled
    return np.asarray(array.to_numpy(zero_copy_only=False), dtype=np.bool_)


_ARROW: dict[str, Callable[[Any, Any], Any]] = {
    "==": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}


def _evaluate(condition: Filter, table: pa.Table) -> Any:
    """Return a bound condition's truth values, with null where it is neither true nor false."""
    if isinstance(condition, And | Or):
        combine = pc.and_kleene if isinstance(condition, And) else pc.or_kleene
        result = _evaluate(condition.parts[0], table)
        for part in condition.parts[1:]:
            result = combine(result, _evaluate(part, table))
        return result
    if isinstance(condition, FieldComparison):
        return _ARROW[condition.operator](table[condition.name], table[condition.other])
    assert isinstance(condition, Comparison | Membership | Like | Exists)
    column = table[condition.name]
    if isinstance(condition, Exists):
        return pc.is_null(column) if condition.is_negated else pc.is_valid(column)
    if isinstance(condition, Comparison):
        return _ARROW[condition.operator](column, pa.scalar(condition.value, column.type))
    if isinstance(condition, Membership):
        result = pc.is_in(column, value_set=pa.array(condition.values, column.type))
    else:
        result = pc.match_like(column, condition.pattern)
    return pc.and_(pc.is_valid(column), pc.invert(result)) if condition.is_negated else result
