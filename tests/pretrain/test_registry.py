"""Components by dotted path: only modules that the user has named are imported."""

import sys
from pathlib import Path

import pytest

from launch import cli
from pretrain import registry
from pretrain.checkpoints import writing
from pretrain.checkpoints.loading import load_model
from pretrain.config import load
from pretrain.errors import ConfigError
from pretrain.model import ModelSchema
from pretrain.train import load_config
from tests.support import ROOT

TOWER = (ROOT / "tests/support/audio_tower.py").read_text()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The dotted path of a tower that can be imported, and leaves the file `imported` when it is."""
    name = f"theirs_{tmp_path.name}".replace("-", "_")
    package = tmp_path / "path" / name
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "tower.py").write_text(f"{TOWER}\nopen({str(tmp_path / 'imported')!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path / "path")
    return f"{name}.tower"


def write_run(folder: Path, config: str) -> Path:
    """Write a run folder as somebody else could hand it over: one checkpoint with this configuration."""
    content = {"model.safetensors": writing.weights_file({}), "config.yaml": lambda path: path.write_text(config)}
    writing.save(folder / "checkpoints", 1, content, keep=0)
    return folder


CONFIGS = {
    "a tower": "image: {tower: MODULE}\ntext: {args: {model_type: clip_text_model}}\n",
    "a further tower": "audio: {tower: MODULE}\ntext: {args: {model_type: clip_text_model}}\n",
    "a task": "image: {size: 32}\ntext: {args: {model_type: clip_text_model}}\ntask: {name: MODULE}\n",
    "a fusion": "image: {size: 32}\ntext: {args: {model_type: clip_text_model}}\ntask: {name: vqa}\nfusion: {name: MODULE}\n",
}


READERS = [(command, "a tower") for command in ("evaluate", "embed", "export", "finetune")] + [
    ("embed", "a further tower"),
    *((command, part) for part in ("a task", "a fusion") for command in ("evaluate", "export")),
]


@pytest.mark.parametrize(("command", "part"), READERS)
def test_a_run_folder_that_names_a_module_does_not_import_it(
    tmp_path: Path, module: str, capsys: pytest.CaptureFixture[str], command: str, part: str
) -> None:
    run = write_run(tmp_path / "run", CONFIGS[part].replace("MODULE", module))
    shards = tmp_path / "a.tar"
    shards.touch()
    arguments = {
        "evaluate": ["evaluate", str(run), "--data", str(shards)],
        "embed": ["embed", str(run), "--data", str(shards), "--out", str(tmp_path / "out")],
        "export": ["export", str(run), str(tmp_path / "out"), "--format", "onnx"],
        "finetune": ["finetune", "vqa", f"init={run}", f"data.train={shards}"],
    }[command]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert f"a run folder names the module '{module}'" in error
    assert f"--allow-module {module}" in error
    assert not (tmp_path / "imported").exists()
    assert module not in sys.modules


def test_a_module_is_imported_where_the_user_allows_it(
    tmp_path: Path, module: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", CONFIGS["a further tower"].replace("MODULE", module))
    with pytest.raises(ConfigError, match="a run folder names the module"):
        load_model(run)
    monkeypatch.setenv(registry.MODULES_VARIABLE, "")
    (tmp_path / "a.tar").touch()
    cli.main(["evaluate", str(run), "--data", str(tmp_path / "a.tar"), "--allow-module", module])
    assert "a run folder names" not in capsys.readouterr().err  # it fails later: the folder has no tokenizer
    assert (tmp_path / "imported").exists()


@pytest.mark.parametrize("place", ["the user's file", "the command line"])
def test_a_module_is_imported_where_the_user_names_it(tmp_path: Path, module: str, place: str) -> None:
    file, settings = tmp_path / "mine.yaml", [f"audio.tower={module}"]
    file.write_text("base: base.yaml\n" if place == "the user's file" else "data: {train: synthetic}\n")
    (tmp_path / "base.yaml").write_text(f"audio: {{tower: {module}}}\n")
    more = ["text.args.model_type=clip_text_model", "train.steps=1"]
    config = load_config(file, more + (settings if place == "the command line" else []))
    assert config.others["audio"].tower == module
    assert (tmp_path / "imported").exists()


@pytest.mark.parametrize("name", ["..os", ".os", "os.", "a b.c", "os.system;x"])
def test_a_dotted_name_that_is_no_module_is_one_line(name: str) -> None:
    with pytest.raises(ConfigError, match="neither the name of a component nor the dotted path"):
        load(ModelSchema, None, [f"image.tower={name}"])
