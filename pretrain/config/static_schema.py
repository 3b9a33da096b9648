"""The schema of a run, read from the source of its dataclasses: a typo is an error before torch is imported.

    check_settings(path, ["optim.l=3"], "pretrain")      # raises ConfigError within a fraction of a second

The dataclasses stand in modules that import torch, timm and transformers, which takes seconds. So their names, types and
defaults are read from the syntax tree here, and the values are built from them as from the real ones. What a Config's check()
refuses is found later, by `load_config`.
"""

from __future__ import annotations

import ast
import dataclasses
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from pretrain.config.reading import load_values
from pretrain.config.schema import build, component_field, extra_components, text_field
from pretrain.config.written import written_text
from pretrain.errors import ConfigError, closest

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("pretrain", "finetune")
SCHEMAS = {"pretrain": ("pretrain/train.py", "PretrainConfig"), "finetune": ("finetune/config.py", "FinetuneConfig")}


class _OutsideError(Exception):
    """A component lies outside the project, so that its fields cannot be read here."""


def check_settings(path: Path, settings: list[str], module: str) -> Any:
    """Refuse unknown keys, values of a wrong type and unknown components in a run's settings.

    path: the YAML file; settings: key=value; module: "pretrain" or "finetune". Raises ConfigError, as `load_config` does.
    Returns the configuration, without what check() does; None where a component lies outside the project.
    """
    values = load_values(path, settings)
    file, name = SCHEMAS[module]
    if written_text(values, "init") is not None:  # a tower that `init` names has fields of its own
        for key in ("image", "text"):
            section = values.get(key)
            if isinstance(section, dict) and not {"name", "args", "tower"} & set(section):
                del values[key]
    try:
        return build(_schema(ROOT / file, name), values, str(path))
    except _OutsideError:
        return None


def component_names(package: str) -> list[str]:
    """Return the names of the components in `package` ("losses", "tasks", ...), sorted."""
    files = [file for root in PACKAGES for file in (ROOT / root / package).glob("*.py")]
    return sorted(file.stem for file in files if file.stem != "__init__" and "Config" in _classes(file))


def _find(package: str, name: str) -> Any:
    """Return an object with the Config of a component, like registry.get_component."""
    if "." in name:
        raise _OutsideError(name)
    choices = component_names(package)
    if name not in choices:
        raise ConfigError(f"no {name!r} in {package}{closest(name, choices)}; the choices are {', '.join(choices)}")
    file = next(file for root in PACKAGES if (file := ROOT / root / package / f"{name}.py").exists())
    return SimpleNamespace(Config=_schema(file, "Config"))


@lru_cache
def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _classes(file: Path) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in _parse(file).body if isinstance(node, ast.ClassDef)}


def _imported_from(file: Path, name: str) -> Path | None:
    """Return the file of the project from which `name` is imported in `file`."""
    for node in _parse(file).body:
        if isinstance(node, ast.ImportFrom) and node.module and any(name == (a.asname or a.name) for a in node.names):
            path = ROOT / node.module.replace(".", "/")
            for source in (path.with_suffix(".py"), path / "__init__.py"):
                if source.exists():
                    return source
    return None


def _class_file(file: Path, name: str) -> Path | None:
    """Return the file that defines the class that `name` means in `file`; None where it is no class of the project."""
    if name in _classes(file):
        return file
    source = _imported_from(file, name)
    return None if source is None else _class_file(source, name)


@lru_cache
def _schema(file: Path, name: str) -> type[Any]:
    """Return a dataclass with the fields of class `name` of `file`, and those of its bases, without check()."""
    return dataclasses.make_dataclass(name, list(_fields(file, name).values()), kw_only=True)


def _fields(file: Path, name: str) -> dict[str, tuple[str, Any, Any]]:
    """Return {field: (field, type, default)} of a dataclass."""
    node = _classes(file)[name]
    specs: dict[str, tuple[str, Any, Any]] = {}
    for base in node.bases:
        if isinstance(base, ast.Name) and (source := _class_file(file, base.id)) is not None:
            specs |= _fields(source, base.id)
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            hint, default = _type(file, statement.annotation), _default(statement.value)
            specs[statement.target.id] = (statement.target.id, hint, default)
    return specs


def _type(file: Path, annotation: ast.expr) -> Any:
    """Return the type of an annotation; Any where it is none that can be read from the source."""
    if isinstance(annotation, ast.Name):
        source = _class_file(file, annotation.id)
        if source is not None:
            return _schema(source, annotation.id)
        alias = _alias(file, annotation.id)
        if alias is not None:
            return _type(*alias)
    names = {"Any": Any, "Literal": Literal}
    try:
        return eval(compile(ast.Expression(annotation), str(file), "eval"), names)
    except NameError:
        return Any


def _alias(file: Path, name: str) -> tuple[Path, ast.expr] | None:
    """Return what `name = ...` stands for, and the file of that line: Precision = Literal["fp32", "bf16"]."""
    for node in _parse(file).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            return file, node.value
    source = _imported_from(file, name)
    return None if source is None else _alias(source, name)


def _default(value: ast.expr | None) -> Any:
    """Return the field of a default as it is written: a constant, a component, or another default, which is left out."""
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
        arguments = [ast.literal_eval(a) for a in value.args if isinstance(a, ast.Constant)]
        if value.func.id == "component_field":
            return component_field(_find, *arguments)
        if value.func.id == "extra_components":
            return extra_components(_find, *arguments)
        if value.func.id == "text_field":
            return text_field(arguments[0], **{k.arg: ast.literal_eval(k.value) for k in value.keywords if k.arg})
    try:
        return dataclasses.field(default=ast.literal_eval(value)) if value is not None else dataclasses.field()
    except ValueError:
        return dataclasses.field(default_factory=lambda: None)
