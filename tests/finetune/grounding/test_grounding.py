"""Grounding from shards to metrics, with planted maps: exactly the boxes, or uniform."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from finetune import model as models
from finetune.attention.trace import AttentionRecord, Step, Trace, Weights
from finetune.config import FusionSchema
from finetune.explain.heatmap import draw_figure
from finetune.explain.token_spans import TokenSpans
from finetune.explain.word_maps import WordMaps, compute_word_maps
from finetune.grounding.evaluate import (
    GroundingConfig,
    build_table,
    chance_levels,
    evaluate_checkpoint,
    evaluate_grounding,
    gather_vocabulary,
    summarize_records,
)
from finetune.grounding.phrases import find_color_swaps, find_mentions
from finetune.grounding.pointing_game import boxes_to_cells, compute_coverage
from finetune.grounding.probes import Record, read_objects
from finetune.loading import Finetuned
from finetune.model import FusionModel
from finetune.tasks import Prediction, Task
from finetune.tasks.questions import Question, read_questions
from pretrain import config as configuration
from pretrain import model as encoders
from pretrain.data.images import ImageDecoder
from pretrain.data.scenes import dataset
from pretrain.data.text import TextDecoder, load_tokenizer
from pretrain.errors import ConfigError, UserError
from tests.support import TINY_TOWERS, Small

CPU = torch.device("cpu")
GRID = (8, 8)


class PlantedTask(Task):
    """A task with a constant prediction and planted attention: on the boxes, or uniform ("blind")."""

    primary_metric = "none"

    def __init__(self, small: Small, is_question: bool, attention: str, length: int) -> None:
        self.text_is_question = is_question  # type: ignore[misc]
        self.attention = attention
        self.decoder = TextDecoder(load_tokenizer(small.tokenizer), length)
        self.json_of_image: dict[bytes, dict[str, Any]] = {}
        self.vocabulary = dataset.VOCABULARY

    def predict(
        self, model: FusionModel, inputs: dict[str, Tensor], masks: dict[str, Tensor], trace: Trace | None = None, top: int = 5
    ) -> Prediction:
        assert trace is not None
        b, T = inputs["text"].shape
        used = torch.zeros(b, 1, T, 64)
        if self.attention == "blind":
            used += 1 / 64
        else:
            for i in range(b):
                self.plant(used[i, 0], inputs["image"][i], inputs["text"][i][masks["text"][i]])
        trace.begin({"text": (T, None), "image": (64, GRID)})
        trace.steps.append(Step("cross", 0, (AttentionRecord("text", ("image",), Weights(used)),)))
        return Prediction([[("nothing", 0.5)]] * b, torch.zeros(b))

    def questions(self, values: dict[str, Any]) -> list[Question]:
        return read_questions(values, "questions") if self.text_is_question else []

    def plant(self, rows: Tensor, image: Tensor, ids: Tensor) -> None:
        """Set the attention of each word's tokens to the cells that its boxes cover."""
        record = self.json_of_image[image.numpy().tobytes()]
        text = self.decoder.tokenizer.decode(ids, skip_special_tokens=True).strip()
        spans = TokenSpans(self.decoder, text)
        for mention in find_mentions(text, record["objects"], self.vocabulary):
            boxes = boxes_to_cells(np.array([record["objects"][o]["box"] for o in mention.objects]), (0, 0, 64, 64), GRID)
            for token in spans.find_tokens(mention.start, mention.end):
                rows[token] = torch.from_numpy(compute_coverage(boxes, GRID)).flatten()


def build_planted(small: Small, is_question: bool, attention: str, length: int = 64) -> Finetuned:
    """Build a tiny model whose task has planted attention."""
    torch.manual_seed(0)
    settings = [*TINY_TOWERS, "image.args.patch_size=8", f"text.tokenizer={small.tokenizer}", "image.size=64"]
    settings += [
        f"text.length={length}",
        f"text.args.max_position_embeddings={length + 13}",
        "fusion.layers=1",
        "fusion.heads=2",
    ]
    config = configuration.build(FusionSchema, configuration.load_values(None, settings), "here")
    tokenizer = load_tokenizer(small.tokenizer)
    encoder = encoders.build(encoders.tower_configs(config), config.model, tokenizer)
    model = models.build(encoder, config.fusion, config.context, config.tokens)
    decoders = encoders.build_decoders(config, tokenizer, encoder, "txt")
    task = PlantedTask(small, is_question, attention, length)
    for shard in sorted(small.root.glob("scenes/val-*.tar")):
        with tarfile.open(shard) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name, data in files.items():
            if name.endswith(".jpg"):
                task.json_of_image[decoders["image"].decode_eval(data).numpy().tobytes()] = json.loads(
                    files[name[:-3] + "json"]
                )
    return Finetuned(model, task, config, tokenizer, decoders, Path("nowhere"), 0)


@pytest.mark.parametrize("is_question", [False, True])
def test_attention_to_the_boxes_scores_1(small: Small, is_question: bool) -> None:
    tuned = build_planted(small, is_question, "boxes")
    metrics = evaluate_grounding(tuned, small.val, GroundingConfig(method="raw", controls=False, workers=0, resamples=200), CPU)
    assert metrics["samples"] == 64
    for kind in ("thing", "colour", "surface", "relation"):
        assert metrics[f"pointing_{kind}"] == metrics[f"pointing_{kind}_low"] == 1, kind
        assert 0.05 < metrics[f"pointing_{kind}_area"] < 0.6
        assert 0 <= metrics[f"pointing_{kind}_centre"] < 1
        assert metrics[f"lift_{kind}"] > 2
        assert f"pointing_{kind}_untrained" not in metrics
    words: Counter[str] = Counter()
    for record in tuned.task.json_of_image.values():
        texts = [q["question"] for q in record["questions"]] if is_question else record["captions"][:1]  # KEY.txt
        mentions_by_text = [find_mentions(text, record["objects"], dataset.VOCABULARY) for text in texts]
        kinds_by_text = [[m.kind for m in ms] + ["text"] * (len({m.objects for m in ms}) == 1) for ms in mentions_by_text]
        kinds_by_text = [kinds for kinds in kinds_by_text if kinds]
        last = len(kinds_by_text) - 1
        measured = kinds_by_text if last < 4 else [kinds_by_text[i * last // 3] for i in range(4)]
        words.update(kind for kinds in measured for kind in kinds)
    assert {kind: metrics[f"words_{kind}"] for kind in words} == words
    assert metrics["counterfactual_moved"] == metrics["counterfactual_after"] == metrics["counterfactual_before"] == 1
    assert metrics["counterfactual_stayed"] == 0
    assert metrics["swaps"] >= (20 if is_question else 1)


def test_uniform_attention_scores_as_chance(small: Small) -> None:
    tuned = build_planted(small, True, "blind")
    metrics = evaluate_grounding(tuned, small.val, GroundingConfig(method="raw", controls=False, workers=0, resamples=200), CPU)
    for kind in ("thing", "colour", "surface", "relation"):
        assert metrics[f"pointing_{kind}"] == pytest.approx(metrics[f"pointing_{kind}_area"])
        assert metrics[f"lift_{kind}"] == pytest.approx(1)
    levels = chance_levels(metrics)
    assert {"pointing_thing", "lift_thing", "counterfactual_moved", "counterfactual_after", "counterfactual_stayed"} <= set(
        levels
    )
    assert {name: metrics[name] for name in levels} == pytest.approx(levels)


def test_lift_is_one_over_the_area(small: Small) -> None:
    """With the whole map inside the boxes, lift is exactly the area of the image over that of the boxes."""
    tuned = build_planted(small, False, "boxes")
    metrics = evaluate_grounding(tuned, small.val, GroundingConfig(method="raw", controls=False, workers=0, max_samples=8), CPU)
    expected = []
    for record in list(tuned.task.json_of_image.values())[:8]:
        for mention in find_mentions(record["captions"][0], record["objects"], dataset.VOCABULARY):
            if mention.kind == "thing":
                share = compute_coverage(
                    boxes_to_cells(np.array([record["objects"][o]["box"] for o in mention.objects]), (0, 0, 64, 64), GRID), GRID
                )
                expected.append(float((share * share).sum() / share.sum() / share.mean()))
    assert metrics["lift_thing"] == pytest.approx(np.mean(expected))


OTHER_WORDS = {
    "car": "tractor", "sofa": "bench", "dog": "hound", "house": "barn", "tree": "pine", "boat": "raft", "ball": "egg",
    "cup": "jug", "chair": "stool", "bird": "hen", "fish": "sheep", "cat": "fox", "lamp": "torch", "plane": "kite",
    "flower": "rose", "mushroom": "root", "red": "turquoise", "orange": "amber", "yellow": "beige", "green": "olive",
    "blue": "teal", "purple": "mauve", "black": "navy", "white": "ivory", "plain": "bare", "striped": "dotted",
    "leather": "wooden", "small": "tiny", "medium": "middling", "large": "huge",
}  # fmt: skip


def translate(text: str) -> str:
    """Replace the words for all objects by others, singular or plural."""
    return re.sub(rf"\b({'|'.join(OTHER_WORDS)})(s?)\b", lambda word: OTHER_WORDS[word[1]] + word[2], text)


@pytest.mark.parametrize("brings_file", [False, True])
def test_a_data_set_with_other_words(small: Small, tmp_path: Path, brings_file: bool) -> None:
    """Scenes in other words have the same mentions of the same objects, with or without a vocabulary file."""
    shard = sorted(small.root.glob("scenes/val-*.tar"))[0]
    with tarfile.open(shard) as old, tarfile.open(tmp_path / "farm-0.tar", "w") as new:
        for member in old:
            data = old.extractfile(member).read()  # type: ignore[union-attr]
            if not member.name.endswith(".jpg"):
                data = translate(data.decode()).encode()
            member.size = len(data)
            new.addfile(member, io.BytesIO(data))
    if brings_file:
        (tmp_path / "vocabulary.json").write_text(translate(dataset.VOCABULARY.to_json()))
    config = GroundingConfig(method="raw", controls=False, resamples=200)
    vocabulary = gather_vocabulary(f"{tmp_path}/farm-*.tar", config)
    assert set(vocabulary.names) == {OTHER_WORDS[name] for name in dataset.CLASSES}
    assert set(vocabulary.attributes["color"]) == {OTHER_WORDS[color] for color in dataset.COLORS}
    assert gather_vocabulary(small.val, config) == dataset.VOCABULARY

    tuned = build_planted(
        small, False, "boxes", length=128
    )  # words that were not in the tokenizer's training text are many tokens
    for image, record in tuned.task.json_of_image.items():
        other = json.loads(translate(json.dumps(record)))
        texts = [*record["captions"], *(question["question"] for question in record["questions"])]
        for text in texts:
            expected = find_mentions(text, record["objects"], dataset.VOCABULARY)
            mentions = find_mentions(translate(text), other["objects"], vocabulary)
            assert [(m.word, m.kind, m.objects) for m in mentions] == [(translate(m.word), m.kind, m.objects) for m in expected]
            before = [
                (swap.old.objects, swap.new.objects) for swap in find_color_swaps(text, record["objects"], dataset.VOCABULARY)
            ]
            after = [(s.old.objects, s.new.objects) for s in find_color_swaps(translate(text), other["objects"], vocabulary)]
            assert before == after
        tuned.task.json_of_image[image] = other
    tuned.task.vocabulary = vocabulary
    metrics = evaluate_grounding(tuned, f"{tmp_path}/farm-*.tar", config, CPU)
    for kind in ("thing", "colour", "surface", "relation"):
        assert metrics[f"pointing_{kind}"] == 1, kind
    assert metrics["counterfactual_moved"] == 1


def test_shuffled_texts_score_low(small: Small) -> None:
    """With the words of another text, the planted attention mostly has no object in this image."""
    tuned = build_planted(small, False, "boxes")
    tuned.task.build_head = lambda model: torch.nn.Identity()  # type: ignore[method-assign, assignment]
    metrics = evaluate_grounding(tuned, small.val, GroundingConfig(method="raw", workers=0, resamples=200), CPU)
    assert (
        metrics["pointing_thing"] == metrics["pointing_thing_untrained"] == 1
    )  # the task plants the attention, whatever the fusion
    assert metrics["pointing_thing_shuffled"] < 0.6


def test_metrics_are_means_over_words_with_intervals_over_images() -> None:
    records = [Record("a", "thing", "pointing", 1.0)] * 9 + [Record("b", "thing", "pointing", 0.0)]
    records += [Record("a", "thing", "pointing_area", 0.25), Record("a", "swap", "moved", 1.0)]
    metrics = summarize_records(records, 400)
    assert (metrics["pointing_thing"], metrics["words_thing"], metrics["pointing_thing_area"]) == (0.9, 10, 0.25)
    assert (metrics["pointing_thing_low"], metrics["pointing_thing_high"]) == (
        0,
        1,
    )  # two images: one with all hits, one with none
    assert metrics["swaps"] == 1
    assert "pointing_relation" not in metrics


def test_invalid_settings_and_data_are_refused(small: Small, tmp_path: Path) -> None:
    tuned = build_planted(small, False, "boxes")
    with pytest.raises(ConfigError, match="did you mean 'relevance'"):
        evaluate_grounding(tuned, small.val, GroundingConfig(method="relevence"), CPU)
    with pytest.raises(UserError, match="must be \\[x0, y0, x1, y1\\]"):
        read_objects({"objects": [{"name": "car", "box": [1, 2, 3]}]}, "shard/0")
    with pytest.raises(UserError, match="must be a list"):
        read_objects({"objects": "car"}, "shard/0")
    assert read_objects({}, "shard/0") == []
    with tarfile.open(sorted(small.root.glob("scenes/val-*.tar"))[0]) as old, tarfile.open(tmp_path / "x-0.tar", "w") as new:
        for member in [member for member in old if not member.name.endswith(".json")][:6]:
            new.addfile(member, old.extractfile(member))
    with pytest.raises(UserError, match="no word names an object with a box in 3 samples"):
        evaluate_grounding(tuned, f"{tmp_path}/x-0.tar", GroundingConfig(workers=0, controls=False), CPU)


def test_the_table_shows_the_metrics(small: Small) -> None:
    from rich.console import Console

    result = evaluate_checkpoint(
        build_planted(small, True, "boxes"), small.val, GroundingConfig(method="raw", controls=False, workers=0), CPU
    )
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(build_table(result))
    shown = console.export_text()
    assert "pointing, thing" in shown
    assert "100.0 %" in shown
    (row,) = [line for line in shown.splitlines() if "pointing, thing" in line]
    assert f"{100 * result['metrics']['pointing_thing_area']:.1f} %" in row
    (row,) = [line for line in shown.splitlines() if "peak moved" in line]
    assert f"{100 * result['chance']['counterfactual_moved']:.1f} %" in row
    assert json.loads(json.dumps(result))["metrics"]["pointing_thing"] == 1


def test_word_maps_of_one_image_and_one_text(small: Small) -> None:
    tuned = build_planted(small, False, "boxes")
    shard = sorted(small.root.glob("scenes/val-*.tar"))[0]
    with tarfile.open(shard) as tar:
        name = next(member.name for member in tar if member.name.endswith(".jpg"))
        data = tar.extractfile(name).read()  # type: ignore[union-attr]
        record = json.loads(tar.extractfile(name[:-3] + "json").read())  # type: ignore[union-attr]
    maps: WordMaps = compute_word_maps(tuned, data, record["captions"][0], "raw")
    assert maps.words == [word.strip(",.:") for word in record["captions"][0].split()]
    assert maps.image.size == (64, 64)
    mention = next(m for m in find_mentions(record["captions"][0], record["objects"], dataset.VOCABULARY) if m.kind == "thing")
    values = maps.maps[maps.words.index(mention.word)]
    boxes = boxes_to_cells(np.array([record["objects"][o]["box"] for o in mention.objects]), (0, 0, 64, 64), GRID)
    np.testing.assert_allclose(values, compute_coverage(boxes, GRID), atol=1e-6)
    assert maps.figure().size[0] > 300
    without_legend = draw_figure(maps.image, maps.words, maps.maps, maps.caption_lines())
    assert maps.figure().height > without_legend.height
    assert [word for word, _ in maps.tiles(80)] == maps.words
    for size, resize, visible in (
        ((4000, 1), "crop", (1, 1)),
        ((90, 30), "crop", (30, 30)),
        ((90, 30), "pad", (90, 91)),  # 30 px become 21, between borders of 21 and 22 px
    ):
        buffer = io.BytesIO()
        Image.new("RGB", size, "red").save(buffer, "PNG")
        tuned.decoders["image"] = ImageDecoder(64, resize=resize)
        tuned.task.json_of_image[tuned.decoders["image"].decode_eval(buffer.getvalue()).numpy().tobytes()] = record  # type: ignore[attr-defined]
        maps = compute_word_maps(tuned, buffer.getvalue(), record["captions"][0], "raw")
        assert maps.image.size == visible
        assert maps.image.getpixel((0, 0)) == ((255, 255, 255) if resize == "pad" else (255, 0, 0))
        assert maps.image.getpixel((visible[0] // 2, visible[1] // 2)) == (255, 0, 0)
        assert maps.figure().size[0] > 300
    for wrong_data, text, message in ((b"no image", "a car", "cannot be used"), (data, " ?! ", "has no word")):
        with pytest.raises(UserError, match=message):
            compute_word_maps(tuned, wrong_data, text)
