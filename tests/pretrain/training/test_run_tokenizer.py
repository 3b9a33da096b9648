"""The tokenizer of a run that names none: trained on its captions, equal for equal data, the checkpoint's when it resumes."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from launch import cli
from pretrain.data.text import load_tokenizer, train_tokenizer
from pretrain.training import run_tokenizer
from tests.support import Small, read_losses


def settings(small: Small, run: str, *more: str) -> list[str]:
    return [item for item in small.settings(run, *more) if not item.startswith("text.tokenizer")]


def test_a_run_that_names_no_tokenizer_trains_one_and_resumes_with_it(
    small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole run and the one in two parts have the same losses, and the tokenizer that `clipfuse tokenizer` trains."""
    constant = "optim.schedule=constant"
    assert cli.main(["pretrain", "clipart", *settings(small, "whole", "train.steps=3", constant)]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("text.tokenizer is not set")]
    expected = train_tokenizer(small.train, in_tmp / "expected", vocab=512, length=24)
    assert lines == [
        f"text.tokenizer is not set: trained one of {len(expected)} tokens on the captions of 300 samples, "
        "in runs/whole/tokenizer"
    ]
    for file in (in_tmp / "expected").iterdir():
        assert (in_tmp / "runs/whole/tokenizer" / file.name).read_bytes() == file.read_bytes()
    checkpoint = in_tmp / "runs/whole/checkpoints/step-0000003"
    assert load_tokenizer(checkpoint / "tokenizer").get_vocab() == expected.get_vocab()
    assert f"vocab_size: {len(expected)}\n" in (checkpoint / "config.yaml").read_text()

    assert cli.main(["pretrain", "clipart", *settings(small, "parts", "train.steps=2", constant)]) == 0
    capsys.readouterr()
    shutil.rmtree("runs/parts/tokenizer")  # the checkpoint's is taken
    assert cli.main(["pretrain", "clipart", *settings(small, "parts", "train.steps=3", constant)]) == 0
    assert "text.tokenizer" not in capsys.readouterr().err
    assert read_losses(Path("runs/parts")) == read_losses(Path("runs/whole"))


def test_a_dry_run_and_a_start_that_fails_leave_no_tokenizer(small: Small, in_tmp: Path) -> None:
    assert cli.main(["pretrain", "clipart", *settings(small, "x", "train.steps=4"), "--dry-run"]) == 0
    assert not list(in_tmp.iterdir())
    assert cli.main(["pretrain", "clipart", *settings(small, "x", "train.steps=4", "image.args={depth: 0.5}")]) == 2
    assert not list(in_tmp.iterdir())


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_paths_are_checked_before_a_tokenizer_is_trained(
    small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str], dry_run: list[str]
) -> None:
    for key in ("data.train", "data.val"):
        words = settings(small, "x", f"data.val={small.val}", "train.steps=4", f"{key}=gone/*.tar")
        assert cli.main(["pretrain", "clipart", *words, *dry_run]) == 2
        error = capsys.readouterr().err
        assert f"clipfuse: {key}=gone/*.tar: no file matches gone/*.tar" in error
        assert "trained one of" not in error
        assert "the run trains" not in error


def test_large_and_remote_data_need_one_and_the_error_gives_the_command(
    small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_tokenizer, "MAX_SAMPLES", 100)
    train = f"data.train=[{{shards: '{small.train}', weight: 2}}, {{shards: '{small.val}', weight: 1}}]"
    assert cli.main(["pretrain", "clipart", *settings(small, "x", train, "data.caption=captions", "train.steps=1")]) == 2
    error = capsys.readouterr().err
    assert "text.tokenizer is not set, and data.train holds more than 100 samples: train one with `clipfuse tokenizer" in error
    command = re.findall(r"`clipfuse (.*?)`", error)[0]
    assert cli.main(shlex.split(command)) == 0  # word for word
    expected = train_tokenizer([small.train, small.val], "expected", vocab=49408, caption="captions")
    assert load_tokenizer("tokenizer").get_vocab() == expected.get_vocab()
    capsys.readouterr()

    remote = "data.train=https://example.invalid/{0000..9999}.tar"
    assert cli.main(["pretrain", "clipart", *settings(small, "x", remote, "train.steps=1")]) == 2
    error = capsys.readouterr().err
    assert "text.tokenizer is not set, and https://example.invalid/0000.tar is not on this machine" in error
    assert "`clipfuse tokenizer 'https://example.invalid/{0000..9999}.tar' tokenizer --vocab 49408`" in error
    assert cli.main(["pretrain", "clipart", *settings(small, "x", "data.train=synthetic", "train.steps=1")]) == 2
    assert "text.tokenizer is not set, and data.train=synthetic has no captions" in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.parametrize(("samples", "tokens"), [(1, 512), (300, 512), (4255, 4096), (8192, 8192), (1_000_000, 32768)])
def test_the_vocabulary_is_not_larger_than_the_number_of_samples_and_at_least_512(samples: int, tokens: int) -> None:
    assert run_tokenizer.choose_vocabulary(samples) == tokens
