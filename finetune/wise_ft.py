"""WiSE-FT: interpolates pretrained and fine-tuned weights (Wortsman et al. 2022, arXiv 2109.01903).

    clipfuse evaluate RUN --data SHARDS --wise 0,0.25,0.5,0.75,1 [--out DIR]

theta(alpha) = (1 - alpha) pretrained + alpha fine-tuned, for every weight that both models have. A tower copy (adapt.fork) is
interpolated with the pretrained tower. Fusion and head exist only in the fine-tuned model and stay as they are. An
intermediate alpha often keeps most of the task's accuracy and most of the pretrained model's retrieval. The curve shows both.
`--out` saves the best alpha as a run.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from finetune.adapt import freeze
from finetune.loading import Finetuned
from finetune.tasks import EvalConfig
from pretrain import config as configuration
from pretrain import model as encoders
from pretrain.checkpoints import loading, warm_start, writing
from pretrain.data.config import evaluation_caption
from pretrain.errors import ConfigError, UserError
from pretrain.evaluation import evaluate
from pretrain.runtime.agree import on_main

PREFIX = "encoder."
"""Prefix of the encoders' names in the state dict of a fine-tuned model."""


def interpolate(pretrained: dict[str, Tensor], tuned: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Interpolate two state dicts; integer entries, and entries that only `tuned` has, stay `tuned`'s.

    Raises UserError where `tuned` lacks an entry of `pretrained`, or has it in another shape.
    """
    out = dict(tuned)
    for name, value in pretrained.items():
        if name not in tuned or tuned[name].shape != value.shape:
            raise UserError(
                f"the two models differ: {name} has another shape, or is missing; WiSE-FT needs two models of one architecture"
            )
        if tuned[name].is_floating_point():
            out[name] = torch.lerp(value.to(tuned[name]), tuned[name], alpha)
    return out


def load_pretrained(tuned: Finetuned, init: Any = None) -> dict[str, Tensor]:
    """Load the weights that a run started from, with the names and image size of the fine-tuned model.

    For a run that started from separate towers, it returns the weights of those towers alone.

    Args:
        tuned: the fine-tuned model.
        init: path or name of the pretrained model; None = the run's `init`.

    Raises:
        UserError: the run had no `init`, or it cannot be loaded.
    """
    values = configuration.read_yaml(tuned.folder / "config.yaml")
    init = values.get("init") if init is None else init
    if init is None:
        raise UserError(f"{tuned.folder} was trained from scratch (init=null): there is no pretrained model to mix it with")
    config, size = tuned.config, tuned.config.adapt.image_size
    try:
        run = init if isinstance(init, str) else init.get("image")
        if size is not None and run is not None:
            config = replace(config, image=replace(config.image, size=loading.load_model(run).config.image.size))
        with torch.random.fork_rng(devices=[]):
            encoder = encoders.build(encoders.tower_configs(config), config.model, tuned.tokenizer)
        warm_start.load_weights(encoder, init, bool(values.get("init_partial")), tuned.tokenizer)
    except UserError as error:
        raise UserError(f"--wise needs the model that this run began from: {error}; or name it with --pretrained") from error
    if size is not None:
        freeze.resize_image_tower(encoder, size, config)
    known = tuple(f"towers.{name}." for name in init) if isinstance(init, dict) else ("",)
    weights = {name: value for name, value in encoder.state_dict().items() if name.startswith(known)}
    out = {f"{PREFIX}{name}": value for name, value in weights.items()}
    for modality in tuned.config.adapt.fork:
        for part in ("tower", "projection"):
            source, target = f"{part}s.{modality}.", f"forks.{modality}.{part}."
            out |= {f"{target}{name.removeprefix(source)}": value for name, value in weights.items() if name.startswith(source)}
    return out


def measure_curve(
    tuned: Finetuned, pretrained: dict[str, Tensor], alphas: list[float], measure: Callable[[], dict[str, float]]
) -> list[dict[str, float]]:
    """Return the metrics of `measure()` at each alpha, and restore the model. Raises ConfigError."""
    for alpha in alphas:
        if not 0 <= alpha <= 1:
            raise ConfigError(f"--wise {alpha:g}: alpha must be from 0 (pretrained) to 1 (fine-tuned)")
    model = tuned.model
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    pretrained = {name: value.to(weights[name].device) if name in weights else value for name, value in pretrained.items()}
    rows = []
    try:
        for alpha in alphas:
            model.load_state_dict(interpolate(pretrained, weights, alpha))
            rows.append({"alpha": alpha, **measure()})
    finally:
        model.load_state_dict(weights)
    return rows


def run(
    tuned: Finetuned,
    shards: Any,
    alphas: list[float],
    device: torch.device,
    init: str | None = None,
    out: Path | None = None,
    caption: str | None = None,
) -> dict[str, Any]:
    """Evaluate the task and retrieval by embeddings on `shards` at each alpha. Collective.

    Args:
        tuned: the fine-tuned model.
        shards: what to evaluate on.
        alphas: each from 0 (pretrained) to 1 (fine-tuned).
        device: where to evaluate.
        init: see load_pretrained.
        out: run folder in which to save the model at the best alpha.
        caption: where retrieval reads captions; None = where the run's evaluation did.

    Returns:
        The result as plain values; `best` is the alpha with the highest primary metric.

    Raises:
        UserError: no pretrained model, an alpha out of range, or `out` already holds a run.
    """
    begin = time.perf_counter()
    weights = load_pretrained(tuned, init)
    decoders = encoders.build_decoders(
        tuned.config, tuned.tokenizer, tuned.model.encoder, caption or _evaluation_caption(tuned)
    )

    def measure() -> dict[str, float]:
        task_metrics = tuned.evaluate(shards, EvalConfig(), device)
        metrics = evaluate.evaluate(tuned.model.encoder, decoders, shards, evaluate.EvalConfig(), device)
        return task_metrics | {name: value for name, value in metrics.items() if "_R@" in name}

    primary = tuned.task.primary_metric
    with encoders.on_device(tuned.model, tuned.config, device):
        rows = measure_curve(tuned, weights, alphas, measure)
    best = max(rows, key=lambda row: row[primary])["alpha"]
    if out is not None:
        save_run(tuned, interpolate({k: v.to(device) for k, v in weights.items()}, tuned.model.state_dict(), best), out)
    return {
        "checkpoint": str(tuned.folder),
        "data": shards,
        "primary": primary,
        "curve": rows,
        "best": best,
        "kept": None if out is None else str(out),
        "seconds": round(time.perf_counter() - begin, 3),
    }


def save_run(tuned: Finetuned, weights: dict[str, Tensor], out: Path) -> None:
    """Save weights as a new run, with configuration and tokenizer of the fine-tuned run.

    Collective. Raises UserError where the folder holds a run already.
    """

    def prepare() -> None:
        if (out / "checkpoints").exists():
            raise ConfigError(f"{out} holds a run already: give --out another folder")
        (out / "checkpoints").mkdir(parents=True)
        shutil.copy(tuned.folder / "config.yaml", out / "config.yaml")

    def files(folder: Path) -> None:
        shutil.copy(tuned.folder / "config.yaml", folder / "config.yaml")
        shutil.copytree(tuned.folder / loading.TOKENIZER, folder / loading.TOKENIZER)

    on_main(prepare)
    cpu_weights = {name: value.cpu() for name, value in weights.items()}
    content = {"model.safetensors": writing.weights_file(cpu_weights), **writing.capture_files(files)}
    writing.save(out / "checkpoints", tuned.step, content, keep=0, best=True)


def summary(result: dict[str, Any]) -> Table:
    """Format the result of `run` as a table with one row per alpha."""
    columns = [result["primary"], "image_to_text_R@1", "text_to_image_R@1"]
    saved = f", saved in {result['kept']}" if result["kept"] else ""
    table = Table(title=result["checkpoint"], caption=f"best alpha {result['best']:g}{saved}, {result['seconds']:.0f} s")
    for name in ("alpha", *columns):
        table.add_column(name.replace("_", " "), justify="right")
    for row in result["curve"]:
        table.add_row(f"{row['alpha']:g}", *(f"{row[name]:.4f}" if name in row else "" for name in columns))
    return table


def _evaluation_caption(tuned: Finetuned) -> str:
    """Return where the captions of evaluation are, from the run's configuration."""
    data = configuration.read_yaml(tuned.folder / "config.yaml").get("data") or {}
    return evaluation_caption(data)
