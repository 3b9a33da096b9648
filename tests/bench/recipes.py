"""Measures recipes of pretraining on drawn scenes, each on and off, at equal samples and at equal time.

    clipfuse data scenes DIR --size 72 --num 8000
    python -m tests.bench.recipes DIR [--recipes draw negatives distill stages] [--seeds 0 1 2] [--steps 300] [--folder RUNS]

`none` is configs/pretrain/scenes-conv.yaml with smaller towers and one caption of a sample at a time. A recipe is `none` and
the settings in RECIPES. Equal samples: as many steps of 64 images. Equal time: as many steps as take what `none` takes, from
the mean seconds of a step in its run of the first seed; the rate's schedule fits the number of steps. A teacher's own
training, four times as many steps, is not counted. RUNS keeps the runs, and those that are there are not trained again. One
thread trains, so that two such commands fit on two cores. One JSON line per run, and one per recipe with the means over seeds:

    image_to_text, text_to_image   R@1 in percent among the scenes of DIR/val-*.tar and their long captions
    foils                          percent of an image's wrong captions (`foils`) that are less similar to it than its caption
    pointing                       percent of phrases such as "a red car", of things with a color and kind of their own, whose
                                   most similar token lies in the thing's box; `chance` is that of a random token
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from finetune.grounding.pointing_game import boxes_to_cells, mark_near_cells
from pretrain.checkpoints.loading import LoadedModel, load_model
from pretrain.data.shards.paths import expand_shards
from pretrain.data.shards.reader import ShardReader
from pretrain.embedding.split import eval_mode
from pretrain.evaluation.retrieval import retrieval_metrics
from tests.support import read_jsonl, run_clipfuse

BASE = [
    "image.stem=[32,64,96,96]",
    "image.args={embed_dim: 96, depth: 1, num_heads: 4, class_token: false, global_pool: max, fc_norm: false, "
    "weight_init: jax}",
    "text.args={model_type: clip_text_model, hidden_size: 96, intermediate_size: 384, num_hidden_layers: 2, "
    "num_attention_heads: 4, hidden_act: gelu}",
    "text.length=32", "model.dim=96", "data.batch_size=64", "data.draw=1", "optim.warmup=30", "train.trackers=[]",
    "train.threads=1",
]  # fmt: skip
RECIPES = {
    "none": [],
    "draw": ["data.draw=4"],
    "negatives": ["data.negatives=foils", "data.draw_negatives=2"],
    "distill": ["data.teachers={teacher}", "loss.name=distill"],
    "stages": ["train.stages=[{{until: 0.6, image.size: 48}}]"],
}
"""Settings of each recipe; {teacher} is the folder of a teacher's embeddings."""
FIGURES = ("image_to_text", "text_to_image", "foils", "pointing")


def train(run: Path, data: Path, recipe: list[str], seed: int, steps: int) -> float:
    """Train and return the mean seconds of a step, the first ten left out."""
    settings = [f"run={run}", f"data.train={data}/train-*.tar", "data.val=null", f"text.tokenizer={run.parent}/tokenizer"]
    settings += [*BASE, f"seed={seed}", f"train.steps={steps}", f"train.save_every={steps}", "train.log_every=10", *recipe]
    if not (run / "checkpoints" / f"step-{steps:07d}").exists():
        run_clipfuse("pretrain", "scenes-conv", *settings, cwd=run.parent, timeout=7200, fork=False)
    seconds = [line["step_seconds"] for line in read_jsonl(run / "metrics.jsonl") if "step_seconds" in line]
    return statistics.mean(seconds[1:])


def measure(loaded: LoadedModel, shards: str) -> dict[str, float]:
    """Return R@1 of both directions, pointing and its chance, in percent."""
    model, decoders = loaded.model, loaded.decoders
    reader = ShardReader(expand_shards(shards))
    images, captions, foils, things = [], [], [], []
    for shard in range(len(reader.paths)):
        for sample in range(reader.count(shard)):
            members = reader.read(shard, sample).members
            images.append(decoders["image"].decode_eval(members["jpg"]))
            captions.append(members["txt"].decode())
            content = json.loads(members["json"])
            foils.append([foil["caption"] for foil in content["foils"]])
            things.append(content["objects"])

    def encode_texts(texts: list[str]) -> torch.Tensor:
        return F.normalize(
            torch.cat([model.encode("text", *decoders["text"].encode(texts[i : i + 100])) for i in range(0, len(texts), 100)]),
            dim=1,
        )

    hits, chances = [], []
    with torch.no_grad(), eval_mode(model):
        tower, project = model.tower("image"), model.projection("image")
        tokens = [tower(torch.stack(images[i : i + 100])) for i in range(0, len(images), 100)]
        image = torch.cat([F.normalize(project(t.pooled), dim=1) for t in tokens])
        text = encode_texts(captions)
        metrics = retrieval_metrics(image, text, torch.arange(len(images)))
        owner = torch.tensor([i for i, texts in enumerate(foils) for _ in texts])
        wrong = encode_texts([foil for texts in foils for foil in texts])
        is_lower = (image[owner] * wrong).sum(dim=1) < (image * text).sum(dim=1)[owner]
        states, grid, side = (
            torch.cat([F.normalize(project(t.states), dim=2) for t in tokens]),
            tokens[0].grid,
            images[0].shape[-1],
        )
        assert grid is not None
        for i, objects in enumerate(things):
            names = Counter((thing["color"], thing["name"]) for thing in objects)
            single = [thing for thing in objects if names[thing["color"], thing["name"]] == 1]
            if len(objects) < 2 or not single:
                continue
            maps = encode_texts([f"a {thing['color']} {thing['name']}" for thing in single]) @ states[i].t()
            for thing, values in zip(single, maps, strict=True):
                box = boxes_to_cells(np.array([thing["box"]]), (0, 0, side, side), grid)
                near = mark_near_cells(box, grid, slack=0).ravel()
                hits.append(float(near[int(values.argmax())]))
                chances.append(float(near.mean()))
    return {
        "image_to_text": 100 * metrics["image_to_text_R@1"], "text_to_image": 100 * metrics["text_to_image_R@1"],
        "foils": 100 * float(is_lower.float().mean()),
        "pointing": 100 * statistics.mean(hits), "chance": 100 * statistics.mean(chances), "phrases": len(hits),
    }  # fmt: skip


def main() -> None:
    """Run each recipe for each seed, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DIR", help="folder of `clipfuse data scenes`")
    parser.add_argument("--recipes", nargs="+", choices=[*RECIPES][1:], default=[*RECIPES][1:])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--folder", type=Path, help="keep the runs here (default: a temporary folder)")
    args = parser.parse_args()
    data = args.data.resolve()
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        root = args.folder.resolve() if args.folder else Path(name)
        root.mkdir(exist_ok=True)
        tokenizer, vectors = root / "tokenizer", root / "teacher-vectors"
        if not tokenizer.exists():
            run_clipfuse("tokenizer", f"{data}/train-*.tar", tokenizer, "--vocab", "512", "--caption", "captions", cwd=root)
        if "distill" in args.recipes and not vectors.exists():
            train(root / "teacher", data, RECIPES["draw"], 100, 4 * args.steps)
            run_clipfuse("embed", root / "teacher", "--data", f"{data}/train-*.tar", "--out", vectors, cwd=root, timeout=3600)
        step_seconds: dict[str, float] = {}
        for seed in args.seeds:
            for recipe in ("none", *args.recipes):
                settings = [setting.format(teacher=vectors) for setting in RECIPES[recipe]]
                for equal in ("samples", "time") if recipe != "none" else ("samples",):
                    ratio = step_seconds["none"] / step_seconds[recipe] if equal == "time" else 1
                    steps = round(args.steps * ratio)
                    run = root / f"{recipe}-{equal}-{seed}"
                    seconds = train(run, data, settings, seed, steps)
                    if equal == "samples":
                        step_seconds.setdefault(recipe, seconds)
                    figures = measure(load_model(run), f"{data}/val-*.tar")
                    line = {"recipe": recipe, "equal": equal, "seed": seed, "steps": steps, "step_seconds": seconds, **figures}
                    print(json.dumps({"bench": "recipes", **line}), flush=True)
                    lines.append(line)
    for recipe, equal in dict.fromkeys((line["recipe"], line["equal"]) for line in lines):
        group = [line for line in lines if (line["recipe"], line["equal"]) == (recipe, equal)]
        means = {name: statistics.mean(line[name] for line in group) for name in FIGURES}
        summary = {"recipe": recipe, "equal": equal, "seeds": len(group), "steps": group[0]["steps"], **means}
        print(json.dumps({"bench": "recipes", **summary}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
