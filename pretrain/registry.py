"""get_component("losses", "clip") -> the module pretrain/losses/clip.py: a file's name is its name in the configuration.

A user adds a loss, a tower, a strategy (and, one floor up, a fusion, a context, a task) with ONE new file. A dotted path
("my_package.my_loss") names a module outside the project. finetune adds itself with `add_root_package`, so that this floor
knows nothing of the one above it.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from types import ModuleType

from pretrain.errors import ConfigError, closest

_packages: list[str] = ["pretrain"]


def add_root_package(package: str) -> None:
    """Lets the rooms of `package` be found as well: "finetune" makes get_component("tasks", "vqa") work."""
    if package not in _packages:
        _packages.append(package)


def component_names(room: str) -> list[str]:
    """The components in a room: one per module, sorted."""
    found: set[str] = set()
    for package in _packages:
        if importlib.util.find_spec(f"{package}.{room}") is None:
            continue
        for info in pkgutil.iter_modules(importlib.import_module(f"{package}.{room}").__path__):
            module = importlib.import_module(f"{package}.{room}.{info.name}")
            if hasattr(module, "Config"):  # helpers that share a room (losses/tiles.py) are not choices
                found.add(info.name)
    return sorted(found)


def get_component(room: str, name: str) -> ModuleType:
    """The module of one component. Raises ConfigError, which lists the choices, for a name that is not there."""
    if "." in name:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ConfigError(f"{room}: cannot import {name!r}: {error}; a dotted path must be importable") from error
    else:
        choices = component_names(room)
        if name not in choices:
            raise ConfigError(f"no {name!r} in {room}{closest(name, choices)}; the choices are {', '.join(choices)}")
        with_room = (p for p in _packages if importlib.util.find_spec(f"{p}.{room}") is not None)
        package = next(p for p in with_room if importlib.util.find_spec(f"{p}.{room}.{name}") is not None)
        module = importlib.import_module(f"{package}.{room}.{name}")
    if not hasattr(module, "Config"):
        raise ConfigError(f"{module.__name__} cannot be used in {room}: it has no Config dataclass")
    return module
