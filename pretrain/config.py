"""Configuration: dataclass schema <- YAML (and its `base:` file) <- `key=value` settings.

    load(Schema, "configs/pretrain/scenes.yaml", ["optim.lr=1e-3"]) -> Schema

All errors of a configuration are raised here, before anything is built: an unknown key (with the nearest valid one), a value
of the wrong type, an unknown component, a combination that a dataclass's `check()` refuses. Each is one ConfigError with one
line.

A schema field made by `component_field` holds the Config of a component that the registry finds by name: `loss.name=clip`
gives `loss` the fields of pretrain/losses/clip.py. This module imports nothing of the project but errors.
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


# ---------------------------------------------------------------------------------------------------------------------
# Reading files and settings


def load(schema: type[T], path: str | Path | None = None, dotlist: list[str] | None = None) -> T:
    """Load a configuration file and key=value settings as an instance of `schema`. Raises ConfigError."""
    return build(schema, load_values(path, dotlist or []), str(path) if path is not None else "the command line")


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
        values = {k: v for k, v in values.items() if k in known or (isinstance(v, dict) and any(key in v for key in keys))}
    config = _build(schema, values, "", where)
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
        content: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"no configuration file {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold `key: value` pairs, not a {type(content).__name__}")
    values = {str(key): value for key, value in content.items()}
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"{path}: `base` must name one file, not {base!r}")
    return merge(read_yaml(path.parent / base, (*parents, path)), values)


def parse_dotlist(dotlist: list[str]) -> dict[str, Any]:
    """Parse settings: ["optim.lr=1e-3"] -> {"optim": {"lr": 0.001}}. Raises ConfigError."""
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
"""By section: keys that give the same quantity in different units, of which one is used."""


def merge(base: dict[str, Any], override: dict[str, Any], section: str = "") -> dict[str, Any]:
    """Merge `override` over `base` and return the result. Dicts merge by key; lists and values replace.

    section: the key of these dicts. A key of ALTERNATIVES in `override` removes the other alternatives of `base`.
    """
    units = ALTERNATIVES.get(section, ())
    is_overridden = any(override.get(key) for key in units)  # 0 means that this unit is not used
    merged_values = {key: value for key, value in base.items() if not (is_overridden and key in units)}
    for key, value in override.items():
        old = merged_values.get(key)
        merged_values[key] = merge(old, value, key) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged_values


# ---------------------------------------------------------------------------------------------------------------------
# Plain values -> dataclasses


def _build(schema: type[Any], values: Any, prefix: str, where: str) -> Any:
    """Build an instance of `schema` from plain values.

    prefix: the dotted key of `values`, with a dot at its end; where: the origin of the values, for error messages.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix.rstrip('.')} in {where} must hold settings, not {values!r}")
    known = {f.name: f for f in fields(schema) if "extra" not in f.metadata}
    values, arguments = _split_extra_components(schema, values, prefix, where)
    for key in values:
        if key not in known:
            choices = ", ".join(known)
            raise ConfigError(f"unknown key {prefix}{key} in {where}{closest(str(key), list(known))}; valid: {choices}")
    hints = typing.get_type_hints(schema)
    leaves: dict[str, Any] = {}
    for name, spec in known.items():
        if "package" in spec.metadata:
            arguments[name] = _build_component(spec, values.get(name, {}), f"{prefix}{name}.", where)
        elif is_dataclass(hints[name]):
            schema_of_field = typing.cast(type, hints[name])
            arguments[name] = _build(schema_of_field, values.get(name, {}) or {}, f"{prefix}{name}.", where)
        elif name in values:
            leaves[name] = values[name]
    arguments.update(_convert_leaves(schema, known, hints, leaves, prefix, where))
    return schema(**arguments)


def _split_extra_components(
    schema: type[Any], values: dict[str, Any], prefix: str, where: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split off the sections of an `extra_components` field: return the rest, and {field: components}."""
    specs = fields(schema)
    names = {f.name for f in specs}
    for spec in specs:
        if "extra" not in spec.metadata:
            continue
        key = spec.metadata["key"]
        sections = {k: v for k, v in values.items() if k not in names and isinstance(v, dict) and key in v}
        rest = {k: v for k, v in values.items() if k not in sections}
        return rest, {spec.name: {k: _build_component(spec, v, f"{prefix}{k}.", where) for k, v in sections.items()}}
    return values, {}


def _build_component(spec: Field[Any], values: Any, prefix: str, where: str) -> Any:
    """Build the Config of the component that `values` names, or of the default one; None if it is null."""
    package, key = spec.metadata["package"], spec.metadata["key"]
    if values is None:
        return None
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix.rstrip('.')} in {where} must hold settings, not {values!r}; write {prefix}{key}=...")
    name = values.get(key, spec.metadata.get("default"))
    if not isinstance(name, str):
        raise ConfigError(f"{prefix}{key} in {where} must be a name, not {name!r}")
    return _build(spec.metadata["find"](package, name).Config, {key: name, **values}, prefix, where)


def _convert_leaves(
    schema: type[Any], known: dict[str, Field[Any]], hints: dict[str, Any], leaves: dict[str, Any], prefix: str, where: str
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
        try:
            merged = OmegaConf.merge(node, {name: value})
            converted[name] = typing.cast(DictConfig, OmegaConf.to_container(merged, resolve=True))[name]
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            if "Interpolation" in type(error).__name__:
                reason = str(error).splitlines()[0]
                raise ConfigError(f"{prefix}{name}={value!r} in {where} cannot be resolved: {reason}") from error
            hint = "" if default is MISSING else f" (default {default!r})"
            raise ConfigError(f"{prefix}{name}={value!r} in {where} must be {_describe_type(hints[name])}{hint}") from error
        if value is None and not _is_optional(hints[name]):
            raise ConfigError(f"{prefix}{name} in {where} must be {_describe_type(hints[name])}, not empty")
    return converted


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


def _check(config: Any) -> None:
    """Run the check() of a configuration and of all that it contains, inner ones first."""
    for spec in fields(config):
        value = getattr(config, spec.name)
        for inner in value.values() if isinstance(value, dict) else [value]:
            if is_dataclass(inner) and not isinstance(inner, type):
                _check(inner)
    if hasattr(config, "check"):
        config.check()


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
    """Return the resolved configuration as YAML; `load` of this text gives an equal configuration."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


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
    raise ConfigError(f"no configuration {name!r}: give a YAML file, or a shipped one: {', '.join(names)}")
