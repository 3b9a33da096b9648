"""A run that resumes computes what it computed before, or is refused; it needs no file that its checkpoint replaces."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
import yaml
from safetensors.torch import save_file

from launch import cli
from pretrain import config as configuration
from pretrain.checkpoints import resuming, store
from pretrain.data.text import load_tokenizer
from pretrain.errors import ConfigError
from pretrain.model import ModelSchema
from pretrain.train import load_config
from tests.support import Small, read_losses


def pretrain(small: Small, run: str, *more: str) -> int:
    return cli.main(["pretrain", "scenes", *small.settings(run, "data.batch_size=8", *more)])


@dataclass
class AudioConfig:
    """Settings of a tower of one's own."""

    tower: str = "my.audio"
    frames: str = "mean"
    trainable_blocks: int = -1


def build_schema(**audio: Any) -> ModelSchema:
    return ModelSchema(others={"audio": AudioConfig(**audio)})


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


def test_architectures_whose_weights_fit_are_refused(small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The number of heads is in no weight's shape; QuickGELU instead of GELU is in no weight's name."""
    vit = "image.args={patch_size: 16, embed_dim: 32, depth: 1, num_heads: 2}"
    assert pretrain(small, "r", "train.steps=1", "image.name=vit_base_patch16_clip_224", vit) == 0
    config = (in_tmp / "runs/r/config.yaml").read_bytes()
    for settings, words in (
        ([vit.replace("num_heads: 2", "num_heads: 4")], "image.args.num_heads is 4 now and was 2; set image.args.num_heads=2"),
        (["image.name=vit_base_patch16_clip_quickgelu_224", vit], "image.name is 'vit_base_patch16_clip_quickgelu_224' now"),
        ([vit, "text.args.num_attention_heads=4"], "text.args.num_attention_heads is 4 now and was 2"),
        ([vit, "text.args.layer_norm_eps=0.5"], "text.args.layer_norm_eps is 0.5 now and was 1e-05"),
        ([vit.replace("depth: 1", "depth: 2"), "model.dim=24"], "image.args.depth is 2 now and was 1"),
        (
            [vit, "model.dim=24"],
            "is a checkpoint of another architecture: 2 have another shape (first projections.image",
        ),
    ):
        capsys.readouterr()
        more = ["train.steps=2", "image.name=vit_base_patch16_clip_224", *settings]
        assert pretrain(small, "r", *more) in (1, 2)
        line = error_line(capsys)
        assert words in line
        assert "runs/r/checkpoints/step-0000001" in line
        assert (in_tmp / "runs/r/config.yaml").read_bytes() == config
    training = ["text.groups=1", "text.args.attention_dropout=0.5"]  # how it is trained may change
    more = ["train.steps=2", "image.name=vit_base_patch16_clip_224.openai", "image.pretrained=false"]
    assert pretrain(small, "r", *more, vit, *training) == 0


def test_a_further_tower_that_computes_otherwise_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "step-0000001"
    checkpoint.mkdir()
    config = build_schema(frames="mean")
    configuration.save(config, checkpoint / "config.yaml")
    model = torch.nn.Linear(1, 1)
    save_file(model.state_dict(), checkpoint / "model.safetensors")
    resuming.refuse_other_model(config, None, checkpoint, model)
    resuming.refuse_other_model(build_schema(frames="mean", trainable_blocks=0), None, checkpoint, model)
    with pytest.raises(ConfigError, match=r"audio.frames is 'last' now and was 'mean'; set audio.frames=mean"):
        resuming.refuse_other_model(build_schema(frames="last"), None, checkpoint, model)


@pytest.fixture
def text_folder(small: Small, in_tmp: Path) -> Path:
    """A sentence-transformers folder with a tiny BERT of random weights, pooled by the mean, and its tokenizer."""
    folder = in_tmp / "bert"
    tokenizer = load_tokenizer(small.tokenizer)
    torch.manual_seed(4)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=len(tokenizer) + 3, max_position_embeddings=40, layer_norm_eps=1e-6, **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    return folder


def test_a_run_resumes_without_what_it_started_from(small: Small, in_tmp: Path, text_folder: Path) -> None:
    """Both pretrained towers and the tokenizer are gone: the losses are those of a run that was never stopped.

    With the image tower's weights went the arguments and statistics that came with them.
    """
    args = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    torch.manual_seed(3)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **args)
    weights = in_tmp / "weights"
    weights.mkdir()
    save_file(model.state_dict(), weights / "model.safetensors")
    statistics = {"architecture": "vit_tiny_patch16_224", "model_args": args, "pretrained_cfg": {"mean": [0.1, 0.2, 0.3]}}
    (weights / "config.json").write_text(json.dumps(statistics))
    towers = ("image.args={}", f"image.weights={weights}", "text.args={}", f"text.name={text_folder}", "text.tokenizer=''")
    more = [*towers, "train.steps=4", "train.save_every=2"]
    assert pretrain(small, "whole", *more) == 0
    assert pretrain(small, "r", *more, "loss.name=tests.support.failing_loss", "loss.how=terminate", "loss.at=2") == 75
    shutil.rmtree(weights)
    shutil.rmtree(text_folder)
    assert pretrain(small, "r", *more) == 0
    assert read_losses(in_tmp / "runs/r") == read_losses(in_tmp / "runs/whole")
    ends = [store.read_weights(in_tmp / f"runs/{run}/checkpoints/step-0000004") for run in ("r", "whole")]
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name
    saved, whole = (
        (in_tmp / f"runs/{run}/checkpoints/step-0000004/config.yaml").read_text().replace("run: r\n", "run: whole\n")
        for run in ("r", "whole")
    )
    assert [line for line in saved.splitlines() if "failing" not in line] == whole.splitlines()
    values = yaml.safe_load(saved)
    assert values["image"]["mean"] == [0.1, 0.2, 0.3]
    assert values["text"]["pool"] == "avg"
    assert pretrain(small, "other", *more) == 2  # another run does not start without them


def test_a_run_resumes_without_the_run_that_it_started_from(
    small: Small, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run gave it architecture, weights and tokenizer; the command names it by a variable."""
    assert pretrain(small, "first", "train.steps=1") == 0
    monkeypatch.setenv("FIRST", "runs/first")
    settings = [item for item in small.settings("r", "data.batch_size=8") if not item.startswith(("image.", "text.", "model."))]
    command = ["pretrain", str(in_tmp / "bare.yaml"), *settings, "init=${oc.env:FIRST}"]
    (in_tmp / "bare.yaml").write_text("loss: {name: clip}\n")
    assert cli.main([*command, "train.steps=1"]) == 0
    assert configuration.read_yaml(in_tmp / "runs/r/config.yaml")["init"] == "runs/first"
    (in_tmp / "runs/first").rename(in_tmp / "moved")
    saved = in_tmp / "runs/r/checkpoints/step-0000001"
    saved.rename(saved.with_name(".step-0000001.replaced.partial"))  # as where a save of the same step is killed
    assert cli.main([*command, "train.steps=2"]) == 0
    assert sorted(read_losses(in_tmp / "runs/r")) == [1, 2]
    capsys.readouterr()
    monkeypatch.setenv("FIRST", "runs/other")
    assert cli.main([*command, "train.steps=3"]) == 0
    assert "init=runs/other is not read: the run goes on from runs/r/checkpoints/step-0000002" in capsys.readouterr().err
    assert cli.main([*command, "run=new", "train.steps=1"]) == 2
    assert "no run or checkpoint at runs/other" in error_line(capsys)
    monkeypatch.delenv("FIRST")
    assert cli.main([*command, "train.steps=4"]) == 2
    line = error_line(capsys)
    assert "init='${oc.env:FIRST}' on the command line cannot be resolved" in line


def test_a_run_folder_resolves_no_variables(small: Small, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in a run folder may be somebody else's: its variables would be read on this machine."""
    checkpoint = in_tmp / "runs/r/checkpoints/step-0000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    (checkpoint / "config.yaml").write_text("image: {name: '${oc.env:SECRET}'}\ntext: {name: x}\n")
    monkeypatch.setenv("SECRET", "resnet18")
    with pytest.raises(ConfigError, match=r"image\.name=\$\{oc\.env:SECRET\} in .*not variables of this machine"):
        load_config(configuration.find_config("clipart", "pretrain"), ["run=r", "init=elsewhere"])
