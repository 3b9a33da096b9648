"""Weights between the pretrained and the fine-tuned encoders: WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903).

    clipfuse evaluate RUN --data SHARDS --wise 0,0.25,0.5,0.75,1 [--out DIR]

theta(alpha) = (1 - alpha) pretrained + alpha fine-tuned, for every weight that both have, those of a forked tower too; fusion
and head, which the pretrained model lacks, stay fine-tuned. Often a point between keeps most of what was learned and most of
what was known before: the curve shows the task's figures beside how well the embeddings still find each other. `--out` keeps
the best point as a run.
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
from pretrain.checkpoints import loading, store, warm_start
from pretrain.data.config import evaluation_caption
from pretrain.errors import ConfigError, UserError
from pretrain.evaluation import evaluate
from pretrain.runtime.agree import on_main

PREFIX = "encoder."
"""Where a fine-tuned model keeps its encoders."""


def interpolate(pretrained: dict[str, Tensor], tuned: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """State dicts -> theta(alpha). What only `tuned` has, and counters, are taken from it. Raises UserError."""
    out = dict(tuned)
    for name, value in pretrained.items():
        if name not in tuned or tuned[name].shape != value.shape:
            raise UserError(
                f"the two models differ: {name} has another shape, or is missing; only fine-tuning of the same model"
            )
        if tuned[name].is_floating_point():
            out[name] = torch.lerp(value.to(tuned[name]), tuned[name], alpha)
    return out


def pretrained(tuned: Finetuned, init: Any = None) -> dict[str, Tensor]:
    """The weights that a run started from, under the names and at the picture size of the fine-tuned model. Raises UserError.

    `init`: where they are, if not where the run's own `init` says. Of a run that started from towers alone, those towers.
    """
    values = configuration.read_yaml(tuned.folder / "config.yaml")
    init = values.get("init") if init is None else init
    if init is None:
        raise UserError(f"{tuned.folder} was trained from nothing (init=null): there is no pretrained model to mix it with")
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
        freeze.resize(encoder, size, config)
    known = tuple(f"towers.{name}." for name in init) if isinstance(init, dict) else ("",)
    began = {name: value for name, value in encoder.state_dict().items() if name.startswith(known)}
    out = {f"{PREFIX}{name}": value for name, value in began.items()}
    for fork in tuned.config.adapt.fork:
        for part in ("tower", "projection"):
            theirs, ours = f"{part}s.{fork}.", f"forks.{fork}.{part}."
            out |= {f"{ours}{name.removeprefix(theirs)}": value for name, value in began.items() if name.startswith(theirs)}
    return out


def curve(
    tuned: Finetuned, began: dict[str, Tensor], alphas: list[float], measure: Callable[[], dict[str, float]]
) -> list[dict[str, float]]:
    """`measure()` with the model at each alpha, in order; the model is as it was afterwards."""
    for alpha in alphas:
        if not 0 <= alpha <= 1:
            raise ConfigError(f"--wise {alpha:g}: alpha must be from 0 (pretrained) to 1 (fine-tuned)")
    model = tuned.model
    kept = {name: value.detach().clone() for name, value in model.state_dict().items()}
    began = {name: value.to(kept[name].device) if name in kept else value for name, value in began.items()}
    rows = []
    try:
        for alpha in alphas:
            model.load_state_dict(interpolate(began, kept, alpha))
            rows.append({"alpha": alpha, **measure()})
    finally:
        model.load_state_dict(kept)
    return rows


def run(
    tuned: Finetuned, shards: Any, alphas: list[float], device: torch.device, init: str | None = None, out: Path | None = None
) -> dict[str, Any]:
    """The curve on `shards`, the task's figures and retrieval by the embeddings, as plain values. Collective. Raises UserError.

    `best` is the alpha with the highest primary figure; `out`: a run folder to keep it in.
    """
    begin = time.perf_counter()
    weights = pretrained(tuned, init)
    tuned.model.to(device)
    towers = encoders.build_decoders(tuned.config, tuned.tokenizer, tuned.model.encoder, _caption(tuned))

    def measure() -> dict[str, float]:
        own = tuned.evaluate(shards, EvalConfig(), device)
        found = evaluate.evaluate(tuned.model.encoder, towers, shards, evaluate.EvalConfig(), device)
        return own | {name: value for name, value in found.items() if "_R@" in name}

    primary = tuned.task.primary_metric
    rows = curve(tuned, weights, alphas, measure)
    best = max(rows, key=lambda row: row[primary])["alpha"]
    if out is not None:
        keep(tuned, interpolate({k: v.to(device) for k, v in weights.items()}, tuned.model.state_dict(), best), out)
    return {
        "checkpoint": str(tuned.folder),
        "data": shards,
        "primary": primary,
        "curve": rows,
        "best": best,
        "kept": None if out is None else str(out),
        "seconds": round(time.perf_counter() - begin, 3),
    }


def keep(tuned: Finetuned, weights: dict[str, Tensor], out: Path) -> None:
    """Writes weights as the checkpoint of a run folder, with all that the fine-tuned one has beside them. Raises UserError."""

    def prepare() -> None:
        if (out / "checkpoints").exists():
            raise ConfigError(f"{out} holds a run already: give --out another folder")
        (out / "checkpoints").mkdir(parents=True)
        shutil.copy(tuned.folder / "config.yaml", out / "config.yaml")

    def files(folder: Path) -> None:
        shutil.copy(tuned.folder / "config.yaml", folder / "config.yaml")
        shutil.copytree(tuned.folder / loading.TOKENIZER, folder / loading.TOKENIZER)

    on_main(prepare)
    whole = {name: value.cpu() for name, value in weights.items()}
    store.save(out / "checkpoints", tuned.step, whole, files, lambda folder: None, keep=0, best=True)


def summary(result: dict[str, Any]) -> Table:
    """The result of `run` for people: a row an alpha."""
    shown = [result["primary"], "image_to_text_R@1", "text_to_image_R@1"]
    kept = f", kept in {result['kept']}" if result["kept"] else ""
    table = Table(title=result["checkpoint"], caption=f"best alpha {result['best']:g}{kept}, {result['seconds']:.0f} s")
    for name in ("alpha", *shown):
        table.add_column(name.replace("_", " "), justify="right")
    for row in result["curve"]:
        table.add_row(f"{row['alpha']:g}", *(f"{row[name]:.4f}" if name in row else "" for name in shown))
    return table


def _caption(tuned: Finetuned) -> str:
    data = configuration.read_yaml(tuned.folder / "config.yaml").get("data") or {}
    return evaluation_caption(data)
