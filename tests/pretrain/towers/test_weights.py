"""Towers start from the weights that the configuration names, say so, and never silently at random."""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from launch import cli
from pretrain import model as models
from pretrain.checkpoints.loading import load_model
from pretrain.data.text import load_tokenizer
from pretrain.errors import ConfigError, UserError
from pretrain.towers import timm as images
from pretrain.towers import transformers as texts
from pretrain.towers.timm_models import loads_published
from tests.support import Small

ARGS = {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]}
VIT = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
BERT = {"vocab_size": 400, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def make_resnet(seed: int = 1) -> nn.Module:
    """Return a small ResNet with a classifier, whose BatchNorm has statistics of its own."""
    torch.manual_seed(seed)
    model = timm.create_model("resnet18", num_classes=10, **ARGS)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.normal_()
    return model


def build_resnet(source: Path | str, **more: Any) -> images.ImageTower:
    torch.manual_seed(0)
    return images.build(images.Config(name="resnet18", size=32, weights=str(source), **{"args": ARGS, **more}))


def assert_loaded(tower: images.ImageTower, model: nn.Module) -> None:
    """All weights and statistics of the tower's model are those of `model`."""
    expected = model.state_dict()
    for name, tensor in tower.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def add_prefix(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in weights.items()}


def scaled(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return other weights of the same names and shapes."""
    return {name: tensor * 2 for name, tensor in weights.items()}


WRAPPERS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda w: w,
    "DDP": lambda w: add_prefix("module.", w),
    "compiled DDP": lambda w: add_prefix("_orig_mod.module.", w),
    "timm's training script": lambda w: {"epoch": 3, "arch": "resnet18", "state_dict": scaled(w), "state_dict_ema": w,
                                         "args": argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("x").name)},
    "DeiT, MAE": lambda w: {"model": w, "optimizer": {"state": {0: {"exp_avg": w["fc.bias"]}}}, "epoch": 1},
    "Lightning": lambda w: {"state_dict": add_prefix("model.", w), "callbacks": {}, "hparams": {"lr": 0.1}},
    "mmpretrain": lambda w: {"meta": {"epoch": 1}, "state_dict": add_prefix("backbone.", w)},
    "DINO": lambda w: {"student": add_prefix("module.backbone.", scaled(w)), "teacher": add_prefix("backbone.", w)},
    "MoCo": lambda w: {"state_dict": {**add_prefix("module.encoder_q.", w), **add_prefix("module.encoder_k.", scaled(w))}},
    "MoCo v3": lambda w: {"state_dict": {**add_prefix("module.momentum_encoder.", scaled(w)),
                                         **add_prefix("module.base_encoder.", w)}},
    "solo-learn": lambda w: {"state_dict": {**add_prefix("backbone.", w), **add_prefix("momentum_backbone.", scaled(w)),
                                            "projector.0.weight": torch.zeros(3, 3)}},
    "open_clip": lambda w: {**add_prefix("visual.trunk.", w), "logit_scale": torch.tensor(2.0)},
    "transformers": lambda w: add_prefix("timm_model.", w),
    "with numbers of NumPy": lambda w: {"state_dict": w, "best": np.float64(0.5), "path": pathlib.PosixPath("x")},
    "half precision": lambda w: {name: t.half() if t.is_floating_point() else t for name, t in w.items()},
}  # fmt: skip


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_files_of_common_trainers(wrapper: str, tmp_path: Path) -> None:
    """The weights inside are loaded, the evaluated ones where there are several; what they came in is stripped."""
    model = make_resnet()
    if wrapper == "half precision":
        model = model.half().float()
    torch.save(WRAPPERS[wrapper](model.state_dict()), tmp_path / "weights.pth")
    tower = build_resnet(tmp_path / "weights.pth")
    assert_loaded(tower, model)
    assert tower.weights_origin is not None
    assert tower.weights_origin.startswith(f"{tmp_path}/weights.pth")
    assert "its classifier ignored (2)" in tower.weights_origin
    assert "random" not in tower.weights_origin
    assert "do not fit" not in tower.weights_origin


def test_safetensors_and_the_statistics_of_timm(tmp_path: Path) -> None:
    """Images are normalized with ImageNet's statistics, as timm does for this model, not with CLIP's."""
    model = make_resnet()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    tower = build_resnet(tmp_path / "weights.safetensors")
    assert_loaded(tower, model)
    assert tower.statistics == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert build_resnet(tmp_path / "weights.safetensors", mean=[0.5, 0.5, 0.5]).statistics[0] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("safe", ["both", False])
def test_a_folder_of_timm(tmp_path: Path, safe: Any) -> None:
    """Architecture arguments and statistics come from its config.json, by weights= and by name=local-dir:."""
    model = make_resnet()
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    timm.models.save_for_hf(model, str(tmp_path), model_args=ARGS, safe_serialization=safe)
    towers = [
        build_resnet(tmp_path, args={}),
        images.build(images.Config(name=f"local-dir:{tmp_path}", size=32)),
    ]
    for tower in towers:
        assert_loaded(tower, model)
        assert tower.statistics == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
        settings = tower.settings()
        assert (settings["name"], settings["pretrained"], settings["weights"]) == ("resnet18", False, None)
        again = images.build(images.Config(size=32, **settings))
        assert again.weights_origin == ""
        again.load_state_dict(tower.state_dict())


def test_positions_are_resampled_and_the_pooling_may_differ(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=7, **VIT)
    torch.save({"model": add_prefix("encoder.", model.state_dict())}, tmp_path / "vit.pt")
    config = images.Config(name="vit_tiny_patch16_224", size=48, args=VIT, weights=str(tmp_path / "vit.pt"), pool="map")
    tower = images.build(config)
    loaded = tower.model.state_dict()
    expected = timm.layers.resample_abs_pos_embed(model.state_dict()["pos_embed"], new_size=[6, 6], num_prefix_tokens=1)
    torch.testing.assert_close(loaded["pos_embed"], expected)
    assert torch.equal(loaded["blocks.1.attn.qkv.weight"], model.state_dict()["blocks.1.attn.qkv.weight"])
    assert "attn_pool.q.weight" in loaded


def test_what_does_not_fit_is_counted_and_named(tmp_path: Path) -> None:
    weights = make_resnet().state_dict()
    del weights["bn1.weight"], weights["bn1.bias"]
    torch.save({**weights, "aux.weight": torch.zeros(2)}, tmp_path / "weights.pth")
    origin = build_resnet(tmp_path / "weights.pth").weights_origin
    assert origin is not None
    total = sum(not name.endswith("num_batches_tracked") for name in weights) + 2 - 2  # without the classifier
    assert f": {total - 2} of {total} tensors" in origin
    assert "2 stay random: bn1.weight, bn1.bias" in origin
    assert "its classifier ignored (2)" in origin
    assert "1 of the file do not fit: aux.weight" in origin


class Custom:
    """A class that a file may not bring in."""


def test_files_that_are_no_weights_of_the_model_are_refused(tmp_path: Path) -> None:
    """One line that names the file and the reason; no code in a file is run."""

    def write(name: str, content: Any) -> Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    weights = make_resnet().state_dict()
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "cut.pth").write_bytes(write("whole.pth", weights).read_bytes()[:5000])
    (tmp_path / "two").mkdir()
    for name in ("a.pth", "b.pth"):
        torch.save(weights, tmp_path / "two" / name)
    (tmp_path / "none").mkdir()
    (tmp_path / "bad-json").mkdir()
    (tmp_path / "bad-json/config.json").write_text("{")
    torch.save(weights, tmp_path / "bad-json/model.bin")
    other = timm.create_model("resnet18", channels=[8, 8, 16, 32], layers=[1, 1, 1, 1], num_classes=0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **VIT)
    timm.models.save_for_hf(vit, str(tmp_path / "vit"))
    cases = {
        tmp_path / "nowhere.pth": "no such file or folder; published weights: image.pretrained=true",
        tmp_path / "text.pth": "not a readable file of weights",
        tmp_path / "empty.pth": "not a readable file of weights",
        tmp_path / "cut.pth": "not a readable file of weights",
        write("object.pth", {"state_dict": weights, "object": Custom()}): r"Python objects \(.*Custom\), which are not loaded",
        write("list.pth", [1, 2]): "no named tensors",
        write("others.pth", other.state_dict()): r"layer4\.\S+ is \[32, .*in the file, \[16, .* in the model",
        write("names.pth", {"a.b": torch.zeros(2)}): "0 of its .* tensors .* the file has a.b, the model conv1.weight",
        write("nan.pth", {**weights, "conv1.weight": weights["conv1.weight"] * float("nan")}): "not all numbers are finite",
        tmp_path / "two": "holds 2 weight files: a.pth, b.pth; name one of them",
        tmp_path / "none": "holds no weight file",
        tmp_path / "bad-json": "config.json is not readable JSON",
        tmp_path / "vit": "its config.json says vit_tiny_patch16_224",
    }
    for path, message in cases.items():
        with pytest.raises(ConfigError, match=message) as error:
            build_resnet(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Defaults


def test_a_name_that_names_weights_loads_them_and_a_bare_architecture_starts_at_random(tmp_path: Path) -> None:
    """By tag or folder; the same name with pretrained=false starts at random, and weights= comes before both."""
    for name, pretrained, expected in (
        ("resnet18", None, False),
        ("resnet18", True, True),
        ("resnet18.a1_in1k", None, True),
        ("resnet18.a1_in1k", False, False),
        ("hf-hub:some/model", None, True),
        ("local-dir:somewhere", None, True),
    ):
        assert loads_published(images.Config(name=name, pretrained=pretrained)) is expected
    assert not loads_published(images.Config(name="resnet18.a1_in1k", pretrained=True, weights="x"))
    assert images.build(images.Config(name="resnet18.a1_in1k", size=32, args=ARGS, pretrained=False)).weights_origin == ""


def make_bert(folder: Path, **pooling: Any) -> Any:
    """Write a BERT; with `pooling`, beside it what sentence-transformers writes."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(1)
    model = BertModel(BertConfig(**BERT)).eval()
    model.save_pretrained(folder)
    if pooling:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 24, **pooling}))
    return model


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({}, "eot"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}, "avg"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "avg"),
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_lasttoken": True}, "eot"),
        ({"pooling_mode": "mean"}, "avg"),
        ({"pooling_mode": "cls"}, "cls"),
    ],
)
def test_pooling_comes_from_a_sentence_transformers_folder(tmp_path: Path, pooling: dict[str, Any], expected: str) -> None:
    bert = make_bert(tmp_path, **pooling)
    tower = texts.build(texts.Config(name=str(tmp_path), length=20)).eval()
    assert tower.pool == tower.settings()["pool"] == expected
    assert tower.weights_origin is not None
    assert tower.weights_origin.startswith(f"{tmp_path}: ")
    ids = torch.randint(5, 400, (2, 9))
    with torch.no_grad():
        states = bert(ids).last_hidden_state
        pooled = {"eot": states[:, -1], "cls": states[:, 0], "avg": states.mean(dim=1)}[expected]
        torch.testing.assert_close(tower(ids).pooled, pooled, rtol=1e-4, atol=1e-5)
    assert texts.build(texts.Config(name=str(tmp_path), length=20, pool="cls")).pool == "cls"


def test_the_pooling_module_may_have_another_folder_and_must_be_readable(tmp_path: Path) -> None:
    make_bert(tmp_path, pooling_mode_max_tokens=True)
    with pytest.raises(ConfigError, match=r"pools by max_tokens .* give text.pool=avg, cls or eot"):
        texts.build(texts.Config(name=str(tmp_path), length=20))
    assert texts.build(texts.Config(name=str(tmp_path), length=20, pool="avg")).pool == "avg"
    for content in ("{", "[]", '{"pooling_mode": 3}'):
        (tmp_path / "1_Pooling/config.json").write_text(content)
        with pytest.raises(ConfigError, match=r"give text\.pool") as error:
            texts.build(texts.Config(name=str(tmp_path), length=20))
        assert "\n" not in str(error.value)
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    modules += [{"path": "2_P", "type": "sentence_transformers.models.Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "2_P").mkdir()
    (tmp_path / "2_P/config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    assert texts.build(texts.Config(name=str(tmp_path), length=20)).pool == "cls"


def test_a_text_folder_without_the_weights_is_refused(tmp_path: Path) -> None:
    """No weights, or those of other names: transformers alone would start at random, with a warning."""
    make_bert(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({"other.weight": torch.zeros(3)}, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks \d+ of \d+ weights of BertModel: .*text\.pretrained=false starts at random"):
        texts.build(texts.Config(name=str(tmp_path), length=20))
    file.unlink()
    with pytest.raises(ConfigError, match=r"the weights cannot be loaded: .*text\.pretrained=false starts at random"):
        texts.build(texts.Config(name=str(tmp_path), length=20))
    assert texts.build(texts.Config(name=str(tmp_path), length=20, pretrained=False)).weights_origin == ""


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def test_a_run_from_two_towers_says_what_it_loaded_and_needs_the_files_no_more(
    small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_resnet()
    torch.save(model.state_dict(), "resnet.pth")
    make_bert(Path("bert"), pooling_mode_mean_tokens=True)
    load_tokenizer(small.tokenizer).save_pretrained("bert")
    settings = [item for item in small.settings("both") if not item.startswith(("image.", "text."))]
    settings += ["image.name=resnet18", "image.size=32", "image.args={channels: [8, 8, 16, 16], layers: [1, 1, 1, 1]}"]
    settings += ["text.length=24", "train.steps=1", "optim.lr=1e-9"]
    settings += ["image.weights=resnet.pth", "text.name=bert", "text.args={}", "text.tokenizer=bert"]
    assert cli.main(["pretrain", "clipart", *settings, "optim.lr_scale={image: 0.1, text: 0.05}"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("image tower: weights from resnet.pth: ")]
    assert [line for line in lines if line.startswith("text tower: weights from bert: ")]
    for path in (Path("resnet.pth"), Path("bert/model.safetensors"), Path("bert/config.json")):
        path.unlink()
    loaded = load_model("runs/both")
    assert (loaded.config.image.weights, loaded.config.image.pretrained, loaded.config.text.pool) == (None, False, "avg")
    assert loaded.config.image.mean == [0.485, 0.456, 0.406]
    weight: Any = loaded.model.tower("image").get_parameter("model.layer1.0.conv1.weight")
    torch.testing.assert_close(weight, model.state_dict()["layer1.0.conv1.weight"], atol=1e-6, rtol=0)


def test_a_random_tower_is_named_and_init_is_not(small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = small.settings("first", "train.steps=1")
    assert cli.main(["pretrain", "scenes", *settings]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert "image tower: random weights; image.pretrained=true or image.weights=FILE starts from trained ones" in lines
    assert "text tower: random weights; text.name=FOLDER starts from trained ones" in lines
    assert cli.main(["pretrain", "scenes", *small.settings("second", "train.steps=1", "init={image: runs/first}")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line[:10] for line in lines if "random weights" in line] == ["text tower"]
    assert cli.main(["pretrain", "scenes", *settings, "run=frozen", "image.trainable_blocks=0", "--dry-run"]) == 0
    assert "image tower: random weights, and frozen" in capsys.readouterr().err


def test_init_from_the_weights_of_one_tower_names_the_setting_that_takes_them(
    small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(make_resnet().state_dict(), "resnet.pth")
    timm.models.save_for_hf(make_resnet(), "resnet", model_args=ARGS)
    make_bert(Path("bert"))
    for init, message in (
        ("{image: resnet.pth}", "image.weights=resnet.pth"),
        ("{image: resnet}", "image.weights=resnet"),
        ("{text: bert}", "text.name=bert"),
        ("resnet.pth", "image.weights=resnet.pth"),
    ):
        code = cli.main(["pretrain", "scenes", *small.settings("x", "train.steps=1", f"init={init}")])
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clipfuse: ")]
        assert code != 0
        assert len(errors) == 1
        assert message in errors[0]
    with pytest.raises(UserError, match=r"init=\{image: runs/x\}"):
        images.build(images.Config(name="resnet18", weights=str(make_run_folder(in_tmp / "runs/x").relative_to(in_tmp))))


def make_run_folder(folder: Path) -> Path:
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    return folder


def test_describe_weights_leaves_out_towers_that_do_not_say() -> None:
    config = images.Config(name="resnet18", size=32, args=ARGS)
    text = texts.Config(args={"model_type": "bert", **BERT}, length=20)
    model = models.build({"image": config, "text": text}, models.ModelConfig(dim=8))
    model.tower("text").weights_origin = None
    assert [line.split(":")[0] for line in models.describe_weights(model)] == ["image tower"]
    assert models.describe_weights(model, "runs/x") == []
