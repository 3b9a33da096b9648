"""OnnxModel: the encoders of an ONNX export, run by onnxruntime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.data.images import ImageDecoder, parse_resize
from pretrain.errors import UserError
from pretrain.ops import parse_color

from .model import Encoding


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
        from transformers import AutoTokenizer

        self.source = str(folder)
        if (folder / "task.json").is_file():
            raise UserError(f"{folder} is the export of a fine-tuned run, whose graphs give tokens: load the run itself")
        try:
            self._image, self._text = (
                onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), providers=onnxruntime.get_available_providers())
                for name in ("image", "text")
            )
            recipe = json.loads((folder / "preprocess.json").read_text())
            resize = parse_resize(recipe)
            color = parse_color(resize.get("pad_color", "white"))
            self._decoder = ImageDecoder(int(recipe["size"]), None, resize["resize"], recipe["interpolation"], pad_color=color)
            self._mean, self._std = (torch.tensor(recipe[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # onnxruntime and transformers raise what they like for damaged files
            raise UserError(f"{folder} cannot be read as an ONNX export: {' '.join(str(error).split())[:300]}") from error
        self._has_fixed_length = isinstance(self._text.get_inputs()[0].shape[1], int)
        self.dim = int(self._image.get_outputs()[0].shape[1])

    def __repr__(self) -> str:
        return f"<clipfuse OnnxModel of {self.source}: {self.dim} numbers an embedding, by onnxruntime>"

    def _decode_image(self, data: bytes) -> Tensor:
        return self._decoder.decode_eval(data)

    def _encode_images(self, pixels: Tensor) -> Tensor:
        values = (pixels.float() / 255 - self._mean) / self._std
        return _to_rows(self._image.run(None, {"pixel_values": values.numpy()})[0])

    def _encode_texts(self, texts: list[str]) -> Tensor:
        tokens = self._tokenizer(
            texts,
            padding="max_length" if self._has_fixed_length else True,
            truncation=True,
            max_length=self._tokenizer.model_max_length,
            return_tensors="np",
            return_attention_mask=True,
        )
        names = {node.name for node in self._text.get_inputs()}
        feed = {name: tokens[name] for name in ("input_ids", "attention_mask") if name in names}
        return _to_rows(self._text.run(None, feed)[0])


def _to_rows(features: np.ndarray) -> Tensor:
    return F.normalize(torch.from_numpy(features).float(), dim=-1)
