"""The same model in other libraries: written for them (export), and read from them (import).

hf.py           transformers: CLIPModel and SiglipModel where the architecture is theirs, else VisionTextDualEncoderModel
open_clip.py    open_clip: its own towers where the architecture is theirs, else timm's
onnx.py         two graphs, image and text, for onnxruntime
read_hf.py      read_open_clip.py: the way back
vision.py       plain vision transformers under the names of timm, open_clip and transformers
words.py        text transformers of CLIP and SigLIP under the names of transformers and open_clip
blocks.py       one transformer block under those names
mean.py         mean pooling as one more layer of attention, for formats that know none
tokens.py       a tokenizer that gives the tower's ids wherever it is loaded
card.py         the model card

May import pretrain.data, towers and model; nothing here knows of runs or checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pretrain.data.images import Preprocess
from pretrain.data.text import TextDecoder
from pretrain.model import DualEncoder, ModelSchema
from pretrain.towers.timm import ImageTower
from pretrain.towers.transformers import TextTower


@dataclass
class Encoders:
    """What a format writes: a trained pair of encoders, in eval mode on the CPU, and all that prepares their inputs."""

    model: DualEncoder
    config: ModelSchema
    text: TextDecoder
    """Tokenizes the way the text tower was trained."""

    @property
    def image_tower(self) -> ImageTower | None:
        """The image tower, if it is one of timm's."""
        tower = dict(self.model.towers.items()).get("image")
        return tower if isinstance(tower, ImageTower) else None

    @property
    def text_tower(self) -> TextTower | None:
        """The text tower, if it is one of transformers'."""
        tower = dict(self.model.towers.items()).get("text")
        return tower if isinstance(tower, TextTower) else None

    def projection(self, modality: str) -> Tensor | None:
        """(D, P), or None where the tower's pooled vector is the embedding."""
        weight = getattr(self.model.projection(modality), "weight", None)
        return None if weight is None else weight.detach()

    @property
    def dim(self) -> int:
        """D, the width of the shared space."""
        return self.model.projection("image").out_features

    @property
    def preprocess(self) -> Preprocess:
        """The recipe of the image tower."""
        tower = self.image_tower
        assert tower is not None
        mean, std = (tuple(values) for values in tower.statistics)
        config = tower.config
        return Preprocess(config.size, config.resize, config.interpolation, mean, std)


@dataclass
class ImportedModel:
    """What a format reads: weights under our names, and the configuration that builds a model for them."""

    config: ModelSchema
    weights: dict[str, Tensor]
    tokenizer: Any


def unsupported(encoders: Encoders) -> str | None:
    """Why no format can hold these encoders, or None: each knows one image tower and one text tower."""
    extra = sorted(set(encoders.model.towers) - {"image", "text"})
    if extra:
        return f"the {extra[0]} tower: there is no place for a third modality"
    if encoders.image_tower is None:
        return "the image tower: it is not one of timm's"
    if encoders.text_tower is None:
        return "the text tower: it is not one of transformers'"
    return None
