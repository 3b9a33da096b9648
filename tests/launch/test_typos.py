"""Typos on the command line: one line that names the first of them, before torch is imported."""

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finetune.config import FinetuneConfig
from launch import cli
from pretrain import registry
from pretrain.config import static_schema
from pretrain.errors import ConfigError
from pretrain.printable import format_count
from pretrain.train import PretrainConfig
from tests.support import ROOT
from tests.support.launches import run_mistakes

TYPOS = {
    "pretrain scenes optim.l=3": "unknown key optim.l on the command line; did you mean 'optim.lr'?",
    "pretrain scenes optm.lr=3 loss.name=clap": "unknown key optm on the command line; did you mean 'optim'?",
    "pretrain scenes loss.name=clap optm.lr=3": "loss.name=clap on the command line: no 'clap' in losses",
    "pretrain scenes optim.lr=fast": "optim.lr='fast' on the command line must be a number",
    "pretrain scenes train.precision=int8": "one of fp32, bf16, fp16",
    "pretrain scenes data.keep=json.width>": "data.keep 'json.width>': column 12: a number",
    "pretrain scnes": "no configuration 'scnes'; did you mean 'scenes'?",
    "pretrain scenes --nproc 2 data.augment.scal=1": "unknown key data.augment.scal on the command line",
    "pretrain scenes --on slurm --nproc 2 image.sizes=1": "unknown key image.sizes on the command line",
    "finetune vqa loss.name=clip": "unknown key loss on the command line",
    "finetune vqa fusion.layer=2": "unknown key fusion.layer on the command line; did you mean 'fusion.layers'?",
    "plan scenes --gpus 2 optim.l=1": "unknown key optim.l on the command line",
    "evaluate nowhere --data gone": "no run or checkpoint at nowhere",
    "evaluate . --data . --task retrieval --pretrained nowhere": "no run or checkpoint at nowhere",
    "index nowhere --data gone --db out": "no run or checkpoint at nowhere",
    "search nowhere text --rerank gone": "no run or checkpoint at gone",
    "search nowhere text --run gone": "no run or checkpoint at gone",
    "serve nowhere --run gone": "no run or checkpoint at gone",
    "evaluate . --data gone --task retrival": "--task retrival: no such evaluation; did you mean 'retrieval'?",
    "embed nowhere --data gone --out out": "no run or checkpoint at nowhere",
    "export nowhere out --format hf": "no run or checkpoint at nowhere",
    "attend nowhere a.jpg text --out a.png": "no run or checkpoint at nowhere",
}


def test_typos_are_found_before_torch_is_imported(tmp_path: Path) -> None:
    results = run_mistakes(list(TYPOS), tmp_path)
    assert len(results) == len(TYPOS)
    for (command, expected), (code, error, heavy) in zip(TYPOS.items(), results, strict=True):
        assert code == 2, command  # a run or folder that is not there is wrong usage, in every command
        assert error.count("\n") == 1, error
        assert error.startswith("clipfuse: "), error
        assert expected in error, command
        assert not heavy, command


def describe(schema: type, find: Any) -> dict[str, Any]:
    """Field -> its type, or the fields of its section or components."""
    hints, described = typing.get_type_hints(schema), {}
    for spec in dataclasses.fields(schema):
        if "package" in spec.metadata:
            package = spec.metadata["package"]
            names = static_schema.component_names(package)
            described[spec.name] = {name: describe(find(package, name).Config, find) for name in names}
        else:
            hint = hints[spec.name]
            described[spec.name] = describe(hint, find) if dataclasses.is_dataclass(hint) else str(hint)
        described[f"{spec.name}: text"] = spec.metadata.get("text")
    return described


@pytest.mark.parametrize(("module", "schema"), [("pretrain", PretrainConfig), ("finetune", FinetuneConfig)])
def test_the_schema_read_from_the_source_is_that_of_the_run(module: str, schema: type) -> None:
    file, name = static_schema.SCHEMAS[module]
    read = static_schema._schema(ROOT / file, name)
    assert describe(read, static_schema._find) == describe(schema, registry.get_component)
    for package in ("losses", "towers", "tasks", "fusion", "context"):
        assert static_schema.component_names(package) == registry.component_names(package)


def test_shipped_configurations_pass() -> None:
    for path in sorted(ROOT.glob("configs/*/*.yaml")):
        static_schema.check_settings(path, ["run=1.10"], path.parent.name)


def test_a_component_outside_the_project_is_left_to_the_run() -> None:
    static_schema.check_settings(ROOT / "configs/pretrain/scenes.yaml", ["audio.tower=my.tower", "audio.x=1"], "pretrain")
    with pytest.raises(ConfigError, match="unknown key optim"):
        static_schema.check_settings(ROOT / "configs/pretrain/scenes.yaml", ["optim.l=1"], "pretrain")


def test_a_tower_that_init_names_may_have_fields_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("init: runs/custom\nimage: {sharpness: 2}\n")
    static_schema.check_settings(file, ["text.depth=3"], "pretrain")
    with pytest.raises(ConfigError, match=r"unknown key image\.sharpness"):
        static_schema.check_settings(file, ["image.name=resnet18"], "pretrain")


def test_version_and_settings_with_dashes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == "clipfuse 0.2.0\n"
    with pytest.raises(SystemExit) as done:
        cli.main(["pretrain", "scenes", "--optim.lr=3"])
    assert done.value.code == 2
    assert "settings have no dashes: optim.lr=3" in capsys.readouterr().err


def test_counts_have_the_number_of_their_noun() -> None:
    assert [format_count(n, "shard") for n in (0, 1, 1200)] == ["0 shards", "1 shard", "1,200 shards"]
    assert [format_count(n, "process") for n in (1, 2)] == ["1 process", "2 processes"]


def test_packing_one_image_speaks_of_one_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "images/a.jpg")
    (tmp_path / "images/a.txt").write_text("a black square")
    assert cli.main(["data", "pack", str(tmp_path / "images"), str(tmp_path / "shards"), "--workers", "1"]) == 0
    assert cli.main(["data", "check", str(tmp_path / "shards"), "--workers", "1"]) == 0
    output = capsys.readouterr().out
    assert "1 sample in 1 shard\n" in output
    assert "1 shard, 1 sample, 0 of them bad" in output
