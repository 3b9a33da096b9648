"""Plain values of a configuration, with the place where each was set and the text it was written as.

YAML reads `run: 001` as the number 1, but a field of text takes the text 001. So values are read into a `Section`, a dict that
keeps the text of its scalars.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml

COMMAND_LINE = "the command line"


class Source(NamedTuple):
    """Where a value was set, and how it was written."""

    value: Any
    """The value that YAML reads; where it reads none, the text."""
    text: str | None
    """What a field of text takes; None for a list or mapping of a file."""
    where: str
    """A file, or COMMAND_LINE."""
    order: int = -1
    """Place among the settings of the command line; -1 = in a file."""
    error: str = ""
    """Why YAML reads no value."""
    key: str | None = None
    """The text of its key; None = as YAML reads it."""
    is_literal: bool = False
    """Whether it stood in quotes or had a tag, as in !!str 3: it is the value that YAML reads, whatever the text."""


class Section(dict[Any, Any]):
    """A mapping of a configuration, as YAML reads it, with the source of its values."""

    def __init__(self, values: dict[Any, Any] | None = None, sources: dict[Any, Source] | None = None) -> None:
        super().__init__(values or {})
        self.sources = sources or {}
        self.replaces = False
        """Whether it replaces the mapping that it is merged over: it began as {} or null on the command line."""
        self.notes: list[str] = []
        """What merging left out or replaced, one line each."""

    def source(self, key: Any) -> Source | None:
        """Return the source of the value of `key`; None where the value was replaced since."""
        source = self.sources.get(key)
        return source if source is not None and source.value is self.get(key) else None


class Items(list[Any]):
    """A list of a configuration, as YAML reads it, with the source of its items."""

    def __init__(self, values: list[Any], sources: list[Source | None]) -> None:
        super().__init__(values)
        self.sources = sources


def with_sources(value: Any, node: yaml.Node, loader: Any, where: str, order: int = -1) -> Any:
    """Return a value that YAML read from `node` with the text of its scalars: dicts as Section, lists as Items."""
    if isinstance(node, yaml.MappingNode) and isinstance(value, dict):
        loader.flatten_mapping(node)
        section = Section(value)
        for key_node, value_node in node.value:
            if isinstance(key_node, yaml.ScalarNode) and (key := loader.construct_object(key_node)) in value:
                section[key] = with_sources(value[key], value_node, loader, where, order)
                source = Source(section[key], _text_of(value_node), where, order, key=key_node.value)
                section.sources[key] = source._replace(is_literal=is_literal(value_node, loader))
        return section
    if isinstance(node, yaml.SequenceNode) and isinstance(value, list):
        items = [with_sources(v, n, loader, where, order) for v, n in zip(value, node.value, strict=True)]
        pairs = zip(items, node.value, strict=True)
        return Items(items, [Source(v, _text_of(n), where, order, is_literal=is_literal(n, loader)) for v, n in pairs])
    return value


def is_literal(node: yaml.Node, loader: Any) -> bool:
    """Return whether a scalar stands in quotes, is a block of text (|), or has a tag."""
    if not isinstance(node, yaml.ScalarNode):
        return False
    return bool(node.style) or node.tag != loader.resolve(yaml.ScalarNode, node.value, (True, False))


def _text_of(node: yaml.Node) -> str | None:
    return node.value if isinstance(node, yaml.ScalarNode) else None


def notes(values: Any) -> Iterator[str]:
    """Yield what merging left out of these values or replaced in them, one line each."""
    if isinstance(values, Section):
        yield from values.notes
        for value in values.values():
            yield from notes(value)


def without(values: dict[str, Any], names: list[str]) -> Section:
    """Return a copy of values without these keys."""
    copy = Section({key: value for key, value in values.items() if key not in names})
    if isinstance(values, Section):
        copy.sources = {key: source for key, source in values.sources.items() if key in copy}
        copy.replaces, copy.notes = values.replaces, list(values.notes)
    return copy


def with_text_keys(values: dict[Any, Any]) -> Section:
    """Return the values under the text of their keys: YAML reads the key `on` as true."""
    if not isinstance(values, Section):
        return Section(values)
    names = {key: (values.sources[key].key if key in values.sources else None) or key for key in values}
    sources = {names[key]: source for key, source in values.sources.items() if key in names}
    return Section({names[key]: value for key, value in values.items()}, sources)


def shorten(text: str, length: int = 200) -> str:
    """Return a text for an error line, of at most `length` characters and three dots."""
    return text if len(text) <= length else text[:length] + "..."
