"""make demo: drawn scenes in; aligned encoders, their export, embeddings, answers to questions and two reports out.

All by commands a person would type.

Each command is printed before it runs, so that the demo is also the shortest tour of the project. Everything lands in one
folder; a demo that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

import torch

from launch import cli
from pretrain.runtime.console import format_duration
from pretrain.runtime.entrypoint import DONE

STEPS_PER_MINUTE = {"pretrain": 70, "finetune": 110}
"""Steps of scenes-conv and vqa on such scenes that two CPU cores take in a minute, a little less than measured."""
SHARE = 0.55
"""Of the training time, for the encoders."""


def commands(folder: Path, minutes: float) -> list[list[str]]:
    """The demo, command by command; `minutes` of training in all."""
    scenes, run, answers = folder / "scenes", folder / "run", folder / "answers"
    data = [f"data.train={scenes}/train-*.tar", f"data.val={scenes}/val-*.tar"]
    pretrain = steps(minutes * SHARE, "pretrain")
    finetune = steps(minutes * (1 - SHARE), "finetune")
    number = "8000" if minutes > 2 else "2000" if minutes >= 1 else "500"
    asked = ["task.types=[colour, kind, count]", "task.questions=4"]
    spread = processes()
    return [
        ["data", "scenes", str(scenes), "--num", number, "--size", "72", "--things", "1-2"],
        ["tokenizer", f"{scenes}/train-*.tar", f"{scenes}/tokenizer", "--vocab", "512", "--caption", "txt,questions"],
        ["pretrain", "scenes-conv", f"run={run}", *data, f"text.tokenizer={scenes}/tokenizer", *spread, *pretrain],
        ["evaluate", str(run), "--data", f"{scenes}/test-*.tar"],
        ["evaluate", str(run), "--data", f"{scenes}/unseen-*.tar"],
        ["export", str(run), str(run / "export"), "--format", "onnx"],
        ["embed", str(run), "--data", f"{scenes}/test-*.tar", "--out", str(run / "embeddings")],
        ["report", str(run), "--data", f"{scenes}/test-*.tar"],
        ["finetune", "vqa", f"run={answers}", f"init={run}", *data, *asked, *spread, *finetune],
        ["evaluate", str(answers), "--data", f"{scenes}/test-*.tar"],
        ["report", str(answers), "--data", f"{scenes}/test-*.tar"],
    ]


def processes() -> list[str]:
    """Settings that spread a training over two cores: small batches gain more from processes than from threads."""
    alone = torch.cuda.is_available() or len(os.sched_getaffinity(0)) < 2
    return [] if alone else ["--nproc", "2", "train.strategy=ddp"]


def steps(minutes: float, what: str) -> list[str]:
    """Settings that make a training take about so many minutes."""
    number = max(8, round(minutes * STEPS_PER_MINUTE[what]))
    every = [f"train.eval_every={max(12, -(-number // 3))}", f"train.log_every={min(10, number // 4)}"]
    return [f"train.steps={number}", *every, f"optim.warmup={min(50, number // 5)}"]


def main(argv: list[str] | None = None) -> int:
    """Runs the demo; returns the exit code of the first command that does not end well."""
    parser = argparse.ArgumentParser(prog="python -m launch.demo", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="training time on two cores (default 8)")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for all that is made (default demo)")
    args = parser.parse_args(argv)
    begin = time.monotonic()
    for made in ("export", "embeddings"):  # the run may have gone on since: what was made of it is made anew
        shutil.rmtree(args.out / "run" / made, ignore_errors=True)
    for words in commands(args.out, args.minutes):
        print(f"\n$ clipfuse {shlex.join(words)}", flush=True)
        code = cli.main(words)
        if code != DONE:
            return code
    pages = " and ".join(str(args.out / run / "report.html") for run in ("run", "answers"))
    print(f"\nDone in {format_duration(time.monotonic() - begin)}. Open {pages} in a browser.")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
