"""A run folder -> one self-contained HTML page: what was trained, how it went, what it can do, how to go on.

    write("runs/clipart")                  runs/clipart/report.html
    write("runs/clipart", "new/*.tar")     its gallery asks about other shards

    record.py       what a run folder says, read as far as it got
    figures.py      the words and numbers of the page
    charts.py       line charts as inline SVG
    gallery.py      what the model answers on held-out pictures and captions
    tuned.py        of a fine-tuned run: its task's figures, its answers, and where each word looked
    page.html.j2    the page

The page needs no network and no other file. A run that is unfinished, was resumed, never evaluated or has no checkpoint
gets a page with what is there. Captions come from strangers: everything is escaped by the template engine.
"""

from __future__ import annotations

import math
import os
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from finetune import loading as inference_of_tasks
from launch.report import figures
from launch.report import gallery as galleries
from launch.report import record as records
from launch.report import tuned as tuning
from launch.report.charts import Series, line_chart
from launch.report.record import Record
from launch.report.tuned import Tuned
from pretrain.checkpoints import export as exports
from pretrain.checkpoints import loading
from pretrain.errors import UserError
from pretrain.runtime import distributed
from pretrain.runtime.files import write_text

NO_SHARDS = "The run names no validation shards (data.val); give some with --data."


def write(run: str | Path, data: Any = None, out: Path | None = None, pictures: int = 2000, workers: int = 2) -> Path:
    """Writes the page and returns its path.

    Args:
        run: a run folder, or the name of one in runs/.
        data: shards for the gallery; by default the run's data.val.
        out: where to; by default report.html in the run folder.
        pictures: how many samples of the shards the gallery ranks; 0 leaves it out.
        workers: processes that read them.

    Raises:
        UserError: there is no run, the page cannot be written, or `data` was given and cannot be used.
    """
    record = records.read(run)
    gallery, missing, weights, export = None, "", {}, None
    tuned = Tuned(record.get("task.name"), "") if record.get("task") else None
    shards = data or record.get("data.val")
    try:
        if tuned is not None:
            model = inference_of_tasks.load(record.folder)
            model.model.to(distributed.device())
            weights = {name: count["total"] for name, count in model.model.parameter_counts().items()}
            tuned = tuning.build(model, shards if pictures else None, workers)
        else:
            loaded = loading.load_model(record.folder)
            export = exports.suggest_format(loaded, f"{_shown_path(record.folder)}/export")
            weights = {name: sum(p.numel() for p in tower.parameters()) for name, tower in loaded.model.towers.items()}
            if shards and pictures:
                gallery = galleries.build(loaded, shards, distributed.device(), workers, pictures)
                missing = "" if gallery else f"No sample of {', '.join(figures.shards(shards))} could be used."
            else:
                missing = NO_SHARDS
    except UserError as error:
        if data:
            raise
        missing = str(error)
    path = out or record.folder / "report.html"
    try:
        write_text(path, render(record, gallery, missing, weights, tuned, export))
    except OSError as error:
        raise UserError(f"cannot write the report {path}: {error.strerror or error}") from error
    return path


def render(
    record: Record,
    gallery: galleries.Gallery | None = None,
    missing: str = "",
    weights: dict[str, int] | None = None,
    tuned: Tuned | None = None,
    export: tuple[str, str] | None = None,
) -> str:
    """The page as text. `missing` says why there are no pictures; `weights` are the parts' parameter counts; `export` is the
    format that can hold the model, and the Python that loads it from export/ in the run folder."""
    shown = _shown_path(record.folder)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    best, where = record.best(), "the validation pairs"
    if best is None and gallery is not None:
        best, where = gallery.line(record.step), f"pairs from {gallery.data}, measured for this page"
    if tuned is not None:
        best, where = tuned.best(record), "the validation samples"
    return environment.get_template("page.html.j2").render(
        tuned=tuned,
        answered=tuned.rows(best) if tuned and best else [],
        name=record.folder.resolve().name,
        folder=shlex.quote(shown),
        exported=shlex.quote(f"{shown}/export"),
        export=export,
        has_export=(record.folder / "export/README.md").exists(),
        embeddings=shlex.quote(f"{shown}/embeddings"),
        embeddings_text=repr(f"{shown}/embeddings"),
        state=record.status["state"],
        why=record.status["why"],
        sentence=tuning.sentence(record) if tuned else figures.sentence(record),
        facts=figures.facts(record, weights or {}),
        recalls=figures.recalls(best) if best and not tuned else [],
        best=best,
        where=where,
        earlier=len(record.evaluations) if best and record.evaluations and record.evaluations[-1]["step"] > best["step"] else 0,
        classification=figures.classification(best) if best and not tuned else [],
        learning=learning_charts(record),
        progress=task_charts(record, tuned) if tuned else progress_charts(record),
        speed=speed_charts(record),
        evaluations=tuned.table(record) if tuned else figures.evaluation_table(record),
        gallery=gallery,
        missing=missing,
        bad=figures.bad_samples(record),
        resume=figures.command(record),
        config=record.config_text.strip(),
        environment=figures.environment_rows(record),
        data=" ".join(shlex.quote(name) for name in figures.shards(record.get("data.val"))[:1]) or "SHARDS",
        made=datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC"),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Charts


def learning_charts(record: Record) -> list[dict[str, Any]]:
    """Loss, learning rate, logit scale, gradient norm over steps."""
    batch = record.get("data.batch_size")
    blind = None
    if record.get("loss.name") == "clip" and isinstance(batch, int) and batch > 1:
        blind = (math.log(batch), f"blind guess: ln {batch:,}")
    return [
        *_chart(record, "loss", "Loss", "the running mean over its values", smooth=True, reference=blind),
        *_chart(record, "logit_scale", "Logit scale", "weight of similarities, at most 100"),
        *_chart(record, "grad_norm", "Gradient norm", "before clipping", smooth=True, zero=True),
        *_chart(record, "lr", "Learning rate", "", zero=True),
    ]


def speed_charts(record: Record) -> list[dict[str, Any]]:
    """Throughput, waiting for data, memory."""
    return [
        *_chart(record, "samples_per_second", "Throughput", "samples a second", smooth=True, zero=True),
        *_chart(record, "data_wait_share", "Waiting for data", "share of the time on steps", "%", smooth=True, zero=True),
        *_chart(record, "memory_gib", "Peak memory", "of one process so far", " GiB", zero=True),
    ]


def progress_charts(record: Record) -> list[dict[str, Any]]:
    """Recalls over steps, with two evaluations or more."""
    if len(record.evaluations) < 2:
        return []
    steps = [line["step"] for line in record.evaluations]
    out = []
    for way, title in figures.WAYS:
        series = [
            Series(f"R@{k}", steps, [line.get(f"val/{way}_R@{k}") for line in record.evaluations])
            for k in figures.KS
            if any(line.get(f"val/{way}_R@{k}") is not None for line in record.evaluations)
        ]
        svg = line_chart(series, "%", zero=True, label=f"{title}: recall over steps")
        if svg:
            out.append({"title": title, "note": "recall", "svg": Markup(svg), "legend": [s.name for s in series]})
    return out


def task_charts(record: Record, tuned: Tuned) -> list[dict[str, Any]]:
    """The primary figure over steps, with two evaluations or more; beside it that of who saw no picture."""
    steps = [line["step"] for line in record.evaluations]
    if len(steps) < 2 or tuned.best(record) is None:
        return []
    names = [(tuned.primary, tuned.primary.replace("_", " ")), (f"blind_{tuned.primary}", "without picture")]
    series = [
        Series(title, steps, [line.get(f"val/{name}") for line in record.evaluations])
        for name, title in names
        if any(line.get(f"val/{name}") is not None for line in record.evaluations)
    ]
    svg = line_chart(series, label=f"{tuned.primary} over steps")
    return (
        [{"title": names[0][1].capitalize(), "note": "", "svg": Markup(svg), "legend": [s.name for s in series]}] if svg else []
    )


def _chart(
    record: Record,
    column: str,
    title: str,
    note: str,
    unit: str = "",
    smooth: bool = False,
    zero: bool = False,
    reference: tuple[float, str] | None = None,
) -> list[dict[str, Any]]:
    steps, values = record.column(column)
    series = Series(title.lower(), steps, values, smooth)
    svg = line_chart([series], unit, zero, reference, label=f"{title} over steps")
    # The numbers in it were formatted here and its words escaped: safe as markup.
    return [{"title": title, "note": note, "svg": Markup(svg), "legend": []}] if svg else []


def _shown_path(folder: Path) -> str:
    relative = os.path.relpath(folder)
    return relative if not relative.startswith("..") else str(folder)
