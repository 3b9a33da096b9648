"""What the processes of a test's world need, imported once by the fork server: 1 to 4 s of each that it forks.

Imports only, and a model: a thread that computed would not survive the fork.
"""

import atexit
import contextlib
import gc
import importlib
import os
import pkgutil

import setuptools  # noqa: F401  # DeepSpeed's builders
import torch._inductor.compile_fx  # noqa: F401  # DeepSpeed's engine

import pretrain.strategies
from tests.pretrain.strategies import tiny

for module in pkgutil.iter_modules(pretrain.strategies.__path__, "pretrain.strategies."):
    importlib.import_module(module.name)
with contextlib.suppress(ImportError):
    importlib.import_module("deepspeed.ops.op_builder.all_ops")
tiny.model("clip")
atexit.register(os._exit, 0)  # Triton would list what it leaks
gc.freeze()  # DeepSpeed collects garbage: not among what is here
