"""The whole first floor through its commands, as a person runs it: shards -> tokenizer -> run -> recall -> report."""

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
    """60 steps on 300 scenes, evaluated twice."""
    run = tmp_path_factory.mktemp("pipeline") / "run"
    more = ("train.steps=60", f"data.val={small.val}", "train.eval_every=30", "train.save_every=20", "train.keep=1", "seed=3")
    run_clipfuse("pretrain", "scenes", *small.settings(run, *more), "train.trackers=[tensorboard]", cwd=run.parent)
    return run


def test_the_run_folder_is_what_the_contract_says(run: Path) -> None:
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


def test_metrics_have_the_fields_of_the_contract_and_the_loss_falls(run: Path) -> None:
    written = read_jsonl(run / "metrics.jsonl")
    trained = [line for line in written if "loss" in line]
    assert [line["step"] for line in trained] == list(range(1, 61))
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
        assert all(name in line for line in trained), name
    assert trained[-1]["samples_seen"] == 60 * 16
    first, last = (sum(line["loss"] for line in part) / 10 for part in (trained[:10], trained[-10:]))
    assert first == pytest.approx(math.log(16), rel=0.25)
    assert last < 0.8 * first
    assert [line["step"] for line in written if "val/image_to_text_R@1" in line] == [30, 60]


def test_rotation_leaves_the_newest_and_the_best(run: Path) -> None:
    left = {store.parse_step(folder) for folder in store.list_complete(run / "checkpoints")}
    best = store.read_pointer(run / "checkpoints", "best")
    assert best is not None
    assert left == {60, store.parse_step(best)}


def test_a_checkpoint_stands_alone(run: Path, tmp_path: Path) -> None:
    """config.yaml, weights and tokenizer are all that loading reads: not the scenes' tokenizer, not the run."""
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
    printed = json.loads(run_clipfuse("evaluate", run, "--data", small.val, "--json", cwd=run.parent).stdout)
    metrics = printed["metrics"]
    assert metrics["samples"] == 64
    assert metrics["image_to_text_R@10"] > 1.5 * printed["chance"]["image_to_text_R@10"]
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


def test_dry_run_prints_what_would_run_and_leaves_nothing(small: Small, tmp_path: Path) -> None:
    out = run_clipfuse("pretrain", "scenes", *small.settings("x", "train.steps=10"), "--dry-run", cwd=tmp_path).stdout
    for words in ("batch_size: 16", "image", "text", "trainable", "1 shards, 300 samples", "10 steps of 16 samples"):
        assert words in out
    assert not list(tmp_path.iterdir())


def test_a_finished_run_has_nothing_left_to_do_and_a_longer_horizon_goes_on(small: Small, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_clipfuse("pretrain", "scenes", *small.settings(run, "train.steps=4"), cwd=tmp_path)
    again = run_clipfuse("pretrain", "scenes", *small.settings(run, "train.steps=4"), cwd=tmp_path)
    assert "nothing left to do" in again.stderr
    run_clipfuse("pretrain", "scenes", *small.settings(run, "train.steps=6"), cwd=tmp_path)
    assert [line["step"] for line in read_jsonl(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_init_starts_from_another_runs_weights(small: Small, run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    settings = small.settings(other, "train.steps=1", f"init={run}", "optim.lr=1e-12", "optim.weight_decay=0")
    run_clipfuse("pretrain", "scenes", *settings, cwd=tmp_path)
    mine, theirs = (store.read_weights(store.find(where)) for where in (other, run))
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=0, atol=1e-6)


def test_help_shows_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for command in ("data", "tokenizer", "pretrain", "evaluate", "report"):
        assert command in shown


def test_my_own_pictures_become_shards_that_train(small: Small, tmp_path: Path) -> None:
    """pack a folder, check it, pack it again as a table, train a step on it."""
    folder = tmp_path / "pictures/deep"
    folder.mkdir(parents=True)
    rows = ["file,title"]
    for i in range(24):
        Image.new("RGB", (40 + i, 50), (10 * i, 0, 99)).save(folder / f"p{i}.jpg")
        (folder / f"p{i}.txt").write_text(f"a colour number {i}")
        rows.append(f"deep/p{i}.jpg,a colour number {i}")
    (tmp_path / "pictures/pairs.csv").write_text("\n".join(rows) + "\n")
    assert "24" in run_clipfuse("data", "pack", "pictures", "one", cwd=tmp_path).stdout
    table = ("--image-column", "file", "--caption-column", "title", "--shard-size", "10")
    run_clipfuse("data", "pack", "pictures/pairs.csv", "two", *table, cwd=tmp_path)
    assert len(list((tmp_path / "two").glob("*.tar"))) == 3
    for out in ("one", "two"):
        checked = json.loads(run_clipfuse("data", "check", out, "--json", cwd=tmp_path).stdout)
        assert (checked["samples"], checked["bad_samples"]) == (24, 0)
    settings = small.settings("r", "train.steps=2", f"data.train={tmp_path}/two", "data.batch_size=12")
    run_clipfuse("pretrain", "scenes", *settings, cwd=tmp_path)
