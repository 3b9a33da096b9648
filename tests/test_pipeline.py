"""Pretraining through its commands: shards -> tokenizer -> run -> evaluation -> report."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from launch import cli
from pretrain.checkpoints import store
from pretrain.checkpoints.loading import load_model
from tests.support import Small, read_jsonl, run_clipfuse


@pytest.fixture(scope="module")
def run(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 60 steps on 300 scenes, evaluated twice."""
    run = tmp_path_factory.mktemp("pipeline") / "run"
    more = ("train.steps=60", f"data.val={small.val}", "train.eval_every=30", "train.save_every=20", "train.keep=1", "seed=3")
    run_clipfuse("pretrain", "scenes", *small.settings(run, *more), "train.trackers=[tensorboard]", cwd=run.parent)
    return run


def test_the_run_folder_holds_the_documented_files(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "environment.json", "status.json", "metrics.jsonl", "checkpoints", "tensorboard"} <= names
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    environment = json.loads((run / "environment.json").read_text())
    assert environment["threads"] == 1
    assert torch.__version__.startswith(environment["versions"]["torch"])
    for pointer in ("latest", "best"):
        folder = run / "checkpoints" / (run / "checkpoints" / pointer).read_text().strip()
        assert {path.name for path in folder.iterdir()} == {
            "config.yaml", "model.safetensors", "tokenizer", "manifest.json", "state"
        }  # fmt: skip


def test_metrics_have_the_documented_fields_and_the_loss_falls(run: Path) -> None:
    all_lines = read_jsonl(run / "metrics.jsonl")
    train_lines = [line for line in all_lines if "loss" in line]
    assert [line["step"] for line in train_lines] == list(range(1, 61))
    for name in (
        "samples_seen",
        "lr",
        "logit_scale",
        "samples_per_second",
        "data_wait_seconds",
        "memory_gib",
        "mfu",
        "skipped",
    ):
        assert all(name in line for line in train_lines), name
    assert train_lines[-1]["samples_seen"] == 60 * 16
    first, last = (sum(line["loss"] for line in lines) / 10 for lines in (train_lines[:10], train_lines[-10:]))
    assert first == pytest.approx(math.log(16), rel=0.25)
    assert last < 0.8 * first
    assert [line["step"] for line in all_lines if "val/image_to_text_R@1" in line] == [30, 60]


def test_rotation_keeps_the_newest_and_the_best_checkpoint(run: Path) -> None:
    kept_steps = {store.parse_step(folder) for folder in store.list_complete(run / "checkpoints")}
    best = store.read_pointer(run / "checkpoints", "best")
    assert best is not None
    assert kept_steps == {60, store.parse_step(best)}


def test_a_checkpoint_loads_without_its_run_and_its_tokenizer_folder(run: Path, tmp_path: Path) -> None:
    """Loading reads only config.yaml, weights and tokenizer: not the run, not text.tokenizer's folder."""
    folder = store.find(run)
    copy = tmp_path / folder.name
    copy.mkdir()
    for name in ("config.yaml", "model.safetensors", "manifest.json"):
        (copy / name).write_bytes((folder / name).read_bytes())
    (copy / "tokenizer").mkdir()
    for path in (folder / "tokenizer").iterdir():
        (copy / "tokenizer" / path.name).write_bytes(path.read_bytes())
    (copy / "manifest.json").unlink()
    values = (copy / "config.yaml").read_text()
    assert str(run) not in values.replace(f"run: {run}", "")
    loaded = load_model(copy)
    assert AutoTokenizer.from_pretrained(copy / "tokenizer").vocab_size == loaded.tokenizer.vocab_size
    ids, mask = loaded.decoders["text"].encode(["a red car on a bridge"])
    assert loaded.model.encode("text", ids, mask).norm().item() == pytest.approx(1, rel=1e-5)


def test_evaluate_prints_a_table_and_json_and_beats_chance(small: Small, run: Path) -> None:
    result = json.loads(run_clipfuse("evaluate", run, "--data", small.val, "--json", cwd=run.parent).stdout)
    metrics = result["metrics"]
    assert metrics["samples"] == 64
    assert metrics["image_to_text_R@10"] > 1.5 * result["chance"]["image_to_text_R@10"]
    best = max(
        (line for line in read_jsonl(run / "metrics.jsonl") if "val/image_to_text_R@1" in line),
        key=lambda line: line["val/image_to_text_R@1"],
    )
    assert metrics["text_to_image_R@5"] == pytest.approx(best["val/text_to_image_R@5"])
    assert "R@1" in run_clipfuse("evaluate", run, "--data", small.val, cwd=run.parent).stdout


def test_report_is_written(run: Path) -> None:
    assert "report.html" in run_clipfuse("report", run, cwd=run.parent).stdout
    page = (run / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_dry_run_prints_a_summary_and_writes_nothing(small: Small, tmp_path: Path) -> None:
    out = run_clipfuse("pretrain", "scenes", *small.settings("x", "train.steps=10"), "--dry-run", cwd=tmp_path).stdout
    for text in ("batch_size: 16", "image", "text", "trainable", "1 shard, 300 samples", "10 steps of 16 samples"):
        assert text in out
    assert not list(tmp_path.iterdir())


def test_a_finished_run_does_nothing_and_resumes_with_more_steps(small: Small, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_clipfuse("pretrain", "scenes", *small.settings(run, "train.steps=4"), cwd=tmp_path)
    trained = (run / "config.yaml").read_text()
    again = run_clipfuse("pretrain", "scenes", *small.settings(run, "train.steps=4", "optim.lr=0.5"), cwd=tmp_path)
    assert "nothing left to train: step 4 of 4 is done" in again.stderr
    assert (run / "config.yaml").read_text() == trained  # what did not train it is not written down
    run_clipfuse("pretrain", "scenes", *small.settings(run, "train.steps=6"), cwd=tmp_path)
    assert [line["step"] for line in read_jsonl(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_init_starts_from_another_runs_weights(small: Small, run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    settings = small.settings(other, "train.steps=1", f"init={run}", "optim.lr=1e-12", "optim.weight_decay=0")
    run_clipfuse("pretrain", "scenes", *settings, cwd=tmp_path)
    weights, initial = (store.read_weights(store.find(folder)) for folder in (other, run))
    for name, value in initial.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-6)


def test_help_shows_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--help"])
    assert exit_info.value.code == 0
    help_text = capsys.readouterr().out
    for command in ("data", "tokenizer", "pretrain", "evaluate", "report"):
        assert command in help_text


def test_a_folder_of_images_becomes_shards_that_train(small: Small, tmp_path: Path) -> None:
    """Pack a folder, check it, pack it again as a table, train two steps on it."""
    folder = tmp_path / "images/deep"
    folder.mkdir(parents=True)
    rows = ["file,title"]
    for i in range(24):
        Image.new("RGB", (40 + i, 50), (10 * i, 0, 99)).save(folder / f"p{i}.jpg")
        (folder / f"p{i}.txt").write_text(f"a color number {i}")
        rows.append(f"deep/p{i}.jpg,a color number {i}")
    (tmp_path / "images/pairs.csv").write_text("\n".join(rows) + "\n")
    assert "24" in run_clipfuse("data", "pack", "images", "one", cwd=tmp_path).stdout
    table = ("--image-column", "file", "--caption-column", "title", "--shard-size", "10")
    run_clipfuse("data", "pack", "images/pairs.csv", "two", *table, cwd=tmp_path)
    assert len(list((tmp_path / "two").glob("*.tar"))) == 3
    for out in ("one", "two"):
        report = json.loads(run_clipfuse("data", "check", out, "--json", cwd=tmp_path).stdout)
        assert (report["samples"], report["bad_samples"]) == (24, 0)
    settings = small.settings("r", "train.steps=2", f"data.train={tmp_path}/two", "data.batch_size=12")
    run_clipfuse("pretrain", "scenes", *settings, cwd=tmp_path)
