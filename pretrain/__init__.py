"""Contrastive pretraining: image-text shards in, aligned image and text encoders out.

    __main__.py   python -m pretrain CONFIG [key=value ...]: the process that every launcher starts
    train.py      PretrainConfig, the schema of a run; train(), which builds its components and calls fit()
    model.py      DualEncoder: a tower and a projection for each modality, and a logit scale
    projections.py   from a tower's pooled vector into the shared space
    optim.py      AdamW: parameter groups, learning-rate schedules, weight averaging
    registry.py   a component's module, found by its file name: get_component("losses", "clip")
    ops.py        float32 products through oneDNN; CLIP's image mean and std
    printable.py  text without passwords, tokens and control characters, as it is printed, logged and saved
    errors.py     UserError and ConfigError, whose message is the one line that a user reads

    evaluation/   retrieval, zero-shot classification, linear probe
    training/     fit(), the only training loop; one optimizer step; the run folder and its metrics
    embedding/    embeddings of whole collections, written to files by any number of processes
    checkpoints/  saving and loading checkpoints; starting from other weights; export
    formats/      conversion to and from transformers, open_clip and ONNX
    strategies/   how a step runs on one process or many: single, ddp, fsdp2, zero1 to zero3
    data/         shards and captions in, batches out
    towers/       encoders of one modality
    losses/       contrastive losses
    runtime/      processes, signals, memory, terminal and files
    config/       configuration: dataclass schema <- YAML <- key=value

    from pretrain import DualEncoder, PretrainConfig, load_model   # imported at first use

May import nothing of finetune or launch. Among these packages, each imports only those below it (pyproject.toml,
[tool.importlinter]). Importing this package imports no other module: `python -m pretrain --help` answers without torch.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

_ARGS = sys.orig_argv
_PROGRAM = (*_ARGS, "")[_ARGS.index("-m") + 1] if sys.argv[:1] == ["-m"] and "-m" in _ARGS else ""
if _PROGRAM.partition(".")[0] == __name__ and not sys.flags.safe_path and "PYTHONSAFEPATH" not in os.environ:
    # `python -m` of this package has put the current folder first, where a user's own pretrain.py would be imported.
    os.environ["PYTHONSAFEPATH"] = "1"
    if sys.path[0] == os.getcwd() != os.path.abspath(f"{__file__}/../.."):
        del sys.path[0]

if TYPE_CHECKING:
    from pretrain.checkpoints.loading import load_model
    from pretrain.model import DualEncoder
    from pretrain.train import PretrainConfig

__all__ = ["DualEncoder", "PretrainConfig", "load_model"]

_MODULES = {
    "DualEncoder": "pretrain.model",
    "PretrainConfig": "pretrain.train",
    "load_model": "pretrain.checkpoints.loading",
}


def __getattr__(name: str) -> Any:
    """Import a public name's module when the name is first used: these modules import torch."""
    if name not in _MODULES:
        raise AttributeError(f"module 'pretrain' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
