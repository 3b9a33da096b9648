"""Measures the share of useful text tokens in a step, by the way in which captions are padded.

    python -m tests.bench.text [SHARDS] [--rows 1024] [--length 77] [--vocab 8000]

SHARDS are real captions; without them scenes are drawn. A tokenizer is trained on them. Prints one JSON line for each way:

- `longest`: every caption is padded to the longest of its batch, rounded up to 8 tokens.
- `dynamic`: groups of similar length, whose shapes depend on the batch (on the CPU).
- `static`: groups whose shapes are the same for every batch (on GPUs).
- `packed`: several captions in a row of full length, in the same shapes for every batch (CLIP text towers on GPUs).

`useful` is the number of real tokens divided by all that are encoded, over all batches. `overflow` is the fraction of batches
that do not fit the static shapes and are encoded in larger ones, which `useful` includes. Batches are drawn with
replacement, as from a large data set; the static shapes are chosen from the first 2,048 samples.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pretrain.data.length_groups import SAMPLES, LengthGroups, group_lengths
from pretrain.data.loader import DataConfig, build_loader
from pretrain.data.text import TextDecoder, load_tokenizer, train_tokenizer
from pretrain.data.text_packing import TextPacking
from pretrain.towers.length_buckets import group_by_length
from tests.support import make_small


def main() -> None:
    """Measure and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="?")
    parser.add_argument("--rows", type=int, nargs="+", default=[1024])
    parser.add_argument("--length", type=int, default=77)
    parser.add_argument("--vocab", type=int, default=8000)
    parser.add_argument("--batches", type=int, default=200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shards = args.shards or str(make_small(Path(folder)).train)
        train_tokenizer(shards, Path(folder) / "tokenizer", vocab=args.vocab)
        decoder = TextDecoder(load_tokenizer(Path(folder) / "tokenizer"), args.length)
        data = DataConfig(train=shards, batch_size=64, workers=0)
        order = build_loader(data, {"text": decoder}, seed=0)
        samples = order.order.epoch_size
        lengths = order.first_samples(samples).masks["text"].sum(dim=1).numpy()
    for rows in args.rows:
        compare(lengths, rows, args.length, args.batches)


def compare(lengths: NDArray[np.int64], rows: int, longest: int, batches: int) -> None:
    """Print a line for each way of padding."""
    drawn = np.random.default_rng(0).choice(lengths, (batches, rows))
    useful = int(drawn.sum())
    padded = sum(rows * min(longest, -(-int(batch.max()) // 8) * 8) for batch in drawn)
    report("longest", rows, useful / padded, longest=int(drawn.max()), mean=round(float(drawn.mean()), 2))
    tokens = 0
    for batch in drawn:
        groups = group_by_length(np.sort(batch).tolist(), 6, 4, longest)
        tokens += sum((end - first) * length for first, end, length in groups)
    report("dynamic", rows, useful / tokens, groups=6)
    histogram = tuple(np.bincount(lengths[:SAMPLES], minlength=longest + 1).tolist())
    packing, tokens, overflow = TextPacking(histogram), 0, 0
    usual = packing.row_counts(rows)[0]
    for batch in drawn:
        count = packing.assign(batch).tokens.shape[1]
        overflow += count > usual
        tokens += count * longest
    report("packed", rows, useful / tokens, overflow=overflow / batches, shapes=f"{usual}x{longest}")
    for count in (2, 3, 4, 6, 8, 12):
        source, tokens, overflow = LengthGroups(histogram, count), 0, 0
        for batch in drawn:
            groups = source.assign(batch)
            overflow += groups.fit != "fits"
            encoded = group_lengths(groups.lengths, groups.fit, longest)
            tokens += sum(n * length for n, length in zip(groups.counts, encoded, strict=True))
        shapes = [f"{n}x{length}" for n, length in source.shapes(rows)]
        report("static", rows, useful / tokens, groups=count, overflow=overflow / batches, shapes=" ".join(shapes))


def report(padding: str, rows: int, useful: float, **more: object) -> None:
    """Print one JSON line."""
    print(json.dumps({"bench": "text", "padding": padding, "rows": rows, "useful": round(useful, 4), **more}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
