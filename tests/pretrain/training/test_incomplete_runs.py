"""Runs with data.incomplete=keep: samples that have two of three modalities."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import IO, Any, cast

import pytest
import torch

from launch import cli
from pretrain.checkpoints.loading import load_model
from pretrain.config import find_config
from pretrain.errors import ConfigError
from pretrain.evaluation.evaluate import EvalConfig, evaluate
from pretrain.evaluation.retrieval import retrieval_metrics
from pretrain.train import build, load_config
from tests.support import Small, read_jsonl, read_losses, run_clipfuse
from tests.support.sounds import AUDIO, write_shard

LEFT_OUT = [{"jpg"}, {"flac"}, {"txt"}, {"txt", "flac"}]
"""Of every fifth sample from the first, the second, ...; the fifth has all. A sample with an image alone has no pair."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.tar of 40 samples, eight of which have an image alone."""
    root = tmp_path_factory.mktemp("incomplete")
    write_shard(root / "whole.tar", 40)
    with tarfile.open(root / "whole.tar") as whole, tarfile.open(root / "train.tar", "w") as tar:
        keys: list[str] = []
        for info in whole:
            key, extension = info.name.split(".", 1)
            keys += [key] if key not in keys else []
            left_out = [*LEFT_OUT, set()][(len(keys) - 1) % 5]
            if extension not in {"jpeg" if "jpg" in left_out else "", "png" if "jpg" in left_out else "", *left_out}:
                tar.addfile(info, whole.extractfile(info))
    return root


def settings(small: Small, run: str, *more: str, audio: bool = True) -> list[str]:
    fixed = ["data.train=train.tar", "data.batch_size=8", "data.max_bad_rate=1", "train.audit=true", *(AUDIO if audio else [])]
    return small.settings(run, *fixed, "train.steps=4", "train.save_every=2", *more)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_two_processes_learn_from_them_is_what_one_does(folder: Path, small: Small) -> None:
    keep = "data.incomplete=keep"
    run_clipfuse("pretrain", "scenes", *settings(small, "one", keep), cwd=folder)
    losses = read_losses(folder / "runs/one")
    lines = [line for line in read_jsonl(folder / "runs/one/metrics.jsonl") if "loss" in line]
    assert {"image_to_text_accuracy", "image_to_audio_accuracy", "text_to_audio_accuracy"} <= lines[0].keys()
    replaced = [line for line in read_jsonl(folder / "runs/one/metrics.jsonl") if "bad_samples" in line]
    assert replaced, lines[-1].keys()
    more = [keep, "train.strategy=ddp", "train.chunks=2"]
    run_clipfuse("pretrain", "scenes", "--nproc", "2", *settings(small, "two", *more), cwd=folder)
    assert list(read_losses(folder / "runs/two").values()) == pytest.approx(list(losses.values()), rel=1e-4)
    again = [keep, "resume=runs/one/checkpoints/step-0000002", "data.workers=2"]
    run_clipfuse("pretrain", "scenes", *settings(small, "rest", *again), cwd=folder)
    assert read_losses(folder / "runs/rest") == {step: loss for step, loss in losses.items() if step > 2}


def test_which_samples_have_what(folder: Path, small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40 samples eight each lack an image, a sound, a caption and nothing; those with an image alone are replaced."""
    monkeypatch.chdir(folder)
    config = load_config(find_config("scenes", "pretrain"), settings(small, "x", "data.incomplete=keep"))
    batch = build(config).loader.first_samples(32)
    present = batch.targets["present"]
    rows = list(zip(*(present[name].tolist() for name in ("image", "text", "audio")), strict=True))
    assert all(sum(row) >= 2 for row in rows)
    for i, key in enumerate(batch.keys):
        kind = int(key.rpartition("/")[2].strip("abcdefghijklmnopqrstuvwxyz-") or 0) % 5
        expected = {0: (False, True, True), 1: (True, True, False), 2: (True, False, True), 4: (True, True, True)}
        assert rows[i] == expected[kind], key
    assert not batch.inputs["image"][~present["image"]].any()
    assert not batch.inputs["audio"][~present["audio"]].any()
    assert batch.inputs["audio"][present["audio"]].any(dim=1).all()


def test_without_the_setting_they_are_bad_samples(folder: Path, small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    config = load_config(find_config("scenes", "pretrain"), settings(small, "x"))
    batch = build(config).loader.first_samples(8)
    assert "present" not in batch.targets


@pytest.mark.parametrize(
    ("setting", "audio", "message"),
    [
        ("keep", False, r"data\.incomplete=keep is for three towers or more: a sample without image or text has no pair"),
        ("keep loss.exchange=ring", True, r"data\.incomplete=keep goes neither"),
        ("yes", True, r"data\.incomplete.*bad"),
    ],
)
def test_what_cannot_be_is_refused(
    folder: Path, small: Small, monkeypatch: pytest.MonkeyPatch, setting: str, audio: bool, message: str
) -> None:
    monkeypatch.chdir(folder)
    words = settings(small, "x", *f"data.incomplete={setting}".split(), audio=audio)
    with pytest.raises(ConfigError, match=message):
        build(load_config(find_config("scenes", "pretrain"), words))


def test_each_pair_is_evaluated_on_the_samples_that_have_both(
    folder: Path, small: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figures are those of shards with these samples alone, encoded by the towers of the pair."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = settings(small, "seen", "data.incomplete=keep", "train.steps=2")
        assert cli.main(["pretrain", "scenes", *words]) == 0
        capsys.readouterr()
        assert cli.main(["evaluate", "runs/seen", "--data", "train.tar", "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        loaded = load_model("runs/seen")
        with tarfile.open("train.tar") as tar:
            samples: dict[str, dict[str, bytes]] = {}
            for info in tar:
                key, extension = info.name.split(".", 1)
                samples.setdefault(key, {})[extension] = cast(IO[bytes], tar.extractfile(info)).read()
    metrics, extensions = result["metrics"], {"image": "jpg", "text": "txt", "audio": "flac"}
    assert (metrics["samples"], metrics["bad_samples"]) == (32, 8)
    for first, second in (("image", "text"), ("image", "audio"), ("audio", "text")):
        both = [s for s in samples.values() if extensions[first] in s and extensions[second] in s]
        assert len(both) == metrics[f"samples_{first}_{second}"]
        encoded = []
        for name in (first, second):
            decoder, contents = loaded.decoders[name], [s[extensions[name]] for s in both]
            with torch.no_grad():
                if name == "text":
                    ids, mask = decoder.encode([content.decode() for content in contents])
                    encoded.append(loaded.model.encode("text", ids, mask))
                else:
                    encoded.append(loaded.model.encode(name, torch.stack([decoder.decode_eval(c) for c in contents])))
        expected = retrieval_metrics(*encoded, torch.arange(len(both)), names=(first, second))
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value), name
            if "R@1" in name:
                assert result["chance"][name] == pytest.approx(int(name[-2:].strip("@")) / len(both))


class Bare:
    """A decoder of sounds as a user may write it, without an item for samples that have none."""

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder

    def __call__(self, sample: Any, rng: Any, train: bool) -> Any:
        return self.decoder(sample, rng, train)

    def collate(self, items: list[Any]) -> Any:
        return self.decoder.collate(items)


def test_a_decoder_without_blanks_is_evaluated_on_whole_samples(
    folder: Path, small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    parts = build(load_config(find_config("scenes", "pretrain"), settings(small, "x")))
    decoders = {**parts.eval_decoders, "audio": Bare(parts.eval_decoders["audio"])}
    metrics = evaluate(parts.model, decoders, "train.tar", EvalConfig(workers=0), torch.device("cpu"))
    assert (metrics["samples"], metrics["bad_samples"]) == (8, 32)
