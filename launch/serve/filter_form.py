"""The filters of the page: inputs for each field of the index, and the condition that they make.

    controls = build_controls(index.describe().fields, {"to.price": "900", "is.room": "living"})
    build_condition(controls, "exists size")         '(exists size) and price <= 900 and room == "living"'

A number has two inputs, from.NAME and to.NAME; a text and a truth value have one, is.NAME. Images without a value are left out
by a filter on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from finetune.search.fields import Field, Kind
from finetune.search.vector_index import VectorIndex
from pretrain.data.filter_parser import parse_filter
from pretrain.errors import ConfigError

SUGGESTIONS = 30
"""Most values of a text that the page suggests."""


@dataclass(frozen=True)
class Control:
    """The inputs of one field, and what stands in them."""

    name: str
    kind: Kind
    low: str = ""
    high: str = ""
    value: str = ""
    suggestions: list[str] = field(default_factory=list)

    @property
    def is_set(self) -> bool:
        """Whether it makes a condition."""
        return any(text.strip() for text in (self.low, self.high, self.value))


def build_controls(
    fields: Sequence[Field], parameters: Mapping[str, str], suggestions: Mapping[str, list[str]] | None = None
) -> list[Control]:
    """Return the inputs of the fields; those whose name cannot be written in a condition are left out."""
    controls = []
    for item in fields:
        low, high, value = (parameters.get(f"{prefix}.{item.name}", "") for prefix in ("from", "to", "is"))
        if "`" not in item.name:
            controls.append(Control(item.name, item.kind, low, high, value, (suggestions or {}).get(item.name, [])))
    return controls


def list_suggestions(index: VectorIndex) -> dict[str, list[str]]:
    """Return the values of each text field that has few."""
    return {item.name: index.list_values(item.name, SUGGESTIONS) for item in index.describe().fields if item.kind == "str"}


def build_condition(controls: Sequence[Control], condition: str = "", where: str = "where") -> str | None:
    """Return the conditions of the inputs and another one, joined by and; None where there are none.

    where: what messages call the input of `condition`.

    Raises ConfigError for a condition that is none, or a number that is none.
    """
    conditions = []
    if condition.strip():
        parse_filter(condition, where)
        conditions.append(condition.strip())
    for control in controls:
        name = f"`{control.name}`"
        if control.kind in ("float", "int"):
            for text, operator in ((control.low, ">="), (control.high, "<=")):
                if text.strip():
                    conditions.append(f"{name} {operator} {_read_number(text, control.name)}")
        elif control.kind == "bool" and control.value in ("true", "false"):
            conditions.append(f"{name} == {control.value}")
        elif control.kind == "str" and control.value.strip():
            escaped = control.value.replace("\\", "\\\\").replace('"', '\\"')
            conditions.append(f'{name} == "{escaped}"')
    if len(conditions) > 1 and condition.strip():
        conditions[0] = f"({conditions[0]})"
    return " and ".join(conditions) or None


def _read_number(text: str, name: str) -> str:
    """Return a number as conditions write it. Raises ConfigError."""
    try:
        number = float(text.strip().replace("_", ""))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{name}: {text.strip()[:40]!r} is no number")
    return str(int(number)) if number == int(number) and abs(number) < 2**53 else repr(number)
