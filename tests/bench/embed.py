"""Samples/s of `clipfuse embed` against its own encoder alone, in turn, on the same samples; one JSON line.

    python -m tests.bench.embed [--data 'SHARDS' --config clipart --rounds 3 key=value ...]

The encoder alone gets batches that were read and decoded before, in the same process, and its results go nowhere. What
embed needs beyond that, reading, decoding, writing, and a worker process on the same cores, is the difference; on a CPU
`processor_time` says how much of it there is, which others on the machine disturb less. Weights are random: speed does not
depend on them. Without --data, scenes of 256 px are drawn. Figures are medians of rounds.
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
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="shards; drawn scenes where missing")
    parser.add_argument("--config", default="clipart", help="whose towers (default clipart)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, help="default: embed's own")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("settings", nargs="*", help="key=value settings of the towers")
    given = parser.parse_args()
    device = distributed.device()
    threads = distributed.pin_threads(0)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        if given.data is None:
            draw_dataset(root / "scenes", {"test": 1000}, size=256)
        shards = given.data or f"{root}/scenes/test-*.tar"
        train_tokenizer(shards, root / "tokenizer", vocab=4096)
        loaded = build(given.config, [f"text.tokenizer={root / 'tokenizer'}", *given.settings], root / "model")
        batches = list(build_eval_loader(shards, loaded.decoders, given.batch))
        samples = sum(len(batch) for batch in batches)
        encoder = Encoder(loaded.model.to(device), loaded.decoders, device, given.precision, dtype=torch.float16)

        def alone() -> tuple[float, float]:
            begin, used = time.perf_counter(), processor_time()
            with eval_mode(loaded.model):
                encoded = sum(len(batch.keys) for _, batch in encoder.stream((None, each) for each in batches) if batch)
            assert encoded == samples
            return samples / (time.perf_counter() - begin), processor_time() - used

        def files(round_: int) -> tuple[float, float]:
            asked = Options([shards], str(root / f"out-{round_}"), precision=given.precision, batch_size=given.batch)
            asked.workers = given.workers
            used = processor_time()
            summary = embed(loaded, asked, device)
            assert summary is not None
            assert summary.samples == samples
            return summary.samples_per_second, processor_time() - used

        alone()  # warm
        rounds = [(*alone(), *files(i)) for i in range(given.rounds)]
    encoders, encoder_time, embeds, embed_time = ([round(each, 1) for each in side] for side in zip(*rounds, strict=True))
    figures = {
        "bench": "embed",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {threads} threads",
        "config": given.config,
        "samples": samples,
        "encoder_samples_per_second": statistics.median(encoders),
        "embed_samples_per_second": statistics.median(embeds),
        "ratio": round(statistics.median(embeds) / statistics.median(encoders), 3),
        "processor_time": round(statistics.median(embed_time) / statistics.median(encoder_time), 3),
        "rounds": [encoders, embeds],
    }
    print(json.dumps(figures))


def processor_time() -> float:
    """Seconds of all cores, of this process and of the workers that ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def build(config: str, settings: list[str], folder: Path) -> LoadedModel:
    """An untrained model of a shipped configuration."""
    values = configuration.load_values(find_config(config, "pretrain"), settings)
    made = configuration.build(ModelSchema, values, config, partial=True)
    tokenizer = load_tokenizer(made.text.tokenizer)
    model = models.build(models.tower_configs(made), made.model, tokenizer).eval()
    return LoadedModel(model, made, tokenizer, models.build_decoders(made, tokenizer, model, "txt"), folder, 0)


if __name__ == "__main__":
    main()
