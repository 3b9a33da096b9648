"""Compares samples/s of our random reads with webdataset's stream on one core; prints one JSON line.

    python -m tests.bench.reads [--samples 10000 --rounds 3]

Nothing is decoded. The shards are generated for the run and are in the page cache for both. A sample has an image of 8 to
15 KB, a caption and a json. Rounds alternate. Figures are medians of processor time, which other work on the machine
disturbs less.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import webdataset as wds

from pretrain.data.order import Order, ShardSource
from pretrain.data.shards.index import load_index
from pretrain.data.shards.paths import count_samples, expand_shards
from pretrain.data.shards.reader import ShardReader


def main() -> None:
    """Measure both and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # webdataset warns about names and unclosed files
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), args.samples)
        paths = expand_shards(folder)
        start = time.process_time()
        for path in paths:
            load_index(path)
        indexing = args.samples / (time.process_time() - start)
        order = Order([ShardSource(count_samples(paths))], seed=0)
        reader = ShardReader(paths)

        def read_ours() -> int:
            located = order.locate(np.arange(args.samples))
            return sum(
                len(reader.read(shard, sample).members)
                for shard, sample in zip(located.shard.tolist(), located.sample.tolist(), strict=True)
            )

        def read_webdataset() -> int:
            samples = wds.WebDataset(paths, shardshuffle=False)
            return sum(len([name for name in sample if not name.startswith("__")]) for sample in samples)

        rounds = [
            (measure_rate(read_webdataset, args.samples), measure_rate(read_ours, args.samples)) for _ in range(args.rounds)
        ]
    stream, random = (statistics.median(rates) for rates in zip(*rounds, strict=True))
    figures = {
        "bench": "reads",
        "webdataset_samples_per_second": round(stream),
        "samples_per_second": round(random),
        "ratio": round(random / stream, 2),
        "indexing_samples_per_second": round(indexing),
    }
    print(json.dumps(figures))


def write_shards(folder: Path, samples: int) -> None:
    """Write ten shards of noise, because their content is not decoded."""
    rng = np.random.default_rng(0)
    for shard in range(10):
        with tarfile.open(folder / f"{shard:04d}.tar", "w") as tar:
            for i in range(samples // 10):
                for name, length in (("jpg", int(rng.integers(8_000, 15_000))), ("txt", 60), ("json", 400)):
                    info = tarfile.TarInfo(f"{shard:04d}{i:05d}.{name}")
                    info.size = length
                    tar.addfile(info, io.BytesIO(rng.bytes(length)))


def measure_rate(read: Callable[[], int], samples: int) -> float:
    """Return samples per second of processor time, and check that all members were read."""
    start = time.process_time()
    members = read()
    seconds = time.process_time() - start
    assert members == 3 * samples, members
    return samples / seconds


if __name__ == "__main__":
    main()
