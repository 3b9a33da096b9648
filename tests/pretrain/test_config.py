"""Reading configurations, and one clear error line for everything that can be wrong with one."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from pretrain.config import build, component_field, extra_components, load, load_values, save, to_dict
from pretrain.errors import ConfigError, closest
from pretrain.registry import get_component
from pretrain.training.loop import TrainConfig


@dataclass
class Inner:
    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    word: Literal["one", "two"] = "one"
    maybe: float | None = None
    anything: Any = None
    more: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        if self.lr < 0:
            raise ConfigError(f"inner.lr={self.lr} must be at least 0")


@dataclass
class Outer:
    name: str = "a"
    count: int = 3
    on: bool = False
    inner: Inner = field(default_factory=Inner)


@dataclass
class WithComponents:
    loss: Any = component_field(get_component, "losses", "name", "clip")
    others: dict[str, Any] = extra_components(get_component, "towers", "tower")


def test_yaml_then_base_then_dotlist(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("name: base\ncount: 1\ninner: {lr: 0.5, betas: [0.1]}\n")
    (tmp_path / "one.yaml").write_text("base: base.yaml\ncount: 2\ninner: {word: two}\n")
    config = load(Outer, tmp_path / "one.yaml", ["inner.lr=1e-2", "inner.anything=[1,{a: 2}]", "inner.more.x=y"])
    assert config == Outer("base", 2, False, Inner(0.01, [0.1], "two", None, [1, {"a": 2}], {"x": "y"}))


def test_a_run_length_replaces_one_in_another_unit(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("train: {epochs: 12}\n")
    assert load_values(tmp_path / "a.yaml", ["train.steps=24"]) == {"train": {"steps": 24}}
    assert load_values(tmp_path / "a.yaml", ["train.steps=0"]) == {"train": {"epochs": 12, "steps": 0}}
    (tmp_path / "b.yaml").write_text("epochs: 12\nsteps: 24\n")
    with pytest.raises(ConfigError, match="exactly one of"):
        load(TrainConfig, tmp_path / "b.yaml")


def test_saved_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = Outer("n", 7, True, Inner(2.0, [], "two", 0.25, {"a": [None, 1e-9]}, {"k": {"v": "1"}}))
    save(config, tmp_path / "c.yaml")
    assert load(Outer, tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("inner.l=3", ["inner.l", "'lr'", "valid: lr, betas"]),
        ("counts=3", ["counts", "'count'"]),
        ("inner.lr=abc", ["inner.lr='abc'", "a number", "0.001"]),
        ("count=3.5", ["count=3.5", "a whole number"]),
        ("count=null", ["count", "a whole number"]),
        ("on=perhaps", ["perhaps", "true or false"]),
        ("inner.word=three", ["inner.word='three'", "one of one, two"]),
        ("inner.betas=3", ["inner.betas=3", "a list"]),
        ("inner.more=3", ["inner.more=3", "settings"]),
        ("inner=3", ["inner", "settings", "3"]),
        ("--count=3", ["no dashes", "count=3"]),
        ("count", ["'count' is not a setting", "key=value"]),
        ("count={", ["'count={'", "cannot be read"]),
        ("name=${oc.env:CLIPFUSE_NOT_SET}", ["name", "CLIPFUSE_NOT_SET"]),
        ("inner.lr=-1", ["inner.lr=-1", "at least 0"]),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_key_value_and_what_is_valid(setting: str, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        load(Outer, None, [setting])
    message = str(raised.value)
    assert "\n" not in message
    for text in expected:
        assert text in message


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a: [1", "not readable YAML"),
        ("- 1\n- 2", "must hold `key: value` pairs"),
        ("base: [x]", "`base` must name one file"),
        ("base: gone.yaml", "no configuration file"),
        ("base: wrong.yaml", "leads back to itself"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(ConfigError, match=match) as raised:
        load(Outer, tmp_path / "wrong.yaml")
    assert "\n" not in str(raised.value)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    for name in ("gone.yaml", "binary.yaml", "."):
        with pytest.raises(ConfigError):
            load(Outer, tmp_path / name)


def test_a_section_has_the_fields_of_its_component() -> None:
    config = load(WithComponents, None, ["loss.name=siglip"])
    assert config.loss.name == "siglip"
    with pytest.raises(ConfigError, match=r"no 'clap' in losses; did you mean 'clip'\?; the choices are clip, siglip"):
        load(WithComponents, None, ["loss.name=clap"])
    with pytest.raises(ConfigError, match=r"unknown key loss\.nothing"):
        load(WithComponents, None, ["loss.nothing=1"])


def test_an_extra_section_with_a_tower_adds_a_modality() -> None:
    config = load(WithComponents, None, ["depth.tower=timm", "depth.name=resnet18"])
    assert config.others["depth"].name == "resnet18"
    values = to_dict(config)
    assert values["depth"]["tower"] == "timm"
    assert "others" not in values
    assert build(WithComponents, values, "itself") == config
    with pytest.raises(ConfigError, match="unknown key depth"):
        load(WithComponents, None, ["depth.name=resnet18"])


def test_a_partial_build_ignores_keys_of_other_schemas() -> None:
    assert build(Outer, {"count": 4, "unknown": {"x": 1}}, "a checkpoint", partial=True).count == 4


def test_closest_suggests_only_near_choices() -> None:
    assert "epochs" in closest("epoch", ["epochs", "steps"])
    assert closest("zzz", ["epochs", "steps"]) == ""
