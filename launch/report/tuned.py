"""What a fine-tuned run can do: its task's figures, its answers on held-out pictures, and where each word looked.

Pictures and texts are drawn by a fixed seed, whether or not the model is right about them: they cannot flatter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from finetune.explain import heatmap
from finetune.explain.word_maps import WordMaps, examples, share_of
from finetune.loading import Finetuned
from launch.report import figures
from launch.report.record import Line, Record
from pretrain.errors import UserError

SHOWN = 8  # pictures
EDGE = 132  # px of a tile


@dataclass
class Word:
    """One word and its heat map (data URI); faint: it hardly looked anywhere."""

    text: str
    picture: str
    faint: bool


@dataclass
class Shown:
    """A picture, what was said or asked, what the model says."""

    picture: str
    text: str
    answer: str
    others: str
    truth: str
    right: bool
    words: list[Word]


@dataclass
class Tuned:
    """A fine-tuned run's part of the page."""

    task: str
    primary: str
    data: str = ""
    shown: list[Shown] = field(default_factory=list)
    missing: str = ""
    """Why there are no pictures."""

    def best(self, record: Record) -> Line | None:
        """The evaluation with the highest primary figure."""
        lines = [line for line in record.evaluations if line.get(f"val/{self.primary}") is not None]
        return max(lines, key=lambda line: float(line[f"val/{self.primary}"])) if lines else None

    def rows(self, line: Line) -> list[dict[str, Any]]:
        """The shares (0 to 1) of an evaluation, the primary figure first, each with that of who saw no picture."""
        values = {name.removeprefix("val/"): value for name, value in line.items() if name.startswith("val/")}
        shares = {
            name: value
            for name, value in values.items()
            if isinstance(value, float) and 0 <= value <= 1 and not name.startswith("blind_")
        }
        order = sorted(shares, key=lambda name: (name != self.primary, not name.startswith(f"{self.primary}_")))
        return [
            {
                "name": name.removeprefix(f"{self.primary}_").replace("_", " "),
                "value": shares[name],
                "blind": values.get(f"blind_{name}"),
            }
            for name in order
        ]

    def table(self, record: Record) -> dict[str, Any]:
        """Every evaluation, one row a step: shares in percent."""
        lines = [(line, {row["name"]: row["value"] for row in self.rows(line)}) for line in record.evaluations]
        names = list(dict.fromkeys(name for _, values in lines for name in values))
        rows = [
            [f"{line['step']:,}", *(f"{100 * values[name]:.1f}" if name in values else "" for name in names)]
            for line, values in lines
        ]
        return {"heads": ["step", *names], "rows": rows}


def build(tuned: Finetuned, shards: Any, workers: int = 2, count: int = SHOWN) -> Tuned:
    """Answers and maps on `shards`; None leaves them out.

    Where a task says nothing about one picture and one text, or has no maps, the page says why.
    """
    out = Tuned(tuned.config.task.name, tuned.task.primary_metric, ", ".join(figures.shards(shards)))
    if not shards:
        out.missing = "the run names no validation shards (data.val); give some with --data."
        return out
    try:
        out.shown = [shown(seen) for seen in examples(tuned, shards, count, workers=workers)]
    except UserError as error:
        out.missing = str(error)
    return out


def shown(seen: WordMaps) -> Shown:
    """An example as the page shows it."""
    name, value = seen.answers[0] if seen.answers else ("", 0.0)
    others = ", ".join(f"{other} {share_of(score)}" for other, score in seen.answers[1:3] if score >= 0.005)
    strong = heatmap.strengths(seen.maps)
    words = [
        Word(word, heatmap.uri(image), bool(s < heatmap.GLANCE))
        for (word, image), s in zip(seen.tiles(EDGE), strong, strict=True)
    ]
    return Shown(
        picture=heatmap.uri(seen.picture.resize((EDGE, EDGE))),
        text=seen.text,
        answer=f"{name}, {share_of(value)}" if name else "",
        others=others,
        truth=seen.truth,
        right=bool(seen.truth) and name == seen.truth,
        words=words,
    )


def sentence(record: Record) -> str:
    """One sentence: what learned what, from which encoders and which data."""
    task, fusion, context = (record.get(f"{part}.name") for part in ("task", "fusion", "context"))
    layers = record.get("fusion.layers")
    how = f"a {fusion} fusion of {layers} layers" if fusion else "no fusion"
    looked = f", {context.replace('_', ' ')} context" if fusion and context not in (None, "dense") else ""
    start = f" from {record.get('init')}" if record.get("init") else " of its own"
    return (
        f"{str(task).capitalize() if task != 'vqa' else 'Questions about pictures'}: encoders{start}, joined by {how}{looked}, "
        f"on {', '.join(figures.shards(record.get('data.train'))) or 'unknown data'}."
    )
