"""Measures the order of 1e9 samples in 1e5 shards for 1,024 ranks, and counts the shards that each node reads.

    python -m tests.bench.order

The counts of samples are simulated. Prints JSON lines, with times in seconds and memory in MB:

- `order`, with one stream and with those that are chosen for remote shards: time to the first batch of one rank, and to a batch
  at a random position; memory above what the imports need, that of one window's permutation (`window_mb`), and of the indices
  of the shards that a worker reads at a time (`indices_mb`, from the index of a real shard); bytes of the state that is saved.
- `shards`: shards that each of 1, 2, 3, 4 and 6 nodes reads in the same steps, and a digest of the sequence.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import pickle
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np

from pretrain.data.loader import Loader
from pretrain.data.order import Order, ShardSource, choose_streams
from pretrain.data.shards.index import load_index
from tests.support import read_peak_mib

WORLD, NODES, BATCH, WINDOW = 1024, 128, 32_768, 16
SHARDS, SAMPLES = 100_000, 10_000


def main() -> None:
    """Measure and print the figures; each case runs in a process of its own, so that its memory is its own."""
    context = multiprocessing.get_context("spawn")
    for streams, window in ((1, WINDOW), choose_streams(WINDOW, BATCH, SHARDS, NODES)):
        process = context.Process(target=measure, args=(streams, window))
        process.start()
        process.join()
    for chosen in (False, True):
        count_shards(chosen)


def measure(streams: int, window: int) -> None:
    """Measure what a worker of one of the ranks does."""
    imported = read_peak_mib()
    rank = WORLD - 1
    counts = np.full(SHARDS, SAMPLES)
    start = time.perf_counter()
    order = Order([ShardSource(counts)], 0, window, streams)
    order.locate(order.positions(0, BATCH, rank, WORLD, NODES))
    first = time.perf_counter() - start
    peak = read_peak_mib()

    start = time.perf_counter()
    for batch in range(1, 2001):
        order.locate(order.positions(batch, BATCH, rank, WORLD, NODES))
    later = (time.perf_counter() - start) / 2000
    seeks = []
    for batch in np.random.default_rng(0).integers(0, order.epoch_size * 10 // BATCH, 20).tolist():
        start = time.perf_counter()
        order.locate(order.positions(batch, BATCH, rank, WORLD, NODES))
        seeks.append(time.perf_counter() - start)
    state = json.dumps(Loader(order, None, {}, BATCH, rank, WORLD, NODES).state_dict())  # type: ignore[arg-type]
    figures = {
        "bench": "order",
        "samples": order.epoch_size,
        "shards": SHARDS,
        "ranks": WORLD,
        "nodes": NODES,
        "streams": streams,
        "window": window,
        "first_batch_seconds": round(first, 4),
        "later_batch_seconds": round(later, 6),
        "seek_seconds": round(statistics.median(seeks), 4),
        "first_batch_mb": round(peak - imported, 1),
        "memory_mb": round(read_peak_mib() - imported, 1),
        "window_mb": round(window * SAMPLES * 4 / 1e6, 2),
        "indices_mb": round(measure_index() * window * max(1, streams // NODES) / 1e6, 1),
        "state_bytes": len(state),
        "pickled_mb": round(len(pickle.dumps(order)) / 1e6, 2),
    }
    print(json.dumps(figures), flush=True)


def measure_index() -> int:
    """Return the bytes that the index of a shard takes in memory: SAMPLES samples of a jpg, a txt and a json."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard-00000.tar"
        with tarfile.open(path, "w") as tar:
            for i in range(SAMPLES):
                for extension in ("jpg", "json", "txt"):
                    tar.addfile(tarfile.TarInfo(f"{i:09}.{extension}"), io.BytesIO())
        index = load_index(str(path))
        return sum(value.nbytes for value in vars(index).values() if isinstance(value, np.ndarray))


def count_shards(chosen: bool, batch_size: int = 3072, shards: int = 960, samples: int = 1000) -> None:
    """Count the shards that each node reads in the steps of a twentieth of an epoch."""
    for nodes in (1, 2, 3, 4, 6):
        streams, window = choose_streams(WINDOW, batch_size, shards, nodes) if chosen else (1, WINDOW)
        order = Order([ShardSource([samples] * shards)], 0, window, streams)
        digest = hashlib.blake2b(digest_size=8)
        read: list[set[int]] = [set() for _ in range(nodes)]
        for batch in range(shards * samples // 20 // batch_size):
            positions = [order.positions(batch, batch_size, node, nodes, nodes) for node in range(nodes)]
            for node, part in enumerate(positions):
                read[node].update(order.locate(part).shard.tolist())
            digest.update(np.stack(order.locate(np.sort(np.concatenate(positions)))).astype("<i8").tobytes())
        line = {
            "bench": "shards",
            "nodes": nodes,
            "streams": streams,
            "window": window,
            "read_by_node": [len(shards_read) for shards_read in read],
            "read_by_all": len(set.union(*read)),
            "sequence": digest.hexdigest(),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
