"""Compares samples/s of `clipfuse embed` with those of its encoder alone; prints one JSON line.

    python -m tests.bench.embed [--data 'SHARDS' --config clipart --rounds 3 key=value ...]

The two take turns on the same samples. The encoder alone gets batches that this process has read and decoded before, and
its results are discarded. The difference is what `embed` does in addition: reading, decoding, writing, and running a worker
process on the same cores. On a CPU, `processor_time` measures this difference; other work on the machine disturbs it less.
Weights are random, because speed does not depend on them. Without --data, scenes of 256 px are drawn. Figures are medians
of the rounds.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch

from pretrain import config as configuration
from pretrain import model as models
from pretrain.checkpoints.loading import LoadedModel
from pretrain.config import find_config
from pretrain.data.loader import build_eval_loader
from pretrain.data.scenes.dataset import draw_dataset
from pretrain.data.text import load_tokenizer, train_tokenizer
from pretrain.embedding.encoder import Encoder, eval_mode
from pretrain.embedding.job import embed
from pretrain.embedding.options import Options
from pretrain.model import ModelSchema
from pretrain.runtime import distributed


def main() -> None:
    """Measure both and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="shards (default: drawn scenes)")
    parser.add_argument("--config", default="clipart", help="configuration whose towers are measured (default clipart)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, help="worker processes (default: that of embed)")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("settings", nargs="*", help="key=value settings of the towers")
    args = parser.parse_args()
    device = distributed.device()
    threads = distributed.pin_threads(0)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        if args.data is None:
            draw_dataset(root / "scenes", {"test": 1000}, size=256)
        shards = args.data or f"{root}/scenes/test-*.tar"
        train_tokenizer(shards, root / "tokenizer", vocab=4096)
        loaded = build(args.config, [f"text.tokenizer={root / 'tokenizer'}", *args.settings], root / "model")
        batches = list(build_eval_loader(shards, loaded.decoders, args.batch))
        samples = sum(len(batch) for batch in batches)
        encoder = Encoder(loaded.model.to(device), loaded.decoders, device, args.precision, dtype=torch.float16)

        def run_encoder() -> tuple[float, float]:
            begin, used = time.perf_counter(), read_processor_time()
            with eval_mode(loaded.model):
                encoded = sum(len(batch.keys) for _, batch in encoder.stream((None, batch) for batch in batches) if batch)
            assert encoded == samples
            return samples / (time.perf_counter() - begin), read_processor_time() - used

        def run_embed(index: int) -> tuple[float, float]:
            options = Options([shards], str(root / f"out-{index}"), precision=args.precision, batch_size=args.batch)
            options.workers = args.workers
            used = read_processor_time()
            summary = embed(loaded, options, device)
            assert summary is not None
            assert summary.samples == samples
            return summary.samples_per_second, read_processor_time() - used

        run_encoder()  # warm up
        rounds = [(*run_encoder(), *run_embed(i)) for i in range(args.rounds)]
    encoders, encoder_time, embeds, embed_time = ([round(value, 1) for value in column] for column in zip(*rounds, strict=True))
    figures = {
        "bench": "embed",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {threads} threads",
        "config": args.config,
        "samples": samples,
        "encoder_samples_per_second": statistics.median(encoders),
        "embed_samples_per_second": statistics.median(embeds),
        "ratio": round(statistics.median(embeds) / statistics.median(encoders), 3),
        "processor_time": round(statistics.median(embed_time) / statistics.median(encoder_time), 3),
        "rounds": [encoders, embeds],
    }
    print(json.dumps(figures))


def read_processor_time() -> float:
    """Return the processor seconds of this process and of its workers that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def build(config: str, settings: list[str], folder: Path) -> LoadedModel:
    """Build an untrained model of a shipped configuration."""
    values = configuration.load_values(find_config(config, "pretrain"), settings)
    resolved = configuration.build(ModelSchema, values, config, partial=True)
    tokenizer = load_tokenizer(resolved.text.tokenizer)
    model = models.build(models.tower_configs(resolved), resolved.model, tokenizer).eval()
    return LoadedModel(model, resolved, tokenizer, models.build_decoders(resolved, tokenizer, model, "txt"), folder, 0)


if __name__ == "__main__":
    main()
