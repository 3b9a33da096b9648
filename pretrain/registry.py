"""Find components by file name: get_component("losses", "clip") is pretrain/losses/clip.py.

A file's name is its name in the configuration. A user adds a loss, a tower or a strategy (in finetune: a fusion, a context, a
task) with ONE new file. A dotted path ("my_package.my_loss") names a module outside the project. finetune registers itself
with `add_root_package`, so that this module imports nothing of finetune.

Importing a module runs its code. So a dotted path is imported only where the user's own file or command line names it
(`allow_modules`), or CLIPFUSE_MODULES does; a run folder may come from somebody else, and is data. A module that the program
has imported before is used as it is.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

from pretrain.errors import ConfigError, closest

_roots: list[str] = ["pretrain"]
_allowed: set[str] = set()
"""Dotted paths that the user has named."""

MODULES_VARIABLE = "CLIPFUSE_MODULES"
"""Environment variable: further modules that run folders may name, with commas between; child processes inherit it."""


def add_root_package(root: str) -> None:
    """Register a root package to search in: "finetune" makes get_component("tasks", "vqa") work."""
    if root not in _roots:
        _roots.append(root)


def allow_modules(names: Iterable[str]) -> None:
    """Allow these dotted paths to be imported as components: the user has named them."""
    _allowed.update(names)


def dotted_names(values: Any) -> Iterator[str]:
    """Yield the dotted paths that name components in the sections of a configuration (plain values)."""
    sections = values.values() if isinstance(values, dict) else ()
    for section in sections:
        for key in ("name", "tower"):
            name = section.get(key) if isinstance(section, dict) else None
            if isinstance(name, str) and "." in name:
                yield name


def _import_module(package: str, name: str) -> ModuleType:
    """Import the module of a dotted path. Raises ConfigError where the user has not named it, or it cannot be imported."""
    if not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(f"{package}: {name!r} is neither the name of a component nor the dotted path of a module")
    if name in sys.modules:
        return sys.modules[name]
    allowed = _allowed | {word.strip() for word in os.environ.get(MODULES_VARIABLE, "").split(",")}
    if name not in allowed and name.partition(".")[0] not in _roots:
        raise ConfigError(
            f"{package}: a run folder names the module {name!r}, whose code would be run; if you trust it, allow it with "
            f"--allow-module {name} or {MODULES_VARIABLE}={name}"
        )
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{package}: cannot import {name!r}: {error}; a dotted path must be importable (PYTHONPATH=FOLDER adds a folder)"
        ) from error


def component_names(package: str) -> list[str]:
    """Return the names of the components in `package` ("losses", "towers", ...): one per module, sorted."""
    components: set[str] = set()
    for root in _roots:
        if importlib.util.find_spec(f"{root}.{package}") is None:
            continue
        for info in pkgutil.iter_modules(importlib.import_module(f"{root}.{package}").__path__):
            module = importlib.import_module(f"{root}.{package}.{info.name}")
            if hasattr(module, "Config"):  # helper modules in the same package (losses/tiles.py) are no components
                components.add(info.name)
    return sorted(components)


def get_component(package: str, name: str) -> ModuleType:
    """Return the module of one component.

    package: "losses", "towers", ...; name: a file name in that package without .py, or the dotted path of any module.
    Raises ConfigError for an unknown name, with the valid ones, for a dotted path that only a run folder names, and for a
    module without a Config dataclass.
    """
    if "." in name:
        module = _import_module(package, name)
    else:
        choices = component_names(package)
        if name not in choices:
            raise ConfigError(f"no {name!r} in {package}{closest(name, choices)}; the choices are {', '.join(choices)}")
        roots = (r for r in _roots if importlib.util.find_spec(f"{r}.{package}") is not None)
        root = next(r for r in roots if importlib.util.find_spec(f"{r}.{package}.{name}") is not None)
        module = importlib.import_module(f"{root}.{package}.{name}")
    if not hasattr(module, "Config"):
        raise ConfigError(f"{module.__name__} cannot be used in {package}: it has no Config dataclass")
    return module
