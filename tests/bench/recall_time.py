"""Compares the wall time to a recall: open_clip's after `--epochs`, and ours to the first checkpoint that is as good.

    python -m tests.bench.recall_time [key=value ...] --train 'SHARDS' --val 'SHARDS' --peer PYTHON [--seeds 0 1 2]

PYTHON is the interpreter of an environment with open-clip-torch 3.3.0 and webdataset 0.2.86, as for tests.bench.pretrain. The
batch of 128 and fp32 are the same for both, and both begin without weights. open_clip trains the towers of
configs/pretrain/clipart.yaml; ours are those of `--config`, changed by `key=value`: `--config clipart` compares equal towers.

The figure is the mean of R@1, R@5 and R@10, image to text and text to image, on --val. One scorer, in this file, reads the
embeddings of both. Seconds are those of the whole command: imports, training and saving, but no evaluation. Ours saves a
checkpoint every `--save-every` steps. One JSON line per seed, and one with the medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.data.shards.paths import expand_shards
from pretrain.embedding import dataset
from tests.bench.pretrain import run_open_clip_script
from tests.support import read_jsonl, run_clipfuse

EMBED = """
import time
end = time.time()
import glob, io, tarfile
import numpy as np, torch
from PIL import Image
checkpoint = sorted(glob.glob("run/checkpoints/epoch_*.pt"))[-1]
model, _, preprocess = open_clip.create_model_and_transforms("bench_towers", pretrained=checkpoint, weights_only=False)
tokenizer = open_clip.get_tokenizer("bench_towers")
model.eval()
samples = {}
for shard in SHARDS:
    with tarfile.open(shard) as tar:
        for member in tar:
            key, _, extension = member.name.rpartition(".")
            if extension in ("txt", "jpg", "png"):
                samples.setdefault((shard, key), {})[extension] = tar.extractfile(member).read()
images, texts = [], []
with torch.no_grad():
    for sample in samples.values():
        image = Image.open(io.BytesIO(sample.get("jpg") or sample["png"]))
        images.append(model.encode_image(preprocess(image)[None], normalize=True)[0])
        texts.append(model.encode_text(tokenizer([sample["txt"].decode()]), normalize=True)[0])
np.savez("out.npz", image=torch.stack(images).numpy(), text=torch.stack(texts).numpy(), end=end)
"""


def mean_recall(image: Tensor, text: Tensor) -> float:
    """Return the mean of R@1, R@5 and R@10 of both directions for (n, D) embeddings of n pairs; a tie counts as a miss."""
    scores = image @ text.t()
    recalls = []
    for matrix in (scores, scores.t()):
        rank = (matrix >= matrix.diagonal()[:, None]).sum(dim=1)  # 1 where nothing else scores as high
        recalls += [float((rank <= k).float().mean()) for k in (1, 5, 10)]
    return statistics.mean(recalls)


def run_open_clip(folder: Path, args: argparse.Namespace, train: list[str], val: list[str], seed: int) -> dict[str, float]:
    """Train with open_clip; return its recall and the seconds from the command to the end of training."""
    flags = {"--precision": args.precision[1], "--seed": seed, "--save-frequency": args.epochs}
    begin = time.time()
    run_open_clip_script(folder, train, args.peer, 128, args.epochs, flags, then=f"SHARDS = {val!r}\n{EMBED}")
    out = np.load(folder / "out.npz")
    return {
        "recall": mean_recall(torch.from_numpy(out["image"]), torch.from_numpy(out["text"])),
        "seconds": float(out["end"]) - begin,
    }


def run_ours(folder: Path, args: argparse.Namespace, seed: int, target: float) -> dict[str, Any]:
    """Train with clipfuse; return the recall of each checkpoint, and the seconds to the first that reaches `target`."""
    settings = [f"run={folder}", f"data.train={args.train}", "data.val=null", f"text.tokenizer={args.tokenizer}"]
    settings += [f"seed={seed}", f"train.epochs={args.epochs}", f"train.save_every={args.save_every}", "train.keep=0"]
    settings += ["train.log_every=1", "train.trackers=[]", f"train.precision={args.precision[0]}", *args.settings]
    begin = time.time()
    run_clipfuse("pretrain", args.config, *settings, cwd=folder.parent, timeout=7200, fork=False)
    recalls, times = {}, {}
    for checkpoint in sorted((folder / "checkpoints").glob("step-*")):
        step = int(checkpoint.name.removeprefix("step-"))
        vectors = folder / f"embeddings-{step}"
        run_clipfuse("embed", checkpoint, "--data", args.val, "--out", vectors, cwd=folder.parent, timeout=1200)
        split = dataset.load(vectors)
        recalls[step] = mean_recall(split.image, split.text)
        times[step] = (checkpoint / "manifest.json").stat().st_mtime - begin
    reached = next((step for step, recall in recalls.items() if recall >= target), None)
    best = max(recalls, key=recalls.__getitem__)
    return {
        "recalls": {step: round(recall, 4) for step, recall in recalls.items()},
        "best_recall": recalls[best],
        "steps": reached,
        "seconds": None if reached is None else times[reached],
        "all_seconds": times[max(times)],
        "all_steps": len(read_jsonl(folder / "metrics.jsonl")),
    }


def main() -> None:
    """Run both for each seed and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="training shards, with txt captions")
    parser.add_argument("--val", required=True, help="validation shards, one caption each")
    parser.add_argument("--peer", help="Python of open_clip's environment")
    parser.add_argument("--target", type=float, help="do not run the peer: the mean recall to reach")
    parser.add_argument("--config", default="clipart-conv", help="configuration of our run")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--save-every", type=int, default=33)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--vocab", type=int, default=49408, help="size of our vocabulary; open_clip's is 49,408")
    parser.add_argument("--precision", nargs=2, default=["fp32", "fp32"], help="ours and open_clip's")
    parser.add_argument("settings", nargs="*", help="key=value settings for our run")
    args = parser.parse_args()
    if (args.peer is None) == (args.target is None):
        parser.error("give either --peer or --target")
    lines = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        args.tokenizer = root / "tokenizer"
        run_clipfuse("tokenizer", args.train, args.tokenizer, "--vocab", str(args.vocab), cwd=root)
        train, val = expand_shards(args.train), expand_shards(args.val)
        for seed in args.seeds:
            line: dict[str, Any] = {"bench": "recall_time", "seed": seed}
            target = args.target
            if args.peer:
                line["open_clip"] = run_open_clip(root / f"open-clip-{seed}", args, train, val, seed)
                target = line["open_clip"]["recall"]
            line["ours"] = run_ours(root / f"ours-{seed}", args, seed, target)
            if args.peer and line["ours"]["seconds"] is not None:
                line["ratio"] = line["ours"]["seconds"] / line["open_clip"]["seconds"]
            print(json.dumps(line), flush=True)
            lines.append(line)
    ratios = [line["ratio"] for line in lines if "ratio" in line]
    if args.peer:
        recalls = [line["open_clip"]["recall"] for line in lines]
        summary = {"seeds": len(lines), "reached": len(ratios), "open_clip_recall": statistics.median(recalls)}
        print(json.dumps({"bench": "recall_time", **summary, "ratio": statistics.median(ratios) if ratios else None}))


if __name__ == "__main__":
    sys.exit(main())
