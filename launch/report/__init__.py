"""The report of a run: one self-contained HTML page with curves, metrics, examples and commands.

    write("runs/clipart")                  writes runs/clipart/report.html
    write("runs/clipart", "new/*.tar")     the same, with examples from other shards

run_history.py   what a run wrote into its folder, as far as it got
figures.py       the texts and numbers of the page
charts.py        line charts as inline SVG
gallery.py       of a pretraining run: what the model answers on held-out images and captions
finetuned.py     of a fine-tuned run: metrics of its task, answers, and heat maps of words
reranked.py      of a retrieval run: queries in the order by embeddings and after re-ranking
searches.py      what some sentences find in an index
page.html.j2     the template of the page

The page needs no network and no other file. Its images are thumbnails of whole images, heat maps included, of at most 16 KiB
each; all of them together take less than 5 MB. A run that is unfinished, was resumed, never evaluated or has no checkpoint gets
a page with what exists. Captions are untrusted input: the template engine escapes everything.

May import pretrain, finetune, and nothing else of launch.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from finetune import loading as finetune_loading
from finetune.explain import heatmap
from launch.report import figures, finetuned, reranked
from launch.report.charts import Series, draw_line_chart
from launch.report.finetuned import FinetunedSection
from launch.report.gallery import Gallery, build_gallery
from launch.report.run_history import RunHistory, read_run
from launch.report.searches import SearchSection, build_searches
from pretrain.checkpoints import export as exports
from pretrain.checkpoints import loading
from pretrain.errors import UserError
from pretrain.evaluation.chance import chance_levels
from pretrain.model import on_device
from pretrain.runtime import distributed
from pretrain.runtime.files import write_text

SEARCHES = 3
"""Captions of the gallery that an index is searched for, where no texts are given."""
NO_SHARDS = "The run names no validation shards (data.val); give some with --data."


def write(
    run: str | Path,
    data: Any = None,
    out: Path | None = None,
    images: int = 2000,
    workers: int = 2,
    index: str | None = None,
    texts: Sequence[str] = (),
) -> Path:
    """Write the page and return its path.

    Args:
        run: a run folder, or the name of one in runs/.
        data: shards for the examples; by default the run's data.val.
        out: the file to write; by default report.html in the run folder.
        images: samples of the shards that the gallery ranks; 0 leaves the examples out. Of a retrieval run at most
            reranked.IMAGES are ranked, for at most reranked.CAPTIONS captions.
        workers: processes that read the shards.
        index: the place of an index to search; None = the page shows no searches.
        texts: what is searched for; by default some captions of the gallery.

    Raises:
        UserError: there is no run, the page cannot be written, or `data` or `index` was given and cannot be used.
    """
    history = read_run(run)
    gallery, missing, weights, export, model = None, "", {}, None, None
    section = FinetunedSection(history.get("task.name"), "") if history.get("task") else None
    shards = data or history.get("data.val")
    try:
        if section is not None:
            model = finetune_loading.load(history.folder)
            weights = {name: count["total"] for name, count in model.model.parameter_counts().items()}
            ranked = min(images, reranked.IMAGES)
            with on_device(model.model, model.config, distributed.device()):
                section = finetuned.build_section(model, shards if images else None, workers, images=ranked)
        else:
            loaded = loading.load_model(history.folder)
            export = exports.suggest_format(loaded, f"{_display_path(history.folder)}/export")
            weights = {name: sum(p.numel() for p in tower.parameters()) for name, tower in loaded.model.towers.items()}
            if shards and images:
                gallery = build_gallery(loaded, shards, distributed.device(), workers, images)
                missing = "" if gallery else f"No sample of {', '.join(figures.list_shards(shards))} could be used."
            else:
                missing = NO_SHARDS
    except UserError as error:
        if data:
            raise
        missing = str(error)
    searches = None
    if index is not None:
        texts = texts or [query.caption for query in gallery.by_caption[:SEARCHES]] if gallery is not None else texts
        if not texts:
            raise UserError("--db: this page has no gallery whose captions could be searched for; --search TEXT says for what")
        searches = build_searches(index, texts, model)
    path = out or history.folder / "report.html"
    try:
        write_text(path, render(history, gallery, missing, weights, section, export, searches))
    except OSError as error:
        raise UserError(f"cannot write the report {path}: {error.strerror or error}") from error
    return path


def render(
    history: RunHistory,
    gallery: Gallery | None = None,
    missing: str = "",
    weights: dict[str, int] | None = None,
    section: FinetunedSection | None = None,
    export: tuple[str, str] | None = None,
    searches: SearchSection | None = None,
) -> str:
    """Return the page as text.

    Args:
        missing: why there is no gallery.
        weights: number of parameters of each component.
        section: what the page shows of a fine-tuned run; None = a pretraining run.
        export: the format that can hold the model, and the Python code that loads it from export/ in the run folder.
        searches: what some sentences find in an index.
    """
    folder = _display_path(history.folder)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    best, source = history.best_evaluation(), "the validation pairs"
    if best is None and gallery is not None:
        best, source = gallery.as_evaluation(history.step), f"pairs from {gallery.data}, measured for this page"
    if section is not None:
        best, source = section.best_evaluation(history), "the validation samples"
    return environment.get_template("page.html.j2").render(
        section=section,
        legend=heatmap.LEGEND,
        section_rows=section.build_rows(best) if section and best else [],
        name=history.folder.resolve().name,
        folder=shlex.quote(folder),
        export_folder=shlex.quote(f"{folder}/export"),
        export=export,
        has_export=(history.folder / "export/README.md").exists(),
        embeddings=shlex.quote(f"{folder}/embeddings"),
        embeddings_literal=repr(f"{folder}/embeddings"),
        state=history.status["state"],
        reason=history.status["why"],
        description=finetuned.describe_run(history) if section else figures.describe_run(history),
        facts=figures.build_facts(history, weights or {}),
        recalls=figures.build_recalls(best) if best and not section else [],
        widths=figures.build_width_table(best) if best and not section else None,
        best=best,
        best_samples=figures.count_samples(history, best) if best and not section else "",
        source=source,
        evaluation_count=(
            len(history.evaluations) if best and history.evaluations and history.evaluations[-1]["step"] > best["step"] else 0
        ),
        classification=figures.build_classification(best) if best and not section else [],
        training_charts=build_training_charts(history),
        evaluation_charts=build_task_charts(history, section) if section else build_recall_charts(history),
        speed_charts=build_speed_charts(history),
        evaluations=section.build_table(history) if section else figures.build_evaluation_table(history),
        gallery=gallery,
        searches=searches,
        place=shlex.quote(searches.place) if searches is not None else "",
        missing=missing,
        bad=figures.count_bad_samples(history),
        spikes=figures.describe_spikes(history),
        command=figures.format_command(history),
        config=history.config_text.strip(),
        environment=figures.list_environment(history),
        data=" ".join(shlex.quote(name) for name in figures.list_shards(history.get("data.val"))[:1]) or "SHARDS",
        created=datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC"),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Charts


def build_training_charts(history: RunHistory) -> list[dict[str, Any]]:
    """Build the charts of loss, logit scale, gradient norm and learning rate over steps."""
    batch = history.get("data.batch_size")
    chance = None
    if history.get("loss.name") == "clip" and isinstance(batch, int) and batch > 1:
        chance = (math.log(batch), f"blind guess: ln {batch:,}")
    return [
        *_build_chart(history, "loss", "Loss", "running mean, with the values behind it", smooth=True, reference=chance),
        *_build_chart(history, "logit_scale", "Logit scale", "factor of the similarities, at most 100"),
        *_build_chart(history, "grad_norm", "Gradient norm", "before clipping", smooth=True, zero=True),
        *_build_chart(history, "lr", "Learning rate", "", zero=True),
    ]


def build_speed_charts(history: RunHistory) -> list[dict[str, Any]]:
    """Build the charts of throughput, data wait and memory over steps."""
    return [
        *_build_chart(history, "samples_per_second", "Throughput", "samples a second", smooth=True, zero=True),
        *_build_chart(
            history, "data_wait_share", "Waiting for data", "fraction of the time spent on steps", "%", smooth=True, zero=True
        ),
        *_build_chart(history, "memory_gib", "Peak memory", "of one process, up to this step", " GiB", zero=True),
    ]


def build_recall_charts(history: RunHistory) -> list[dict[str, Any]]:
    """Build the charts of recall over steps, with the chance of R@1; none for fewer than two evaluations."""
    if len(history.evaluations) < 2:
        return []
    steps = [line["step"] for line in history.evaluations]
    levels = chance_levels(figures.read_metrics(history.evaluations[-1]))
    charts = []
    for direction, title in figures.list_directions(history.evaluations):
        series = [
            Series(f"R@{k}", steps, [line.get(f"val/{direction}_R@{k}") for line in history.evaluations])
            for k in figures.KS
            if any(line.get(f"val/{direction}_R@{k}") is not None for line in history.evaluations)
        ]
        level = levels.get(f"{direction}_R@1")
        reference = None if level is None else (level, "chance of R@1")
        svg = draw_line_chart(series, "%", zero=True, reference=reference, label=f"{title}: recall over steps")
        if svg:
            charts.append({"title": title, "note": "recall", "svg": Markup(svg), "legend": [s.name for s in series]})
    return charts


def build_task_charts(history: RunHistory, section: FinetunedSection) -> list[dict[str, Any]]:
    """Build the chart of the primary metric over steps, with chance, and without the image, sound or re-ranking.

    There is none for fewer than two evaluations.
    """
    steps = [line["step"] for line in history.evaluations]
    if len(steps) < 2 or section.best_evaluation(history) is None:
        return []
    names = [
        (section.primary_metric, section.primary_metric.replace("_", " ")),
        (f"blind_{section.primary_metric}", f"without {section.noun}"),
    ]
    if section.primary_metric.startswith("reranked_"):
        names.append((section.primary_metric.removeprefix("reranked_"), "by embeddings"))
    values = [value for line in history.evaluations if (value := line.get(f"val/{section.primary_metric}")) is not None]
    unit = "%" if all(0 <= value <= 1 for value in values) else ""
    level = chance_levels(figures.read_metrics(history.evaluations[-1])).get(section.primary_metric)
    reference = None if level is None else (level, "chance")
    series = [
        Series(title, steps, [line.get(f"val/{name}") for line in history.evaluations])
        for name, title in names
        if any(line.get(f"val/{name}") is not None for line in history.evaluations)
    ]
    svg = draw_line_chart(series, unit, zero=True, reference=reference, label=f"{section.primary_metric} over steps")
    if not svg:
        return []
    return [{"title": names[0][1].capitalize(), "note": "", "svg": Markup(svg), "legend": [s.name for s in series]}]


def _build_chart(
    history: RunHistory,
    column: str,
    title: str,
    note: str,
    unit: str = "",
    smooth: bool = False,
    zero: bool = False,
    reference: tuple[float, str] | None = None,
) -> list[dict[str, Any]]:
    """Build the chart of one number of the training lines; an empty list where no line has it."""
    steps, values = history.column(column)
    series = Series(title.lower(), steps, values, smooth)
    svg = draw_line_chart([series], unit, zero, reference, label=f"{title} over steps")
    # charts.py formats its numbers and escapes its texts, so the SVG is safe as markup.
    return [{"title": title, "note": note, "svg": Markup(svg), "legend": []}] if svg else []


def _display_path(folder: Path) -> str:
    """Return the path relative to the working folder where it lies below it."""
    relative = os.path.relpath(folder)
    return relative if not relative.startswith("..") else str(folder)
