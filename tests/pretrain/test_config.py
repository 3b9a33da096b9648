"""Reading configurations, and one clear error line for everything that can be wrong with one."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from pretrain import config
from pretrain.config import (
    build,
    component_field,
    extra_components,
    find_config,
    load,
    load_values,
    notes,
    save,
    text_field,
    to_dict,
)
from pretrain.errors import ConfigError, closest
from pretrain.registry import get_component
from pretrain.train import load_config
from pretrain.training.config import TrainConfig


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
        ("inner.l=3", ["inner.l", "'inner.lr'", "valid: lr, betas"]),
        ("counts=3", ["counts", "'count'"]),
        ("inner.lr=abc", ["inner.lr='abc'", "a number", "0.001"]),
        ("count=3.5", ["count=3.5", "a whole number"]),
        ("count=null", ["count", "a whole number"]),
        ("on=perhaps", ["perhaps", "true or false"]),
        ("inner.word=three", ["inner.word='three'", "one of one, two"]),
        ("inner.betas=3", ["inner.betas=3", "a list"]),
        ("inner.betas=[0.9,{a: 1}]", ["inner.betas=[0.9, {'a': 1}]", "a list", "each item a number"]),
        ("inner.betas=[[0.9],0.98]", ["inner.betas=[[0.9], 0.98]", "a list", "each item a number"]),
        ("inner.more=3", ["inner.more=3", "settings"]),
        ("inner=3", ["inner", "settings", "3"]),
        ("--count=3", ["no dashes", "count=3"]),
        ("count", ["'count' is not a setting", "key=value"]),
        ("count={", ["'count={'", "cannot be read"]),
        ("name=${oc.env:CLIPFUSE_NOT_SET}", ["name", "CLIPFUSE_NOT_SET"]),
        ("inner.lr=-1", ["inner.lr=-1", "at least 0"]),
        ("inner..lr=1", ["'inner..lr=1' is not a setting", "a part of its key is empty"]),
        (".count=1", ["'.count=1' is not a setting", "a part of its key is empty"]),
        ("inner.=1", ["'inner.=1' is not a setting", "a part of its key is empty"]),
        ("\u2014count=1", ["begins with a long dash"]),
        ("INNER.LR=1", ["unknown key INNER", "did you mean 'inner'?"]),
        ("lr=1", ["unknown key lr on the command line; did you mean inner.lr?"]),
        ("inner=[]", ["inner on the command line must hold settings, not []"]),
        ("inner=0", ["inner on the command line must hold settings, not 0"]),
        ("inner=false", ["inner on the command line must hold settings, not False"]),
        ("inner={lr: 1, lr: 2}", ["'inner={lr: 1, lr: 2}' cannot be read", "found duplicate key lr"]),
        ("count=1e3", ["count=1000.0", "a whole number (default 3); write 1000"]),
        ("inner.betas=0.9,0.98", ["inner.betas='0.9,0.98'", "a list [A, B, ...], each item a number"]),
        ("name=${x", ["name='${x' on the command line cannot be resolved"]),
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
    with pytest.raises(ConfigError, match=r"no 'clap' in losses; did you mean 'clip'\?; the choices are clip, distill, siglip"):
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


@dataclass
class Typed:
    run: str = "a"
    name: str | None = None
    shards: Any = text_field(None, numbers=("weight",))
    seed: int = 0
    rate: float = 1.0
    word: Literal["on", "off"] = "on"
    widths: list[int] = field(default_factory=lambda: [1])
    classes: list[str] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)


LITERAL = [
    "001", "10:30", "2026_10_05", "2026-10-05", "1.10", "1.1", "1e3", "on", "no", "0x10", ".inf", "*.tar", "{0000..0001}.tar",
    "{0000..0001}", "{a,b}", "{a,b}/{c,d}", "[ab]*.tar", "a #b.tar", "#b", "&a", "!a", "@a", "%a", "it's", "a: b", "- a", "a,b",
    "s3://bucket/{0..3}.tar?x=1", "pipe:cat {0..3}.tar", " a ",
]  # fmt: skip
"""Texts of which YAML would read another value, or none."""


@pytest.mark.parametrize("text", LITERAL)
@pytest.mark.parametrize("key", ["run", "name", "shards"])
def test_a_text_field_takes_the_text_as_typed(key: str, text: str) -> None:
    assert getattr(load(Typed, None, [f"{key}={text}"]), key) == text


@pytest.mark.parametrize("text", ["001", "10:30", "2026_10_05", "1.10", "1e3", "on", "no", "0x10", "2026-10-05"])
def test_a_text_field_takes_the_text_of_a_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "base.yaml").write_text(
        f"run: {text}  # a comment\nname: &anchor {text}\nshards: [*anchor, {{shards: {text}, weight: 010}}]\n"
        f"classes: [{text}]\nweights: {{{text}: 2}}\n"
    )
    (tmp_path / "a.yaml").write_text("base: base.yaml\nseed: 1\n")
    config = load(Typed, tmp_path / "a.yaml")
    shards = [text, {"shards": text, "weight": 10}]
    assert config == Typed(text, text, shards, 1, classes=[text], weights={text: 2.0})
    save(config, tmp_path / "saved.yaml")
    assert load(Typed, tmp_path / "saved.yaml") == config


def test_lists_mappings_null_and_quotes_on_the_command_line() -> None:
    settings = ["classes=[001, on, 'x: y']", "weights={001: 3}", "shards=[{shards: 0010, weight: 3}]", "run='001'", "name=null"]
    config = load(Typed, None, settings)
    assert config == Typed(
        "001", None, [{"shards": "0010", "weight": 3}], 0, 1.0, "on", [1], ["001", "on", "x: y"], {"001": 3.0}
    )
    assert load(Typed, None, ["shards={image: 001, text: 1e3}"]).shards == {"image": "001", "text": "1e3"}
    with pytest.raises(ConfigError, match=r"put patterns in quotes"):
        load(Typed, None, ["shards=[{0..3}.tar, *.tar]"])
    assert load(Typed, None, ["shards=['{0..3}.tar', '*.tar']"]).shards == ["{0..3}.tar", "*.tar"]


def test_numbers_are_decimal(tmp_path: Path) -> None:
    assert load(Typed, None, ["seed=010", "rate=010"]) == Typed(seed=10, rate=10.0)
    assert load(Typed, None, ["seed='08'", "rate=1e-3"]) == Typed(seed=8, rate=0.001)
    assert load(Typed, None, ["seed=0x10", "rate=-.5e3"]) == Typed(seed=16, rate=-500.0)
    for text in ("1_000", "10:30", "1,000", "1 000", "'1_000'", "\u0661\u0662", "\uff11", "1'000", "12_", "190:20:30.15"):
        for key in ("seed", "rate", "widths", "weights"):
            value = {"widths": f"[1, {text}]", "weights": f"{{a: {text}}}"}.get(key, text)
            if text == "1,000" and key in ("widths", "weights"):  # these are two items
                continue
            with pytest.raises(
                ConfigError, match=rf"^{key}=.* on the command line must be .*number.*; write numbers in digits 0-9"
            ) as raised:
                load(Typed, None, [f"{key}={value}"])
            assert text.strip("'") in str(raised.value)
            (tmp_path / "a.yaml").write_text(f"{key}: {value}\n", encoding="utf-8")
            with pytest.raises(ConfigError, match=rf"^{key}=.* in .*a.yaml must be .*number.*; write numbers in digits 0-9"):
                load(Typed, tmp_path / "a.yaml")
    for setting in ("seed=on", "rate=yes", "seed=0b11", "seed=0o17", "seed=1.0", "rate=1e", "seed=", "rate=null", "rate=inf"):
        with pytest.raises(ConfigError, match=rf"^{setting.split('=')[0]}.* must be a"):
            load(Typed, None, [setting])


def test_words_of_a_choice_may_be_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("inner: {word: Two}\n")
    assert load(Outer, tmp_path / "a.yaml").inner.word == "two"
    assert load(Outer, tmp_path / "a.yaml", ["inner.word=ONE"]).inner.word == "one"
    assert load(Outer, tmp_path / "a.yaml", ["inner="]).inner.word == "one"


def test_a_number_of_thousands_of_digits_is_one_short_line(tmp_path: Path) -> None:
    for value in ("1" * 5000, f"'{'1' * 5000}'", "0x" + "f" * 5000):
        (tmp_path / "a.yaml").write_text(f"seed: {value}\n")
        for arguments in ((None, [f"seed={value}"]), (tmp_path / "a.yaml", [])):
            with pytest.raises(ConfigError, match="digits") as raised:
                load(Typed, *arguments)
            assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("value", ["2", "-1", "10:30", "0x1", "1_0", "1.0", "o", "truee", "\u0661", "[true]"])
def test_true_and_false_are_words_or_0_and_1(value: str) -> None:
    for word, expected in {"true": True, "True": True, "on": True, "1": True, "no": False, "'off'": False, "0": False}.items():
        assert load(Outer, None, [f"on={word}"]).on is expected
    with pytest.raises(ConfigError, match=r"^on=.* on the command line must be true or false"):
        load(Outer, None, [f"on={value}"])


SCALARS: dict[str, Any] = {
    "3": 3, "-3": -3, "+3": 3, "010": 10, "08": 8, "0x1F": 31, "1.5": 1.5, ".5": 0.5, "-.5": -0.5, "1.": 1.0, "1e3": 1000.0,
    "1E-3": 0.001, "1.5e+3": 1500.0, ".5e3": 500.0, "true": True, "False": False, "TRUE": True,
    "null": None, "~": None,
    "1_000": "1_000", "1_000.5": "1_000.5", "10:30": "10:30", "1:30.5": "1:30.5", "on": "on", "off": "off", "yes": "yes",
    "No": "No", "y": "y", "0b11": "0b11", "0o17": "0o17", "2026-10-05": "2026-10-05", "2026_10_05": "2026_10_05",
    "1.1.0": "1.1.0",
    "inf": "inf", "nan": "nan", "\u0661": "\u0661", "1e": "1e", "--3": "--3", "a b": "a b", "it's": "it's",
    "'3'": "3", '"010"': "010", "'true'": "true", "'null'": "null", "''": "",
}  # fmt: skip
"""What is written -> the value of a field of any type: YAML 1.2's core schema, https://yaml.org/spec/1.2.2/#103-core-schema."""


@pytest.mark.parametrize("text", SCALARS)
def test_a_field_of_any_type_takes_numbers_as_yaml_1_2_writes_them(tmp_path: Path, text: str) -> None:
    value = SCALARS[text]
    (tmp_path / "a.yaml").write_text(
        f"anything: &a {text}\nmore: {{one: {text}, list: [{text}], inner: {{two: [{{three: {text}}}]}}, alias: *a}}\n", "utf-8"
    )
    more = {"one": value, "list": [value], "inner": {"two": [{"three": value}]}, "alias": value}
    settings = [f"anything={text}", f"more.one={text}", f"more.list=[{text}]", f"more.inner={{two: [{{three: {text}}}]}}"]
    expected = repr(Inner(anything=value, more=more))  # 1 == 1.0 == True
    loaded = load(Inner, tmp_path / "a.yaml")
    assert repr(loaded) == repr(load(Inner, None, [*settings, f"more.alias={text}"])) == expected
    save(loaded, tmp_path / "saved.yaml")
    assert repr(load(Inner, tmp_path / "saved.yaml")) == expected


def test_keys_of_a_field_of_any_type() -> None:
    """YAML 1.1 reads on, 010, 10:30 and 1_0 as true, 8, 630 and 10."""
    keys = {"on": 1, "010": 2, "10:30": 3, "1_0": 4}
    text = "{on: 1, 010: 2, '10:30': 3, 1_0: 4}"
    assert load(Inner, None, [f"more={text}"]).more == keys
    assert load(Inner, None, [f"more.inner={text}"]).more == {"inner": {"on": 1, 10: 2, "10:30": 3, "1_0": 4}}
    assert load(Inner, None, [f"more.{key}={value}" for key, value in keys.items()]).more == keys


@pytest.mark.parametrize("text", ["*.tar", "a #b", "#b", "@a", "%a", "a: b", "- a", "&a", "!a", "{0..3}.tar", "[ab]*.tar"])
def test_a_field_of_any_type_takes_text_that_yaml_cannot_read(text: str) -> None:
    if text[0] in "{[":  # a mapping or a list with a mistake
        with pytest.raises(ConfigError, match="cannot be read"):
            load(Inner, None, [f"more.x={text}"])
    else:
        assert load(Inner, None, [f"more.x={text}"]).more == {"x": text}


def test_an_unquoted_pattern_in_a_file_is_refused_with_the_way_to_write_it(tmp_path: Path) -> None:
    for text in ("{0000..0001}.tar", "*.tar", "*/a.tar"):
        (tmp_path / "a.yaml").write_text(f"shards: {text}\n")
        with pytest.raises(ConfigError, match="in quotes"):
            load(Typed, tmp_path / "a.yaml")


def test_mappings_and_lists_can_be_emptied(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("inner: {lr: 0.5, more: {x: 1, y: 2}, betas: [0.5]}\n")

    def inner(*settings: str) -> Inner:
        return load(Outer, tmp_path / "a.yaml", list(settings)).inner

    assert inner().more == {"x": 1, "y": 2}
    assert inner("inner.more={z: 3}").more == {"x": 1, "y": 2, "z": 3}
    for empty in ("inner.more={}", "inner.more=null", "inner.more="):
        assert inner(empty).more == {}
        assert inner(empty, "inner.more.z=3").more == {"z": 3}
        assert inner("inner.more.z=3", empty).more == {}
    assert inner("inner.betas=null").betas == []
    assert inner("inner={}", "inner.lr=2") == Inner(lr=2)
    (tmp_path / "b.yaml").write_text("base: a.yaml\ninner: {more: {}}\n")
    assert load(Outer, tmp_path / "b.yaml").inner == Inner(lr=0.5, betas=[0.5])


def test_another_architecture_comes_without_the_args_of_the_first(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("image: {name: vit_base_patch16_224, size: 64, args: {patch_size: 12, depth: 4}}\n")

    def image(*settings: str) -> dict[str, Any]:
        return dict(load_values(tmp_path / "a.yaml", list(settings))["image"])

    assert image("image.name=resnet18") == {"name": "resnet18", "size": 64}
    assert image("image.args.in_chans=3", "image.name=resnet18") == {"name": "resnet18", "size": 64, "args": {"in_chans": 3}}
    assert image("image.name=vit_tiny_patch16_224")["args"] == {"patch_size": 12, "depth": 4}
    assert image("image.name=vit_tiny_patch16_224", "image.args={}")["args"] == {}
    said = list(notes(load_values(tmp_path / "a.yaml", ["image.name=resnet18"])))
    assert said == ["image.name=resnet18: without image.args of vit_base_patch16_224 (patch_size, depth)"]
    assert not list(notes(load_values(tmp_path / "a.yaml", ["image.size=32"])))


def test_a_key_given_twice_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("count: 2\n")

    def say(*settings: str) -> list[str]:
        return list(notes(load_values(tmp_path / "a.yaml", list(settings))))

    twice = ["count=3", "inner.lr=1", "count=4", "inner.lr=2", "count=5"]
    assert say(*twice) == ["given more than once, the last counts: count=5, not 4; inner.lr=2, not 1"]
    assert load_values(tmp_path / "a.yaml", twice) == {"count": 5, "inner": {"lr": 2}}
    assert say("count=3", "count=3", "inner={}", "inner.lr=2") == []


def test_errors_name_the_place_of_the_value_and_the_first_mistake(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("count: 2\n")
    for settings, expected in [
        (["inner.l=3"], "unknown key inner.l on the command line; did you mean 'inner.lr'"),
        (["on=perhaps"], "on='perhaps' on the command line must be true or false"),
        (["inner.lrr=1", "count=x"], "unknown key inner.lrr on the command line"),
        (["count=x", "inner.lrr=1"], "count='x' on the command line"),
        (["inner=3", "coun=1"], "inner on the command line must hold settings"),
        (["inner.lr=1", "inner.word=three", "nme=x"], "inner.word='three' on the command line"),
    ]:
        with pytest.raises(ConfigError) as raised:
            load(Outer, tmp_path / "a.yaml", settings)
        assert str(raised.value).startswith(expected)
    (tmp_path / "b.yaml").write_text("base: c.yaml\ncount: 1\n")
    (tmp_path / "c.yaml").write_text("inner: {l: 2}\n")
    with pytest.raises(ConfigError, match=rf"unknown key inner\.l in {tmp_path / 'c.yaml'}"):
        load(Outer, tmp_path / "b.yaml", ["inner.lr=1"])


def test_the_component_of_the_command_line_is_named_there() -> None:
    with pytest.raises(ConfigError, match=r"loss\.name=clap on the command line: no 'clap' in losses"):
        load(WithComponents, None, ["loss.name=clap"])
    with pytest.raises(ConfigError, match=r"unknown key loss\.nothing on the command line"):
        load(WithComponents, None, ["loss.nothing=1"])


@pytest.mark.parametrize("settings", [["image.name=resnet10t"], ["image.name=resnet10t", "image.args=null"]])
def test_a_shipped_configuration_trains_another_architecture(settings: list[str]) -> None:
    config = load_config(find_config("scenes", "pretrain"), settings)
    assert config.image.args == {}
    assert get_component("towers", "timm").build(config.image).pooled_width == 512


def test_what_yaml_cannot_read_is_text_or_one_line() -> None:
    """A byte that is not UTF-8 arrives as a lone surrogate. A mapping that YAML cannot read is no name."""
    assert config.parse_dotlist(["run=caf\udce9"])["run"] == "caf\udce9"
    values = config.load_values(None, ["init={image: ${oc.env:X}, text: b}"])
    with pytest.raises(ConfigError, match="in a mapping, put values with braces in quotes"):
        config.written_text(values, "init")


# ---------------------------------------------------------------------------------------------------------------------
# Files of somebody else

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LAUGHS, "its aliases stand for more than 65,536 values"),
        ("a: &a {a: *a}\n", "its aliases stand for more than 65,536 values"),
        ("".join(f"k{i}: 1\n" for i in range(70_000)), "it holds more than 65,536 values"),
        ("a: " + "[" * 100_000, "its values are nested deeper than 64 levels"),
        ("a: " + "{a: " * 100 + "1" + "}" * 100, "its values are nested deeper than 64 levels"),
        ("a: " + "x" * (5 << 20), "bytes, more than 4,194,304"),
        ("a: 1\na: 2\n", "found duplicate key a"),
        ("a: !!python/object/apply:os.system [exit]\n", "could not determine a constructor for the tag"),
        ("a: ${" + "${" * 5000, "is not readable YAML"),
    ],
)
def test_a_hostile_file_is_one_short_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_values(tmp_path / "c.yaml", [])
    message = str(raised.value)
    assert words in message
    assert "\n" not in message
    assert len(message) < 1000


@pytest.mark.parametrize(
    "value", ["${oc.env:SECRET}", "a${oc.env:SECRET,b}", "${oc.decode:'1'}", "${oc.create:{a: 1}}", "${name}"]
)
@pytest.mark.parametrize("key", ["name", "inner.anything", "inner.more.x", "inner.lr"])
def test_the_configuration_of_a_run_folder_reads_no_variable(monkeypatch: pytest.MonkeyPatch, key: str, value: str) -> None:
    """It may be somebody else's: what the variable holds would be shown, or sent to a hub as the name of a model."""
    monkeypatch.setenv("SECRET", "s3cr3t")
    values: Any = value
    for name in reversed(key.split(".")):
        values = {name: values}
    with pytest.raises(ConfigError, match="a saved configuration holds values, not variables") as raised:
        build(Outer, values, "theirs", partial=True)
    assert "s3cr3t" not in str(raised.value)
    # -- sections that are not built are not looked at: a pattern of shards may have such text
    assert build(Outer, {"other": value}, "theirs", partial=True) == Outer()
