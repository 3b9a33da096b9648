"""load(RUN): a fine-tuned model with its task, tokenizer and decoders, ready to answer, and to be looked into."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune import model as models
from finetune.attention.trace import Trace
from finetune.config import FusionSchema
from finetune.model import FusionModel
from finetune.tasks import EvalConfig, Prediction, Setting, Task
from pretrain import config as configuration
from pretrain import model as encoders
from pretrain import registry
from pretrain.checkpoints import loading, store
from pretrain.data.config import evaluation_caption, resolve_sources
from pretrain.data.text import load_tokenizer
from pretrain.errors import UserError


@dataclass
class Finetuned:
    """A fine-tuned model and all that turns samples into its inputs."""

    model: FusionModel
    task: Task
    config: FusionSchema
    tokenizer: Any
    decoders: dict[str, Any]
    """By modality, for evaluation."""
    folder: Path
    step: int
    train: Any = None
    """The shards it learned from, where they are still there: baselines need them."""

    def inputs(self, pictures: list[bytes], texts: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Encoded pictures (JPEG, PNG, ...) and a text each -> inputs and masks of a batch. Raises BadSample, UserError."""
        if len(pictures) != len(texts):
            raise UserError(f"{len(pictures)} pictures and {len(texts)} texts: give one text a picture")
        images = torch.stack([self.decoders["image"].decode_eval(data) for data in pictures])
        device = next(self.model.parameters()).device
        if "text" not in self.decoders:  # a task of pictures alone
            return {"image": images.to(device)}, {}
        ids, mask = self.decoders["text"].encode(texts)
        return {"image": images.to(device), "text": ids.to(device)}, {"text": mask.to(device)}

    def predict(self, pictures: list[bytes], texts: list[str], trace: Trace | None = None, top: int = 5) -> Prediction:
        """What the task says about pictures and texts, one text a picture. With a `trace`, gradients are on: for maps."""
        inputs, masks = self.inputs(pictures, texts)
        with torch.set_grad_enabled(trace is not None):
            return self.task.predict(self.model, inputs, masks, trace, top)

    def evaluate(
        self, shards: Any, config: EvalConfig, device: torch.device, precision: str = "fp32", train: Any = None
    ) -> dict[str, float]:
        """The task's figures on `shards`; `train`: shards to learn baselines from instead of the run's own. Collective."""
        setting = Setting(self.decoders, device, precision, config, train=train if train is not None else self.train)
        return self.task.evaluate(self.model.to(device), shards, setting)


def is_finetuned(run: str | Path) -> bool:
    """Whether RUN is a fine-tuned run or checkpoint of ours; False for whatever else it is."""
    try:
        path = store.find(run) / "config.yaml"
    except UserError:
        return False
    return path.exists() and "task" in configuration.read_yaml(path)


def load(run: str | Path) -> Finetuned:
    """RUN is a run folder (its best, else newest checkpoint) or a checkpoint folder. Raises UserError."""
    folder = store.find(run)
    path = folder / "config.yaml"
    if not path.exists():
        raise UserError(f"{folder} has no config.yaml: it is not a checkpoint of clipfuse")
    values = configuration.read_yaml(path)
    if "task" not in values:
        raise UserError(f"{folder} holds encoders and no task: fine-tune them with `clipfuse finetune CONFIG init={run}`")
    config = configuration.build(FusionSchema, values, str(path), partial=True)
    data = values.get("data") or {}
    tokenizer = load_tokenizer(str(folder / loading.TOKENIZER))
    encoder = encoders.build(encoders.tower_configs(config), config.model, tokenizer)
    task = registry.get_component("tasks", config.task.name).build(config.task, None)
    model = models.build(encoder, config.fusion, config.context, config.tokens, config.adapt.fork)
    model.head = task.head(model)
    store.load_weights(model, store.read_weights(folder), folder)
    model.eval()
    decoders = task.decoders(encoders.build_decoders(config, tokenizer, encoder, evaluation_caption(data)))
    return Finetuned(model, task, config, tokenizer, decoders, folder, store.parse_step(folder), _there(data.get("train")))


def _there(shards: Any) -> Any:
    """The shards, if they can still be found from here."""
    try:
        resolve_sources(shards, "data.train")
    except UserError:
        return None
    return shards
