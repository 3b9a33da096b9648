"""Runs the guide in finetune/README.md, its JSON, commands and Python, on generated images."""

import contextlib
import io
import json
import re
import shlex
import tarfile
from pathlib import Path
from typing import IO, cast

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from launch import cli
from pretrain.data.text import load_tokenizer
from tests.support import ROOT, TINY_TOWERS, Small

README = (ROOT / "finetune/README.md").read_text()


def read_code(section: str) -> list[str]:
    """Return the lines of code of a section."""
    text = README.split(f"## {section}")[1].split("\n## ")[0]
    return [line.strip() for line in text.splitlines() if line.startswith("    ")]


CODE = read_code("My own data in five minutes")
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


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_line_about_sounds_runs(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smaller = {
        "data": ["--num", "40", "--size", "64", "--workers", "1"],
        "tokenizer": [],
        "pretrain": [*TINY_TOWERS, "audio.widths=[8,16]", "data.batch_size=16", "train.steps=2", "eval.max_samples=20"],
        "finetune": ["fusion.heads=4", "data.batch_size=16", "train.steps=2", "eval.max_samples=20"],
        "evaluate": [],
        "index": [],
        "search": [],
    }
    quiet = ["train.trackers=[]", "data.workers=0", "eval.workers=0", "train.threads=1", "train.eval_every=0"]
    for line in read_code("Questions about sounds"):
        words = shlex.split(line)[1:]
        more = smaller[words[0]] + (quiet if words[0] in ("pretrain", "finetune") else [])
        assert cli.main([*words, *more]) == 0, line
    printed = capsys.readouterr().out
    assert "accuracy order" in printed
    assert len(re.findall(r"scenes/val-0000\.tar:\d+$", printed, re.M)) == 10  # where the sounds that were found lie
    with tarfile.open("scenes/val-0000.tar") as tar:
        member = next(info for info in tar if info.name.endswith(".flac"))
        Path("sound.flac").write_bytes(cast(IO[bytes], tar.extractfile(member)).read())
    attend = re.search(r"`clipfuse\s(attend\sruns/heard [^`]+)`", README)
    assert attend
    assert cli.main(shlex.split(attend[1].replace("\n", " "))) == 0
    assert Path("heard.png").stat().st_size > 5000
