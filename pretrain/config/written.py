"""What a field takes of a value: its text as it was written, and decimal numbers."""

from __future__ import annotations

import re
import types
import typing
from typing import Any

from pretrain.config.values import Items, Section, Source, with_text_keys
from pretrain.errors import ConfigError


def written_text(values: dict[str, Any], key: str) -> Any:
    """Return the value of a `text_field` of this name: its text as it was written, else list, mapping or None."""
    source = values.source(key) if isinstance(values, Section) else None
    return as_text(values.get(key), source, ())


def as_written(hint: Any, value: Any, source: Source | None, numbers: tuple[str, ...] | None = None) -> Any:
    """Return the value that a field of this type takes: text as it was written, and decimal numbers.

    numbers: of a `text_field`, the keys of its mappings that hold numbers; None for other fields. Null empties a list or a
    mapping. Raises ConfigError where the value is neither text nor readable.
    """
    if numbers is not None:
        return as_text(value, source, numbers)
    inner = next((arg for arg in typing.get_args(hint) if arg is not type(None)), hint) if is_union(hint) else hint
    text = source.text if source is not None else None
    if inner is str or (typing.get_origin(inner) is typing.Literal and isinstance(typing.get_args(inner)[0], str)):
        return text if text is not None and value is not None else value
    if source is not None and source.error:
        raise ConfigError(source.error)
    if inner in (int, float) and text is not None and isinstance(value, int | float) and not isinstance(value, bool):
        if re.fullmatch(r"[+-]?[0-9][0-9_]*", text):  # YAML reads 010 as 8
            return inner(text.replace("_", ""))
        return text if ":" in text else value  # YAML reads 10:30 as 630
    if typing.get_origin(inner) is list:
        argument = typing.get_args(inner)[0]
        if isinstance(value, Items):
            return [as_written(argument, v, s) for v, s in zip(value, value.sources, strict=True)]
        return [] if value is None and inner is hint else value
    if typing.get_origin(inner) is dict:
        argument = typing.get_args(inner)[1]
        if value is None and inner is hint:
            return {}
        if isinstance(value, Section):
            section = with_text_keys(value)
            return {k: as_written(argument, v, section.source(k)) for k, v in section.items()}
    return plain(value)


def plain(value: Any) -> Any:
    """Return dicts and lists without sources, which OmegaConf takes."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list) else value


def as_text(value: Any, source: Source | None, numbers: tuple[str, ...]) -> Any:
    """Return the value of a `text_field`: its text, or lists and mappings of text."""
    is_block = source is not None and source.text is not None and not source.text.lstrip().startswith(("{", "["))
    if isinstance(value, Section) and value and not is_block and not all(v is None for v in value.values()):
        return {k: plain(v) if k in numbers else as_text(v, value.source(k), numbers) for k, v in value.items()}
    if isinstance(value, Items) and not is_block:
        return [as_text(v, s, numbers) for v, s in zip(value, value.sources, strict=True)]
    if value is None or source is None or source.text is None:
        return plain(value)
    if source.error and re.fullmatch(r"\[.*,.*\]", source.text, re.DOTALL):
        raise ConfigError(f"{source.error}; in a list, put patterns in quotes: ['*.tar', '{{0000..0099}}.tar']")
    if source.error and re.fullmatch(r"\{\s*\w+\s*:\s.*\}", source.text, re.DOTALL):
        raise ConfigError(f"{source.error}; in a mapping, put values with braces in quotes: {{image: '{{a,b}}'}}")
    return source.text


def is_union(hint: Any) -> bool:
    """Return whether a type is a union, as in `int | None`."""
    return typing.get_origin(hint) in (typing.Union, types.UnionType)
