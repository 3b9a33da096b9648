"""Imports that test processes need, done once by the fork server.

Nothing is computed here but a model's construction: a thread that computed would not survive the fork.

Measured: saves 1 to 2 s for each forked process.
"""

import contextlib
import importlib
import pkgutil

import pretrain.strategies
from tests.support import tiny

for module in pkgutil.iter_modules(pretrain.strategies.__path__, "pretrain.strategies."):
    importlib.import_module(module.name)
with contextlib.suppress(ImportError):
    importlib.import_module("deepspeed.ops.op_builder.all_ops")
tiny.build_model("clip")
