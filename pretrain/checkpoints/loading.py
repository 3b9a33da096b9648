"""Load a checkpoint or a published model as model, tokenizer and decoders, ready to encode.

Evaluation, export, embedding and fine-tuning all start from what `load_model` returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain import config as configuration
from pretrain import model as models
from pretrain.checkpoints import store
from pretrain.data.config import evaluation_caption
from pretrain.data.text import load_tokenizer
from pretrain.errors import ConfigError, UserError
from pretrain.formats import ImportedModel, hf_import, open_clip_import
from pretrain.model import DualEncoder, ModelSchema

TOKENIZER = "tokenizer"
"""The tokenizer's folder inside a checkpoint."""

WEIGHT_FILES = (".pt", ".pth", ".bin", ".safetensors")
"""Suffixes of the weight files that open_clip writes."""


@dataclass
class LoadedModel:
    """A trained model with the tokenizer and decoders that turn samples into its inputs."""

    model: DualEncoder
    """In eval mode."""
    config: ModelSchema
    tokenizer: Any
    decoders: dict[str, Any]
    """By modality, for evaluation."""
    folder: Path
    """The checkpoint folder; for a published model, its name as given."""
    step: int
    """The step of the checkpoint; 0 for a published model."""
    widths: tuple[int, ...] = ()
    """Of loss.matryoshka: how many of the first dimensions are embeddings by themselves, besides all of them."""
    keeps_incomplete: bool = False
    """Whether it was trained on samples that lack a modality, too: data.incomplete=keep."""


def load_model(run: str | Path) -> LoadedModel:
    """Load the encoders that RUN names.

    RUN is a run folder (its best, else its newest checkpoint), a checkpoint folder, or a published model: a folder or hub
    name of transformers, or a folder or MODEL:FILE of open_clip. Of a fine-tuned run, only the encoders are loaded.

    Raises:
        UserError: nothing is there, it is damaged, or it is a model that cannot be read.
    """
    read_published = find_importer(run)
    if read_published is not None:
        imported = read_published(str(run))
        return _build_loaded(imported.config, imported.weights, imported.tokenizer, "txt", Path(run), 0)
    folder = store.find(run)
    path = folder / "config.yaml"
    if not path.exists():
        raise UserError(f"{folder} has no config.yaml: it is not a checkpoint of clipfuse")
    values = configuration.read_yaml(path)
    config = configuration.build(ModelSchema, values, str(path), partial=True)
    caption = evaluation_caption(values.get("data") or {})
    tokenizer = load_tokenizer(str(folder / TOKENIZER))
    weights = store.read_weights(folder)
    if "task" in values:  # a fine-tuned model holds its encoders below `encoder.`, beside fusion and head
        weights = {name.removeprefix("encoder."): w for name, w in weights.items() if name.startswith("encoder.")}
    loaded = _build_loaded(config, weights, tokenizer, caption, folder, store.parse_step(folder))
    if "task" not in values:  # fine-tuning does not train them
        loaded.widths = read_widths(values.get("loss"), config.model.dim)
        loaded.keeps_incomplete = (values.get("data") or {}).get("incomplete") == "keep"
    return loaded


def read_widths(loss: Any, dim: int) -> tuple[int, ...]:
    """Return the widths below `dim` of loss.matryoshka in the section `loss` of a configuration, in order.

    Raises ConfigError where it is no list of whole numbers.
    """
    widths = loss.get("matryoshka") if isinstance(loss, Mapping) else loss
    if widths is None:
        return ()
    if not isinstance(widths, list | tuple) or any(type(width) is not int or width < 1 for width in widths):
        raise ConfigError(f"loss.matryoshka={str(widths)[:80]} must be a list of widths")
    return tuple(sorted({width for width in widths if width < dim}))


def _build_loaded(
    config: ModelSchema, weights: dict[str, Tensor], tokenizer: Any, caption: str, folder: Path, step: int
) -> LoadedModel:
    model = models.build(models.tower_configs(config), config.model, tokenizer)
    store.load_weights(model, weights, folder)
    model.eval()
    return LoadedModel(model, config, tokenizer, models.build_decoders(config, tokenizer, model, caption), folder, step)


def find_importer(run: str | Path) -> Callable[[str], ImportedModel] | None:
    """Return the function that reads RUN if it names a model of transformers or open_clip.

    None if RUN is a run or checkpoint of clipfuse, or names nothing.
    """
    path, text = Path(run), str(run)
    if path.is_dir():
        if (path / "open_clip_config.json").is_file():
            return open_clip_import.read
        is_clipfuse = (path / "config.yaml").exists() or (path / "checkpoints").exists()
        return hf_import.read if (path / "config.json").is_file() and not is_clipfuse else None
    if path.is_file() or (":" in text and Path(text.rpartition(":")[2]).suffix in WEIGHT_FILES):
        return open_clip_import.read
    is_hub_name = text.count("/") == 1 and not text.startswith((".", "/", "~", "runs/"))
    return hf_import.read if is_hub_name and not path.parent.exists() else None
