"""Fine-tuning runs end to end: processes, exact resuming, evaluation, loading, an external task."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import finetune
from launch import cli
from pretrain.checkpoints.loading import load_model
from tests.support import Small, read_jsonl, read_losses, run_clipfuse

OUTSIDE = '''
"""Predicts whether an image shows an object of a color: one logit from the image embedding."""

from dataclasses import dataclass
from typing import Any
import json

import torch
from torch import nn

from finetune.model import Head
from finetune.tasks import Task
from pretrain.runtime.agree import gather_or_raise


@dataclass
class Config:
    name: str = "redness"
    color: str = "red"


class HasColor:
    def __init__(self, color): self.color = color
    def __call__(self, sample, rng, train):
        return self.color in {o["color"] for o in json.loads(sample.members["json"])["objects"]}
    def collate(self, items): return None
    def targets(self, items): return {"has_color": torch.tensor(items, dtype=torch.float32)}


class Logit(Head):
    def __init__(self, width):
        super().__init__()
        self.out = nn.Linear(width, 1)

    def forward(self, model, inputs, masks, targets, trace=None):
        return {"logit": self.out(model.embed("image", inputs["image"]))[:, 0]}


class Redness(Task):
    primary_metric = "accuracy"

    def __init__(self, config): self.config = config
    def build_decoders(self, towers): return {"image": towers["image"], "has_color": HasColor(self.config.color)}
    def build_head(self, model): return Logit(model.encoder.projection("image").out_features)

    def loss(self, features, targets):
        return nn.functional.binary_cross_entropy_with_logits(features["logit"], targets["has_color"]), {}

    def evaluate(self, model, shards, setup):
        def right():
            with setup.inference_mode(model):
                pairs = [(self.encode(model, b)["logit"] > 0, b.targets["has_color"] > 0) for b in setup.batches(shards)]
                return [x for predicted, true in pairs for x in (predicted == true).tolist()]
        results = [x for part in gather_or_raise(right) for x in part]
        return {"accuracy": sum(results) / len(results), "samples": len(results)}


def build(config, survey): return Redness(config)
'''


@pytest.fixture(scope="module")
def encoders(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pretrain a run of three steps."""
    run = tmp_path_factory.mktemp("encoders") / "run"
    assert cli.main(["pretrain", "scenes", *small.settings(run, "train.steps=3")]) == 0
    return run


def arguments(small: Small, encoders: Path, run: Path, *more: str) -> list[str]:
    return [
        "finetune", "vqa", f"run={run}", f"init={encoders}", f"data.train={small.train}", f"data.val={small.val}",
        "data.batch_size=16", "data.workers=0", "eval.workers=0", "eval.max_samples=16", "task.questions=2", "fusion.layers=1",
        "fusion.heads=2", "fusion.dropout=0.1", "optim.warmup=2", "train.log_every=1", "train.trackers=[]", "train.threads=1",
        "train.eval_every=0", "train.save_every=3", "train.steps=6", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def straight(small: Small, encoders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("straight") / "run"
    assert cli.main(arguments(small, encoders, run)) == 0
    return run


def test_it_starts_from_init_and_trains_all_weights_that_the_loss_uses(encoders: Path, straight: Path) -> None:
    before, after = load_model(encoders), finetune.load(straight)
    old, new = before.model.state_dict(), after.model.encoder.state_dict()
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert "logit_scale" not in moved  # no contrastive loss here
    assert any(name.startswith("towers.text") for name in moved)
    assert any(name.startswith("towers.image") for name in moved)
    for name in moved:
        assert (old[name] - new[name]).abs().max() < 0.05, name  # six small steps from the pretrained weights
    assert all(value == value for value in read_losses(straight).values())


def test_resumed_bit_for_bit(small: Small, encoders: Path, straight: Path, tmp_path: Path) -> None:
    """Resume from the middle checkpoint, with the files that a stopped run leaves; `init` is gone."""
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    for path in (run / "checkpoints").iterdir():
        if path.name != "step-0000003":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert cli.main(arguments(small, tmp_path / "gone", run)) == 0
    assert read_losses(run) == read_losses(straight)
    last = "checkpoints/step-0000006/model.safetensors"
    assert (run / last).read_bytes() == (straight / last).read_bytes()


def test_another_model_does_not_resume(
    small: Small, encoders: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, before the configuration in the run folder is replaced, also where all weights fit."""
    config = (straight / "config.yaml").read_bytes()
    for settings, words in (
        (["task.loss=sigmoid"], "task.loss is 'sigmoid' now and was "),
        (["fusion.heads=4"], "fusion.heads is 4 now and was 2; set fusion.heads=2"),
        (["context.name=pooled", "context.heads=2"], "context.name is 'pooled' now and was 'dense'"),
        (["image.resize=squash"], "image.resize is 'squash' now and was 'crop'"),
        (["adapt.lora.rank=2"], "adapt.lora.rank is 2 now and was 0"),
        (["data.batch_size=32"], "data.batch_size is 32 now and was 16; a run resumes with the same data"),
        (
            ["adapt.trainable_blocks={image: 0}"],
            "has optimizer state of encoder.projections.image.weight, which is not",
        ),
    ):
        assert cli.main(arguments(small, encoders, straight, *settings)) == 2, settings
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clipfuse: ")]
        assert words in line
        assert f"{straight}/checkpoints/step-0000006" in line
        assert (straight / "config.yaml").read_bytes() == config


def test_a_folder_of_another_stage_does_not_resume(
    small: Small, encoders: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments(small, encoders, encoders)) == 2
    assert "it is of a pretraining run, not of fine-tuning; choose another run=NEW" in capsys.readouterr().err
    assert cli.main(["pretrain", "scenes", *small.settings(straight, "train.steps=1")]) == 2
    assert "it is of a fine-tuning run, not of pretraining" in capsys.readouterr().err


def test_the_evaluate_command(small: Small, straight: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(straight), "--data", small.val, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tasks"] == ["vqa"]
    assert result["primary"] == "accuracy"
    metrics = result["metrics"]
    kinds = ("colour", "kind", "surface", "count", "existence", "relation")
    assert {f"accuracy_{kind}" for kind in kinds} | {f"blind_accuracy_{kind}" for kind in kinds} <= set(metrics)
    assert metrics["samples"] == 64
    logged = [line for line in read_jsonl(straight / "metrics.jsonl") if "val/accuracy" in line]
    assert logged[-1]["val/samples"] == 16
    assert cli.main(["evaluate", str(straight), "--data", small.val]) == 0
    assert "without image" in capsys.readouterr().out
    assert cli.main(["evaluate", str(straight), "--data", small.val, "--task", "retrieval", "--json"]) == 0  # its encoders
    assert "image_to_text_R@1" in json.loads(capsys.readouterr().out)["metrics"]


def test_a_loaded_run_predicts_answers(small: Small, straight: Path) -> None:
    import tarfile

    tuned = finetune.load(straight)
    with tarfile.open(sorted(Path(small.val).parent.glob("val-*.tar"))[0]) as tar:
        name = next(name for name in tar.getnames() if name.endswith(".jpg"))
        image = tar.extractfile(name).read()  # type: ignore[union-attr]
    prediction = tuned.predict([image, image], ["what colour is the car?", "how many things are there?"], top=3)
    assert [len(row) for row in prediction.best] == [3, 3]
    assert {answer for row in prediction.best for answer, _ in row} <= set(tuned.config.task.answers)
    assert "yes" in tuned.config.task.answers
    assert not prediction.score.requires_grad


def test_cached_steps_give_the_losses_of_plain_steps(small: Small, encoders: Path, straight: Path, tmp_path: Path) -> None:
    plain, cached = tmp_path / "plain", tmp_path / "cached"
    for run, chunks in ((plain, 1), (cached, 4)):
        assert cli.main(arguments(small, encoders, run, "fusion.dropout=0", f"train.chunks={chunks}", "data.val=null")) == 0
    for step, loss in read_losses(plain).items():
        assert read_losses(cached)[step] == pytest.approx(loss, rel=1e-4)


def test_two_processes_give_the_losses_of_one(small: Small, encoders: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    more = ("fusion.dropout=0", "train.steps=3")
    assert cli.main(arguments(small, encoders, one, *more)) == 0
    done = run_clipfuse(*arguments(small, encoders, two, *more, "train.strategy=ddp"), "--nproc", "2", cwd=tmp_path)
    assert "done: 3 steps" in done.stderr + done.stdout
    for step, loss in read_losses(one).items():
        assert read_losses(two)[step] == pytest.approx(loss, rel=1e-4)
    first, second = (
        next(line for line in read_jsonl(run / "metrics.jsonl") if "val/accuracy" in line)["val/accuracy"] for run in (one, two)
    )
    assert first == pytest.approx(second, abs=0.03)  # a hardly trained model has near ties, which rounding may reverse


def test_a_task_outside_the_project(
    small: Small, encoders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "outside_tasks").mkdir()
    (tmp_path / "outside_tasks" / "__init__.py").touch()
    (tmp_path / "outside_tasks" / "redness.py").write_text(OUTSIDE)
    config = tmp_path / "redness.yaml"
    config.write_text(
        f"""
run: {tmp_path / "run"}
init: {encoders}
data: {{train: "{small.train}", val: "{small.val}", batch_size: 16, workers: 0}}
task: {{name: outside_tasks.redness, color: blue}}
fusion: null
train: {{steps: 4, trackers: [], log_every: 1, threads: 1}}
eval: {{workers: 0}}
"""
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert cli.main(["finetune", str(config)]) == 0
    assert cli.main(["evaluate", str(tmp_path / "run"), "--data", small.val, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["tasks"] == ["outside_tasks.redness"]
    assert 0 <= result["metrics"]["accuracy"] <= 1
    weights = load_file(tmp_path / "run/checkpoints/step-0000004/model.safetensors")
    assert any(name.startswith("head.out") for name in weights)
    assert not any(name.startswith("fusion.") for name in weights)
    sys.modules.pop("outside_tasks.redness", None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["init=nowhere/at/all"], "nowhere/at/all"),
        (["init=null"], "init=RUN is missing"),
        (["text.tokenizer=./no-such-folder"], "./no-such-folder"),
        (["task.name=vqaa"], "did you mean 'vqa'"),
        (["task.field=captions"], "task.field=captions"),
        (["data.train=synthetic"], "no task to learn"),
        (["data.draw=2"], "data.draw=2 is for pretraining"),
        (["data.decode_on=device"], "data.decode_on=device is for pretraining"),
        (["fusion=null"], "needs a fusion"),
        (["data.batch_size=15", "train.chunks=2"], "data.batch_size=15"),
        (["model.dim=24"], "another architecture"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_refused_in_one_line(
    small: Small, encoders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: list[str], message: str
) -> None:
    code = cli.main(arguments(small, encoders, tmp_path / "run", *settings))
    error = capsys.readouterr().err.strip().splitlines()
    assert code in (1, 2)
    assert message in error[-1]
    assert len([line for line in error if line.startswith("clipfuse: ")]) == 1


def test_dry_run_prints_the_parameters_of_each_part(
    small: Small, encoders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*arguments(small, encoders, tmp_path / "run"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    for part in ("image", "text", "fusion", "task"):
        assert any(line.startswith(part) and "trainable" in line for line in out.splitlines())
    assert "exports: onnx can hold this model; hf and open_clip can hold its encoders" in out
    assert not (tmp_path / "run").exists()
