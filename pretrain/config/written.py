"""What a field takes of a value: its text as it was written, numbers, or plain values of any type."""

from __future__ import annotations

import re
import types
import typing
from typing import Any

from pretrain.config.spelling import SpellingError, parse_boolean, parse_number, parse_scalar
from pretrain.config.values import Items, Section, Source, with_text_keys
from pretrain.errors import ConfigError


def written_text(values: dict[str, Any], key: str) -> Any:
    """Return the value of a `text_field` of this name: its text as it was written, else list, mapping or None."""
    source = values.source(key) if isinstance(values, Section) else None
    return as_text(values.get(key), source, ())


def as_written(hint: Any, value: Any, source: Source | None, numbers: tuple[str, ...] | None = None) -> Any:
    """Return the value that a field of this type takes: text as it was written, and numbers as spelling.py reads them.

    numbers: of a `text_field`, the keys of its mappings that hold numbers; None for other fields. Null empties a list or a
    mapping. Raises ConfigError where the value is not readable, SpellingError where a number or truth value is none.
    """
    if numbers is not None:
        return as_text(value, source, numbers)
    inner = next((arg for arg in typing.get_args(hint) if arg is not type(None)), hint) if is_union(hint) else hint
    text = source.text if source is not None else None
    if inner is str:
        return text if text is not None and value is not None else value
    if typing.get_origin(inner) is typing.Literal and isinstance(typing.get_args(inner)[0], str):
        chosen = text if text is not None and value is not None else value
        by_lower_case = {str(choice).lower(): choice for choice in typing.get_args(inner)}
        return by_lower_case.get(chosen.lower(), chosen) if isinstance(chosen, str) else chosen
    if inner is Any:
        return as_plain(value, source)
    if source is not None and source.error:
        raise ConfigError(source.error)
    if inner in (int, float, bool):
        return _as_number(inner, value, source)
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
    return as_plain(value, source)


def _as_number(kind: type, value: Any, source: Source | None) -> Any:
    """Return the number of a field of type int or float, or the truth value of one of type bool. Raises SpellingError."""
    if value is None or isinstance(value, dict | list):
        return as_plain(value, source)
    text = value if isinstance(value, str) else None
    if source is not None and source.text is not None and not source.is_literal:
        text = source.text.strip()
    if text is None or "${" in text:  # a value that YAML did not read, or a variable
        return value
    if kind is bool:
        return parse_boolean(text)
    number = parse_number(text)
    if kind is int and isinstance(number, float):
        raise SpellingError(number, f"; write {int(number)}" if number.is_integer() and abs(number) < 2**63 else "")
    return number


def as_plain(value: Any, source: Source | None = None) -> Any:
    """Return a value of a field of any type without sources: text as it was written unless spelling.py reads a value in it.

    Raises ConfigError for a list or mapping that is not readable.
    """
    if source is not None and source.text is not None and (source.error or isinstance(value, dict | list)):
        if not source.text.lstrip().startswith(("{", "[")):  # on the command line, `a: b` is text
            return source.text
        if source.error:
            raise ConfigError(source.error)
    if isinstance(value, Section):
        return {_plain_key(k, value.sources.get(k)): as_plain(v, value.source(k)) for k, v in value.items()}
    if isinstance(value, dict):
        return {k: as_plain(v) for k, v in value.items()}
    if isinstance(value, list):
        sources_of_items = value.sources if isinstance(value, Items) else [None] * len(value)
        return [as_plain(v, s) for v, s in zip(value, sources_of_items, strict=True)]
    if source is None or source.text is None or source.is_literal:
        return value
    return parse_scalar(source.text.strip())


def _plain_key(key: Any, source: Source | None) -> Any:
    """Return a key of a mapping; YAML 1.1 reads the key `on` as true, and the key 010 as 8."""
    return key if isinstance(key, str) or source is None or source.key is None else parse_scalar(source.key)


def as_text(value: Any, source: Source | None, numbers: tuple[str, ...]) -> Any:
    """Return the value of a `text_field`: its text, or lists and mappings of text."""
    is_block = source is not None and source.text is not None and not source.text.lstrip().startswith(("{", "["))
    if isinstance(value, Section) and value and not is_block and not all(v is None for v in value.values()):
        sources = {k: value.source(k) for k in value}
        return {k: as_plain(v, sources[k]) if k in numbers else as_text(v, sources[k], numbers) for k, v in value.items()}
    if isinstance(value, Items) and not is_block:
        return [as_text(v, s, numbers) for v, s in zip(value, value.sources, strict=True)]
    if value is None or source is None or source.text is None:
        return as_plain(value)
    if source.error and re.fullmatch(r"\[.*,.*\]", source.text, re.DOTALL):
        raise ConfigError(f"{source.error}; in a list, put patterns in quotes: ['*.tar', '{{0000..0099}}.tar']")
    if source.error and re.fullmatch(r"\{\s*\w+\s*:\s.*\}", source.text, re.DOTALL):
        raise ConfigError(f"{source.error}; in a mapping, put values with braces in quotes: {{image: '{{a,b}}'}}")
    return source.text


def is_union(hint: Any) -> bool:
    """Return whether a type is a union, as in `int | None`."""
    return typing.get_origin(hint) in (typing.Union, types.UnionType)
