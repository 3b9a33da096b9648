"""A run that resumes computes what it computed before, or is refused; it needs no file that its checkpoint replaces."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from launch import cli
from pretrain import config as configuration
from pretrain.checkpoints import store
from pretrain.train import load_config
from tests.support import Small, read_losses


def pretrain(small: Small, run: str, *more: str) -> int:
    return cli.main(["pretrain", "scenes", *small.settings(run, "data.batch_size=8", *more)])


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clipfuse: ")]
    return line


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ("text.pool=avg", "text.pool=eot", ("text.pool is 'eot' now and was 'avg'", "set text.pool=avg")),
        ("image.pool=avg", "image.pool=cls", ("image.pool is 'cls' now and was 'avg'", "set image.pool=avg")),
        ("image.resize=crop", "image.resize=squash", ("image.resize is 'squash' now and was 'crop'",)),
        (
            "text.args.hidden_act=quick_gelu",  # the default of the architecture, which its checkpoint does not name
            "text.args.hidden_act=gelu",
            ("text.args.hidden_act is 'gelu' now and was 'quick_gelu'", "set text.args.hidden_act=quick_gelu"),
        ),
        ("image.mean=[0.5,0.5,0.5]", "image.std=[0.25,0.25,0.25]", ("image.std is [0.25, 0.25, 0.25] now",)),
    ],
)
def test_a_model_whose_weights_fit_but_which_computes_otherwise_is_refused(
    small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str], before: str, now: str, words: tuple[str, ...]
) -> None:
    """As after an upgrade that changed the default of a field that the command leaves out."""
    assert pretrain(small, "r", "train.steps=1", before) == 0
    config = (in_tmp / "runs/r/config.yaml").read_bytes()
    capsys.readouterr()
    assert pretrain(small, "r", "train.steps=2", now) == 2
    line = error_line(capsys)
    for word in ("cannot resume runs/r/checkpoints/step-0000001", *words):
        assert word in line
    assert (in_tmp / "runs/r/config.yaml").read_bytes() == config
    assert pretrain(small, "r", "train.steps=2", before) == 0


def test_another_tokenizer_is_refused(small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pretrain.data.text import train_tokenizer

    assert pretrain(small, "r", "train.steps=1") == 0
    train_tokenizer(small.train, in_tmp / "other", vocab=300)
    capsys.readouterr()
    assert pretrain(small, "r", "train.steps=2", f"text.tokenizer={in_tmp}/other", "text.args.vocab_size=400") == 2
    assert "runs/r/checkpoints/step-0000001/tokenizer is the one that it was trained with" in error_line(capsys)


def test_a_run_resumes_without_the_weights_that_it_started_from(small: Small, in_tmp: Path) -> None:
    """`image.weights` is gone, and with it the statistics that came with it: the losses are those of a run never stopped."""
    args = load_config(configuration.find_config("scenes", "pretrain"), small.settings("r")).image
    torch.manual_seed(3)
    model = timm.create_model(args.name, img_size=args.size, num_classes=0, **args.args)
    weights = in_tmp / "weights"
    weights.mkdir()
    save_file(model.state_dict(), weights / "model.safetensors")
    (weights / "config.json").write_text(json.dumps({"architecture": args.name, "pretrained_cfg": {"mean": [0.1, 0.2, 0.3]}}))
    more = [f"image.weights={weights}", "train.save_every=2"]
    assert pretrain(small, "whole", "train.steps=4", *more) == 0
    assert (
        pretrain(small, "r", "train.steps=4", *more, "loss.name=tests.support.failing_loss", "loss.how=terminate", "loss.at=2")
        == 75
    )
    (weights / "model.safetensors").unlink()
    (weights / "config.json").unlink()
    weights.rmdir()
    assert pretrain(small, "r", "train.steps=4", *more) == 0
    assert read_losses(in_tmp / "runs/r") == read_losses(in_tmp / "runs/whole")
    ends = [store.read_weights(in_tmp / f"runs/{run}/checkpoints/step-0000004") for run in ("r", "whole")]
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name
    saved = configuration.read_yaml(in_tmp / "runs/r/checkpoints/step-0000004/config.yaml")
    assert saved["image"]["mean"] == [0.1, 0.2, 0.3]
