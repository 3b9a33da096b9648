"""load(): whatever holds a trained model -> a Model that encodes, or a FinetunedModel that also answers."""

from __future__ import annotations

from pathlib import Path

import torch

from finetune import loading as finetuned_loading
from pretrain.checkpoints.loading import load_model
from pretrain.errors import UserError
from pretrain.model import build_decoders

from .finetuned import FinetunedModel
from .model import Model
from .onnx import OnnxModel, is_onnx_export


def load(
    source: str | Path, device: str | torch.device | None = None, precision: str = "fp32"
) -> Model | FinetunedModel | OnnxModel:
    """Load a trained model, ready to encode.

    Args:
        source: a run folder ("runs/first", or its name "first"; its best, else newest checkpoint), a checkpoint folder, a
            folder that `clipfuse export` wrote, or a published CLIP: a folder or hub name of transformers or open_clip.
        device: "cuda", "cuda:1", "cpu", ...; None = the GPU if there is one. ONNX exports run where onnxruntime runs them.
        precision: of the towers' matrix products: fp32, bf16 or fp16. Embeddings are float32 in all of them.

    Returns:
        FinetunedModel for a fine-tuned run, OnnxModel for an ONNX export, else Model. All encode images and texts.

    Raises:
        UserError: nothing usable at `source`; the message says what was looked for.
    """
    chosen = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={str(device)!r}: there is no GPU here; leave device out, or give 'cpu'")
    name = str(source)
    if is_onnx_export(Path(source)):
        return OnnxModel(Path(source))
    if finetuned_loading.is_finetuned(source):
        finetuned = finetuned_loading.load(source)
        decoders = build_decoders(finetuned.config, finetuned.tokenizer, finetuned.model.encoder, "txt")
        return FinetunedModel(finetuned, decoders, name, chosen, precision)
    loaded = load_model(source)
    return Model(loaded.model, loaded.decoders, name, chosen, precision, loaded.config.performance)
