"""A checkpoint -> model, tokenizer and decoders, ready to encode: what evaluation, export and fine-tuning start from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain import config as configuration
from pretrain import model as models
from pretrain.checkpoints import store
from pretrain.data.config import evaluation_caption
from pretrain.data.text import load_tokenizer
from pretrain.errors import UserError
from pretrain.formats import ImportedModel, hf_import, open_clip_import
from pretrain.model import DualEncoder, ModelSchema

TOKENIZER = "tokenizer"
"""The tokenizer's folder inside a checkpoint."""

WEIGHT_FILES = (".pt", ".pth", ".bin", ".safetensors")
"""What open_clip's files of weights end in."""


@dataclass
class LoadedModel:
    """A trained model and all that turns samples into its inputs."""

    model: DualEncoder
    config: ModelSchema
    tokenizer: Any
    decoders: dict[str, Any]
    """By modality, for evaluation."""
    folder: Path
    step: int


def load_model(run: str | Path) -> LoadedModel:
    """RUN is a run folder (its best, else newest checkpoint) or a checkpoint folder; of a fine-tuned one, the encoders. Or a
    model of transformers (a folder, a hub name) or open_clip (a folder, MODEL:FILE).

    Raises UserError.
    """
    read = find_importer(run)
    if read is not None:
        found = read(str(run))
        return _built(found.config, found.weights, found.tokenizer, "txt", Path(run), 0)
    folder = store.find(run)
    path = folder / "config.yaml"
    if not path.exists():
        raise UserError(f"{folder} has no config.yaml: it is not a checkpoint of clipfuse")
    values = configuration.read_yaml(path)
    config = configuration.build(ModelSchema, values, str(path), partial=True)
    caption = evaluation_caption(values.get("data") or {})
    tokenizer = load_tokenizer(str(folder / TOKENIZER))
    weights = store.read_weights(folder)
    if "task" in values:  # fine-tuned: the encoders stand among other parts
        weights = {name.removeprefix("encoder."): w for name, w in weights.items() if name.startswith("encoder.")}
    return _built(config, weights, tokenizer, caption, folder, store.parse_step(folder))


def _built(
    config: ModelSchema, weights: dict[str, Tensor], tokenizer: Any, caption: str, folder: Path, step: int
) -> LoadedModel:
    model = models.build(models.tower_configs(config), config.model, tokenizer)
    store.load_weights(model, weights, folder)
    model.eval()
    return LoadedModel(model, config, tokenizer, models.build_decoders(config, tokenizer, model, caption), folder, step)


def find_importer(run: str | Path) -> Callable[[str], ImportedModel] | None:
    """What reads RUN where it is not ours but a model of transformers or open_clip; None where it is ours, or nothing."""
    path, text = Path(run), str(run)
    if path.is_dir():
        if (path / "open_clip_config.json").is_file():
            return open_clip_import.read
        ours = (path / "config.yaml").exists() or (path / "checkpoints").exists()
        return hf_import.read if (path / "config.json").is_file() and not ours else None
    if path.is_file() or (":" in text and Path(text.rpartition(":")[2]).suffix in WEIGHT_FILES):
        return open_clip_import.read
    hub_name = text.count("/") == 1 and not text.startswith((".", "/", "~", "runs/"))
    return hf_import.read if hub_name and not path.parent.exists() else None
