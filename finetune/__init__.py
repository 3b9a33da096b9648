"""Fine-tuning: cross-attention on aligned encoders for downstream tasks, and maps of its attention.

    config.py       the configuration of a run, completed with the architecture of `init`
    model.py        FusionModel: encoders, fusion and the head of a task
    train.py        train(): assembles a run and calls pretrain's fit(); __main__.py is what launchers start
    loading.py      load(RUN): a fine-tuned model, ready to predict
    evaluate.py     the metrics of a fine-tuned run, for `clipfuse evaluate`
    export.py       ONNX graphs of encoders and head; model_card.py writes their model card
    next_commands.py  the commands that a run prints at its end
    wise_ft.py      WiSE-FT: interpolation between pretrained and fine-tuned weights

    attention/      multi-head attention that can record its weights
    context/        how images are attended to: dense | local | coarse_to_fine | pooled
    fusion/         which modality attends to which: cross | co | merged
    adapt/          frozen layers, low-rank adapters, another image size
    tasks/          one file per task: vqa | retrieval | classification | captioning
    explain/        maps of what each word attends to
    grounding/      evaluation of these maps against boxes of objects

Imports pretrain, never launch. The order of layers is a contract in pyproject.toml, [tool.importlinter].
Importing this package adds its packages to pretrain.registry.
"""

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

from pretrain import registry  # noqa: E402 - after the current folder has left the path

if TYPE_CHECKING:
    from finetune.loading import Finetuned, load

__all__ = ["Finetuned", "load"]

registry.add_root_package("finetune")


def __getattr__(name: str) -> Any:
    """Import `load` and `Finetuned` on first access, because the modules below import this package first."""
    if name not in __all__:
        raise AttributeError(f"module 'finetune' has no attribute {name!r}")
    from finetune import loading

    return getattr(loading, name)
