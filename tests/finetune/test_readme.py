"""The guide of finetune/README.md, word by word: its line of JSON, its commands, its Python, on pictures made here."""

import contextlib
import io
import json
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from launch import cli
from pretrain.data.text import load_tokenizer
from tests.support import ROOT, Small

GUIDE = (ROOT / "finetune/README.md").read_text().split("## My own data in five minutes")[1].split("\n## ")[0]
CODE = [line.strip() for line in GUIDE.splitlines() if line.startswith("    ")]
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 220), "white": (240, 240, 240)}


def tiny_clip(folder: Path, tokenizer: Path) -> None:
    """A CLIP as transformers publishes it, of random weights, where the guide's name leads without a network."""
    words = load_tokenizer(tokenizer)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    config = CLIPConfig(
        text_config={**sizes, **special, "vocab_size": len(words), "max_position_embeddings": 24},
        vision_config={**sizes, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    words.save_pretrained(folder)


def write(rows: range, name: str, example: dict[str, object]) -> None:
    """Lines with the fields of the guide's own."""
    lines = []
    for i in rows:
        colour = "red" if i == 17 else list(COLOURS)[i % 4]
        path = Path(f"pictures/{i}.jpg")
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (48, 40), COLOURS[colour]).save(path)
        asked = [{"question": "what colour is the car?", "answers": [colour], "type": "colour"}]
        line = {"image": str(path), "caption": f"a {colour} car on a bridge", "label": i % 4, "questions": asked}
        assert line.keys() == example.keys()
        lines.append(json.dumps(line))
    Path(name).write_text("\n".join(lines))


def test_the_guide_word_by_word(small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = json.loads(next(line for line in CODE if line.startswith("{")))
    write(range(32), "train.jsonl", example)
    write(range(32, 40), "val.jsonl", example)
    tiny_clip(in_tmp / "openai/clip-vit-base-patch32", small.tokenizer)
    shown = {}
    for line in CODE:
        if line.startswith("clipfuse "):
            # Not the guide's business: no tracker, no child processes of a test.
            quiet = ["train.trackers=[]", "data.workers=0", "eval.workers=0", "train.threads=1"] if " finetune " in line else []
            assert cli.main([*shlex.split(line)[1:], *quiet]) == 0, line
            shown[line] = capsys.readouterr().out
    assert "32 samples" in shown["clipfuse data check train"]
    assert "without image" in shown["clipfuse evaluate runs/mine --data val"]

    said = io.StringIO()
    python = "\n".join(line for line in CODE if not line.startswith(("clipfuse ", "{")))
    with contextlib.redirect_stdout(said):
        exec(python, {})  # what a person would type
    assert "'red'" in said.getvalue().split(",")[0]
    last = json.loads(Path("runs/mine/metrics.jsonl").read_text().splitlines()[-1])
    assert last["val/accuracy_colour"] >= 0.75  # of eight pictures never seen
    assert last["val/blind_accuracy_colour"] <= 0.5
