"""Configuration: dataclass schema <- YAML (and its `base:` file) <- `key=value` settings.

    load(Schema, "configs/pretrain/scenes.yaml", ["optim.lr=1e-3"]) -> Schema

All errors of a configuration are raised here, before anything is built: an unknown key (with the nearest valid one), a value
of the wrong type, an unknown component, a combination that a dataclass's `check()` refuses. Each is one ConfigError with one
line.

A schema field made by `component_field` holds the Config of a component that the registry finds by name: `loss.name=clip`
gives `loss` the fields of pretrain/losses/clip.py. A field of text takes a value as it was typed: `run=001` and `run: 001` are
the text 001, though YAML reads a number. So values are read into a `Section`, a dict that keeps the text of its scalars. This
module imports nothing of the project but errors.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, field, fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.omegaconf import get_yaml_loader

from pretrain.errors import ConfigError, closest
from pretrain.printable import hide_secrets_in

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


# ---------------------------------------------------------------------------------------------------------------------
# Values with the text they were written as

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


class Section(dict[Any, Any]):
    """A mapping of a configuration, as YAML reads it, with the source of its values."""

    def __init__(self, values: dict[Any, Any] | None = None, sources: dict[Any, Source] | None = None) -> None:
        super().__init__(values or {})
        self.sources = sources or {}
        self.replaces = False
        """Whether it replaces the mapping that it is merged over: it began as {} or null on the command line."""
        self.notes: list[str] = []
        """What merging left out, one line each."""

    def source(self, key: Any) -> Source | None:
        """Return the source of the value of `key`; None where the value was replaced since."""
        source = self.sources.get(key)
        return source if source is not None and source.value is self.get(key) else None


class Items(list[Any]):
    """A list of a configuration, as YAML reads it, with the source of its items."""

    def __init__(self, values: list[Any], sources: list[Source | None]) -> None:
        super().__init__(values)
        self.sources = sources


def _with_sources(value: Any, node: yaml.Node, loader: Any, where: str, order: int = -1) -> Any:
    """Return a value that YAML read from `node` with the text of its scalars: dicts as Section, lists as Items."""
    if isinstance(node, yaml.MappingNode) and isinstance(value, dict):
        loader.flatten_mapping(node)
        section = Section(value)
        for key_node, value_node in node.value:
            if isinstance(key_node, yaml.ScalarNode) and (key := loader.construct_object(key_node)) in value:
                section[key] = _with_sources(value[key], value_node, loader, where, order)
                section.sources[key] = Source(section[key], _text_of(value_node), where, order, key=key_node.value)
        return section
    if isinstance(node, yaml.SequenceNode) and isinstance(value, list):
        items = [_with_sources(v, n, loader, where, order) for v, n in zip(value, node.value, strict=True)]
        return Items(items, [Source(v, _text_of(n), where, order) for v, n in zip(items, node.value, strict=True)])
    return value


def _text_of(node: yaml.Node) -> str | None:
    return node.value if isinstance(node, yaml.ScalarNode) else None


def written_text(values: dict[str, Any], key: str) -> Any:
    """Return the value of a `text_field` of this name: its text as it was written, else list, mapping or None."""
    source = values.source(key) if isinstance(values, Section) else None
    return _as_text(values.get(key), source, ())


def notes(values: Any) -> Iterator[str]:
    """Yield what merging left out of these values, one line each."""
    if isinstance(values, Section):
        yield from values.notes
        for value in values.values():
            yield from notes(value)


# ---------------------------------------------------------------------------------------------------------------------
# Reading files and settings


def load(schema: type[T], path: str | Path | None = None, dotlist: list[str] | None = None) -> T:
    """Load a configuration file and key=value settings as an instance of `schema`. Raises ConfigError."""
    return build(schema, load_values(path, dotlist or []), str(path) if path is not None else COMMAND_LINE)


def load_values(path: str | Path | None, dotlist: list[str]) -> dict[str, Any]:
    """Load a file, merge key=value settings over it and return plain values. Raises ConfigError."""
    return merge(read_yaml(Path(path)) if path is not None else {}, parse_dotlist(dotlist))


def build(schema: type[T], values: dict[str, Any], where: str, partial: bool = False) -> T:
    """Build an instance of `schema` from plain values and run its checks. Raises ConfigError.

    where: the origin of the values, for error messages. partial: ignore top-level keys that the schema does not have.
    """
    if partial:
        specs = fields(schema)  # type: ignore[arg-type]
        known = {f.name for f in specs}
        keys = [f.metadata["key"] for f in specs if "extra" in f.metadata]
        extra = {k for k, v in values.items() if isinstance(v, dict) and any(key in v for key in keys)}
        values = _without(values, [k for k in values if k not in known | extra])
    problems: list[tuple[int, ConfigError]] = []
    config = _build(schema, values, "", where, problems)
    if problems:
        raise min(problems, key=lambda problem: problem[0])[1]
    _check(config)
    return typing.cast(T, config)


def read_yaml(path: Path, parents: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a YAML file as plain values, over the file that its `base:` names (relative to this file).

    parents: the files whose `base` led here, to detect a cycle. Raises ConfigError.
    """
    path = path.resolve()
    if path in parents:
        raise ConfigError(f"{path}: `base` leads back to itself: {' -> '.join(p.name for p in (*parents, path))}")
    try:
        _refuse_expansion(path)
        content: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        loader = get_yaml_loader()(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"no configuration file {path}") from None
    except (yaml.YAMLError, ValueError, TypeError, OSError, OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(f"{path} is not readable YAML: {' '.join(str(error).split())}{_quote_hint(error, path)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold `key: value` pairs, not a {type(content).__name__}")
    content = _with_text_keys(_with_sources(content, node, loader, str(path)) if node is not None else content)
    values = Section({str(key): value for key, value in content.items()}, {str(k): v for k, v in content.sources.items()})
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"{path}: `base` must name one file, not {base!r}")
    return merge(read_yaml(path.parent / base, (*parents, path)), values)


_MAX_FILE_BYTES = 1 << 22
_MAX_VALUES = 1 << 18


def _refuse_expansion(path: Path) -> None:
    """Raise YAMLError for a file that is no ordinary one, is far too large, or whose aliases stand for far too many values."""
    if not path.is_file() and not path.is_dir() and path.exists():
        raise yaml.YAMLError("it is not an ordinary file")
    if path.is_file() and path.stat().st_size > _MAX_FILE_BYTES:
        raise yaml.YAMLError(f"it has {path.stat().st_size:,} bytes, more than {_MAX_FILE_BYTES:,}")
    sizes: dict[int, int] = {}

    def count(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = _MAX_VALUES + 1  # of a node inside itself
            pairs = node.value if isinstance(node, yaml.MappingNode) else [(item,) for item in node.value]
            sizes[id(node)] = 1 + sum(count(child) for pair in pairs for child in pair) if node.id != "scalar" else 1
        return sizes[id(node)]

    node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    if node is not None and count(node) > _MAX_VALUES:
        raise yaml.YAMLError(f"its aliases stand for more than {_MAX_VALUES:,} values")


def _quote_hint(error: Exception, path: Path) -> str:
    """Return what to add where YAML stopped at a pattern of shards, whose first character means something else in YAML."""
    mark = getattr(error, "problem_mark", None)
    lines = path.read_text(encoding="utf-8").splitlines() if mark is not None else []
    line = lines[mark.line] if mark is not None and mark.line < len(lines) else ""
    is_pattern = re.search(r"[:-]\s+(\*|[{\[].*[}\]]\S)", line)
    return "; put a pattern in quotes: '*.tar', '{0000..0099}.tar'" if is_pattern else ""


def parse_dotlist(dotlist: list[str]) -> dict[str, Any]:
    """Parse settings: ["optim.lr=1e-3"] -> {"optim": {"lr": 0.001}}. Raises ConfigError."""
    merged_values = Section()
    for order, item in enumerate(dotlist):
        key, equals, text = item.partition("=")
        if item.startswith("-"):
            raise ConfigError(f"{item!r}: settings have no dashes; write {item.lstrip('-') or 'key=value'!r}")
        if not equals or not key:
            raise ConfigError(f"{item!r} is not a setting; write key=value, for example optim.lr=1e-3")
        value, source = _parse_value(item, text, order)
        for name in reversed(key.split(".")):
            value, source = Section({name: value}, {name: source}), Source(None, None, COMMAND_LINE, order)
            source = source._replace(value=value)
        merged_values = merge(merged_values, value)
    return merged_values


def _parse_value(item: str, text: str, order: int) -> tuple[Any, Source]:
    """Parse the text behind key= as YAML. A text that YAML cannot read is its own value, and the source says why."""
    try:
        loader = get_yaml_loader()(text)
        node = loader.get_single_node()
        value: Any = yaml.load(text, Loader=get_yaml_loader())
        value = typing.cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create({"value": value}), resolve=False))["value"]
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError) as error:
        return text, Source(text, text, COMMAND_LINE, order, f"{item!r} cannot be read: {' '.join(str(error).split())}")
    if isinstance(node, yaml.ScalarNode) and node.style in ("'", '"'):
        return value, Source(value, node.value, COMMAND_LINE, order)
    if value is None and text.strip().lower() not in ("", "~", "null"):  # YAML reads a comment or the name of an anchor
        return text, Source(text, text, COMMAND_LINE, order)
    if node is not None:
        value = _with_sources(value, node, loader, COMMAND_LINE, order)
    if isinstance(value, Section) and not value:
        value.replaces = True
    return value, Source(value, text, COMMAND_LINE, order)


ALTERNATIVES = {"train": ("steps", "samples", "epochs")}
"""By section: keys that give the same quantity in different units, of which one is used."""


def merge(base: dict[str, Any], override: dict[str, Any], section: str = "") -> Section:
    """Merge `override` over `base` and return the result. Dicts merge by key; lists and values replace, and so does {}.

    section: the key of these dicts. A key of ALTERNATIVES in `override` removes the other alternatives of `base`. A `name` of
    another architecture removes the `args` of `base`.
    """
    units = ALTERNATIVES.get(section, ())
    is_overridden = any(override.get(key) for key in units)  # 0 means that this unit is not used
    merged_values = _without(base, [key for key in base if is_overridden and key in units])
    _drop_other_args(merged_values, override, section)
    for key, value in override.items():
        old = merged_values.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and value and not getattr(value, "replaces", False):
            new = merge(old, value, key)
        else:
            new = value
            if isinstance(value, Section) and key in merged_values and old is None:
                value.replaces = True  # null came first
        source = override.sources.get(key) if isinstance(override, Section) else None
        merged_values[key] = new
        merged_values.sources.pop(key, None)
        if source is not None:
            merged_values.sources[key] = source._replace(value=new) if source.value is value else source
    return merged_values


def _without(values: dict[str, Any], names: list[str]) -> Section:
    """Return a copy of values without these keys."""
    copy = Section({key: value for key, value in values.items() if key not in names})
    if isinstance(values, Section):
        copy.sources = {key: source for key, source in values.sources.items() if key in copy}
        copy.replaces, copy.notes = values.replaces, list(values.notes)
    return copy


def _drop_other_args(values: Section, override: dict[str, Any], section: str) -> None:
    """Remove `args` from the values of a tower where `override` names an architecture of another family, and note it."""
    name, args = override.get("name"), values.get("args")
    if not isinstance(name, str) or not isinstance(args, dict) or not args:
        return
    old = values.get("name")
    source = values.source("args")
    if (source is not None and source.where == COMMAND_LINE) or (isinstance(old, str) and _family(old) == _family(name)):
        return
    del values["args"]
    of = f" of {old}" if isinstance(old, str) else ""
    values.notes.append(f"{section}.name={name}: without {section}.args{of} ({', '.join(map(str, args))})")


def _family(name: str) -> str:
    """Return the letters that the name of a model begins with: vit for vit_tiny_patch16_224, resnet for resnet18."""
    letters = re.match(r"[a-z]*", re.split(r"[/:]", name.rstrip("/"))[-1].lower())
    return letters[0] if letters is not None else ""


# ---------------------------------------------------------------------------------------------------------------------
# Plain values -> dataclasses


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
    values, arguments = _split_extra_components(schema, _with_text_keys(values), prefix, where, problems)
    for key in values:
        if key not in known:
            choices = ", ".join(known)
            place, order = _origin(values, key, where)
            message = f"unknown key {prefix}{key} {_place(place)}{closest(str(key), list(known))}; valid: {choices}"
            problems.append((order, ConfigError(message)))
    hints = typing.get_type_hints(schema)
    leaves = Section()
    for name, spec in known.items():
        place, order = _origin(values, name, where)
        if "package" in spec.metadata:
            arguments[name] = _build_component(spec, values.get(name, {}), f"{prefix}{name}.", place, order, problems)
        elif is_dataclass(hints[name]):
            schema_of_field = typing.cast(type, hints[name])
            arguments[name] = _build(schema_of_field, values.get(name) or {}, f"{prefix}{name}.", place, problems, order)
        elif name in values:
            leaves[name] = values[name]
            if (source := values.source(name)) is not None:
                leaves.sources[name] = source
    arguments.update(_convert_leaves(schema, known, hints, leaves, prefix, where, problems))
    return schema(**arguments) if len(problems) == count else None


def _with_text_keys(values: dict[Any, Any]) -> Section:
    """Return the values under the text of their keys: YAML reads the key `on` as true."""
    if not isinstance(values, Section):
        return Section(values)
    names = {key: (values.sources[key].key if key in values.sources else None) or key for key in values}
    sources = {names[key]: source for key, source in values.sources.items() if key in names}
    return Section({names[key]: value for key, value in values.items()}, sources)


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
        return _without(values, list(sections)), {spec.name: components}
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
    values = _with_text_keys(values)
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
        schema_of_field = dataclasses.make_dataclass("One", [(name, hints[name], field(default="???"))])
        try:
            node = OmegaConf.structured(schema_of_field)
        except OmegaConfBaseException as error:
            raise AssertionError(f"{schema.__name__}.{name}: OmegaConf cannot hold {hints[name]}: {error}") from error
        place, order = _origin(leaves, name, where)
        try:
            value = _as_written(hints[name], value, leaves.source(name), known[name].metadata.get("text"))
            merged = OmegaConf.merge(node, {name: value})
            converted[name] = typing.cast(DictConfig, OmegaConf.to_container(merged, resolve=True))[name]
            _refuse_variables_in_urls(value, converted[name], f"{prefix}{name}", _place(place))
        except ConfigError as error:
            problems.append((order, error))
            continue
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            if "Interpolation" in type(error).__name__:
                reason = str(error).splitlines()[0]
                message = f"{prefix}{name}={value!r} {_place(place)} cannot be resolved: {reason}"
            else:
                hint = "" if default is MISSING else f" (default {default!r})"
                message = f"{prefix}{name}={value!r} {_place(place)} must be {_describe_type(hints[name])}{hint}"
            problems.append((order, ConfigError(message)))
            continue
        if value is None and not _is_optional(hints[name]):
            message = f"{prefix}{name} {_place(place)} must be {_describe_type(hints[name])}, not empty"
            problems.append((order, ConfigError(message)))
    return converted


def _as_written(hint: Any, value: Any, source: Source | None, numbers: tuple[str, ...] | None = None) -> Any:
    """Return the value that a field of this type takes: text as it was written, and decimal numbers.

    numbers: of a `text_field`, the keys of its mappings that hold numbers; None for other fields. Null empties a list or a
    mapping. Raises ConfigError where the value is neither text nor readable.
    """
    if numbers is not None:
        return _as_text(value, source, numbers)
    inner = next((arg for arg in typing.get_args(hint) if arg is not type(None)), hint) if _is_union(hint) else hint
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
            return [_as_written(argument, v, s) for v, s in zip(value, value.sources, strict=True)]
        return [] if value is None and inner is hint else value
    if typing.get_origin(inner) is dict:
        argument = typing.get_args(inner)[1]
        if value is None and inner is hint:
            return {}
        if isinstance(value, Section):
            section = _with_text_keys(value)
            return {k: _as_written(argument, v, section.source(k)) for k, v in section.items()}
    return _plain(value)


def _plain(value: Any) -> Any:
    """Return dicts and lists without sources, which OmegaConf takes."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def _as_text(value: Any, source: Source | None, numbers: tuple[str, ...]) -> Any:
    """Return the value of a `text_field`: its text, or lists and mappings of text."""
    is_block = source is not None and source.text is not None and not source.text.lstrip().startswith(("{", "["))
    if isinstance(value, Section) and value and not is_block and not all(v is None for v in value.values()):
        return {k: _plain(v) if k in numbers else _as_text(v, value.source(k), numbers) for k, v in value.items()}
    if isinstance(value, Items) and not is_block:
        return [_as_text(v, s, numbers) for v, s in zip(value, value.sources, strict=True)]
    if value is None or source is None or source.text is None:
        return _plain(value)
    if source.error and re.fullmatch(r"\[.*,.*\]", source.text, re.DOTALL):
        raise ConfigError(f"{source.error}; in a list, put patterns in quotes: ['*.tar', '{{0000..0099}}.tar']")
    if source.error and re.fullmatch(r"\{\s*\w+\s*:\s.*\}", source.text, re.DOTALL):
        raise ConfigError(f"{source.error}; in a mapping, put values with braces in quotes: {{image: '{{a,b}}'}}")
    return source.text


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


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
        return f"a list, each item {_describe_type(typing.get_args(hint)[0])}"
    return "settings (key: value)" if typing.get_origin(hint) is dict else str(hint)


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


SEED = f"[0, {2**64 - 1}]"
"""The interval of a seed, for check_numbers."""


def check_numbers(config: Any, section: str, **intervals: str) -> None:
    """Refuse numbers of a Config that lie outside their interval. Raises ConfigError, which names the key.

    section: the key of the Config. intervals: by field, as in "[0, 1)" or "(0, inf)"; they hold for each item of a list and
    each value of a mapping. Whatever the field, NaN, infinity and whole numbers of more than 64 bits are refused.
    """
    for spec in fields(config):
        value = getattr(config, spec.name)
        interval = intervals.get(spec.name, "(-inf, inf)")
        for number in _numbers(value):
            if not _is_inside(number, interval):
                key = f"{section}.{spec.name}" if section else spec.name
                raise ConfigError(f"{key}={value} must be {_describe_interval(interval, isinstance(value, list | dict))}")


def _numbers(value: Any) -> Iterator[int | float]:
    """Yield the numbers of a field's value: itself, or those in its lists and mappings."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)


def _is_inside(number: int | float, interval: str) -> bool:
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    if not math.isfinite(number) if isinstance(number, float) else not -(2**63) <= number < 2**64:
        return False
    above = low <= number if interval[0] == "[" else low < number
    return above and (number <= high if interval[-1] == "]" else number < high)


def _describe_interval(interval: str, is_several: bool) -> str:
    """Describe an interval in words: "[0, 1)" is "a number from 0 to below 1"."""
    low, high = (bound.strip() for bound in interval[1:-1].split(","))
    words = [] if low == "-inf" else [f"{'from' if interval[0] == '[' else 'above'} {low}"]
    if high != "inf":
        words.append(f"{'to' if interval[-1] == ']' else 'to below'} {high}")
    elif words and interval[0] == "[":
        words = [f"at least {low}"]
    noun = "numbers" if is_several else "a number"
    return f"{noun} {' '.join(words)}" if words else f"{noun}: neither NaN, infinite nor beyond 64 bits"


# ---------------------------------------------------------------------------------------------------------------------
# Saving


def to_dict(config: Any) -> dict[str, Any]:
    """Return plain values, in the order of the schema; extra components become top-level sections again."""
    values: dict[str, Any] = {}
    for spec in fields(config):
        value = dataclasses.asdict(config)[spec.name]
        values.update(value if "extra" in spec.metadata else {spec.name: value})
    return values


def to_yaml(config: Any) -> str:
    """Return the resolved configuration as YAML; `load` of this text gives an equal one, but for passwords and tokens."""
    return OmegaConf.to_yaml(OmegaConf.create(hide_secrets_in(to_dict(config))))


def save(config: Any, path: Path) -> None:
    """Save the resolved configuration as YAML."""
    path.write_text(to_yaml(config))


CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def find_config(name: str, kind: str) -> Path:
    """Return the path of a configuration: `name` is a file, or the name of a shipped one.

    kind: "pretrain" or "finetune"; find_config("scenes", "pretrain") is configs/pretrain/scenes.yaml. Raises ConfigError.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = CONFIGS / kind / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    names = sorted(path.stem for path in (CONFIGS / kind).glob("*.yaml"))
    hint = closest(name, names)
    raise ConfigError(f"no configuration {name!r}{hint}; give a YAML file, or a shipped one: {', '.join(names)}")
