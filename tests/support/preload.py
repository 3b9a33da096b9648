"""Imports that test processes need, done once by the fork server.

Nothing is computed here but a model's construction: a thread that computed would not survive the fork.

Measured: a forked run of two steps took 0.7 CPU seconds, with fewer imports here and garbage collections it took 1.2.
"""

import contextlib
import gc
import importlib
import pkgutil

gc.disable()

import pretrain.strategies  # noqa: E402
import pretrain.train  # noqa: E402
from tests.support import tiny  # noqa: E402

MODULES = (
    "launch.cli",
    "launch.elastic",
    "pretrain.checkpoints.store",
    "pretrain.training.loop",
    "finetune.train",
    "pyarrow.parquet",
)
"""What commands import when they start to work."""
OF_DEEPSPEED = (
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.module_inject.auto_ep_layer",
)
"""What DeepSpeed imports when an engine is built; the second one imports torch's compiler."""

for module in pkgutil.iter_modules(pretrain.strategies.__path__, "pretrain.strategies."):
    importlib.import_module(module.name)
for name in MODULES:
    importlib.import_module(name)
for name in OF_DEEPSPEED:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
for loss in ("clip", "siglip"):
    tiny.build_model(loss)
gc.freeze()  # else each collection in a forked process walks through 500,000 objects, and copies their pages
gc.enable()
