"""What the processes of a test's world need, imported once by the fork server: 1 to 2 s of each that it forks.

Imports only, and a model: a thread that computed would not survive the fork.
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
