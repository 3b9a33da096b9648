"""The first hour on a GPU: one command measures and checks everything that only a GPU can show.

    python -m tests.bench.gpu [--out DIR] [--minutes 25] [--only SECTION ...] [--peer PYTHON] [--tiny]

Sections, each in processes of its own with a time limit, so that one that fails or hangs costs no other:

    gradients    relative error of every strategy's gradients against one float64 process: fp32, bf16, fp16; 1 and 4 chunks
    tests        the tests that need a GPU (pytest -m gpu), with a step in which a synchronizing call is an error
    flops        the MFU counter of every shipped configuration, frozen and with BatchNorm too
    loss         time and peak memory of our losses against open_clip's, B = 4,096 to 65,536
    throughput   samples/s, MFU and memory of B/32, B/16 and L/14, eager and compiled, on synthetic data
    batch        the largest batch of B/32 and L/14 that fits, plain and cached
    peer         open_clip with its best flags on its own synthetic data; needs --peer
    loader       images/s of the loader against open_clip's
    resume       how far a run that was killed and resumed is from one that was not
    profile      where the time of a B/32 step goes (train.profile), eager and compiled

Writes DIR/gpu.json (all rows) and DIR/gpu.md (a table), and prints the table. Without a GPU a section that needs one is a line
"not here". --tiny shrinks every size, so that a CPU runs through in minutes. PYTHON is the interpreter of an environment with
open-clip-torch and its own webdataset.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.support import ROOT, read_jsonl

Row = dict[str, Any]


class Bench:
    """What every section needs: sizes, scratch space, the time left, and how to run a command."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        import torch

        self.args, self.folder = args, folder
        self.has_gpu = torch.cuda.is_available()
        self.device = "cuda" if self.has_gpu else "cpu"
        self.tiny = bool(args.tiny)
        self.deadline = time.monotonic() + 60 * args.minutes

    def run(self, *command: str | Path, timeout: float, env: dict[str, str] | None = None) -> str:
        """Run a command in a process group of its own; return its stdout. Raises RuntimeError with its last line of error."""
        seconds = min(timeout, self.deadline - time.monotonic())
        if seconds < 5:
            raise RuntimeError("no time left")
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **(env or {})}
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise RuntimeError(f"stopped after {seconds:.0f} s") from None
        if process.returncode:
            lines = [line for line in (err or out).splitlines() if line.strip()]
            raise RuntimeError(f"exit code {process.returncode}: {lines[-1][:300] if lines else 'no message'}")
        return out

    def module(self, name: str, *arguments: str | Path, timeout: float) -> str:
        """Run a module of this project with this interpreter."""
        if self.tiny and not self.has_gpu:  # what runs is tested, not measured
            from tests.support import forked

            done = forked.run(name, [str(word) for word in arguments], ROOT, timeout, OMP_NUM_THREADS="1")
            if done.returncode:
                raise RuntimeError(f"exit code {done.returncode}: {done.stderr.strip()[-300:]}")
            return done.stdout
        return self.run(sys.executable, "-m", name, *arguments, timeout=timeout)

    def pretrain(self, config: str, run: str, *settings: str, timeout: float = 300) -> list[Row]:
        """Train on synthetic data and return the lines of metrics.jsonl."""
        folder, tokenizer = self.folder / run, self.folder / "tokenizer"
        if not tokenizer.exists():
            self.module("launch.cli", "data", "scenes", self.folder / "scenes", "--num", "200", timeout=120)
            self.module("launch.cli", "tokenizer", f"{self.folder}/scenes/train-*.tar", tokenizer, timeout=120)
        words = [
            f"run={folder}",
            f"text.tokenizer={tokenizer}",
            "train.epochs=0",
            "train.samples=0",
            "data.train=synthetic",
            "data.val=null",
            "train.trackers=[]",
            "train.log_every=5",
            *settings,
        ]
        self.module("launch.cli", "pretrain", config, *words, timeout=timeout)
        return read_jsonl(folder / "metrics.jsonl")


TINY_MODEL = [
    "image.name=vit_tiny_patch16_224",
    "image.size=32",
    "image.args={patch_size: 16, embed_dim: 32, depth: 2, num_heads: 2}",
    "text.args={model_type: clip_text_model, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, "
    "num_attention_heads: 2, hidden_act: gelu}",
    "model.dim=32",
]
"""Settings that shrink a configuration with a ViT and a CLIP text tower."""


def run_gradients(bench: Bench) -> Iterator[Row]:
    """One process on this device: every strategy, precision and number of chunks."""
    processes = [["single"], ["ddp"], ["fsdp2"], ["zero1"], ["zero2"], ["zero3"]]
    for names in [["single", "ddp", "fsdp2"]] if bench.tiny else processes:
        out = bench.module("tests.bench.gpu", "--gradients-of", *names, timeout=240)
        yield from (json.loads(line) for line in out.splitlines() if line.startswith("{"))


def measure_gradients(name: str) -> Iterator[Row]:
    """Measure the gradients of one strategy in this process, on its device."""
    import torch

    from pretrain.optim import OptimConfig
    from pretrain.runtime import distributed
    from pretrain.strategies import build_strategy
    from tests.support import tiny

    device = distributed.device()
    if name != "single":
        distributed.ensure_group()
    _, expected = tiny.reference_gradients("clip", tiny.build_batch())
    for precision in ("fp32", "bf16", "fp16") if device.type == "cuda" else ("fp32", "bf16"):
        strategy = build_strategy(name, precision, OptimConfig(clip_norm=0.0), device)  # type: ignore[arg-type]
        strategy.setup(tiny.build_model("clip", torch.float32))
        strategy.model.train()
        for chunks in (1, 4):
            _, gradients = tiny.run_one_step(strategy, tiny.build_objective("clip"), tiny.build_batch(), chunks, (0, 0, 0))
            floor = 1e-3 if precision == "fp32" else 2e-2
            gradients = {key: value.cpu() for key, value in gradients.items()}
            errors = tiny.gradient_errors(gradients, expected, floor)
            yield {"what": f"{name} {precision}, {chunks} chunks", "value": max(errors.values()), "unit": "relative error"}


def run_tests(bench: Bench) -> Iterator[Row]:
    """Run the tests that are marked gpu."""
    paths = ["tests/launch/api"] if bench.tiny else ["tests"]
    out = bench.module("pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *paths, timeout=400)
    yield {"what": "pytest -m gpu", "value": out.strip().splitlines()[-1], "unit": ""}


def run_flops(bench: Bench) -> Iterator[Row]:
    """Count the operations of a sample for every shipped configuration, with its tests' references."""
    out = bench.module("pytest", "-q", "-p", "no:cacheprovider", "tests/pretrain/training/test_flops.py", timeout=300)
    yield {"what": "counters of all configurations", "value": out.strip().splitlines()[-1], "unit": ""}


def run_loss(bench: Bench) -> Iterator[Row]:
    """Time and peak memory of the losses."""
    sizes = ["256", "--rounds", "1"] if bench.tiny else ["4096", "16384", "32768", "65536"]
    out = bench.module("tests.bench.loss", "--device", bench.device, "--batch", *sizes, timeout=300)
    for line in out.splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            yield {"what": f"loss {row.get('who', 'clip')}, B = {row.get('batch')}", "value": row, "unit": "JSON"}


MODELS = {"vit-b-32": 2048, "vit-b-16": 1024, "vit-l-14": 256}
"""Shipped configuration -> samples a step for one GPU of 80 GB or more."""


def _settings(bench: Bench, batch: int, *more: str) -> list[str]:
    """Return the settings of a synthetic run on this device."""
    if bench.tiny:
        return [*TINY_MODEL, "data.batch_size=16", "train.precision=fp32", "train.strategy=single", *more]
    common = ["text.args.vocab_size=49408", "train.precision=bf16", "train.strategy=single"]  # open_clip's vocabulary
    return [f"data.batch_size={batch}", *common, *more]


def run_throughput(bench: Bench) -> Iterator[Row]:
    """Samples/s of the shipped models, eager and compiled."""
    steps = 10 if bench.tiny else 30
    for config, batch in list(MODELS.items())[: 1 if bench.tiny else None]:
        for compile in ("false",) if bench.tiny else ("false", "true"):
            name = f"{config} {'compiled' if compile == 'true' else 'eager'}"
            try:
                settings = _settings(bench, batch, f"train.steps={steps}", f"train.compile={compile}")
                lines = [line for line in bench.pretrain(config, name.replace(" ", "-"), *settings) if "loss" in line]
            except RuntimeError as error:
                yield {"what": name, "value": str(error), "unit": "failed"}
                continue
            last = lines[-1]
            yield {"what": name, "value": last["samples_per_second"], "unit": "samples/s", "batch": batch}
            yield {"what": f"{name}, MFU", "value": last["mfu"], "unit": ""}
            yield {"what": f"{name}, peak memory", "value": last["memory_gib"], "unit": "GiB"}
            yield {"what": f"{name}, waiting for data", "value": last["data_wait_share"], "unit": "of the time"}


def run_batch(bench: Bench) -> Iterator[Row]:
    """Double the batch until memory is full, plain and cached."""
    for config in ("vit-b-32",) if bench.tiny else ("vit-b-32", "vit-l-14"):
        for chunks in (1, 8):
            largest, batch = 0, 32 if bench.tiny else 512 * chunks
            limit = 32 if bench.tiny else 1 << 17
            while batch <= limit:
                run = f"batch-{config}-{chunks}-{batch}"
                try:
                    settings = _settings(bench, batch, "train.steps=2", f"train.chunks={chunks}", f"data.batch_size={batch}")
                    bench.pretrain(config, run, *settings, timeout=120)
                except RuntimeError as error:
                    reason = f"the next size: {error}"
                    break
                largest, batch, reason = batch, batch * 2, "the largest that was tried"
            yield {"what": f"{config}, largest batch, {chunks} chunks ({reason})", "value": largest, "unit": "samples"}


def run_peer(bench: Bench) -> Iterator[Row]:
    """open_clip on its own synthetic data: local loss, gathered with gradient, compiled, bf16."""
    if bench.args.peer is None:
        yield {"what": "open_clip", "value": "not here: --peer PYTHON names its environment", "unit": ""}
        return
    models = {"vit-b-32": "ViT-B-32", "vit-b-16": "ViT-B-16", "vit-l-14": "ViT-L-14"}
    for config, batch in list(MODELS.items())[: 1 if bench.tiny else None]:
        flags = ["--dataset-type", "synthetic", "--train-num-samples", str(40 * batch), "--epochs", "1", "--workers", "8"]
        flags += ["--batch-size", str(batch), "--precision", "amp_bf16", "--local-loss", "--gather-with-grad", "--torchcompile"]
        flags += ["--log-every-n-steps", "10", "--logs", str(bench.folder / "peer"), "--name", config]
        bench.run(bench.args.peer, "-m", "open_clip_train.main", "--model", models[config], *flags, timeout=300)
        log = (bench.folder / "peer" / config / "out.log").read_text()
        rates = [float(rate) for rate in re.findall(r"Data \(t\):.*?, ([\d.]+)/s", log)]
        yield {"what": f"open_clip {models[config]}", "value": rates[-1], "unit": "samples/s", "batch": batch}


def run_loader(bench: Bench) -> Iterator[Row]:
    """Images/s of the loader."""
    out = bench.module("tests.bench.loader", *(["--images", "100", "--rounds", "1"] if bench.tiny else []), timeout=240)
    for line in out.splitlines():
        if line.startswith("{"):
            yield {"what": "loader", "value": json.loads(line), "unit": "JSON"}


def run_resume(bench: Bench) -> Iterator[Row]:
    """Lose the last half of a run, resume it from its checkpoint, and compare the losses."""
    steps = 8 if bench.tiny else 40
    deterministic = ("deterministic", ["train.deterministic=true"])
    for name, extra in [deterministic] if bench.tiny else [("default", []), deterministic]:
        settings = _settings(bench, 512, f"train.steps={steps}", "train.log_every=1", f"train.save_every={steps // 2}", *extra)
        whole = bench.pretrain("vit-b-32", f"resume-{name}", *settings)
        checkpoints = bench.folder / f"resume-{name}" / "checkpoints"
        (checkpoints / f"step-{steps:07d}").rename(bench.folder / f"lost-{name}")
        (checkpoints / "latest").write_text(f"step-{steps // 2:07d}\n")
        resumed = bench.pretrain("vit-b-32", f"resume-{name}", *settings)
        losses = [[row["loss"] for row in rows if "loss" in row] for rows in (whole, resumed)]
        difference = max(abs(a - b) for a, b in zip(*losses, strict=True))
        yield {"what": f"resume, {name}: largest difference of the loss", "value": difference, "unit": ""}


def run_profile(bench: Bench) -> Iterator[Row]:
    """Profile five steps of B/32; the parts add up to the step."""
    from pretrain.training import profile_summary

    for compile in ("false",) if bench.tiny else ("false", "true"):
        name = f"vit-b-32 {'compiled' if compile == 'true' else 'eager'}"
        begin = 2 if bench.tiny else 15
        profile = [f"train.steps={begin + 5}", f"train.profile={begin}:{begin + 5}", f"train.compile={compile}"]
        bench.pretrain("vit-b-32", f"profile-{compile}", *_settings(bench, MODELS["vit-b-32"], *profile))
        trace = bench.folder / f"profile-{compile}" / f"profile-{begin}-{begin + 5}.json.gz"
        summary = profile_summary.summarize(profile_summary.read_trace(trace))
        yield {"what": f"{name}, one step", "value": 1e3 * summary.seconds, "unit": "ms"}
        for part, seconds in summary.parts.items():
            yield {"what": f"{name}, {part}", "value": seconds / summary.seconds, "unit": "of the step"}
        yield {
            "what": f"{name}, profile",
            "value": trace.with_name(f"profile-{begin}-{begin + 5}.txt").read_text(),
            "unit": "text",
        }


SECTIONS: dict[str, tuple[Callable[[Bench], Iterator[Row]], bool]] = {
    "gradients": (run_gradients, False),
    "tests": (run_tests, False),
    "flops": (run_flops, False),
    "throughput": (run_throughput, True),
    "loss": (run_loss, True),
    "resume": (run_resume, True),
    "profile": (run_profile, True),
    "batch": (run_batch, True),
    "peer": (run_peer, True),
    "loader": (run_loader, False),
}
"""Name -> (function, whether it needs a GPU), the most important first."""


def write_table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table, long texts below it."""
    lines, texts = ["| section | what | value | unit |", "|---|---|---|---|"], []
    for row in rows:
        value, unit = row["value"], row["unit"]
        if unit == "text":
            texts.append(f"\n### {row['what']}\n\n```\n{value}\n```")
            continue
        if unit == "JSON":
            unit = ""
            value = ", ".join(f"{key} {_format(v)}" for key, v in value.items() if isinstance(v, int | float))
        lines.append(f"| {row['section']} | {row['what']} | {_format(value)} | {unit} |")
    return "\n".join([*lines, *texts]) + "\n"


def _format(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(argv: list[str] | None = None) -> int:
    """Run the sections and write the results; the exit code is 1 where a section failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS))
    parser.add_argument("--peer")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--gradients-of", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.gradients_of:
        for name in args.gradients_of:
            for row in measure_gradients(name):
                print(json.dumps(row), flush=True)
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(args, Path(name))
        rows.append({"section": "machine", **describe_machine()})
        for section, (function, needs_gpu) in SECTIONS.items():
            if args.only and section not in args.only:
                continue
            begin = time.monotonic()
            if needs_gpu and not bench.has_gpu and not bench.tiny:
                rows.append({"section": section, "what": section, "value": "not here: no GPU", "unit": ""})
                continue
            try:
                for row in function(bench):
                    rows.append({"section": section, **row})
                    (args.out / "gpu.json").write_text(json.dumps(rows, indent=1))  # what is measured survives a time limit
            except Exception as error:
                rows.append({"section": section, "what": section, "value": f"{error}"[:300], "unit": "failed"})
            print(f"{section}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    (args.out / "gpu.json").write_text(json.dumps(rows, indent=1))
    table = write_table(rows)
    (args.out / "gpu.md").write_text(table)
    print(table)
    return int(any(row["unit"] == "failed" for row in rows))


def describe_machine() -> Row:
    """Return the device, the versions and the date as a row."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"no GPU, {os.cpu_count()} CPU cores"
    versions = f"Python {sys.version.split()[0]}, torch {torch.__version__}"
    return {"what": device, "value": f"{versions}, {time.strftime('%Y-%m-%d')}", "unit": ""}


if __name__ == "__main__":
    sys.exit(main())
