"""Measures milliseconds of a search by the number of images; prints one JSON line for each size.

    python -m tests.bench.search [--sizes 10000 100000 1000000] [--rerank 100000] [--queries 30]

- `dense_ms`: the median of single queries for the best 100 of n random unit vectors of 512 numbers, in the exact backend; also
  their 95th percentile, and `filtered_ms` with a filter that one image in ten passes.
- `reranked`: n images with random embeddings and token features (pooled by 2) of a small model (scenes-conv, 72 px), of which
  16 are re-ranked; the median of each stage in milliseconds, as `clipfuse search` reports them.
- `first_answer_s`: seconds from the start of `clipfuse search` with that re-ranker to its end, the median of three processes.

Weights and vectors are random, because speed does not depend on them. Milvus Lite compares all vectors as the exact backend
does, and offers no approximate index, so that there is no recall to measure; on a server, measure its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from launch.cli.runs import import_models

import_models(is_search=True)  # as the commands do, before anything imports torch

import numpy as np  # noqa: E402
import torch  # noqa: E402

from finetune import loading  # noqa: E402
from finetune.search import places, reranking  # noqa: E402
from finetune.search.fields import Field  # noqa: E402
from finetune.search.item_sources import Location  # noqa: E402
from finetune.search.opening import describe_model  # noqa: E402
from finetune.search.query import Query, Searcher, load_query_model  # noqa: E402
from finetune.search.token_store import TokenStore, pool_tokens  # noqa: E402
from finetune.search.vector_index import Description, IndexedItem, VectorIndex  # noqa: E402
from launch import cli  # noqa: E402
from pretrain.checkpoints.loading import load_model  # noqa: E402
from pretrain.runtime import distributed  # noqa: E402
from tests.support import environment  # noqa: E402

WIDTH, BATCH = 512, 5000
FIELDS = (Field("tenth", "int"),)


def fill(place: str, description: Description, count: int, rng: np.random.Generator) -> VectorIndex:
    """Build an index of `count` random unit vectors."""
    index = places.create_index(place, description)
    for begin in range(0, count, BATCH):
        numbers = range(begin, min(begin + BATCH, count))
        rows = [IndexedItem(f"s/{i:07}", "", -1, 0, f"picture {i}", {"tenth": i % 10}) for i in numbers]
        index.upsert(rows, rng.standard_normal((len(rows), description.dim), dtype=np.float32))
    return index


def measure_dense(folder: Path, count: int, queries: int) -> dict[str, float]:
    """Return milliseconds of single queries in an index of `count` vectors."""
    rng = np.random.default_rng(count)
    figures = {}
    with fill(str(folder), Description(WIDTH, {"fingerprint": "none"}, FIELDS), count, rng) as index:
        for name, condition in (("dense", None), ("filtered", "tenth == 3")):
            times = []
            for query in rng.standard_normal((queries + 3, 1, WIDTH), dtype=np.float32):
                begin = time.perf_counter()
                index.search(query, 100, condition)
                times.append(1000 * (time.perf_counter() - begin))
            figures[f"{name}_ms"] = round(statistics.median(times[3:]), 2)
            figures[f"{name}_p95_ms"] = round(float(np.quantile(times[3:], 0.95)), 2)
    return figures


def train(folder: Path) -> None:
    """Make a small run and a retrieval run, of one step each."""
    with contextlib.chdir(folder), contextlib.redirect_stdout(sys.stderr):
        quiet = [
            "data.val=null",
            "data.workers=0",
            "train.trackers=[]",
            "train.steps=1",
            "train.eval_every=0",
            "data.batch_size=8",
        ]
        shards = "scenes/train-*.tar"
        for words in (
            ["data", "scenes", "scenes", "--num", "64", "--size", "72", "--workers", "1"],
            ["tokenizer", shards, "tokenizer", "--vocab", "512"],
            ["pretrain", "scenes-conv", "run=runs/first", f"data.train={shards}", "text.tokenizer=tokenizer", *quiet],
            ["finetune", "retrieval", "init=runs/first", "run=runs/rerank", f"data.train={shards}", *quiet, "task.foils=null"],
        ):
            if code := cli.main(words):
                raise SystemExit(f"clipfuse {' '.join(words)} ended with {code}")


def measure_reranked(folder: Path, count: int, queries: int) -> dict[str, object]:
    """Return milliseconds of each stage of a search with a re-ranker, and seconds to the first answer of a new process."""
    train(folder)
    loaded, tuned = load_model(folder / "runs/first"), loading.load(folder / "runs/rerank")
    place, rng, device = str(folder / "index"), np.random.default_rng(0), distributed.device()
    dim = int(loaded.model.projection("image").out_features)
    with fill(place, Description(dim, describe_model(loaded), FIELDS), count, rng) as index:
        assert index.token_folder is not None
        pixels = torch.randint(0, 256, (16, 3, *tuned.decoders["image"].decode_eval(_draw()).shape[1:]), dtype=torch.uint8)
        images = reranking.encode_items(tuned, list(pixels), device)
        images = reranking.ItemTokens(pool_tokens(images.tokens, 2), images.embedding)
        layout = reranking.describe_layout(images, reranking.fingerprint_features(tuned), str(tuned.folder), 1, 2)
        block = reranking.select(images, torch.arange(1000) % 16)
        with TokenStore.create(index.token_folder, layout) as store:
            for begin in range(0, count, 1000):
                keys = [f"s/{i:07}" for i in range(begin, min(begin + 1000, count))]
                store.put(keys, [Location("", -1, 0)] * len(keys), reranking.select(block, slice(len(keys))))
        searcher = Searcher(index, load_query_model(index, None), device, tuned)
        found = [searcher.search(Query(f"a red car {i}", k=10, candidates=16)).milliseconds for i in range(queries + 3)][3:]
    words = ["search", place, "a red car", "--rerank", str(folder / "runs/rerank"), "--candidates", "16", "--json"]
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "launch.cli", *words], env=environment(), check=True, timeout=120, stdout=subprocess.DEVNULL
        )
        seconds.append(time.perf_counter() - begin)
    stages = {stage: round(statistics.median(each[stage] for each in found), 2) for stage in found[0]}
    return {"reranked_ms": stages, "first_answer_s": round(statistics.median(seconds), 2)}


def _draw() -> bytes:
    from PIL import Image

    from pretrain.data.thumbnails import encode_jpeg

    return encode_jpeg(Image.new("RGB", (72, 72)))


def main() -> None:
    """Measure and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="of the dense index")
    parser.add_argument("--rerank", type=int, default=100_000, metavar="N", help="images with token features; 0 = none")
    parser.add_argument("--queries", type=int, default=30)
    args = parser.parse_args()
    threads = distributed.pin_threads(0)
    for count in args.sizes:
        with tempfile.TemporaryDirectory() as name:
            figures = measure_dense(Path(name) / "index", count, args.queries)
        print(json.dumps({"bench": "search", "images": count, "width": WIDTH, "threads": threads, **figures}), flush=True)
    if args.rerank:
        with tempfile.TemporaryDirectory() as name:
            reranked = measure_reranked(Path(name), args.rerank, args.queries)
        print(
            json.dumps({"bench": "search", "images": args.rerank, "candidates": 16, "threads": threads, **reranked}), flush=True
        )


if __name__ == "__main__":
    main()
