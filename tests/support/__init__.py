"""Helpers of all tests: small data and configurations, the clipfuse command, readers of run folders."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent

TINY_TOWERS: list[str] = [
    "image.name=vit_tiny_patch16_224",
    "image.size=32",
    "image.args={patch_size: 16, embed_dim: 32, depth: 2, num_heads: 2, global_pool: avg, fc_norm: false}",
    "text.args={model_type: clip_text_model, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, "
    "num_attention_heads: 2}",
    "text.length=24",
    "model.dim=16",
]
"""Settings that shrink a configuration with a ViT and a CLIP text tower, so that a step takes milliseconds."""
ONE_BLOCK: list[str] = ["image.args.depth=1", "text.args.num_hidden_layers=1"]
"""Settings after those, for models that are traced to be exported: each block takes a second."""


HEAVY = [
    "torch._dynamo",
    "torch._inductor",
    "scipy.optimize",
    "deepspeed",
    "pandas",
    "sklearn",
    "matplotlib",
    "onnx",
    "open_clip",
    "torchmetrics",
    "peft",
    "wandb",
    "webdataset",
    "s3fs",
]
"""Modules that a training of tiny towers without train.compile, or a search, must not import: they take seconds."""


@dataclass(frozen=True)
class Small:
    """A small data set of drawn scenes in shards, and a tokenizer trained on it."""

    root: Path

    @property
    def train(self) -> str:
        return f"{self.root}/scenes/train-*.tar"

    @property
    def val(self) -> str:
        return f"{self.root}/scenes/val-*.tar"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer"

    def settings(self, run: Path | str, *more: str) -> list[str]:
        """Return the key=value settings of a tiny run on these shards, with `more` at their end."""
        return [
            f"run={run}",
            f"data.train={self.train}",
            "data.val=null",
            f"text.tokenizer={self.tokenizer}",
            "data.batch_size=16",
            "data.workers=0",
            "train.log_every=1",
            "train.trackers=[]",
            "optim.warmup=2",
            "train.epochs=0",
            "train.samples=0",
            "train.eval_every=0",
            "train.threads=1",
            *TINY_TOWERS,
            *more,
        ]


def make_small(root: Path) -> Small:
    """Draw the scenes into `root` and train the tokenizer on them."""
    from pretrain.data.scenes.dataset import draw_dataset
    from pretrain.data.text import train_tokenizer

    small = Small(root)
    draw_dataset(root / "scenes", {"train": 300, "val": 64, "test": 64}, size=64, seed=0, workers=1)
    train_tokenizer(small.train, small.tokenizer, vocab=400)
    return small


def run_clipfuse(
    *arguments: str | Path, cwd: Path, timeout: float = 240, check: int | None = 0, fork: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run clipfuse in a process of its own; fail the test if its exit code is not `check` (None: any code).

    fork: from a server that has imported the libraries; False: a new interpreter, as a user starts it and measurements need it.
    """
    words = [str(argument) for argument in arguments]
    if fork:
        from tests.support import forked

        done = forked.run("launch.cli", words, cwd, timeout)
    else:
        command = [sys.executable, "-m", "launch.cli", *words]
        done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout, check=False)
    if check is not None and done.returncode != check:
        raise AssertionError(f"exit code {done.returncode}, not {check}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done


def read_peak_mib() -> float:
    """Return the peak resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def environment(**more: str) -> dict[str, str]:
    """Return a child's environment: this checkout importable, no launcher variables, no network, no GPU."""
    left_out = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "PYTHONSAFEPATH")  # the last one cli.main() sets
    inherited = {name: value for name, value in os.environ.items() if name not in left_out}
    path = os.pathsep.join(filter(None, [str(ROOT), inherited.get("PYTHONPATH", "")]))
    return {**inherited, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a jsonl file, without a last line that a run is still writing."""
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def read_losses(run: Path) -> dict[int, float]:
    """Read {step: loss} from the training lines of a run's metrics.jsonl."""
    return {line["step"]: line["loss"] for line in read_jsonl(run / "metrics.jsonl") if "loss" in line}


def read_sample_keys(run: Path, rank: int = 0) -> dict[int, list[str]]:
    """Read {step: sample keys} of one rank of a run with train.audit=true."""
    return {line["step"]: line["keys"] for line in read_jsonl(run / f"audit-{rank}.jsonl")}
