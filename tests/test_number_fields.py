"""check() of every Config refuses numbers that are none: NaN, infinity, negative ones, more than 64 bits."""

import copy
import dataclasses
import importlib
import math
import pkgutil
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import finetune
import pretrain
from finetune.config import FinetuneConfig
from pretrain.config import load
from pretrain.errors import ConfigError
from pretrain.train import PretrainConfig, load_config

NEEDED: dict[str, dict[str, Any]] = {
    "pretrain.towers.transformers.Config": {"args": {"model_type": "clip_text_model"}},
    "pretrain.towers.audio.Config": {"name": "conv", "widths": [8]},
    "pretrain.towers.mel.MelSettings": {
        "rate": 16000,
        "recipe": "slaney",
        "n_fft": 1024,
        "window": 1024,
        "hop": 160,
        "mels": 64,
        "fmin": 50.0,
        "fmax": 8000.0,
        "mean": -40.0,
        "std": 25.0,
    },
    "pretrain.training.config.TrainConfig": {"steps": 1},
    "pretrain.embedding.options.Options": {"data": [], "out": ""},
    "pretrain.data.filter.options.FilterOptions": {"duplicates": 0.95, "clusters": 2, "per_cluster": 2},
    "finetune.adapt.freeze.AdaptConfig": {"trainable_blocks": {"image": 1}},
    "finetune.tasks.classification.Config": {"class_weights": {"a": 1.0}},
    "finetune.tasks.retrieval.Config": {"pool": 2},
    "pretrain.optim.OptimConfig": {"lr_scale": {"image": 1.0}, "weight_decay_of": {"image": 1.0}},
    "pretrain.towers.timm.Config": {"mean": [0.5] * 3, "std": [0.5] * 3, "stem": [8, 8]},
    "pretrain.model.ModelConfig": {"logit_scale": 1.0, "logit_bias": 0.0},
    "finetune.config.FinetuneConfig": {},
    "pretrain.train.PretrainConfig": {},
}
"""Class -> settings without which it is invalid, or whose items have no numbers."""

SIGNED = {
    "trainable_blocks": -2,
    "layer": None,
    "logit_bias": None,
    "similarity": -2,
    "duplicates": -2,
    "pretrain.towers.audio.Config.mean": None,
    "pretrain.towers.mel.MelSettings.mean": None,
}
"""Fields with a meaning for -1 -> a number that has none; None = any sign is valid."""


def configs() -> Iterator[type]:
    """Every dataclass with a check() in the modules of both packages."""
    classes = set()
    for package in (pretrain, finetune):
        for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if not info.name.endswith("__main__"):
                for value in vars(importlib.import_module(info.name)).values():
                    if isinstance(value, type) and dataclasses.is_dataclass(value) and hasattr(value, "check"):
                        classes.add(value)
    yield from sorted(classes, key=name_of)


def name_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__name__}"


def valid(cls: type) -> Any:
    """A Config that passes its check()."""
    config = cls(**copy.deepcopy(NEEDED.get(name_of(cls), {})))
    if cls in (PretrainConfig, FinetuneConfig):
        config.data, config.train.steps = dataclasses.replace(config.data, train="shards.tar"), 1
    config.check()
    return config


def scalars(hint: Any) -> set[type]:
    """The types of numbers in an annotation: {float} for dict[str, float]."""
    return {hint} & {int, float} | {kind for argument in typing.get_args(hint) for kind in scalars(argument)}


def find_signed(cls: type, field: str) -> int | None:
    """The number below 0 that a field refuses."""
    return SIGNED.get(f"{name_of(cls)}.{field}", SIGNED.get(field, -1))


def with_number(value: Any, number: Any) -> Any:
    """The value with this number in place of its own, or of its last one."""
    if isinstance(value, list):
        return [*value[:-1], number]
    return {**value, next(iter(value)): number} if isinstance(value, dict) else number


CASES = [
    pytest.param(cls, spec.name, number, id=f"{name_of(cls)}.{spec.name}={number}")
    for cls in configs()
    for spec in dataclasses.fields(cls)
    for kind in scalars(typing.get_type_hints(cls)[spec.name])
    for number in (
        *((math.nan, math.inf, -math.inf, 1e39) if kind is float else (2**70,)),
        *(number for number in [find_signed(cls, spec.name)] if number is not None),
    )
    if typing.get_origin(typing.get_type_hints(cls)[spec.name]) is not typing.Literal
]


def test_every_config_is_tried() -> None:
    tried = {case.values[0] for case in CASES}
    assert len(tried) > 20
    assert {f"{name_of(cls)}.{field}" for cls, field, _ in (case.values for case in CASES)} > {
        "pretrain.optim.OptimConfig.lr",
        "pretrain.training.config.TrainConfig.timeout",
        "pretrain.towers.timm.Config.mean",
        "pretrain.data.images.AugmentConfig.ratio",
        "pretrain.train.PretrainConfig.seed",
        "finetune.config.FinetuneConfig.seed",
    }


@pytest.mark.parametrize(("cls", "field", "number"), CASES)
def test_a_number_out_of_range_is_refused(cls: type, field: str, number: float) -> None:
    config = dataclasses.replace(valid(cls), **{field: with_number(getattr(valid(cls), field), number)})
    with pytest.raises(ConfigError) as raised:
        config.check()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("setting", ["optim.lr=.nan", "optim.lr=nan", "optim.clip_norm=.inf", "train.timeout=inf", "seed=-1"])
def test_the_command_line_names_the_key(tmp_path: Path, setting: str) -> None:
    (tmp_path / "a.yaml").write_text("text: {args: {model_type: clip_text_model}}\ntrain: {steps: 1}\n")
    with pytest.raises(ConfigError, match=rf"^{setting.split('=')[0]}=.* must be"):
        load_config(tmp_path / "a.yaml", [setting])


def test_seeds_have_64_bits(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("text: {args: {model_type: clip_text_model}}\ntrain: {steps: 1}\n")
    assert load_config(tmp_path / "a.yaml", [f"seed={2**64 - 1}"]).seed == 2**64 - 1
    with pytest.raises(ConfigError, match=r"^seed=18446744073709551616 must be a number from 0 to 18446744073709551615"):
        load_config(tmp_path / "a.yaml", [f"seed={2**64}"])


def test_numbers_of_args_and_of_components_outside_the_project_are_checked(tmp_path: Path) -> None:
    """Their Config has no check()."""

    @dataclasses.dataclass
    class Inner:
        width: float = 1.0
        args: dict[str, Any] = dataclasses.field(default_factory=dict)

    @dataclasses.dataclass
    class Outer:
        inner: Inner = dataclasses.field(default_factory=Inner)

    Outer.__annotations__["inner"] = Inner
    for setting in ("inner.width=.nan", "inner.args={a: [{b: .inf}]}", f"inner.args.a={2**80}"):
        with pytest.raises(ConfigError, match=rf"^{setting.split('=')[0].removesuffix('.a')}="):
            load(Outer, None, [setting])
