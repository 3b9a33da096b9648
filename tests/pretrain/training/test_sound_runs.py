"""Pretraining with sounds: three towers, and sounds with texts alone, from the command to embeddings and Python."""

from __future__ import annotations

import json
import re
import shutil
from itertools import permutations
from pathlib import Path

import clipfuse
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from transformers import AutoFeatureExtractor, AutoTokenizer, ClapModel

from launch import cli
from pretrain.checkpoints.loading import load_model
from pretrain.training.metrics import describe_results
from tests.pretrain.towers.test_audio import CLAP, save_ast
from tests.support import Small, read_jsonl, read_losses
from tests.support.sounds import AUDIO, make_tone, write_shard

DIRECTIONS = [f"{a}_to_{b}" for a, b in permutations(("image", "text", "audio"), 2)]
MORE = ["data.train=train-00.tar", "data.val=val-00.tar", "data.batch_size=8", "eval.workers=0", *AUDIO]


@pytest.fixture(scope="module")
def folder(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, and runs/three of 6 steps."""
    root = tmp_path_factory.mktemp("sound")
    write_shard(root / "train-00.tar", 40)
    write_shard(root / "val-00.tar", 12, seed=1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert cli.main(["pretrain", "scenes", *small.settings("three", *MORE, "train.steps=6", "train.save_every=3")]) == 0
    return root


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def test_three_towers_train_and_are_evaluated_in_all_directions(here: Path) -> None:
    lines = read_jsonl(here / "runs/three/metrics.jsonl")
    evaluated = [line for line in lines if "val/samples" in line][-1]
    assert not any(name.startswith("val/samples_") for name in evaluated)  # every sample has all three
    for direction in DIRECTIONS:
        assert 0 <= evaluated[f"val/{direction}_R@1"] <= evaluated[f"val/{direction}_R@10"] <= 1
        assert evaluated[f"val/chance_{direction}_R@1"] == pytest.approx(1 / 12)
        assert evaluated[f"val/{direction}_median_rank"] >= 1
    described = describe_results({k.removeprefix("val/"): v for k, v in evaluated.items()}, "image_to_text_R@1")
    assert sorted(part.split()[0] for part in described.split(", ")) == sorted(f"{name}_R@1" for name in DIRECTIONS)
    assert {"image_to_text_accuracy", "image_to_audio_accuracy", "text_to_audio_accuracy"} <= lines[0].keys()
    assert read_losses(here / "runs/three")[6] < read_losses(here / "runs/three")[1]


def test_a_run_resumes_bit_for_bit(here: Path, small: Small) -> None:
    more = ["train.steps=6", "train.save_every=3", "resume=runs/three/checkpoints/step-0000003"]
    assert cli.main(["pretrain", "scenes", *small.settings("rest", *MORE, *more)]) == 0
    losses = read_losses(here / "runs/three")
    assert read_losses(here / "runs/rest") == {step: losses[step] for step in (4, 5, 6)}
    last = "checkpoints/step-0000006/model.safetensors"
    assert (here / "runs/rest" / last).read_bytes() == (here / "runs/three" / last).read_bytes()


def test_a_published_tower_trains_on_and_resumes_when_its_folder_is_gone(
    here: Path, small: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    save_ast(here / "ast")
    data = [setting for setting in MORE if not setting.startswith("audio.")]
    more = ["audio.tower=audio", "audio.name=ast", "train.save_every=1", "data.val=null", "image=null"]
    settings = [s for s in small.settings("published", *data, *more) if not s.startswith("image.")]
    assert cli.main(["pretrain", "scenes", *settings, "train.steps=1"]) == 0
    assert "audio tower: weights from ast: 55 of 55 tensors" in capsys.readouterr().err
    shutil.rmtree(here / "ast")
    assert cli.main(["pretrain", "scenes", *settings, "train.steps=2"]) == 0
    assert list(read_losses(here / "runs/published")) == [1, 2]
    tower = load_model("runs/published").config.others["audio"]
    assert (tower.name, tower.rate, tower.mean, tower.std, tower.mels) == (None, 16000, -5.0, 6.0, 64)


def test_embeddings_of_the_command_are_those_of_python_and_evaluate_alike(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", "val-00.tar"]
    words = ["runs/three", *data, "--out", "vectors", "--dtype", "float32", "--workers", "0"]
    assert cli.main(["embed", *words]) == 0
    table = pq.read_table(next((here / "vectors").glob("*.parquet")))
    model = clipfuse.load("runs/three")
    sounds = [make_tone(220, 0.8, 1000), make_tone(440 * 1.001, 0.3, 1001)]
    expected = np.stack(table["audio"].to_pylist()[:2])
    found = model.encode_audio(sounds)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    Path("a.flac").write_bytes(sounds[0])
    samples, rate = soundfile.read("a.flac", dtype="float32")
    stereo = np.stack([samples, samples], axis=1)
    integers, _ = soundfile.read("a.flac", dtype="int16")
    many = model.encode_audio(["a.flac", Path("a.flac"), sounds[0], (samples, rate), (stereo, rate), (integers, rate)])
    np.testing.assert_allclose(many, expected[:1].repeat(6, axis=0), atol=1e-5)
    np.testing.assert_allclose(model.encode_audio((samples, rate)), expected[:1], atol=1e-5)
    capsys.readouterr()
    results = []
    for source in (data, ["--data", "vectors"]):
        assert cli.main(["evaluate", "runs/three", *source, "--json"]) == 0
        results.append(json.loads(capsys.readouterr().out)["metrics"])
    for direction in DIRECTIONS:
        assert results[1][f"{direction}_R@1"] == pytest.approx(results[0][f"{direction}_R@1"])


@pytest.mark.parametrize(
    ("sound", "message"),
    [
        ("missing.flac", r"audio\[0\] cannot be read: missing.flac: No such file"),
        (b"no sound", r"audio\[0\] is not a usable sound: audio unreadable"),
        ((np.zeros(800, dtype=np.complex64), 8000), r"audio\[0\] .* complex64"),
        ((np.zeros(800, dtype=np.float32), 0), r"audio\[0\] .* rate 0"),
        ((np.zeros((2, 3, 4), dtype=np.float32), 8000), r"audio\[0\] .* shape \(2, 3, 4\)"),
        (3, r"audio must be a list"),
        ([3], r"audio\[0\] is int; give a path"),
        (np.zeros(800, dtype=np.float32), r"audio\[0\] .* give a path, .* \(array, rate\)"),
    ],
)
def test_sounds_that_cannot_be_used_are_one_line(here: Path, sound: object, message: str) -> None:
    model = clipfuse.load("runs/three")
    with pytest.raises(clipfuse.UserError, match=message) as error:
        model.encode_audio(sound)
    assert "\n" not in str(error.value)


def test_formats_that_cannot_hold_three_towers_say_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for form in ("hf", "open_clip"):
        assert cli.main(["export", "runs/three", f"three-{form}", "--format", form]) == 1
        message = f"{form} cannot hold the audio tower: it holds an image and a text tower only; --format onnx can hold it"
        assert message in capsys.readouterr().err


def test_claps_architectures_become_a_clap_model_of_transformers(
    here: Path, small: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained, exported, loaded with transformers alone, with its own feature extractor, and read again."""
    clap = {**CLAP, "hidden_dropout_prob": 0.0, "num_mel_bins": 16, "spec_size": 48, "depths": [1, 2]}
    text = {"model_type": "clap_text_model", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sound = ["audio.tower=audio", f"audio.args={json.dumps(clap)}", "audio.rate=8000", "audio.seconds=1"]
    towers = ["image=null", *sound, f"text.args={json.dumps(text | {'intermediate_size': 32})}", "text.pool=tower"]
    data = [setting for setting in MORE if not setting.startswith("audio.")]
    settings = [s for s in small.settings("clap", *data, "data.val=null") if not s.startswith(("image.", "text.args"))]
    assert cli.main(["pretrain", "scenes", *settings, *towers, "train.steps=2"]) == 0
    assert cli.main(["export", "runs/clap", "clap", "--format", "hf"]) == 0
    sound_array = np.random.default_rng(0).uniform(-0.5, 0.5, 8000).astype(np.float32)
    texts, ours = ["a red thing", "a thing"], clipfuse.load("runs/clap")
    model, extractor, tokenizer = (of.from_pretrained("clap") for of in (ClapModel, AutoFeatureExtractor, AutoTokenizer))
    features = extractor(sound_array, sampling_rate=8000, return_tensors="pt")["input_features"].float()
    with torch.no_grad():
        out = model.eval()(input_features=features, **tokenizer(texts, return_tensors="pt", padding=True))
    np.testing.assert_allclose(out.audio_embeds.numpy(), ours.encode_audio((sound_array, 8000)), atol=1e-4)
    np.testing.assert_allclose(out.text_embeds.numpy(), ours.encode_texts(texts), atol=1e-5)
    assert "ClapModel" in (here / "clap/README.md").read_text()

    # What was exported is read again, wherever a command takes a run.
    again = clipfuse.load("clap")
    np.testing.assert_allclose(again.encode_audio((sound_array, 8000)), ours.encode_audio((sound_array, 8000)), atol=1e-6)
    np.testing.assert_allclose(again.encode_texts(texts), ours.encode_texts(texts), atol=1e-6)
    capsys.readouterr()
    metrics = []
    for folder in ("runs/clap", "clap"):
        assert cli.main(["evaluate", folder, "--data", "val-00.tar", "--json"]) == 0
        metrics.append(json.loads(capsys.readouterr().out)["metrics"])
    assert metrics[0] == metrics[1]
    assert cli.main(["embed", "clap", "--data", "val-00.tar", "--out", "clap-vectors", "--dtype", "float32"]) == 0
    table = pq.read_table(next(Path("clap-vectors").glob("*.parquet")))
    assert table.column_names == ["key", "text", "audio", "caption", "json"]
    np.testing.assert_allclose(table["text"].to_pylist(), ours.encode_texts(table["caption"].to_pylist()), atol=1e-6)
    Path("more.yaml").write_text("init: clap")
    fixed = [s for s in small.settings("more", *data) if not s.startswith(("image.", "text.", "audio.", "model."))]
    assert cli.main(["pretrain", "more.yaml", *fixed, "data.val=null", "train.steps=1", "optim.lr=1e-12"]) == 0
    capsys.readouterr()
    trained = load_model("runs/more").model.state_dict()
    for name, weight in load_model("runs/clap").model.state_dict().items():
        torch.testing.assert_close(trained[name], weight, atol=1e-6, rtol=0, msg=name)


def test_sounds_and_texts_alone(here: Path, small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    """No images: another primary metric, classes of sounds, an index of sounds, and no command that needs images."""
    settings = [s for s in small.settings("two", *MORE, "train.steps=4", "train.save_every=2") if not s.startswith("image.")]
    classes = [
        "eval.tasks=[retrieval,zero_shot,linear_probe]",
        "eval.classes=red,green,blue,white",
        "eval.probe_train=train-00.tar",
    ]
    words = ["pretrain", "scenes", *settings, "image=null", *classes]
    assert cli.main([*words, "--dry-run"]) == 0
    assert "audio" in capsys.readouterr().out
    assert cli.main([*words, "train.eval_every=2"]) == 0
    output = capsys.readouterr()
    assert "clipfuse index runs/two --data val-00.tar --db runs/two/index\n" in output.err
    assert "clipfuse finetune" not in output.out + output.err
    evaluated = [line for line in read_jsonl(here / "runs/two/metrics.jsonl") if "val/samples" in line][-1]
    assert evaluated["val/audio_to_text_R@1"] >= 0
    assert evaluated["val/zero_shot_classes"] == evaluated["val/linear_probe_classes"] == 4
    assert not [name for name in evaluated if "image" in name]
    assert "audio_to_text_R@1" in output.err
    capsys.readouterr()
    zero_shot = ["--task", "zero_shot", "--classes", "red,green,blue,white"]
    assert cli.main(["evaluate", "runs/two", "--data", "val-00.tar", *zero_shot]) == 0
    assert re.search(r"^ *12 sounds, ", capsys.readouterr().out, re.MULTILINE)
    assert cli.main(["evaluate", "runs/three", "--data", "val-00.tar"]) == 0
    assert re.search(r"^ *12 samples, 12 captions, ", capsys.readouterr().out, re.MULTILINE)
    assert cli.main(["report", "runs/two"]) == 0
    assert cli.main(["export", "runs/two", "two-onnx", "--format", "onnx"]) == 1
    assert "onnx cannot hold a model without image tower" in capsys.readouterr().err
    assert "A gallery shows images and captions" in (here / "runs/two/report.html").read_text()
    model = clipfuse.load("runs/two")
    assert model.encode_audio(["a.flac"] if Path("a.flac").exists() else [make_tone(220, 0.5, 0)]).shape == (1, 16)
    with pytest.raises(clipfuse.UserError, match="has no image tower; it encodes text, audio"):
        model.encode_images([np.zeros((8, 8, 3), dtype=np.uint8)])


def test_synthetic_sounds(here: Path, small: Small) -> None:
    words = ["pretrain", "scenes", *small.settings("noise", *MORE, "data.train=synthetic", "data.val=null", "train.steps=1")]
    assert cli.main(words) == 0
    assert torch.isfinite(torch.tensor(read_losses(here / "runs/noise")[1]))
