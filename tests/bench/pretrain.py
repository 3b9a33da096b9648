"""Compares pretraining samples/s with open_clip's training script; prints one JSON line for each precision.

    python -m tests.bench.pretrain --train 'SHARDS' --peer PYTHON [--epochs 3 --rounds 2] [--precision fp32 bf16]

PYTHON is the interpreter of an environment with open-clip-torch 3.3.0 and webdataset 0.2.86 (which open_clip needs and we
do not). The two take turns on the same shards. Both train towers of the same size (configs/pretrain/clipart.yaml) with the
same batch size and precision (bf16 by autocast). Samples/s are those of the second and later epochs, so that neither startup
nor evaluation counts. Without --train, scenes are drawn.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

from pretrain.data.shards.paths import count_samples, expand_shards
from tests.support import environment, read_jsonl, run_clipfuse

TOWERS = {
    "embed_dim": 192,
    "vision_cfg": {"image_size": 112, "layers": 6, "width": 192, "head_width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 4},
}
PEER_PRECISION = {"fp32": "fp32", "bf16": "amp_bf16"}
"""train.precision -> open_clip's --precision."""
PEER = """
import json, runpy, sys
import open_clip
open_clip.add_model_config(sys.argv.pop(1))
sys.argv[0] = "main"
runpy.run_module("open_clip_train.main", run_name="__main__")
"""


def run_ours(folder: Path, train: str, tokenizer: Path, batch: int, epochs: int, samples: int, extra: list[str]) -> float:
    """Train with clipfuse and return samples/s."""
    settings = [f"run={folder}", f"data.train={train}", "data.val=null", f"text.tokenizer={tokenizer}"]
    settings += [f"data.batch_size={batch}", f"train.epochs={epochs}", "train.log_every=1", *extra]
    run_clipfuse("pretrain", "clipart", *settings, cwd=folder.parent, timeout=7200, fork=False)
    rows = [line for line in read_jsonl(folder / "metrics.jsonl") if "loss" in line]
    first = next(i for i, line in enumerate(rows) if line["samples_seen"] >= samples)
    return (rows[-1]["samples_seen"] - rows[first]["samples_seen"]) / (rows[-1]["time"] - rows[first]["time"])


def run_open_clip_script(
    folder: Path, train: list[str], python: str, batch: int, epochs: int, flags: dict[str, Any], then: str = ""
) -> None:
    """Train with open_clip's script in a new folder, on towers and recipe of configs/pretrain/clipart.yaml.

    flags: more flags of the script. then: Python code that the same process runs afterwards.
    """
    folder.mkdir()
    (folder / "bench_towers.json").write_text(json.dumps(TOWERS))
    flags = {
        "--model": "bench_towers", "--dataset-type": "webdataset", "--train-data": "::".join(train),
        "--train-num-samples": sum(count_samples(train)), "--batch-size": batch, "--workers": 1, "--epochs": epochs,
        "--lr": 1e-3, "--warmup": 20, "--wd": 0.1, "--precision": "fp32", "--device": "cpu", "--logs": folder, "--name": "run",
        **flags,
    }  # fmt: skip
    options = [str(word) for pair in flags.items() for word in pair]
    command = [python, "-c", PEER + then, str(folder / "bench_towers.json"), *options]
    subprocess.run(command, cwd=folder, env=environment(PYTHONPATH=""), check=True, capture_output=True, timeout=7200)


def run_open_clip(folder: Path, train: list[str], python: str, batch: int, epochs: int, precision: str) -> float:
    """Train with open_clip and return samples/s, from the times in its log."""
    flags = {"--log-every-n-steps": 1, "--precision": PEER_PRECISION[precision]}
    run_open_clip_script(folder, train, python, batch, epochs, flags)
    stamps = re.findall(r"^(\S+,\d\d:\d\d:\d\d) .*Train Epoch: (\d+) \[", (folder / "run/out.log").read_text(), re.M)
    times = [(int(epoch), datetime.strptime(stamp, "%Y-%m-%d,%H:%M:%S")) for stamp, epoch in stamps]
    steps = [time for epoch, time in times if epoch >= 1]
    return (len(steps) - 1) * batch / (steps[-1] - steps[0]).total_seconds()


def main() -> None:
    """Run both in turn and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", help="shards (default: drawn scenes)")
    parser.add_argument("--peer", help="Python of open_clip's environment; without it only ours is measured")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--precision", nargs="+", choices=list(PEER_PRECISION), default=["fp32"], help="of both (default fp32)")
    parser.add_argument("--vocab", type=int, default=49408, help="size of our vocabulary; open_clip's is 49,408")
    parser.add_argument("settings", nargs="*", help="key=value settings for our run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        train = args.train
        if train is None:
            run_clipfuse("data", "scenes", root / "scenes", "--num", "2000", cwd=root)
            train = f"{root}/scenes/train-*.tar"
        run_clipfuse("tokenizer", train, root / "tokenizer", "--vocab", str(args.vocab), cwd=root)
        paths = expand_shards(train)
        samples = sum(count_samples(paths))
        for precision in args.precision:
            folder = root / precision
            folder.mkdir()
            our_rates, peer_rates = [], []
            settings = [f"train.precision={precision}", *args.settings]
            for i in range(args.rounds):
                ours, peer = folder / f"ours-{i}", folder / f"open-clip-{i}"
                our_rates.append(run_ours(ours, train, root / "tokenizer", args.batch, args.epochs, samples, settings))
                if args.peer:
                    peer_rates.append(run_open_clip(peer, paths, args.peer, args.batch, args.epochs, precision))
            line = {"bench": "pretrain", "precision": precision, "samples": samples, "batch": args.batch}
            line |= {"ours_samples_per_second": our_rates}
            if peer_rates:
                ratios = [x / y for x, y in zip(our_rates, peer_rates, strict=True)]
                line |= {"open_clip_samples_per_second": peer_rates, "ratio": statistics.median(ratios), "ratios": ratios}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
