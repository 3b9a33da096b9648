"""Imports timm and transformers without what they import for functions that training never calls.

torch's compiler and scipy's optimizers take as long to import as torch itself. timm, torchvision and transformers mark a few
functions for the compiler, import two names of torch._dynamo, and one function of scipy.optimize. While `import_libraries`
runs, modules of these names are stand-ins, whose functions import the real module when they are called. Afterwards the
stand-ins are gone, and whatever imports torch._dynamo gets the real one. It lacks the marks of functions that may stay opaque
to it (allow_in_graph: in transformers those of fp8 kernels), so runs that compile import everything at once.

`uncollected` is for all imports: the garbage collector would walk through the growing heap again and again, for nothing.
"""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
FUNCTIONS = {f"{COMPILER}.utils": ("is_compile_supported",), "scipy.optimize": ("linear_sum_assignment",)}
"""Module -> the functions that are imported from it and not called."""

LIBRARIES = ("timm", "transformers.modeling_layers", "transformers.masking_utils", "transformers.image_processing_utils")
"""What the towers import; the modules of single text models import these."""


class _StandIn(ModuleType):
    """A module whose functions import the real one when they are called; any other name imports it at once."""

    def __init__(self, name: str, functions: dict[str, Callable[..., Any]]) -> None:
        super().__init__(name)
        vars(self).update(functions)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_import_real(self.__name__), name)


@contextmanager
def uncollected() -> Iterator[None]:
    """Collect no garbage inside the block, which imports; later collections leave out what is there at its end.

    Modules, classes and functions stay for the whole process. A quarter of the CPU time to the first step went into collections
    that found none of them to be garbage.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.freeze()
            gc.enable()


def import_libraries() -> None:
    """Import timm and the base modules of transformers, without torch's compiler and scipy's optimizers."""
    with without_unused():
        for name in LIBRARIES:
            importlib.import_module(name)


@contextmanager
def without_unused() -> Iterator[None]:
    """Import without the modules above inside the block; does nothing for those that are imported already."""
    stand_ins: dict[str, _StandIn] = {}
    if COMPILER not in sys.modules:
        package = stand_ins[COMPILER] = _StandIn(COMPILER, dict(MARKS))
        spec = importlib.util.find_spec(COMPILER)
        package.__path__ = list(spec.submodule_search_locations or []) if spec else []
    for name, functions in FUNCTIONS.items():
        if name not in sys.modules and (not name.startswith(COMPILER) or stand_ins):
            stand_ins[name] = _StandIn(name, {function: _forward(name, function) for function in functions})
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        _remove(stand_ins.values())


def _remove(stand_ins: Iterable[_StandIn]) -> None:
    """Remove stand-ins from the imported modules, unless the real ones have taken their place."""
    for stand_in in list(stand_ins):
        name = stand_in.__name__
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]


def _import_real(name: str) -> ModuleType:
    """Import the real module, even inside the block."""
    _remove([module for module in list(sys.modules.values()) if isinstance(module, _StandIn)])
    return importlib.import_module(name)


def _forward(module: str, function: str) -> Callable[..., Any]:
    """Return a function that calls that of the real module."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(_import_real(module), function)(*args, **kwargs)

    return call


def _disable(function: Any = None, recursive: bool = True, **options: Any) -> Any:
    """Stand for torch._dynamo.disable: it has an effect only once the compiler is imported."""
    if function is None:
        return lambda decorated: _disable(decorated, recursive, **options)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        compiler: Any = sys.modules.get(COMPILER)
        if compiler is None or isinstance(compiler, _StandIn):
            return function(*args, **kwargs)
        return compiler.disable(function, recursive, **options)(*args, **kwargs)

    return call


def _assume_constant_result(function: Any) -> Any:
    """Mark a function as torch._dynamo.assume_constant_result does."""
    function._dynamo_marked_constant = True
    return function


def _allow_in_graph(function: Any) -> Any:
    return function


MARKS = {"disable": _disable, "assume_constant_result": _assume_constant_result, "allow_in_graph": _allow_in_graph}
"""Functions of torch._dynamo that mark others."""
