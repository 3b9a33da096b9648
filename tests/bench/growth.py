"""Measures how the time of a step grows with batch, text length, resolution and processes, and start-up with shards.

    python -m tests.bench.growth [--only batch length size processes shards] [--quick]

Towers of configs/pretrain/clipart.yaml on synthetic data, float32, without grouping texts by length. Each line of JSON is one
curve: the sizes, the seconds at each, and the exponent e of seconds ~ size^e, the slope of the least-squares line through the
logarithms. Seconds of a step (batch, size, processes: the same global batch) are the median over steps 3 to 12. Those of
length are one forward and backward pass of the text tower; those of shards, from the command to the first logged step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pretrain import registry
from tests.support import read_jsonl, run_clipfuse

TEXT = {
    "model_type": "clip_text_model", "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4,
    "num_attention_heads": 3, "hidden_act": "gelu", "vocab_size": 4096, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def fit_exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Return the slope of the least-squares line through (log size, log seconds)."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def time_step(folder: Path, *settings: str, options: Sequence[str] = (), steps: int = 12) -> float:
    """Return the median seconds of a step, from the third on."""
    common = [f"run={folder}", "data.val=null", "train.epochs=0", f"train.steps={steps}", "train.log_every=1"]
    common += ["train.trackers=[]", "data.train=synthetic", "text.groups=1", f"text.tokenizer={folder.parent / 'tokenizer'}"]
    run_clipfuse("pretrain", "clipart", *options, *common, *settings, cwd=folder.parent, timeout=1200, fork=False)
    times = [line["time"] for line in read_jsonl(folder / "metrics.jsonl") if "loss" in line]
    return statistics.median(later - earlier for earlier, later in pairwise(times[1:]))


def time_text(length: int) -> float:
    """Return the median seconds of forward and backward passes of the text tower over 64 texts of `length` tokens."""
    torch.manual_seed(0)
    tower = registry.get_component("towers", "transformers")
    model = tower.build(tower.Config(args={**TEXT, "max_position_embeddings": length}, length=length, groups=1)).train()
    inputs, mask = torch.randint(3, 4096, (64, length)), torch.ones(64, length, dtype=torch.bool)
    inputs[:, -1] = 2
    times = []
    for _ in range(8):
        begin = time.perf_counter()
        model(inputs, mask).pooled.sum().backward()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[2:])


def time_start(folder: Path, count: int) -> float:
    """Return the seconds from the command to the first step, on `count` shards of two samples."""
    data = folder / "data"
    data.mkdir(parents=True)
    picture = BytesIO()
    Image.new("RGB", (64, 64), "red").save(picture, "JPEG")
    for shard in range(count):
        with tarfile.open(data / f"{shard:06d}.tar", "w") as tar:
            for key in range(2):
                for name, content in ((f"{key:04d}.jpg", picture.getvalue()), (f"{key:04d}.txt", b"a red square")):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, BytesIO(content))
    begin = time.time()
    settings = [f"run={folder / 'run'}", f"data.train={data}/*.tar", "data.val=null", "train.epochs=0", "train.steps=1"]
    settings += [
        "data.batch_size=16",
        "train.log_every=1",
        "train.trackers=[]",
        f"text.tokenizer={folder.parent / 'tokenizer'}",
    ]
    run_clipfuse("pretrain", "clipart", *settings, cwd=folder, timeout=1200, fork=False)
    return float(read_jsonl(folder / "run" / "metrics.jsonl")[0]["time"]) - begin


def main() -> None:
    """Measure the curves and print one JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["batch", "length", "size", "processes", "shards"])
    parser.add_argument("--quick", action="store_true", help="two small sizes a curve")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        run_clipfuse("data", "scenes", root / "scenes", "--num", "100", cwd=root)
        run_clipfuse("tokenizer", f"{root}/scenes/train-*.tar", root / "tokenizer", cwd=root)
        curves: dict[str, tuple[list[int], Callable[[int], float]]] = {
            "batch": ([32, 64, 128, 256, 512], lambda n: time_step(root / f"batch-{n}", f"data.batch_size={n}")),
            "length": ([38, 77, 154, 308, 616], time_text),
            "size": ([64, 112, 160, 224], lambda n: time_step(root / f"size-{n}", f"image.size={n}")),
            "processes": (
                [1, 2],
                lambda n: time_step(root / f"nproc-{n}", "train.strategy=ddp", options=["--nproc", str(n)]),
            ),
            "shards": ([10, 100, 1000, 10000], lambda n: time_start(root / f"shards-{n}", n)),
        }
        for curve, (sizes, measure) in curves.items():
            if args.only and curve not in args.only:
                continue
            sizes = sizes[:2] if args.quick else sizes
            seconds = [measure(n) for n in sizes]
            line = {"bench": "growth", "of": curve, "sizes": sizes, "seconds": [round(s, 4) for s in seconds]}
            print(json.dumps({**line, "exponent": round(fit_exponent(sizes, seconds), 3)}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
