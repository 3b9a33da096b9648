"""Published folders never run code of their own, and nobody is asked whether they may."""

import json
from pathlib import Path

import pytest

from pretrain import registry
from pretrain.checkpoints.loading import load_model
from pretrain.errors import UserError
from pretrain.towers import hf_models

CODE = 'from pathlib import Path\nPath(__file__).with_name("ran").touch()\nConfig = Model = Tokenizer = object\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose configuration names classes in a file beside it; whoever asks whether to run it is answered yes."""
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "own.py").write_text(CODE)
    classes = {"AutoConfig": "own.Config", "AutoModel": "own.Model", "AutoTokenizer": ["own.Tokenizer", None]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": classes}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Tokenizer", "auto_map": classes}))
    return tmp_path


def test_code_in_a_published_folder_is_not_run(folder: Path) -> None:
    with pytest.raises(UserError, match="transformers cannot read its configuration: The repository"):
        load_model(folder)
    text = registry.get_component("towers", "transformers").Config(name=str(folder), pretrained=True)
    with pytest.raises(UserError, match=r"The repository|custom code"):
        hf_models.load_text_model(text, None)
    assert not list(folder.rglob("ran"))
