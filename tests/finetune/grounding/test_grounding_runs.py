"""`clipfuse attend` and `evaluate --task grounding` on runs of every task with images and texts."""

from __future__ import annotations

import html
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import clipfuse
import numpy as np
import pytest
import torch
from PIL import Image

import finetune
from finetune.explain.attribution import METHODS
from finetune.explain.examples import sample_examples
from finetune.explain.heatmap import LEGEND
from finetune.explain.token_spans import TokenSpans
from finetune.explain.word_maps import compute_token_maps, compute_word_maps, find_decoders
from finetune.grounding.evaluate import GroundingConfig, evaluate_grounding
from launch import cli, report
from launch.report.finetuned import FinetunedSection
from launch.report.reranked import build_reranked_gallery, draw_captions
from launch.report.run_history import read_run
from pretrain.data import loader
from tests.support import TINY_TOWERS, Small

CPU = torch.device("cpu")
TASKS = {"vqa": "what colour is the car?", "retrieval": "a red car, left of a black sofa", "captioning": "a red car on a sofa"}


@pytest.fixture(scope="module")
def runs(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run of two steps for each task, on a grid of 16 cells."""
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
def image_path(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of a wide image, of which the model's input shows the middle."""
    path = tmp_path_factory.mktemp("images") / "wide.png"
    with tarfile.open(sorted(small.root.glob("scenes/val-*.tar"))[0]) as tar:
        member = next(member for member in tar if member.name.endswith(".jpg"))
        Image.open(io.BytesIO(tar.extractfile(member).read())).resize((90, 60)).save(path)  # type: ignore[union-attr]
    return path


@pytest.mark.parametrize("task", TASKS)
def test_attend_writes_a_figure_for_each_task(
    runs: Path, image_path: Path, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "map.png"
    assert cli.main(["attend", str(runs / task), str(image_path), TASKS[task], "--out", str(out)]) == 0
    output = capsys.readouterr().out
    assert TASKS[task] in output
    assert ("answer: " in output) == (task == "vqa")
    with Image.open(out) as figure:
        assert figure.width > 500
    model = finetune.load(runs / task)
    for method in METHODS:
        maps = compute_word_maps(model, image_path.read_bytes(), TASKS[task], method)
        assert maps.maps.shape == (len(maps.words), 4, 4)
        assert maps.image.size == (60, 60)  # the middle, in the pixels of the stored image
        assert np.isfinite(maps.maps).all()
        assert (maps.maps >= 0).all()
    assert all(p.requires_grad for p in model.model.parameters())  # as before


def test_the_map_of_a_generated_word_is_that_of_the_position_before(runs: Path, image_path: Path) -> None:
    """The map of a word is the attention of the position that predicts it."""
    model = finetune.load(runs / "captioning")
    inputs, masks = model.encode_inputs([image_path.read_bytes()], ["a red car"])
    maps, _ = compute_token_maps(model.model, model.task, inputs["image"], inputs["text"], masks["text"], "raw")
    captured = []
    fusion = model.model.fusion
    assert fusion is not None
    fusion.register_forward_pre_hook(lambda module, inputs: captured.append(inputs[1]))
    compute_token_maps(model.model, model.task, inputs["image"], inputs["text"], masks["text"], "raw")
    (trace,) = captured
    (cross_step,) = [step for step in trace.steps if step.kind == "cross"]
    weights = cross_step.records[0].weights.used.mean(dim=1).detach()
    spans = TokenSpans(find_decoders(model.decoders)[1], "a red car")
    (car,) = spans.find_words()[2].tokens[:1]
    torch.testing.assert_close(maps[0, car].flatten(), weights[0, car - 1])


@pytest.mark.parametrize("task", ["vqa", "retrieval"])
def test_every_metric_has_its_controls(runs: Path, small: Small, task: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Maps after two steps score about as chance, and the command prints what the function returns."""
    capsys.readouterr()
    words = ["evaluate", str(runs / task), "--data", small.val, "--task", "grounding", "--maps", "raw", "--json"]
    assert cli.main(words) == 0
    printed = json.loads(capsys.readouterr().out)
    metrics = evaluate_grounding(finetune.load(runs / task), small.val, GroundingConfig(method="raw"), CPU)
    assert printed["metrics"] == metrics
    for kind in ("thing", "colour", "surface"):
        for end in ("", "_low", "_high", "_area", "_centre", "_untrained", "_shuffled"):
            assert 0 <= metrics[f"pointing_{kind}{end}"] <= 1
        assert metrics[f"pointing_{kind}_low"] <= metrics[f"pointing_{kind}"] <= metrics[f"pointing_{kind}_high"]
        assert abs(metrics[f"pointing_{kind}"] - metrics[f"pointing_{kind}_area"]) < 0.5
        assert metrics[f"lift_{kind}"] == pytest.approx(1, abs=0.4)
    assert metrics["counterfactual_moved"] <= min(metrics["counterfactual_before"], metrics["counterfactual_after"])


def test_examples_for_the_report(runs: Path, small: Small) -> None:
    examples = sample_examples(finetune.load(runs / "vqa"), small.val, 6)
    assert len({example.text.split()[0] for example in examples}) >= 3  # a question of each type in turn
    assert all(example.truth and example.text_is_question and example.answers for example in examples)
    repeated = sample_examples(finetune.load(runs / "vqa"), small.val, 6)
    assert [example.text for example in repeated] == [example.text for example in examples]
    (example,) = sample_examples(finetune.load(runs / "retrieval"), small.val, 1)
    assert example.answers[0][0] == "score"
    assert example.format_answers() == (f"score, {example.answers[0][1]:.2f}", "")  # not a probability in percent
    assert not example.truth


def test_the_report_of_a_retrieval_run_shows_both_orders(runs: Path, small: Small, tmp_path: Path) -> None:
    """Compare the ranks with those of the embeddings and of predict() on each candidate."""
    run, n = shutil.copytree(runs / "retrieval", tmp_path / "retrieval"), 24
    model = clipfuse.load(run, device="cpu")
    loaded = model._finetuned
    loaded.task.config.score = "matching"  # after two steps, the sum still orders pairs as embeddings do
    built = build_reranked_gallery(loaded, small.val, workers=0, images=n)
    assert built is not None
    assert sum(built.counts.values()) == n
    batches = list(loader.build_eval_loader(small.val, {"raw": RawImages(), "text": loaded.decoders["text"]}, n, max_samples=n))
    images, captions = batches[0].targets["raw"], [of_image[0] for of_image in batches[0].targets["captions"]]
    cosines = model.encode_texts(captions) @ model.encode_images(images).T
    ranks: list[tuple[int, int]] = []
    for j, caption in enumerate(captions):
        candidates = np.argsort(-cosines[j])[: built.candidates].tolist()
        scores = {
            i: row[0][1] for i, row in zip(candidates, model.predict([images[i] for i in candidates], caption), strict=True)
        }
        after = 1 + sum(score > scores[j] for score in scores.values()) if j in scores else 0
        ranks.append((candidates.index(j) + 1 if j in scores else 0, after))
    assert built.counts["missed"] == sum(before == 0 for before, _ in ranks)
    assert built.counts["up"] == sum(after < before for before, after in ranks)
    assert built.counts["down"] == sum(after > before for before, after in ranks)
    assert built.first_after == pytest.approx(sum(after == 1 for _, after in ranks) / n)
    assert built.counts["up"] > 0
    assert built.counts["down"] > 0
    for query in built.queries:
        j = captions.index(query.caption)
        assert (query.rank_before, query.rank_after) == ranks[j]
        for answers, rank in ((query.by_embeddings, query.rank_before), (query.reranked, query.rank_after)):
            assert [answer.rank for answer in answers if answer.is_right] == [rank]
            assert len({answer.image for answer in answers}) == len(answers) == (5 if rank <= 5 else 6)
    some = build_reranked_gallery(loaded, small.val, workers=0, images=n, most=10)
    assert some is not None
    assert (some.images, some.captions, some.ranked) == (n, n, 10)
    drawn = [ranks[j] for j in draw_captions(n, 10)]
    assert some.counts["up"] == sum(after < before for before, after in drawn)
    assert some.first_after == pytest.approx(sum(after == 1 for _, after in drawn) / 10)
    assert [(query.rank_before, query.rank_after) for query in some.queries] == [
        ranks[captions.index(query.caption)] for query in some.queries
    ]
    page = report.render(read_run(run), None, section=FinetunedSection("retrieval", "reranked_R@1", reranked=some))
    assert "Of their 24 captions 10 were looked at, drawn by a fixed seed." in page
    (run / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": step, "val/reranked_R@1": 0.2, "val/R@1": 0.1, "val/chance_reranked_R@1": 0.0625}) + "\n"
            for step in (1, 2)
        )
    )
    page = report.write(run, small.val, workers=0, images=n).read_text()
    assert "Left where it was" in page
    assert "All their 24 captions were looked at." in page
    assert "chance 6.2 %" in page
    assert page.count("<span>by embeddings</span>") >= 3
    assert sum(f'<q dir="auto">{html.escape(caption, quote=False)}</q>' in page for caption in captions) >= 3


class RawImages:
    """A decoder that returns the files of images."""

    def __call__(self, sample: Any, rng: Any, train: bool) -> bytes:
        return bytes(sample.members["jpg"])

    def collate(self, items: list[bytes]) -> None:
        return

    def targets(self, items: list[bytes]) -> dict[str, Any]:
        return {"raw": items}


def test_the_report_shows_answers_and_maps(runs: Path, small: Small, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "vqa", tmp_path / "vqa")
    line = {"step": 2, "val/accuracy": 0.75, "val/accuracy_colour": 0.5, "val/blind_accuracy_colour": 0.125, "val/samples": 64}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    page = report.write(run, small.val, workers=0).read_text()
    assert "fine-tuning report" in page
    assert "75.0<small>%" in page
    assert page.count('<article class="query looks">') == 8
    assert page.count(LEGEND) == 1
    for example in sample_examples(finetune.load(run), small.val, 8):
        assert html.escape(example.text, quote=False) in page
        assert page.count(f'<figcaption dir="auto">{example.words[-1]}</figcaption>') >= 1
    assert "width:50.0%" in page
    assert 'style="left:12.5%"' in page
    assert "Images found by caption" not in page
    assert "There is nothing to show" in report.render(read_run(run), section=FinetunedSection("vqa", "accuracy", missing="no"))


def test_errors_are_one_line(
    runs: Path, image_path: Path, tmp_path: Path, small: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.png").write_text("no image")
    run = str(runs / "vqa")
    cases: list[tuple[list[str], int, str]] = [
        (["attend", run, "missing.jpg", "a car", "--out", "x.png"], 2, "cannot read the image missing.jpg"),
        (["attend", run, str(tmp_path / "text.png"), "a car", "--out", "x.png"], 1, "the image cannot be used"),
        (["attend", run, str(image_path), " ?! ", "--out", "x.png"], 1, "has no word"),
        (["attend", run, str(image_path), "a car", "--out", str(tmp_path / "no" / "x.png")], 1, "cannot write"),
        (["attend", run, str(image_path), "a car", "--out", "x.png", "--maps", "grad"], 2, "did you mean 'gradcam'"),
        (["attend", run, str(image_path), "a car", "--out", "x.png", "--maps", "raw", "--layer", "5"], 2, "no layer 5"),
        (["attend", str(tmp_path), str(image_path), "a car", "--out", "x.png"], 1, "no complete checkpoint"),
        (["evaluate", run, "--data", "none-*.tar", "--task", "grounding"], 2, "none-*.tar"),
        (["evaluate", run, "--data", small.val, "--task", "grounding", "--maps", "rolluot"], 2, "did you mean 'rollout'"),
    ]
    for words, code, message in cases:
        capsys.readouterr()
        assert cli.main(words) == code, words
        output = capsys.readouterr().err.strip()
        assert message in output, words
        assert "\n" not in output
