"""Grounding from shards to figures, with maps that are known: a model that looks exactly at the boxes, and a blind one."""

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
from torch import Tensor

from finetune import model as models
from finetune.attention.trace import AttentionRecord, Step, Trace, Weights
from finetune.config import FusionSchema
from finetune.explain.token_spans import TokenSpans
from finetune.explain.word_maps import WordMaps, look
from finetune.grounding.evaluate import GroundingConfig, figures, grounding, run, summary, vocabulary_of
from finetune.grounding.phrases import mentions, swaps
from finetune.grounding.pointing_game import covered, to_cells
from finetune.grounding.probes import Record, objects_of
from finetune.loading import Finetuned
from finetune.model import FusionModel
from finetune.tasks import Prediction, Task
from finetune.tasks.questions import Question, read_questions
from pretrain import config as configuration
from pretrain import model as encoders
from pretrain.data.scenes import dataset
from pretrain.data.text import TextDecoder, load_tokenizer
from pretrain.errors import ConfigError, UserError
from tests.support import TINY_TOWERS, Small

CPU = torch.device("cpu")
GRID = (8, 8)


class Planted(Task):
    """Says nothing and looks where `values` says."""

    primary_metric = "none"

    def __init__(self, small: Small, asks: bool, sight: str, length: int) -> None:
        self.text_is_question = asks  # type: ignore[misc]
        self.sight = sight
        self.decoder = TextDecoder(load_tokenizer(small.tokenizer), length)
        self.known: dict[bytes, dict[str, Any]] = {}
        self.vocabulary = dataset.VOCABULARY

    def predict(
        self, model: FusionModel, inputs: dict[str, Tensor], masks: dict[str, Tensor], trace: Trace | None = None, top: int = 5
    ) -> Prediction:
        assert trace is not None
        b, T = inputs["text"].shape
        used = torch.zeros(b, 1, T, 64)
        if self.sight == "blind":
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
        """Each word's tokens look at all that its boxes cover, shared over the word's tokens as they come."""
        said = self.known[image.numpy().tobytes()]
        text = self.decoder.tokenizer.decode(ids, skip_special_tokens=True).strip()
        cut = TokenSpans(self.decoder, text)
        for mention in mentions(text, said["objects"], self.vocabulary):
            boxes = to_cells(np.array([said["objects"][o]["box"] for o in mention.objects]), (0, 0, 64, 64), GRID)
            for token in cut.tokens(mention.start, mention.end):
                rows[token] = torch.from_numpy(covered(boxes, GRID)).flatten()


def planted(small: Small, asks: bool, sight: str, length: int = 64) -> Finetuned:
    """A real tiny model whose task has planted sight."""
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
    task = Planted(small, asks, sight, length)
    for shard in sorted(small.root.glob("scenes/val-*.tar")):
        with tarfile.open(shard) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name, data in files.items():
            if name.endswith(".jpg"):
                task.known[decoders["image"].decode_eval(data).numpy().tobytes()] = json.loads(files[name[:-3] + "json"])
    return Finetuned(model, task, config, tokenizer, decoders, Path("nowhere"), 0)


@pytest.mark.parametrize("asks", [False, True])
def test_a_model_that_looks_at_the_boxes(small: Small, asks: bool) -> None:
    tuned = planted(small, asks, "boxes")
    found = grounding(tuned, small.val, GroundingConfig(method="raw", controls=False, workers=0, resamples=200), CPU)
    assert found["samples"] == 64
    for kind in ("thing", "colour", "surface", "relation"):
        assert found[f"pointing_{kind}"] == found[f"pointing_{kind}_low"] == 1, kind
        assert 0.05 < found[f"pointing_{kind}_area"] < 0.6
        assert 0 <= found[f"pointing_{kind}_centre"] < 1
        assert found[f"lift_{kind}"] > 2
        assert f"pointing_{kind}_untrained" not in found
    words: Counter[str] = Counter()
    for said in tuned.task.known.values():
        texts = [q["question"] for q in said["questions"]] if asks else said["captions"][:1]  # KEY.txt
        found_in = [mentions(text, said["objects"], dataset.VOCABULARY) for text in texts]
        spoken = [[m.kind for m in ms] + ["text"] * (len({m.objects for m in ms}) == 1) for ms in found_in]
        spoken = [kinds for kinds in spoken if kinds]
        few = spoken if len(spoken) <= 4 else [spoken[i * (len(spoken) - 1) // 3] for i in range(4)]
        words.update(kind for kinds in few for kind in kinds)
    assert {kind: found[f"words_{kind}"] for kind in words} == words
    assert found["counterfactual_moved"] == found["counterfactual_after"] == found["counterfactual_before"] == 1
    assert found["counterfactual_stayed"] == 0
    assert found["swaps"] >= (20 if asks else 1)


def test_a_blind_model_scores_what_chance_does(small: Small) -> None:
    tuned = planted(small, True, "blind")
    found = grounding(tuned, small.val, GroundingConfig(method="raw", controls=False, workers=0, resamples=200), CPU)
    for kind in ("thing", "colour", "surface", "relation"):
        assert found[f"pointing_{kind}"] == pytest.approx(found[f"pointing_{kind}_area"])
        assert found[f"lift_{kind}"] == pytest.approx(1)
    assert found["counterfactual_after"] == pytest.approx(found["counterfactual_area"])
    assert found["counterfactual_moved"] < 0.5


def test_lift_is_one_over_the_area(small: Small) -> None:
    """All of the map inside the box: lift is exactly the picture's area over the boxes'."""
    tuned = planted(small, False, "boxes")
    found = grounding(tuned, small.val, GroundingConfig(method="raw", controls=False, workers=0, max_samples=8), CPU)
    expected = []
    for said in list(tuned.task.known.values())[:8]:
        for mention in mentions(said["captions"][0], said["objects"], dataset.VOCABULARY):
            if mention.kind == "thing":
                share = covered(
                    to_cells(np.array([said["objects"][o]["box"] for o in mention.objects]), (0, 0, 64, 64), GRID), GRID
                )
                expected.append(float((share * share).sum() / share.sum() / share.mean()))
    assert found["lift_thing"] == pytest.approx(np.mean(expected))


OTHER_WORDS = {
    "car": "tractor", "sofa": "bench", "dog": "hound", "house": "barn", "tree": "pine", "boat": "raft", "ball": "egg",
    "cup": "jug", "chair": "stool", "bird": "hen", "fish": "sheep", "cat": "fox", "lamp": "torch", "plane": "kite",
    "flower": "rose", "mushroom": "root", "red": "turquoise", "orange": "amber", "yellow": "beige", "green": "olive",
    "blue": "teal", "purple": "mauve", "black": "navy", "white": "ivory", "plain": "bare", "striped": "dotted",
    "leather": "wooden", "small": "tiny", "medium": "middling", "large": "huge",
}  # fmt: skip


def translated(text: str) -> str:
    """The same with other words for all objects, singular or plural."""
    return re.sub(rf"\b({'|'.join(OTHER_WORDS)})(s?)\b", lambda word: OTHER_WORDS[word[1]] + word[2], text)


@pytest.mark.parametrize("brings_file", [False, True])
def test_data_with_words_of_its_own(small: Small, tmp_path: Path, brings_file: bool) -> None:
    """Scenes in other words: the same mentions of the same objects, whether the data lists its words or not."""
    shard = sorted(small.root.glob("scenes/val-*.tar"))[0]
    with tarfile.open(shard) as old, tarfile.open(tmp_path / "farm-0.tar", "w") as new:
        for member in old:
            data = old.extractfile(member).read()  # type: ignore[union-attr]
            if not member.name.endswith(".jpg"):
                data = translated(data.decode()).encode()
            member.size = len(data)
            new.addfile(member, io.BytesIO(data))
    if brings_file:
        (tmp_path / "vocabulary.json").write_text(translated(dataset.VOCABULARY.to_json()))
    config = GroundingConfig(method="raw", controls=False, resamples=200)
    vocabulary = vocabulary_of(f"{tmp_path}/farm-*.tar", config)
    assert set(vocabulary.names) == {OTHER_WORDS[name] for name in dataset.CLASSES}
    assert set(vocabulary.attributes["color"]) == {OTHER_WORDS[color] for color in dataset.COLORS}
    assert vocabulary_of(small.val, config) == dataset.VOCABULARY

    tuned = planted(small, False, "boxes", length=128)  # words that the tokenizer has not seen are many tokens
    for image, said in tuned.task.known.items():
        other = json.loads(translated(json.dumps(said)))
        texts = [*said["captions"], *(question["question"] for question in said["questions"])]
        for text in texts:
            expected = mentions(text, said["objects"], dataset.VOCABULARY)
            found = mentions(translated(text), other["objects"], vocabulary)
            assert [(m.word, m.kind, m.objects) for m in found] == [(translated(m.word), m.kind, m.objects) for m in expected]
            before = [(swap.old.objects, swap.new.objects) for swap in swaps(text, said["objects"], dataset.VOCABULARY)]
            after = [(s.old.objects, s.new.objects) for s in swaps(translated(text), other["objects"], vocabulary)]
            assert before == after
        tuned.task.known[image] = other
    tuned.task.vocabulary = vocabulary
    figures = grounding(tuned, f"{tmp_path}/farm-*.tar", config, CPU)
    for kind in ("thing", "colour", "surface", "relation"):
        assert figures[f"pointing_{kind}"] == 1, kind
    assert figures["counterfactual_moved"] == 1


def test_shuffled_text_looks_elsewhere(small: Small) -> None:
    """The planted model knows where the other text's words would be in this picture: mostly nowhere."""
    tuned = planted(small, False, "boxes")
    tuned.task.build_head = lambda model: torch.nn.Identity()  # type: ignore[method-assign, assignment]
    found = grounding(tuned, small.val, GroundingConfig(method="raw", workers=0, resamples=200), CPU)
    assert found["pointing_thing"] == found["pointing_thing_untrained"] == 1  # the sight is the task's, not the fusion's
    assert found["pointing_thing_shuffled"] < 0.6


def test_figures_are_means_over_words_with_intervals_over_pictures() -> None:
    records = [Record("a", "thing", "pointing", 1.0)] * 9 + [Record("b", "thing", "pointing", 0.0)]
    records += [Record("a", "thing", "pointing_area", 0.25), Record("a", "swap", "moved", 1.0)]
    found = figures(records, 400)
    assert (found["pointing_thing"], found["words_thing"], found["pointing_thing_area"]) == (0.9, 10, 0.25)
    assert (found["pointing_thing_low"], found["pointing_thing_high"]) == (0, 1)  # two pictures, one of each kind
    assert found["swaps"] == 1
    assert "pointing_relation" not in found


def test_what_cannot_be_measured_is_said(small: Small, tmp_path: Path) -> None:
    tuned = planted(small, False, "boxes")
    with pytest.raises(ConfigError, match="did you mean 'relevance'"):
        grounding(tuned, small.val, GroundingConfig(method="relevence"), CPU)
    with pytest.raises(UserError, match="must be \\[x0, y0, x1, y1\\]"):
        objects_of({"objects": [{"name": "car", "box": [1, 2, 3]}]}, "shard/0")
    with pytest.raises(UserError, match="must be a list"):
        objects_of({"objects": "car"}, "shard/0")
    assert objects_of({}, "shard/0") == []
    with tarfile.open(sorted(small.root.glob("scenes/val-*.tar"))[0]) as old, tarfile.open(tmp_path / "x-0.tar", "w") as new:
        for member in [member for member in old if not member.name.endswith(".json")][:6]:
            new.addfile(member, old.extractfile(member))
    with pytest.raises(UserError, match="no word to point at in 3 samples"):
        grounding(tuned, f"{tmp_path}/x-0.tar", GroundingConfig(workers=0, controls=False), CPU)


def test_a_table_for_people(small: Small) -> None:
    from rich.console import Console

    result = run(planted(small, True, "boxes"), small.val, GroundingConfig(method="raw", controls=False, workers=0), CPU)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(summary(result))
    shown = console.export_text()
    assert "pointing, thing" in shown
    assert "100.0 %" in shown
    assert json.loads(json.dumps(result))["metrics"]["pointing_thing"] == 1


def test_one_picture_one_text(small: Small) -> None:
    tuned = planted(small, False, "boxes")
    shard = sorted(small.root.glob("scenes/val-*.tar"))[0]
    with tarfile.open(shard) as tar:
        name = next(member.name for member in tar if member.name.endswith(".jpg"))
        picture = tar.extractfile(name).read()  # type: ignore[union-attr]
        said = json.loads(tar.extractfile(name[:-3] + "json").read())  # type: ignore[union-attr]
    seen: WordMaps = look(tuned, picture, said["captions"][0], "raw")
    assert seen.words == [word.strip(",.:") for word in said["captions"][0].split()]
    assert seen.picture.size == (64, 64)
    thing = next(m for m in mentions(said["captions"][0], said["objects"], dataset.VOCABULARY) if m.kind == "thing")
    values = seen.maps[seen.words.index(thing.word)]
    where = to_cells(np.array([said["objects"][o]["box"] for o in thing.objects]), (0, 0, 64, 64), GRID)
    np.testing.assert_allclose(values, covered(where, GRID), atol=1e-6)
    assert seen.figure().size[0] > 300
    assert [word for word, _ in seen.tiles(80)] == seen.words
    for bad, text, message in ((b"no picture", "a car", "cannot be used"), (picture, " ?! ", "has no word")):
        with pytest.raises(UserError, match=message):
            look(tuned, bad, text)
