"""The same model in other libraries: written for them (export) and read from them (import).

hf.py                   export to transformers: CLIPModel or SiglipModel if one has the same architecture, else
                        VisionTextDualEncoderModel
clap.py                 export of texts and sounds to transformers: ClapModel, for CLAP's towers
hf_import.py            import of CLIP, SigLIP, CLAP and dual encoders from transformers; clap_import.py: CLAP's sections
open_clip.py            export to open_clip: its own towers if they have the same architecture, else timm's
open_clip_import.py     import of open_clip's folders and weight files
onnx.py                 export of ONNX graphs, image, text and audio, for onnxruntime
vit_weights.py          vision transformers of CLIP and SigLIP under the weight names of timm, open_clip and transformers
text_weights.py         text transformers of CLIP and SigLIP under the weight names of transformers and open_clip
block_weights.py        one transformer block under those names
mean_pooling.py         mean pooling as one more attention layer, for formats that have no mean pooling
portable_tokenizer.py   a tokenizer folder that gives the text tower's ids wherever it is loaded
model_card.py           the model card; it alone reads files of a run folder (config.yaml, environment.json, metrics.jsonl)

May import pretrain.model, data, towers and what lies below them, but not checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pretrain.data.images import Preprocess
from pretrain.data.text import TextDecoder
from pretrain.model import DualEncoder, ModelSchema
from pretrain.towers.audio import AudioTower
from pretrain.towers.timm import ImageTower
from pretrain.towers.transformers import TextTower


@dataclass
class Encoders:
    """Trained encoders of images and texts, perhaps of sounds too, in eval mode on the CPU, with what prepares their inputs."""

    model: DualEncoder
    config: ModelSchema
    text: TextDecoder
    """Tokenizes as in the training of the text tower."""

    @property
    def image_tower(self) -> ImageTower | None:
        """The image tower, or None if it is not one of timm's."""
        tower = dict(self.model.towers.items()).get("image")
        return tower if isinstance(tower, ImageTower) else None

    @property
    def text_tower(self) -> TextTower | None:
        """The text tower, or None if it is not one of transformers'."""
        tower = dict(self.model.towers.items()).get("text")
        return tower if isinstance(tower, TextTower) else None

    @property
    def audio_tower(self) -> AudioTower | None:
        """The audio tower, or None if there is none, or it is not one of this project's."""
        tower = dict(self.model.towers.items()).get("audio")
        return tower if isinstance(tower, AudioTower) else None

    def projection(self, modality: str) -> Tensor | None:
        """Return the projection matrix (D, P), or None if the tower's pooled vector is the embedding, or it has two layers."""
        weight = getattr(self.model.projection(modality), "weight", None)
        return None if weight is None else weight.detach()

    @property
    def dim(self) -> int:
        """D, the width of the shared space."""
        return self.model.projection(next(iter(self.model.towers))).out_features

    @property
    def end_id(self) -> int | None:
        """Id of the token that ends every text, or None."""
        tokenizer = self.text.tokenizer
        end: int | None = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        return end

    @property
    def preprocess(self) -> Preprocess:
        """How images are resized and normalized for the image tower."""
        tower = self.image_tower
        assert tower is not None
        mean, std = (tuple(values) for values in tower.statistics)
        config = tower.config
        return Preprocess(config.size, config.resize, config.interpolation, mean, std, tower.pad_color)


@dataclass
class ImportedModel:
    """A model read from another library.

    The weights are under the names of DualEncoder; the configuration builds a model for them.
    """

    config: ModelSchema
    weights: dict[str, Tensor]
    tokenizer: Any


def unsupported(encoders: Encoders, others: tuple[str, ...] = (), holds_mlp: bool = False) -> str | None:
    """Return why no format can hold these encoders, or None.

    Every format holds one image tower of timm and one text tower of transformers. others: further modalities that it can hold;
    holds_mlp: whether it can hold projections of two layers.
    """
    if "image" not in encoders.model.towers:
        return "a model without image tower"
    if encoders.model.has_mlp and not holds_mlp:
        return "projections of two layers (model.projection=mlp)"
    extra = sorted(set(encoders.model.towers) - {"image", "text", *others})
    if extra:
        return f"the {extra[0]} tower: it holds an image and a text tower only"
    if encoders.image_tower is None:
        return "the image tower: it is not one of timm's"
    if encoders.text_tower is None:
        return "the text tower: it is not one of transformers'"
    return None
