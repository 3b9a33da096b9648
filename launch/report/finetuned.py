"""The page's section about a fine-tuned run: task metrics, answers on images or sounds, heat maps of words.

Samples and texts are drawn by a fixed seed, whether or not the model is right about them, so that they cannot flatter it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from finetune.explain import heatmap
from finetune.explain.examples import sample_examples
from finetune.explain.word_maps import WordMaps
from finetune.loading import Finetuned
from launch.report import figures
from launch.report.reranked import IMAGES, RerankedGallery, build_reranked_gallery
from launch.report.run_history import Line, RunHistory
from pretrain.data.thumbnails import encode_jpeg, to_data_uri
from pretrain.errors import UserError
from pretrain.evaluation.chance import chance_levels, without_chance
from pretrain.printable import format_count, get_noun

NO_FRACTIONS = ("_rank", "_ms", "_k")
"""Ends of the names of metrics that are no fractions, whatever their value."""
RERANKED = "reranked_"
"""Prefix of metrics after re-ranking."""
EXAMPLES = 8
"""Images on the page."""
TILE_PIXELS = 200
"""Longer side of a heat map; images are thumbnails of thumbnails.SIDE."""
TILE_BYTES = 8 << 10
"""Most bytes of a heat map."""
MAX_WORDS = 24
"""Words of a text whose heat maps are shown, from the first."""


@dataclass
class WordTile:
    """One word and its heat map."""

    text: str
    image: str
    """A data URI."""
    is_faint: bool
    """Whether the word attended to almost nothing, compared with the other words."""


@dataclass
class Example:
    """An image or sound, the text or question that goes with it, and the model's answer."""

    image: str
    """A data URI; of a sound its spectrogram."""
    text: str
    answer: str
    """The best answer with its probability or score."""
    other_answers: str
    """The next two answers with their probabilities, where they have any."""
    truth: str
    """The right answer; empty where it is unknown."""
    is_right: bool
    words: list[WordTile]
    hidden_words: int
    """Words beyond MAX_WORDS."""


@dataclass
class FinetunedSection:
    """What the page shows of a fine-tuned run."""

    task: str
    primary_metric: str
    data: str = ""
    """The shards that the examples come from."""
    examples: list[Example] = field(default_factory=list)
    missing: str = ""
    """Why there are no examples."""
    reranked: RerankedGallery | None = None
    """Of a retrieval run: queries in both orders."""
    chance: str = ""
    """What the levels of chance are, in a few words."""
    noun: str = "image"
    """What texts are about, as messages call it: image, sound."""

    def best_evaluation(self, history: RunHistory) -> Line | None:
        """Return the evaluation with the highest primary metric."""
        lines = [line for line in history.evaluations if line.get(f"val/{self.primary_metric}") is not None]
        return max(lines, key=lambda line: float(line[f"val/{self.primary_metric}"])) if lines else None

    def build_rows(self, line: Line) -> list[dict[str, Any]]:
        """Build a row for each metric of an evaluation that is a fraction (0 to 1), the primary one first.

        Each row also has the level of chance, and the metric of a baseline that never sees the image, where it was measured.
        """
        values = figures.read_metrics(line)
        levels = chance_levels(values)
        fractions = {
            name: value
            for name, value in without_chance(values).items()
            if isinstance(value, float)
            and 0 <= value <= 1
            and not name.startswith("blind_")
            and not name.endswith(NO_FRACTIONS)
        }
        position = {name: i for i, name in enumerate(fractions)}

        def key(name: str) -> tuple[bool, bool, bool, int, bool]:
            base = name.removeprefix(RERANKED)  # the same metric by embeddings stands before that after re-ranking
            is_variant = base == self.primary_metric.removeprefix(RERANKED)
            is_part = name.startswith(f"{self.primary_metric}_")
            return name != self.primary_metric, not is_variant, not is_part, position.get(base, position[name]), base != name

        order = sorted(fractions, key=key)
        return [
            {
                "name": self._label(name),
                "value": fractions[name],
                "blind": values.get(f"blind_{name}"),
                "chance": levels.get(name),
            }
            for name in order
        ]

    def _label(self, name: str) -> str:
        """Return a metric's name for the page: "image to text R@1, re-ranked"."""
        suffix = ", re-ranked" if name.startswith(RERANKED) else ""
        return name.removeprefix(f"{self.primary_metric}_").removeprefix(RERANKED).replace("_", " ") + suffix

    def build_table(self, history: RunHistory) -> dict[str, Any]:
        """Build the table of all evaluations, one row a step: fractions in percent."""
        rows_of_line = [(f"{line['step']:,}", self.build_rows(line)) for line in history.evaluations]
        lines = [(step, {row["name"]: row["value"] for row in rows}) for step, rows in rows_of_line]
        if lines and any(row["chance"] is not None for row in rows_of_line[-1][1]):
            lines.append(("chance", {row["name"]: row["chance"] for row in rows_of_line[-1][1] if row["chance"] is not None}))
        names = list(dict.fromkeys(name for _, values in lines for name in values))
        rows = [[head, *(f"{100 * values[name]:.1f}" if name in values else "" for name in names)] for head, values in lines]
        return {"heads": ["step", *names], "rows": rows}


def build_section(
    model: Finetuned, shards: Any, workers: int = 2, count: int = EXAMPLES, images: int = IMAGES
) -> FinetunedSection:
    """Build the section with `count` examples from `shards`; None leaves the examples out.

    For a retrieval run, the first `images` samples are ranked as well.

    Where a task predicts nothing for one image and one text, or has no maps, the page says why.
    """
    data = ", ".join(figures.list_shards(shards))
    task = model.task
    section = FinetunedSection(
        model.config.task.name, task.primary_metric, data, chance=task.describe_chance(), noun=get_noun(task.subject)
    )
    if not shards:
        section.missing = "the run names no validation shards (data.val); give some with --data."
        return section
    try:
        section.examples = [build_example(maps) for maps in sample_examples(model, shards, count, workers=workers)]
    except UserError as error:
        section.missing = str(error)
    section.reranked = build_reranked_gallery(model, shards, workers, images)
    return section


def build_example(maps: WordMaps) -> Example:
    """Turn an image or sound, its text and the maps of its words into what the page shows."""
    answer, others = maps.format_answers()
    strengths = heatmap.compute_strengths(maps.maps)
    words = [
        WordTile(word, to_data_uri(encode_jpeg(image, TILE_BYTES)), bool(strength < heatmap.RING_THRESHOLD))
        for (word, image), strength in zip(maps.tiles(TILE_PIXELS)[:MAX_WORDS], strengths, strict=False)
    ]
    return Example(
        image=to_data_uri(encode_jpeg(maps.image if maps.whole is None else maps.whole)),
        text=maps.text,
        answer=answer,
        other_answers=others,
        truth=maps.truth,
        is_right=bool(maps.truth) and bool(maps.answers) and maps.answers[0][0] == maps.truth,
        words=words,
        hidden_words=len(maps.words) - len(words),
    )


def describe_run(history: RunHistory) -> str:
    """Describe the run in one sentence: the task, the encoders it starts from, the fusion, and the data."""
    task, fusion, context = (history.get(f"{name}.name") for name in ("task", "fusion", "context"))
    layers = history.get("fusion.layers")
    depth = f" of {format_count(layers, 'layer')}" if isinstance(layers, int) else ""
    fusion_text = f"a {fusion} fusion{depth}" if fusion else "no fusion"
    context_text = f", {context.replace('_', ' ')} context" if fusion and context not in (None, "dense") else ""
    start = f" from {history.get('init')}" if history.get("init") else " of its own"
    attended = [name for name in (history.get("fusion.context"), history.get("fusion.query")) if name not in (None, "text")]
    noun = f"{get_noun(attended[0]) if attended else 'image'}s"
    return (
        f"{str(task).capitalize() if task != 'vqa' else f'Questions about {noun}'}: encoders{start}, joined by "
        f"{fusion_text}{context_text}, on {', '.join(figures.list_shards(history.get('data.train'))) or 'unknown data'}."
    )
