"""Export to ONNX: graphs for onnxruntime and other readers of ONNX files. There is no import.

    image.onnx  image-fp16.onnx     pixel_values (b, 3, S, S) float32, normalized -> image_embeds (b, D) float32, length 1
    text.onnx   text-fp16.onnx      input_ids, attention_mask (b, T) int64 -> text_embeds (b, D) float32, length 1
    audio.onnx  audio-fp16.onnx     waveforms (b, S) float32 in [-1, 1] -> audio_embeds (b, D) float32, length 1; of models with
                                    an audio tower. The spectrogram is part of the graph, in float32
    preprocess.json  tokenizer files  README.md

b is any number. T is any length up to the tower's; for a tower that attends to padding (SigLIP), it is the tower's length.
The fp16 graphs compute in float16; their inputs and outputs are the same.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import warnings
from collections.abc import Sequence
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
    """Return which part of the encoders cannot be written as a graph, or None."""
    return unsupported(encoders, ("audio",) if encoders.audio_tower is not None else (), holds_mlp=True)


def write(encoders: Encoders, folder: Path, target: Path | None = None) -> None:
    """Write graphs, preprocessing and tokenizer into an existing folder.

    target: not used; no file names the folder.

    Raises UserError where a library is missing.
    """
    check_libraries()
    for precision, suffix in ((torch.float32, ""), (torch.float16, "-fp16")):
        model = to_exportable(encoders.model, precision)
        _write_image_graph(model, encoders.preprocess.size, folder / f"image{suffix}.onnx")
        _write_text_graph(model, encoders.text.length, folder / f"text{suffix}.onnx")
        if encoders.audio_tower is not None:
            _write_audio_graph(model, encoders.audio_tower.samples, folder / f"audio{suffix}.onnx")
    recipe: dict[str, Any] = encoders.preprocess.to_open_clip()
    if (tower := encoders.audio_tower) is not None:
        recipe["audio"] = {"rate": tower.rate, "seconds": tower.seconds, "pad": tower.config.pad}
    (folder / "preprocess.json").write_text(json.dumps(recipe, indent=1))
    portable_tokenizer.save(encoders.text, folder)


def check_libraries() -> None:
    """Raise UserError if a library that the exporter needs is not installed."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--format onnx needs {', '.join(missing)}, not installed here: pip install 'clipfuse[onnx]'")


class _Image(nn.Module):
    """The image encoder as a graph: pixel_values (b, 3, S, S) float32, normalized -> (b, D)."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model.encode("image", pixel_values.to(self.model.logit_scale.dtype))


class _Text(nn.Module):
    """The text encoder as a graph: input_ids and attention_mask (b, T) int64 -> (b, D)."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model.encode("text", input_ids, attention_mask.bool())


class _Audio(nn.Module):
    """The audio encoder as a graph: waveforms (b, S) float32 in [-1, 1] -> (b, D)."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, waveforms: Tensor) -> Tensor:
        return self.model.encode("audio", waveforms)


def to_exportable(model: Model, precision: torch.dtype) -> Model:
    """Copy a model without length buckets and special matrix products, which a graph cannot express.

    Args:
        model: the model, which stays as it is.
        precision: dtype of the copy's parameters.
    """
    exportable = copy.deepcopy(model).to(precision).eval().requires_grad_(False)
    for module in exportable.modules():
        if isinstance(module, TextTower):
            module.groups = 1
        if isinstance(module, nn.Linear):
            module.__class__ = nn.Linear
    return exportable


def _write_image_graph(model: DualEncoder, size: int, path: Path) -> None:
    batch = torch.export.Dim("batch")
    write_graph(_Image(model), (torch.zeros(2, 3, size, size),), ["pixel_values"], ["image_embeds"], ({0: batch},), path)


def _write_text_graph(model: DualEncoder, length: int, path: Path) -> None:
    ids, shape = build_trace_ids(model.tower("text").trims, length)
    inputs = (ids, torch.ones_like(ids))
    write_graph(_Text(model), inputs, ["input_ids", "attention_mask"], ["text_embeds"], (shape, shape), path)


def _write_audio_graph(model: DualEncoder, samples: int, path: Path) -> None:
    batch = torch.export.Dim("batch")
    write_graph(_Audio(model), (torch.zeros(2, samples),), ["waveforms"], ["audio_embeds"], ({0: batch},), path)


def build_trace_ids(trims: bool, length: int) -> tuple[Tensor, dict[int, Any]]:
    """Return token ids (2, T) int64 to trace a text tower with, and which dimensions are dynamic.

    Args:
        trims: the tower gives the same result without padding; only then is the length dynamic.
        length: the tower's longest text, in tokens.
    """
    shape: dict[int, Any] = {0: torch.export.Dim("batch")}
    if trims:
        shape[1] = torch.export.Dim("length", max=length)
    return torch.ones(2, length - 1 if trims and length > 3 else length, dtype=torch.int64), shape


@torch.no_grad()
def write_graph(
    module: nn.Module, inputs: tuple[Tensor, ...], names: list[str], outputs: list[str], shapes: tuple[Any, ...], path: Path
) -> None:
    """Trace a module and write its graph to a file; weights beyond 1 GiB go to a second file beside it.

    Args:
        module: put in eval mode.
        inputs: to trace it with.
        names: of the inputs.
        outputs: names of the outputs.
        shapes: the dynamic dimensions of each input, as torch.export's dynamic_shapes.
        path: the file.
    """
    level = logging.getLogger("torch.onnx").level
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
        logging.getLogger("torch.onnx").setLevel(level)
    assert program is not None
    program.save(str(path), external_data=_count_bytes(module) > 1 << 30)  # a file holds at most 2 GiB


def _count_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Loading with onnxruntime alone


class Graphs:
    """The graphs of an exported folder, with its tokenizer, run by onnxruntime."""

    def __init__(self, folder: Path, suffix: str = "", providers: Sequence[str] = ("CPUExecutionProvider",)) -> None:
        """suffix: "-fp16" loads the float16 graphs. providers: where onnxruntime may run them, in order of preference."""
        import onnxruntime
        from transformers import AutoTokenizer

        self._image, self._text = (
            onnxruntime.InferenceSession(str(folder / f"{name}{suffix}.onnx"), providers=list(providers))
            for name in ("image", "text")
        )
        path = folder / f"audio{suffix}.onnx"
        self._audio = onnxruntime.InferenceSession(str(path), providers=list(providers)) if path.exists() else None
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self._has_fixed_length = isinstance(self._text.get_inputs()[0].shape[1], int)
        self._text_inputs = {node.name for node in self._text.get_inputs()}
        self.dim = int(self._image.get_outputs()[0].shape[1])

    def embed_images(self, images: Tensor) -> Tensor:
        """Embed normalized images: (b, 3, S, S) float32 -> (b, D)."""
        return torch.from_numpy(self._image.run(None, {"pixel_values": images.numpy()})[0])

    def embed_audio(self, waveforms: Tensor) -> Tensor:
        """Embed waveforms: (b, S) float32 in [-1, 1] -> (b, D). Raises UserError for a folder without this graph."""
        if self._audio is None:
            raise UserError("there is no audio.onnx: the exported model has no audio tower")
        return torch.from_numpy(self._audio.run(None, {"waveforms": waveforms.numpy()})[0])

    def __call__(self, images: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Embed normalized images (b, 3, S, S) and texts -> (b, D) each."""
        return self.embed_images(images), self.embed_texts(texts)

    def embed_texts(self, texts: list[str]) -> Tensor:
        """Tokenize and embed texts -> (b, D)."""
        tokens = self._tokenizer(
            texts,
            padding="max_length" if self._has_fixed_length else True,
            truncation=True,
            max_length=self._tokenizer.model_max_length,
            return_tensors="np",
            return_attention_mask=True,
        )
        values = {name: tokens[name] for name in ("input_ids", "attention_mask") if name in self._text_inputs}
        return torch.from_numpy(self._text.run(None, values)[0])


def load(folder: Path, suffix: str = "") -> Graphs:
    """Load an exported folder with onnxruntime. suffix: "-fp16" loads the float16 graphs."""
    return Graphs(folder, suffix)
