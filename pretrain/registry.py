"""Find components by file name: get_component("losses", "clip") is pretrain/losses/clip.py.

A file's name is its name in the configuration. A user adds a loss, a tower or a strategy (in finetune: a fusion, a context, a
task) with ONE new file. A dotted path ("my_package.my_loss") names a module outside the project. finetune registers itself
with `add_root_package`, so that this module imports nothing of finetune.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from types import ModuleType

from pretrain.errors import ConfigError, closest

_roots: list[str] = ["pretrain"]


def add_root_package(root: str) -> None:
    """Register a root package to search in: "finetune" makes get_component("tasks", "vqa") work."""
    if root not in _roots:
        _roots.append(root)


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
    Raises ConfigError for an unknown name, with the valid ones, and for a module without a Config dataclass.
    """
    if "." in name:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ConfigError(f"{package}: cannot import {name!r}: {error}; a dotted path must be importable") from error
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
