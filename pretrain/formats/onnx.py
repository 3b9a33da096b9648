"""ONNX: two graphs, for onnxruntime and what reads its files. Written only.

    image.onnx  image-fp16.onnx     pixel_values (b, 3, S, S) float32, normalised -> image_embeds (b, D) float32, length 1
    text.onnx   text-fp16.onnx      input_ids, attention_mask (b, T) int64 -> text_embeds (b, D) float32, length 1
    preprocess.json  tokenizer files  README.md

b is any number, T any length up to the tower's, unless the tower attends to padding (SigLIP): then T is the tower's length.
The fp16 graphs compute in float16 and keep their inputs and outputs.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pretrain.errors import UserError
from pretrain.formats import Encoders, portable_tokenizer, unsupported
from pretrain.model import DualEncoder
from pretrain.towers.transformers import TextTower

OPSET = 18
Model = TypeVar("Model", bound=nn.Module)


def export_error(encoders: Encoders) -> str | None:
    """Which part of the encoders has no graph, or None."""
    return unsupported(encoders)


def write(encoders: Encoders, folder: Path) -> None:
    """Writes the folder, which exists. Raises UserError where the exporter's libraries are missing."""
    check_libraries()
    for precision, suffix in ((torch.float32, ""), (torch.float16, "-fp16")):
        model = to_exportable(encoders.model, precision)
        _image(model, encoders.preprocess.size, folder / f"image{suffix}.onnx")
        _text(model, encoders.text.length, folder / f"text{suffix}.onnx")
    (folder / "preprocess.json").write_text(json.dumps(encoders.preprocess.to_open_clip(), indent=1))
    portable_tokenizer.save(encoders.text, folder)


def check_libraries() -> None:
    """Raises UserError where the exporter's libraries are missing."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--format onnx needs {', '.join(missing)}, not installed here: pip install 'clipfuse[onnx]'")


class _Image(nn.Module):
    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model.encode("image", pixel_values.to(self.model.logit_scale.dtype))


class _Text(nn.Module):
    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model.encode("text", input_ids, attention_mask.bool())


def to_exportable(model: Model, precision: torch.dtype) -> Model:
    """A copy without what a graph has no place for: groups by length, products by another route."""
    made = copy.deepcopy(model).to(precision).eval().requires_grad_(False)
    for module in made.modules():
        if isinstance(module, TextTower):
            module.groups = 1
        if isinstance(module, nn.Linear):
            module.__class__ = nn.Linear
    return made


def _image(model: DualEncoder, size: int, path: Path) -> None:
    batch = torch.export.Dim("batch")
    write_graph(_Image(model), (torch.zeros(2, 3, size, size),), ["pixel_values"], ["image_embeds"], ({0: batch},), path)


def _text(model: DualEncoder, length: int, path: Path) -> None:
    ids, shape = build_trace_ids(model.tower("text").trims, length)
    inputs = (ids, torch.ones_like(ids))
    write_graph(_Text(model), inputs, ["input_ids", "attention_mask"], ["text_embeds"], (shape, shape), path)


def build_trace_ids(trims: bool, length: int) -> tuple[Tensor, dict[int, Any]]:
    """Ids (2, T) int64 to trace a text tower with, and what of their shape is free: the length only where it trims."""
    shape: dict[int, Any] = {0: torch.export.Dim("batch")}
    if trims:
        shape[1] = torch.export.Dim("length", max=length)
    return torch.ones(2, length - 1 if trims and length > 3 else length, dtype=torch.int64), shape


@torch.no_grad()
def write_graph(
    module: nn.Module, inputs: tuple[Tensor, ...], names: list[str], outputs: list[str], shapes: tuple[Any, ...], path: Path
) -> None:
    """Writes `module`, traced with `inputs`, as one file; `shapes`: as torch.export's dynamic_shapes."""
    before = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module.eval(),
                inputs,
                input_names=names,
                output_names=outputs,
                dynamic_shapes=shapes,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    finally:
        logging.getLogger("torch.onnx").setLevel(before)
    assert program is not None
    program.save(str(path), external_data=_bytes(module) > 1 << 30)  # one file holds 2 GiB


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Loading, as a stranger would


def load(folder: Path, suffix: str = "") -> Any:
    """What onnxruntime makes of the folder: (images (b, 3, S, S), texts) -> embeddings."""
    import onnxruntime
    from transformers import AutoTokenizer

    image, text = (
        onnxruntime.InferenceSession(str(folder / f"{name}{suffix}.onnx"), providers=["CPUExecutionProvider"])
        for name in ("image", "text")
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    fixed = isinstance(text.get_inputs()[0].shape[1], int)

    def embed(images: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
        length = tokenizer.model_max_length
        padding = "max_length" if fixed else True
        made = tokenizer(
            texts, padding=padding, truncation=True, max_length=length, return_tensors="np", return_attention_mask=True
        )
        words = {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}
        known = {one.name for one in text.get_inputs()}
        found = (
            image.run(None, {"pixel_values": images.numpy()})[0],
            text.run(None, {name: value for name, value in words.items() if name in known})[0],
        )
        return torch.from_numpy(found[0]), torch.from_numpy(found[1])

    return embed
