"""Configuration: dataclass schema <- YAML (with an optional `base:` file) <- `key=value` on the command line.

    load(Schema, "configs/pretrain/scenes.yaml", ["optim.lr=1e-3"]) -> Schema

Everything that can be wrong with a configuration is found here, before anything is built: an unknown key (with the
nearest one that exists), a value of the wrong type, a component nobody wrote, a combination that a dataclass's
`check()` refuses. Each is one ConfigError with one line.

A schema field made by `component_field` holds the Config of a component that the registry finds by name: `loss.name=clip` gives
`loss` the fields of pretrain/losses/clip.py. This floor imports nothing of the project.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from dataclasses import MISSING, Field, field, fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pretrain.errors import ConfigError, closest

T = TypeVar("T")


Find = Callable[[str, str], ModuleType]
"""(room, name) -> module: registry.get_component, which stands one floor higher."""


def component_field(find: Find, room: str, key: str, default: str) -> Any:
    """A schema field that holds the Config of a component of `room`, chosen by the field's own `key`."""
    return field(default=None, metadata={"find": find, "room": room, "key": key, "default": default})


def extra_components(find: Find, room: str, key: str) -> Any:
    """A schema field that gathers every other section holding `key` (audio: {tower: ...}) as components of `room`."""
    return field(default_factory=dict, metadata={"find": find, "room": room, "key": key, "collects": True})


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def load(schema: type[T], path: str | Path | None = None, dotlist: list[str] | None = None) -> T:
    """The configuration as an instance of `schema`. Raises ConfigError."""
    return build(schema, load_values(path, dotlist or []), str(path) if path is not None else "the command line")


def load_values(path: str | Path | None, dotlist: list[str]) -> dict[str, Any]:
    """What file and command line say, as plain values. Raises ConfigError."""
    return merge(read_yaml(Path(path)) if path is not None else {}, parse_dotlist(dotlist))


def build(schema: type[T], given: dict[str, Any], where: str, partial: bool = False) -> T:
    """An instance of `schema` from plain values; `partial` passes over top-level keys the schema does not have."""
    if partial:
        specs = fields(schema)  # type: ignore[arg-type]
        known = {f.name for f in specs}
        keys = [f.metadata["key"] for f in specs if "collects" in f.metadata]
        given = {k: v for k, v in given.items() if k in known or (isinstance(v, dict) and any(key in v for key in keys))}
    made = _build(schema, given, "", where)
    _check(made)
    return typing.cast(T, made)


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """One file as plain values; `base:` names a file, relative to this one, whose values come first."""
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path}: `base` leads back to itself: {' -> '.join(p.name for p in (*seen, path))}")
    try:
        read: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"no configuration file {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(read, dict):
        raise ConfigError(f"{path} must hold `key: value` pairs, not a {type(read).__name__}")
    values = {str(key): value for key, value in read.items()}
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"{path}: `base` must name one file, not {base!r}")
    return merge(read_yaml(path.parent / base, (*seen, path)), values)


def parse_dotlist(dotlist: list[str]) -> dict[str, Any]:
    """["optim.lr=1e-3"] -> {"optim": {"lr": 0.001}}."""
    merged_values: dict[str, Any] = {}
    for item in dotlist:
        key, equals, _ = item.partition("=")
        if item.startswith("-"):
            raise ConfigError(f"{item!r}: settings have no dashes; write {item.lstrip('-') or 'key=value'!r}")
        if not equals or not key:
            raise ConfigError(f"{item!r} is not a setting; write key=value, for example optim.lr=1e-3")
        try:
            value = OmegaConf.to_container(OmegaConf.from_dotlist([item]), resolve=False)
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ConfigError(f"{item!r} cannot be read: {' '.join(str(error).split())}") from error
        merged_values = merge(merged_values, typing.cast(dict[str, Any], value))
    return merged_values


ALTERNATIVES = {"train": ("steps", "samples", "epochs")}
"""Keys of a section that say one thing in different units."""


def merge(base: dict[str, Any], above: dict[str, Any], section: str = "") -> dict[str, Any]:
    """`base` with `above` merged over it; lists replace, and one of several alternatives replaces the others."""
    units = ALTERNATIVES.get(section, ())
    given = any(above.get(key) for key in units)  # 0 says: not this one
    merged_values = {key: value for key, value in base.items() if not (given and key in units)}
    for key, value in above.items():
        old = merged_values.get(key)
        merged_values[key] = merge(old, value, key) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged_values


# ---------------------------------------------------------------------------------------------------------------------
# Plain values -> dataclasses


def _build(schema: type[Any], given: Any, prefix: str, where: str) -> Any:
    if not isinstance(given, dict):
        raise ConfigError(f"{prefix.rstrip('.')} in {where} must hold settings, not {given!r}")
    known = {f.name: f for f in fields(schema) if "collects" not in f.metadata}
    given, values = _collect(schema, given, prefix, where)
    for key in given:
        if key not in known:
            choices = ", ".join(known)
            raise ConfigError(f"unknown key {prefix}{key} in {where}{closest(str(key), list(known))}; valid: {choices}")
    hints = typing.get_type_hints(schema)
    leaves: dict[str, Any] = {}
    for name, spec in known.items():
        if "room" in spec.metadata:
            values[name] = _component(spec, given.get(name, {}), f"{prefix}{name}.", where)
        elif is_dataclass(hints[name]):
            values[name] = _build(typing.cast(type, hints[name]), given.get(name, {}) or {}, f"{prefix}{name}.", where)
        elif name in given:
            leaves[name] = given[name]
    values.update(_leaves(schema, known, hints, leaves, prefix, where))
    return schema(**values)


def _collect(schema: type[Any], given: dict[str, Any], prefix: str, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Takes the sections of a `extra_components` field out of the given values."""
    specs = fields(schema)
    own = {f.name for f in specs}
    for spec in specs:
        if "collects" not in spec.metadata:
            continue
        key = spec.metadata["key"]
        taken = {k: v for k, v in given.items() if k not in own and isinstance(v, dict) and key in v}
        rest = {k: v for k, v in given.items() if k not in taken}
        return rest, {spec.name: {k: _component(spec, v, f"{prefix}{k}.", where) for k, v in taken.items()}}
    return given, {}


def _component(spec: Field[Any], given: Any, prefix: str, where: str) -> Any:
    room, key = spec.metadata["room"], spec.metadata["key"]
    if given is None:
        return None
    if not isinstance(given, dict):
        raise ConfigError(f"{prefix.rstrip('.')} in {where} must hold settings, not {given!r}; write {prefix}{key}=...")
    name = given.get(key, spec.metadata.get("default"))
    if not isinstance(name, str):
        raise ConfigError(f"{prefix}{key} in {where} must be a word, not {name!r}")
    return _build(spec.metadata["find"](room, name).Config, {key: name, **given}, prefix, where)


def _leaves(
    schema: type[Any], known: dict[str, Field[Any]], hints: dict[str, Any], given: dict[str, Any], prefix: str, where: str
) -> dict[str, Any]:
    """Values checked and converted by OmegaConf, one by one so that an error names its key."""
    out: dict[str, Any] = {}
    for name, value in given.items():
        default = known[name].default
        one = dataclasses.make_dataclass("One", [(name, hints[name], field(default="???"))])
        try:
            node = OmegaConf.structured(one)
        except OmegaConfBaseException as error:
            raise AssertionError(f"{schema.__name__}.{name}: OmegaConf cannot hold {hints[name]}: {error}") from error
        try:
            merged = OmegaConf.merge(node, {name: value})
            out[name] = typing.cast(DictConfig, OmegaConf.to_container(merged, resolve=True))[name]
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            if "Interpolation" in type(error).__name__:
                reason = str(error).splitlines()[0]
                raise ConfigError(f"{prefix}{name}={value!r} in {where} cannot be resolved: {reason}") from error
            hint = "" if default is MISSING else f" (default {default!r})"
            raise ConfigError(f"{prefix}{name}={value!r} in {where} must be {_describe(hints[name])}{hint}") from error
        if value is None and not _optional(hints[name]):
            raise ConfigError(f"{prefix}{name} in {where} must be {_describe(hints[name])}, not empty")
    return out


def _optional(hint: Any) -> bool:
    return hint is Any or type(None) in typing.get_args(hint)


def _describe(hint: Any) -> str:
    """A type as a person would say it."""
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(str(choice) for choice in typing.get_args(hint))
    if type(None) in typing.get_args(hint):
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return f"{_describe(inner[0])} or null"
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Any: "a value"}
    if hint in words:
        return words[hint]
    if typing.get_origin(hint) is list:
        return f"a list, each item {_describe(typing.get_args(hint)[0])}"
    return "settings (key: value)" if typing.get_origin(hint) is dict else str(hint)


def _check(config: Any) -> None:
    """Runs every check(), inner ones first."""
    for spec in fields(config):
        value = getattr(config, spec.name)
        for inner in value.values() if isinstance(value, dict) else [value]:
            if is_dataclass(inner) and not isinstance(inner, type):
                _check(inner)
    if hasattr(config, "check"):
        config.check()


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values, in the order of the schema; collected sections stand beside the others again."""
    values: dict[str, Any] = {}
    for spec in fields(config):
        value = dataclasses.asdict(config)[spec.name]
        values.update(value if "collects" in spec.metadata else {spec.name: value})
    return values


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML that `load` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def save(config: Any, path: Path) -> None:
    """Writes the resolved configuration."""
    path.write_text(to_yaml(config))


CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def find_config(name: str, kind: str) -> Path:
    """A path, or the name of a shipped configuration: "scenes" means configs/pretrain/scenes.yaml."""
    if Path(name).is_file():
        return Path(name)
    shipped = CONFIGS / kind / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    names = sorted(path.stem for path in (CONFIGS / kind).glob("*.yaml"))
    raise ConfigError(f"no configuration {name!r}: give a YAML file, or a shipped one: {', '.join(names)}")
