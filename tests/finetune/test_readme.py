"""Runs the guide in finetune/README.md, its JSON, commands and Python, on generated images."""

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
COLORS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 220), "white": (240, 240, 240)}


def save_tiny_clip(folder: Path, tokenizer: Path) -> None:
    """Save a CLIP with random weights in a folder with the guide's hub name, so that no network is used."""
    tokens = load_tokenizer(tokenizer)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id, "pad_token_id": tokens.pad_token_id}
    config = CLIPConfig(
        text_config={**sizes, **special, "vocab_size": len(tokens), "max_position_embeddings": 24},
        vision_config={**sizes, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    tokens.save_pretrained(folder)


def write_lines(rows: range, name: str, example: dict[str, object]) -> None:
    """Write lines with the fields of the guide's example, and their images."""
    lines = []
    for i in rows:
        color = "red" if i == 17 else list(COLORS)[i % 4]
        path = Path(f"images/{i}.jpg")
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (48, 40), COLORS[color]).save(path)
        questions = [{"question": "what color is the car?", "answers": [color], "type": "color"}]
        line = {"image": str(path), "caption": f"a {color} car on a bridge", "label": i % 4, "questions": questions}
        assert line.keys() == example.keys()
        lines.append(json.dumps(line))
    Path(name).write_text("\n".join(lines))


def test_every_line_of_the_guide_runs(small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = json.loads(next(line for line in CODE if line.startswith("{")))
    write_lines(range(32), "train.jsonl", example)
    write_lines(range(32, 40), "val.jsonl", example)
    save_tiny_clip(in_tmp / "openai/clip-vit-base-patch32", small.tokenizer)
    outputs = {}
    for line in CODE:
        if line.startswith("clipfuse "):
            # Settings for tests that the guide does not need: no trackers, no child processes.
            quiet = ["train.trackers=[]", "data.workers=0", "eval.workers=0", "train.threads=1"] if " finetune " in line else []
            assert cli.main([*shlex.split(line)[1:], *quiet]) == 0, line
            outputs[line] = capsys.readouterr().out
    assert "32 samples" in outputs["clipfuse data check train"]
    assert "without image" in outputs["clipfuse evaluate runs/mine --data val"]

    printed = io.StringIO()
    python = "\n".join(line for line in CODE if not line.startswith(("clipfuse ", "{")))
    with contextlib.redirect_stdout(printed):
        exec(python, {})
    assert "'red'" in printed.getvalue().split(",")[0]
    last = json.loads(Path("runs/mine/metrics.jsonl").read_text().splitlines()[-1])
    assert last["val/accuracy_color"] >= 0.75  # on eight images that were not in training
    assert last["val/blind_accuracy_color"] <= 0.5
