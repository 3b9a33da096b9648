"""OnnxModel: the encoders of an ONNX export, run by onnxruntime."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from pretrain.data.audio import AudioDecoder
from pretrain.data.images import ImageDecoder, parse_resize
from pretrain.errors import UserError
from pretrain.formats.onnx import Graphs
from pretrain.ops import parse_color
from pretrain.towers.mel import FULL_SCALE

from .model import Encoding, to_rows


def is_onnx_export(folder: Path) -> bool:
    """Whether a folder is an ONNX export of encoders."""
    return all((folder / name).is_file() for name in ("image.onnx", "text.onnx", "preprocess.json"))


class OnnxModel(Encoding):
    """Encoders as graphs for onnxruntime. Made by `clipfuse.load`."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError: onnxruntime is not installed, or the folder is not what `clipfuse export --format onnx` wrote."""
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError(f"{folder} needs onnxruntime: pip install 'clipfuse[onnx]'") from error
        self.source = str(folder)
        if (folder / "task.json").is_file():
            raise UserError(f"{folder} is the export of a fine-tuned run, whose graphs give tokens: load the run itself")
        try:
            self._graphs = Graphs(folder, providers=onnxruntime.get_available_providers())
            recipe = json.loads((folder / "preprocess.json").read_text())
            resize = parse_resize(recipe)
            color = parse_color(resize.get("pad_color", "white"))
            self._decoder = ImageDecoder(int(recipe["size"]), None, resize["resize"], recipe["interpolation"], pad_color=color)
            audio = recipe.get("audio")
            self._audio = None if audio is None else AudioDecoder(audio["rate"], audio["seconds"], audio["pad"])
            self._mean, self._std = (torch.tensor(recipe[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        except Exception as error:  # onnxruntime and transformers raise what they like for damaged files
            raise UserError(f"{folder} cannot be read as an ONNX export: {' '.join(str(error).split())[:300]}") from error
        self.dim = self._graphs.dim

    def __repr__(self) -> str:
        return f"<clipfuse OnnxModel of {self.source}: {self.dim} numbers an embedding, by onnxruntime>"

    def _decode_image(self, data: bytes) -> Tensor:
        return self._decoder.decode_eval(data)

    def _encode_images(self, pixels: Tensor) -> Tensor:
        return to_rows(self._graphs.embed_images((pixels.float() / 255 - self._mean) / self._std))

    def _decode_audio(self, data: bytes) -> Tensor:
        return super()._decode_audio(data) if self._audio is None else self._audio.decode_eval(data)

    def _encode_audio(self, waveforms: Tensor) -> Tensor:
        return to_rows(self._graphs.embed_audio(waveforms.float() / FULL_SCALE))

    def _encode_texts(self, texts: list[str]) -> Tensor:
        return to_rows(self._graphs.embed_texts(texts))
