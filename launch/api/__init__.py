"""clipfuse in Python: load a trained model, encode images and texts, compare them, ask a fine-tuned one.

    import clipfuse
    model = clipfuse.load("runs/first")                # or an export, or a published CLIP; a fine-tuned run gives its task too
    images = model.encode_images(["a.jpg", pil_image, bytes_])                 # (n, D) float32, unit length
    texts = model.encode_texts(["a red car", "a green sofa"])                  # (m, D) float32, unit length
    print(model.similarity(images, texts))                                     # (n, m) cosines
    sounds = model.encode_audio(["a.flac", (array, 48000)])                    # likewise, where the model has an audio tower

__main__.py    python -m clipfuse: the command
loading.py     load(): runs, checkpoints, exports, published models
model.py       Model: encode_images, encode_texts, encode_audio, similarity
finetuned.py   FinetunedModel: predict and attend as well
onnx.py        the same from an ONNX export, by onnxruntime
sounds.py      paths, arrays and bytes of sounds, as the bytes that decoders read
images.py      paths, PIL images, arrays and bytes, as the bytes that decoders read

This folder is the package `clipfuse`. It may import finetune and pretrain; heavy libraries are imported when they are needed.
"""

from __future__ import annotations

import os
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Any

_ARGS = sys.orig_argv
_PROGRAM = (*_ARGS, "")[_ARGS.index("-m") + 1] if sys.argv[:1] == ["-m"] and "-m" in _ARGS else ""
if _PROGRAM.partition(".")[0] == __name__ and not sys.flags.safe_path and "PYTHONSAFEPATH" not in os.environ:
    # `python -m` of this package has put the current folder first, where a user's own pretrain.py would be imported.
    os.environ["PYTHONSAFEPATH"] = "1"
    if sys.path[0] == os.getcwd() != os.path.abspath(f"{__file__}/../../.."):
        del sys.path[0]

from pretrain.errors import UserError  # noqa: E402 - after the current folder has left the path

if TYPE_CHECKING:
    from .finetuned import FinetunedModel
    from .loading import load
    from .model import Model, similarity
    from .onnx import OnnxModel

__all__ = ["FinetunedModel", "Model", "OnnxModel", "UserError", "load", "similarity"]

_MODULES = {
    "FinetunedModel": "finetuned",
    "Model": "model",
    "OnnxModel": "onnx",
    "load": "loading",
    "similarity": "model",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import clipfuse` alone does not import torch."""
    if name == "__version__":
        return metadata.version("clipfuse")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
