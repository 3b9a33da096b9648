"""`clipfuse attend` and `evaluate --task grounding` on runs of every task that reads a picture and a text."""

from __future__ import annotations

import html
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import finetune
from finetune.explain.attribution import METHODS
from finetune.explain.token_spans import TokenSpans
from finetune.explain.word_maps import examples, look, readers, token_maps
from finetune.grounding.evaluate import GroundingConfig, grounding
from launch import cli, report
from launch.report.finetuned import FinetunedSection
from launch.report.run_history import read_run
from tests.support import TINY_TOWERS, Small

CPU = torch.device("cpu")
TASKS = {"vqa": "what colour is the car?", "retrieval": "a red car, left of a black sofa", "captioning": "a red car on a sofa"}


@pytest.fixture(scope="module")
def runs(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps for each task, on 16 cells."""
    folder = tmp_path_factory.mktemp("runs")
    for task in TASKS:
        words = [
            "finetune", task, f"run={folder / task}", f"data.train={small.train}", "data.val=null", "data.batch_size=16",
            "data.workers=0", "image.tower=timm", "text.tower=transformers", f"text.tokenizer={small.tokenizer}", *TINY_TOWERS,
            "image.args.patch_size=8", "text.length=64", "fusion.layers=1", "fusion.heads=2", "optim.warmup=1",
            "train.trackers=[]", "train.threads=1", "train.eval_every=0", "train.save_every=2", "train.steps=2",
        ]  # fmt: skip
        assert cli.main(words) == 0
    return folder


@pytest.fixture(scope="module")
def picture(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wide picture, of which the model sees the middle."""
    path = tmp_path_factory.mktemp("pictures") / "wide.png"
    with tarfile.open(sorted(small.root.glob("scenes/val-*.tar"))[0]) as tar:
        member = next(member for member in tar if member.name.endswith(".jpg"))
        Image.open(io.BytesIO(tar.extractfile(member).read())).resize((90, 60)).save(path)  # type: ignore[union-attr]
    return path


@pytest.mark.parametrize("task", TASKS)
def test_a_figure_of_each_task(
    runs: Path, picture: Path, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "map.png"
    assert cli.main(["attend", str(runs / task), str(picture), TASKS[task], "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert TASKS[task] in said
    assert ("answer: " in said) == (task == "vqa")
    with Image.open(out) as drawn:
        assert drawn.width > 500
    model = finetune.load(runs / task)
    for method in METHODS:
        seen = look(model, picture.read_bytes(), TASKS[task], method)
        assert seen.maps.shape == (len(seen.words), 4, 4)
        assert seen.picture.size == (60, 60)  # the middle, in the picture's own pixels
        assert np.isfinite(seen.maps).all()
        assert (seen.maps >= 0).all()
    assert all(p.requires_grad for p in model.model.parameters())  # left as it was


def test_a_decoder_looks_before_it_writes(runs: Path, picture: Path) -> None:
    """The map of a word is the attention of the position that had to find it."""
    model = finetune.load(runs / "captioning")
    inputs, masks = model.encode_inputs([picture.read_bytes()], ["a red car"])
    maps, _ = token_maps(model.model, model.task, inputs["image"], inputs["text"], masks["text"], "raw")
    captured = []
    fusion = model.model.fusion
    assert fusion is not None
    fusion.register_forward_pre_hook(lambda module, given: captured.append(given[1]))
    token_maps(model.model, model.task, inputs["image"], inputs["text"], masks["text"], "raw")
    (trace,) = captured
    (crossing,) = [step for step in trace.steps if step.kind == "cross"]
    weights = crossing.records[0].weights.used.mean(dim=1).detach()
    cut = TokenSpans(readers(model)[1], "a red car")
    (car,) = cut.words()[2].tokens[:1]
    torch.testing.assert_close(maps[0, car].flatten(), weights[0, car - 1])


@pytest.mark.parametrize("task", ["vqa", "retrieval"])
def test_every_figure_with_its_controls(runs: Path, small: Small, task: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Maps of an untrained model are worth what chance is; the command prints what the function returns."""
    capsys.readouterr()
    words = ["evaluate", str(runs / task), "--data", small.val, "--task", "grounding", "--maps", "raw", "--json"]
    assert cli.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    again = grounding(finetune.load(runs / task), small.val, GroundingConfig(method="raw"), CPU)
    assert found["metrics"] == again
    for kind in ("thing", "colour", "surface"):
        for end in ("", "_low", "_high", "_area", "_centre", "_untrained", "_shuffled"):
            assert 0 <= again[f"pointing_{kind}{end}"] <= 1
        assert again[f"pointing_{kind}_low"] <= again[f"pointing_{kind}"] <= again[f"pointing_{kind}_high"]
        assert abs(again[f"pointing_{kind}"] - again[f"pointing_{kind}_area"]) < 0.5
        assert again[f"lift_{kind}"] == pytest.approx(1, abs=0.4)
    assert again["counterfactual_moved"] <= min(again["counterfactual_before"], again["counterfactual_after"])


def test_examples_for_the_report(runs: Path, small: Small) -> None:
    found = examples(finetune.load(runs / "vqa"), small.val, 6)
    assert len({each.text.split()[0] for each in found}) >= 3  # a question of each type in turn
    assert all(each.truth and each.asks and each.answers for each in found)
    assert [each.text for each in examples(finetune.load(runs / "vqa"), small.val, 6)] == [each.text for each in found]
    (said,) = examples(finetune.load(runs / "retrieval"), small.val, 1)
    assert said.answers[0][0] == "match"
    assert not said.truth


def test_the_report_shows_answers_and_maps(runs: Path, small: Small, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "vqa", tmp_path / "vqa")
    line = {"step": 2, "val/accuracy": 0.75, "val/accuracy_colour": 0.5, "val/blind_accuracy_colour": 0.125, "val/samples": 64}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    page = report.write(run, small.val, workers=0).read_text()
    assert "fine-tuning report" in page
    assert "75.0<small>%" in page
    assert page.count('<article class="query looks">') == 8
    for seen in examples(finetune.load(run), small.val, 8):
        assert html.escape(seen.text, quote=False) in page
        assert page.count(f"<figcaption>{seen.words[-1]}</figcaption>") >= 1
    assert "width:50.0%" in page
    assert 'style="left:12.5%"' in page
    assert "Images found by caption" not in page
    assert "There is nothing to show" in report.render(read_run(run), section=FinetunedSection("vqa", "accuracy", missing="no"))


def test_what_goes_wrong_is_one_line(
    runs: Path, picture: Path, tmp_path: Path, small: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.png").write_text("no picture")
    run = str(runs / "vqa")
    cases: list[tuple[list[str], int, str]] = [
        (["attend", run, "missing.jpg", "a car", "--out", "x.png"], 1, "cannot read the picture missing.jpg"),
        (["attend", run, str(tmp_path / "text.png"), "a car", "--out", "x.png"], 1, "the picture cannot be used"),
        (["attend", run, str(picture), " ?! ", "--out", "x.png"], 1, "has no word"),
        (["attend", run, str(picture), "a car", "--out", str(tmp_path / "no" / "x.png")], 1, "cannot write"),
        (["attend", run, str(picture), "a car", "--out", "x.png", "--maps", "grad"], 2, "did you mean 'gradcam'"),
        (["attend", run, str(picture), "a car", "--out", "x.png", "--maps", "raw", "--layer", "5"], 2, "no layer 5"),
        (["attend", str(tmp_path), str(picture), "a car", "--out", "x.png"], 1, "no complete checkpoint"),
        (["evaluate", run, "--data", "none-*.tar", "--task", "grounding"], 2, "none-*.tar"),
        (["evaluate", run, "--data", small.val, "--task", "grounding", "--maps", "rolluot"], 2, "did you mean 'rollout'"),
    ]
    for words, code, message in cases:
        capsys.readouterr()
        assert cli.main(words) == code, words
        said = capsys.readouterr().err.strip()
        assert message in said, words
        assert "\n" not in said
