"""Plain values as an instance of a dataclass schema: each error names its key, where it was set, and what would be valid."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable
from dataclasses import MISSING, Field, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pretrain.config.merging import merge
from pretrain.config.numbers import check_numbers
from pretrain.config.reading import load_values
from pretrain.config.spelling import SpellingError
from pretrain.config.values import COMMAND_LINE, Section, shorten, with_text_keys, without
from pretrain.config.written import as_written, written_text
from pretrain.errors import ConfigError, closest

T = TypeVar("T")

FindComponent = Callable[[str, str], ModuleType]
"""(package, name) -> module: registry.get_component, passed in because this module does not import the registry."""


def component_field(find: FindComponent, package: str, key: str, default: str) -> Any:
    """Declare a schema field that holds the Config of a component of `package`.

    key: the key inside the field that names the component; default: the component where the key is absent.
    """
    return field(default=None, metadata={"find": find, "package": package, "key": key, "default": default})


def extra_components(find: FindComponent, package: str, key: str) -> Any:
    """Declare a schema field that collects all other sections with `key` as components of `package`.

    With key "tower", the section `audio: {tower: ...}` becomes {"audio": Config of that tower}.
    """
    return field(default_factory=dict, metadata={"find": find, "package": package, "key": key, "extra": True})


def text_field(default: str | None, numbers: tuple[str, ...] = ()) -> Any:
    """Declare a schema field of type Any that holds text, null, or lists and mappings of text.

    numbers: keys of those mappings whose values are no text. Brace patterns need no quotes: a value in braces is a mapping only
    where it holds `key: value` pairs.
    """
    return field(default=default, metadata={"text": numbers})


def load(schema: type[T], path: str | Path | None = None, dotlist: list[str] | None = None) -> T:
    """Load a configuration file and key=value settings as an instance of `schema`. Raises ConfigError."""
    return build(schema, load_values(path, dotlist or []), str(path) if path is not None else COMMAND_LINE)


def build(schema: type[T], values: dict[str, Any], where: str, partial: bool = False) -> T:
    """Build an instance of `schema` from plain values and run its checks. Raises ConfigError.

    where: the origin of the values, for error messages. partial: the values are those of a checkpoint, which may be somebody
    else's: top-level keys that the schema does not have are ignored, and variables are refused, which would be read here.
    """
    if partial:
        specs = fields(schema)  # type: ignore[arg-type]
        known = {f.name for f in specs}
        keys = [f.metadata["key"] for f in specs if "extra" in f.metadata]
        extra = {k for k, v in values.items() if isinstance(v, dict) and any(key in v for key in keys)}
        values = without(values, [k for k in values if k not in known | extra])
        _refuse_variables(values, "", where)
    problems: list[tuple[int, ConfigError]] = []
    config = _build(schema, values, "", where, problems)
    if problems:
        raise min(problems, key=lambda problem: problem[0])[1]
    _check(config)
    return typing.cast(T, config)


def read_text_field(values: dict[str, Any], key: str, default: str | None = None) -> Any:
    """Return the value that a `text_field` of this name takes, before the whole configuration is built. Raises ConfigError.

    It is the text as it was written, with its variables resolved: `values` must be the user's own file and command line.
    """
    schema = dataclasses.make_dataclass("TextField", [(key, typing.Any, text_field(default))])
    return getattr(build(schema, without(values, [name for name in values if name != key]), "the configuration"), key)


def _place(where: str) -> str:
    return f"on {where}" if where == COMMAND_LINE else f"in {where}"


def _build(
    schema: type[Any], values: Any, prefix: str, where: str, problems: list[tuple[int, ConfigError]], order: int = -1
) -> Any:
    """Build an instance of `schema` from plain values; None where something is wrong, which is added to `problems`.

    prefix: the dotted key of `values`, with a dot at its end; where, order: the origin of values that have no source, and its
    place on the command line (-1 = in a file). problems: pairs of such a place and the error; the user reads the first one.
    """
    if not isinstance(values, dict):
        problems.append((order, ConfigError(f"{prefix.rstrip('.')} {_place(where)} must hold settings, not {values!r}")))
        return None
    count = len(problems)
    known = {f.name: f for f in fields(schema) if "extra" not in f.metadata}
    values, arguments = _split_extra_components(schema, with_text_keys(values), prefix, where, problems)
    for key in values:
        if key not in known:
            place, order = _origin(values, key, where)
            hint = closest(str(key), list(known), prefix) or _find_in_sections(schema, str(key))
            message = f"unknown key {prefix}{key} {_place(place)}{hint}; valid: {', '.join(known)}"
            problems.append((order, ConfigError(message)))
    hints = typing.get_type_hints(schema)
    leaves = Section()
    for name, spec in known.items():
        place, order = _origin(values, name, where)
        source = values.source(name)
        if source is not None and source.error and ("package" in spec.metadata or is_dataclass(hints[name])):
            problems.append((order, ConfigError(source.error)))
        elif "package" in spec.metadata:
            arguments[name] = _build_component(spec, values.get(name, {}), f"{prefix}{name}.", place, order, problems)
        elif is_dataclass(hints[name]):
            schema_of_field = typing.cast(type, hints[name])
            section = values[name] if values.get(name) is not None else {}
            arguments[name] = _build(schema_of_field, section, f"{prefix}{name}.", place, problems, order)
        elif name in values:
            leaves[name] = values[name]
            if source is not None:
                leaves.sources[name] = source
    arguments.update(_convert_leaves(schema, known, hints, leaves, prefix, where, problems))
    return schema(**arguments) if len(problems) == count else None


def _find_in_sections(schema: type[Any], key: str) -> str:
    """Return the end of an error message that names a key of a section of the schema: optim.lr for lr."""
    hints = typing.get_type_hints(schema)
    sections = [
        f.name for f in fields(schema) if is_dataclass(hints[f.name]) and key in {g.name for g in fields(hints[f.name])}
    ]
    return f"; did you mean {sections[0]}.{key}?" if sections else ""


def _origin(values: Section, key: str, where: str) -> tuple[str, int]:
    """Return where a key was set, and its place on the command line (-1 = in a file)."""
    source = values.sources.get(key)
    return (source.where, source.order) if source is not None else (where, -1)


def _split_extra_components(
    schema: type[Any], values: Section, prefix: str, where: str, problems: list[tuple[int, ConfigError]]
) -> tuple[Section, dict[str, Any]]:
    """Split off the sections of an `extra_components` field: return the rest, and {field: components}."""
    specs = fields(schema)
    names = {f.name for f in specs}
    for spec in specs:
        if "extra" not in spec.metadata:
            continue
        key = spec.metadata["key"]
        sections = {k: v for k, v in values.items() if k not in names and isinstance(v, dict) and key in v}
        components = {
            k: _build_component(spec, v, f"{prefix}{k}.", *_origin(values, k, where), problems) for k, v in sections.items()
        }
        return without(values, list(sections)), {spec.name: components}
    return values, {}


def _build_component(
    spec: Field[Any], values: Any, prefix: str, where: str, order: int, problems: list[tuple[int, ConfigError]]
) -> Any:
    """Build the Config of the component that `values` names, or of the default one; None if it is null."""
    package, key = spec.metadata["package"], spec.metadata["key"]
    if values is None:
        return None
    if not isinstance(values, dict):
        message = f"{prefix.rstrip('.')} {_place(where)} must hold settings, not {values!r}; write {prefix}{key}=..."
        problems.append((order, ConfigError(message)))
        return None
    values = with_text_keys(values)
    name = written_text(values, key) if key in values else spec.metadata.get("default")
    where, order = _origin(values, key, where)
    if not isinstance(name, str):
        problems.append((order, ConfigError(f"{prefix}{key} {_place(where)} must be a name, not {name!r}")))
        return None
    try:
        component = spec.metadata["find"](package, name)
    except ConfigError as error:
        problems.append((order, ConfigError(f"{prefix}{key}={name} {_place(where)}: {error}")))
        return None
    return _build(component.Config, merge({key: name}, values), prefix, where, problems)


@cache
def _one_field(name: str, hint: Any, spelled: str) -> Any:
    """Return OmegaConf's node of one field without a value, which merging copies; the same for all configurations.

    spelled: the repr of `hint`, since unions are equal in any order.
    """
    return OmegaConf.structured(dataclasses.make_dataclass("One", [(name, hint, field(default="???"))]))


def _convert_leaves(
    schema: type[Any],
    known: dict[str, Field[Any]],
    hints: dict[str, Any],
    leaves: Section,
    prefix: str,
    where: str,
    problems: list[tuple[int, ConfigError]],
) -> dict[str, Any]:
    """Convert values that are no sections with OmegaConf, one by one, so that an error names its key."""
    converted: dict[str, Any] = {}
    for name, value in leaves.items():
        default = known[name].default
        try:
            node = _one_field(name, hints[name], repr(hints[name]))
        except OmegaConfBaseException as error:
            raise AssertionError(f"{schema.__name__}.{name}: OmegaConf cannot hold {hints[name]}: {error}") from error
        place, order = _origin(leaves, name, where)
        try:
            value = as_written(hints[name], value, leaves.source(name), known[name].metadata.get("text"))
            merged = OmegaConf.merge(node, {name: value})
            converted[name] = typing.cast(DictConfig, OmegaConf.to_container(merged, resolve=True))[name]
            if not _has_containers_of(hints[name], converted[name]):
                raise TypeError(name)
            _refuse_variables_in_urls(value, converted[name], f"{prefix}{name}", _place(place))
        except ConfigError as error:
            problems.append((order, error))
            continue
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            if re.search("Interpolation|Grammar", type(error).__name__):
                reason = str(error).splitlines()[0]
                message = f"{prefix}{name}={shorten(repr(value))} {_place(place)} cannot be resolved: {shorten(reason)}"
            else:
                value, note = (error.value, error.note) if isinstance(error, SpellingError) else (value, "")
                hint = "" if default is MISSING else f" (default {default!r})"
                message = (
                    f"{prefix}{name}={shorten(repr(value))} {_place(place)} must be {_describe_type(hints[name])}{hint}{note}"
                )
            problems.append((order, ConfigError(message)))
            continue
        if value is None and not _is_optional(hints[name]):
            message = f"{prefix}{name} {_place(place)} must be {_describe_type(hints[name])}, not empty"
            problems.append((order, ConfigError(message)))
    return converted


_WHOLE_VARIABLE = re.compile(r"\$\{oc\.env:\w+(,[^${}]*)?\}")


def _refuse_variables_in_urls(value: Any, resolved: Any, key: str, place: str) -> None:
    """Refuse a url or command with a variable inside: a file that others wrote could send what the variable holds.

    A value that is one variable and nothing else is the user's own url. Raises ConfigError.
    """
    if isinstance(value, dict) and isinstance(resolved, dict):
        value, resolved = [*value, *value.values()], [*resolved, *resolved.values()]
    if isinstance(value, list | tuple) and isinstance(resolved, list | tuple):
        for item, resolved_item in zip(value, resolved, strict=True):
            _refuse_variables_in_urls(item, resolved_item, key, place)
        return
    if not isinstance(value, str) or "${" not in value or _WHOLE_VARIABLE.fullmatch(value.strip()):
        return
    if any("://" in text or text.lstrip().startswith("pipe:") for text in (value, str(resolved))):
        raise ConfigError(
            f"{key}={value} {place} puts a variable into a url, which would send what it holds: write the url out, or put the "
            "whole url into the variable"
        )


def _refuse_variables(values: Any, key: str, where: str) -> None:
    """Refuse `${...}` in the values of a checkpoint: runs save what variables stood for. Raises ConfigError."""
    if isinstance(values, dict):
        for name, value in values.items():
            _refuse_variables(name, key, where)
            _refuse_variables(value, f"{key}.{name}" if key else str(name), where)
    elif isinstance(values, list):
        for value in values:
            _refuse_variables(value, key, where)
    elif isinstance(values, str) and "${" in values:
        raise ConfigError(
            f"{shorten(key)}={shorten(values)} in {where}: a saved configuration holds values, not variables of this machine; "
            "write the value instead"
        )


def _has_containers_of(hint: Any, value: Any) -> bool:
    """Return whether lists and mappings in a value stand where its type has some: OmegaConf takes [0.5, {a: 1}] for numbers."""
    if hint is Any or not isinstance(value, list | dict):
        return True
    kind, items = (dict, value.values()) if isinstance(value, dict) else (list, value)
    for choice in (hint, *typing.get_args(hint)):
        if (typing.get_origin(choice) or choice) is kind:
            inner = (typing.get_args(choice) or (Any,))[-1]
            return all(_has_containers_of(inner, item) for item in items)
    return False


def _is_optional(hint: Any) -> bool:
    return hint is Any or type(None) in typing.get_args(hint)


def _describe_type(hint: Any) -> str:
    """Describe a type in plain words, for error messages."""
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(str(choice) for choice in typing.get_args(hint))
    if type(None) in typing.get_args(hint):
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return f"{_describe_type(inner[0])} or null"
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Any: "a value"}
    if hint in words:
        return words[hint]
    if typing.get_origin(hint) is list:
        return f"a list [A, B, ...], each item {_describe_type(typing.get_args(hint)[0])}"
    if typing.get_origin(hint) is dict:
        inner = typing.get_args(hint)[1]
        return "settings (key: value)" if inner is Any else f"settings (key: value), each value {_describe_type(inner)}"
    return str(hint)


def _check(config: Any, prefix: str = "") -> None:
    """Run the check() of a configuration and of all that it contains, inner ones first; refuse numbers that are none."""
    for spec in fields(config):
        value = getattr(config, spec.name)
        for name, inner in value.items() if isinstance(value, dict) else [(spec.name, value)]:
            if is_dataclass(inner) and not isinstance(inner, type):
                _check(inner, f"{prefix}{name}.")
    if hasattr(config, "check"):
        config.check()
    check_numbers(config, prefix.rstrip("."))
