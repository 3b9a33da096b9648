"""Measures what smaller and approximate indexes lose on searches by text among images; prints one JSON line for each.

    python -m tests.bench.quantized EMBEDDED [--queries 1000] [--k 100]        (pip install --no-deps faiss-cpu)

EMBEDDED is what `clipfuse embed` wrote. Its images are indexed; the first texts are the queries, so that queries and vectors
are of different modalities, whose distributions differ: an index that is built on images alone may suit images as queries
better. `image_recall` is the same with images as queries (a vector finds itself, which counts), for comparison.

    recall        share of the exact best k by cosine that are among the k returned, the mean over queries
    top1          share of queries whose exact best image is among the k returned
    bytes         of a vector in the index, without the graph of HNSW (32 links a vector: 256 bytes more)

`refined` indexes score 4 k candidates of the small vectors again by 8 bits a number. What an index loses on 1e5 vectors is less
than what it loses on more: effort (`ef`, `nprobe`) must grow with the number.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pretrain.embedding.parquet import to_numpy

INDEXES = {
    "float16": "SQfp16",
    "8 bits": "SQ8",
    "8 bits, HNSW": "HNSW32,SQ8",
    "HNSW": "HNSW32",
    "product, 4 bits a pair": "PQ{half}x4fs",
    "product, refined": "PQ{half}x4fs,Refine(SQ8)",
    "1 bit (RaBitQ)": "RaBitQ",
    "1 bit (RaBitQ), refined": "RaBitQ,Refine(SQ8)",
    "1 bit (RaBitQ), lists, refined": "IVF{lists},RaBitQ,Refine(SQ8)",
}
"""Name -> the specification of faiss; half: D / 2, lists: 4 sqrt(n)."""


def read_vectors(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the image and text vectors (n, D) of a folder that embed wrote, float32 of unit length."""
    files = sorted(folder.glob("*.parquet"))
    if not files:
        sys.exit(f"{folder} holds no *.parquet: give what `clipfuse embed` wrote")
    table = pq.ParquetDataset(files).read(columns=["image", "text"])
    vectors = [np.ascontiguousarray(to_numpy(table[name]), dtype=np.float32) for name in ("image", "text")]
    images, texts = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in vectors)
    return images, texts


def compute_recall(found: np.ndarray, exact: np.ndarray) -> tuple[float, float]:
    """Return (recall, top1) of found rows (q, k) against exact ones (q, k)."""
    shared = [len(np.intersect1d(row, best)) for row, best in zip(found, exact, strict=True)]
    top1 = (found == exact[:, :1]).any(axis=1).mean()
    return float(np.mean(shared) / exact.shape[1]), float(top1)


def main() -> None:
    """Build each index and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="EMBEDDED")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--ef", type=int, default=400, help="candidates that HNSW keeps")
    parser.add_argument("--nprobe", type=int, default=64, help="lists that are searched")
    args = parser.parse_args()
    faiss: Any = importlib.import_module("faiss")
    images, texts = read_vectors(args.folder)
    count, dim = images.shape
    queries = {"recall": texts[: args.queries], "image_recall": images[: args.queries]}
    flat = faiss.IndexFlatIP(dim)
    flat.add(images)
    exact = {name: flat.search(vectors, args.k)[1] for name, vectors in queries.items()}
    for name, specification in INDEXES.items():
        words = specification.format(half=dim // 2, lists=round(4 * math.sqrt(count)))
        index = faiss.index_factory(dim, words, faiss.METRIC_INNER_PRODUCT)
        begin = time.monotonic()
        index.train(images)
        index.add(images)
        line: dict[str, Any] = {"bench": "quantized", "index": name, "images": count, "width": dim, "k": args.k}
        line["build_seconds"] = round(time.monotonic() - begin, 2)
        set_effort(faiss, index, args.ef, args.nprobe)
        base = faiss.downcast_index(index.base_index) if hasattr(index, "base_index") else index
        storage = faiss.downcast_index(base.storage) if hasattr(base, "storage") else base
        line["bytes"] = int(getattr(storage, "code_size", 0)) + (dim if hasattr(index, "base_index") else 0)
        for measure, vectors in queries.items():
            begin = time.monotonic()
            found = index.search(vectors, args.k)[1]
            seconds = time.monotonic() - begin
            line[measure], top1 = compute_recall(found, exact[measure])
            if measure == "recall":
                line |= {"top1": top1, "ms": round(1000 * seconds / len(vectors), 3)}
        print(json.dumps(line), flush=True)


def set_effort(faiss: Any, index: Any, ef: int, nprobe: int) -> None:
    """Set how many candidates, lists and vectors to refine a search looks at."""
    if hasattr(index, "k_factor"):
        index.k_factor = 4
        index = faiss.downcast_index(index.base_index)
    if hasattr(index, "hnsw"):
        index.hnsw.efSearch = ef
    if hasattr(index, "nprobe"):
        index.nprobe = nprobe


if __name__ == "__main__":
    sys.exit(main())
