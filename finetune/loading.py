"""load(RUN): a fine-tuned model with its task, tokenizer and decoders, ready to predict."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune import model as models
from finetune.attention.trace import Trace
from finetune.config import FusionSchema
from finetune.model import FusionModel
from finetune.tasks import EvalConfig, EvalSetup, Prediction, Task
from pretrain import config as configuration
from pretrain import model as encoders
from pretrain import registry
from pretrain.checkpoints import loading, store
from pretrain.data.config import evaluation_caption, resolve_sources
from pretrain.data.text import load_tokenizer
from pretrain.errors import UserError
from pretrain.printable import format_count, get_noun


@dataclass
class Finetuned:
    """A fine-tuned model, its task, and the decoders that turn samples into its inputs."""

    model: FusionModel
    task: Task
    config: FusionSchema
    tokenizer: Any
    decoders: dict[str, Any]
    """The task's decoders by modality, for evaluation."""
    folder: Path
    step: int
    train: Any = None
    """The training shards, where they still exist: baselines are computed from them."""

    def encode_inputs(self, images: list[bytes], texts: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Encode image files (JPEG, PNG, ...), or sound files where the texts are about sounds, and one text for each.

        Returns inputs and masks of a batch, by modality. Raises BadSample, UserError.
        """
        return encode_inputs(self.decoders, next(self.model.parameters()).device, images, texts, self.task.subject)

    def predict(self, images: list[bytes], texts: list[str], trace: Trace | None = None, top: int = 5) -> Prediction:
        """Predict from image files and one text per image.

        With a `trace`, attention is recorded in it and gradients are on, as maps need. Raises BadSample, UserError.
        """
        inputs, masks = self.encode_inputs(images, texts)
        with torch.set_grad_enabled(trace is not None):
            return self.task.predict(self.model, inputs, masks, trace, top)

    def evaluate(
        self, shards: Any, config: EvalConfig, device: torch.device, precision: str = "fp32", train: Any = None
    ) -> dict[str, float]:
        """Compute the task's metrics on `shards`. Collective. Raises UserError.

        `train` names shards from which baselines are computed, instead of the run's training shards.
        """
        setup = EvalSetup(self.decoders, device, precision, config, train=train if train is not None else self.train)
        with encoders.on_device(self.model, self.config, device) as model:
            return self.task.evaluate(model, shards, setup)


def encode_inputs(
    decoders: dict[str, Any], device: torch.device, images: list[bytes], texts: list[str], subject: str = "image"
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Encode image files (JPEG, PNG, ...) and one text per image with the decoders of a model on `device`.

    subject: the modality of the files, audio for sounds.

    Returns inputs and masks of a batch, by modality. Raises BadSample, UserError.
    """
    if len(images) != len(texts):
        noun = get_noun(subject)
        raise UserError(f"{format_count(len(images), noun)} and {format_count(len(texts), 'text')}: give one text per {noun}")
    pixels = torch.stack([decoders[subject].decode_eval(data) for data in images])
    if "text" not in decoders:  # the task reads images alone
        return {subject: pixels.to(device)}, {}
    ids, mask = decoders["text"].encode(texts)
    return {subject: pixels.to(device), "text": ids.to(device)}, {"text": mask.to(device)}


def is_finetuned(run: str | Path) -> bool:
    """Return whether RUN is a fine-tuned run or checkpoint of clipfuse."""
    try:
        path = store.find(run) / "config.yaml"
    except UserError:
        return False
    return path.exists() and "task" in configuration.read_yaml(path)


def load(run: str | Path, caption: str | None = None) -> Finetuned:
    """Load a run folder (its best, else newest checkpoint) or a checkpoint folder.

    `caption` is where evaluation reads captions; None = where the run's did. Raises UserError.
    """
    folder = store.find(run)
    path = folder / "config.yaml"
    if not path.exists():
        raise UserError(f"{folder} has no config.yaml: it is not a checkpoint of clipfuse")
    values = configuration.read_yaml(path)
    if not values.get("task"):
        raise UserError(f"{folder} holds encoders without a task: fine-tune them with `clipfuse finetune CONFIG init={run}`")
    config = configuration.build(FusionSchema, values, str(path), partial=True)
    data = values.get("data") or {}
    tokenizer = load_tokenizer(str(folder / loading.TOKENIZER))
    encoder = encoders.build(encoders.tower_configs(config), config.model, tokenizer)
    task = registry.get_component("tasks", config.task.name).build(config.task, None)
    task.subject = models.find_subject(config.fusion, list(encoder.towers))
    model = models.build(encoder, config.fusion, config.context, config.tokens, config.adapt.fork)
    model.head = task.build_head(model)
    store.load_weights(model, store.read_weights(folder), folder)
    model.eval()
    decoders = task.build_decoders(encoders.build_decoders(config, tokenizer, encoder, caption or evaluation_caption(data)))
    return Finetuned(model, task, config, tokenizer, decoders, folder, store.parse_step(folder), _existing(data.get("train")))


def _existing(shards: Any) -> Any:
    """Return the shards if they can still be found, else None."""
    try:
        resolve_sources(shards, "data.train")
    except UserError:
        return None
    return shards
