"""The demo that `make demo` runs: from drawn scenes to two trained models and a report on each.

It draws scenes, trains a tokenizer and two encoders, evaluates and exports them, embeds the test images, and makes an index of
them, which the report searches. Then it fine-tunes a model that answers questions about the images.

The demo prints each command before it runs it, as a person would type it. Its output is a short tour of the project.
Everything is written into one folder. A demo that was stopped resumes when it is started again.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from pathlib import Path

from launch import cli
from launch.cli.command import Parser
from pretrain.config.arguments import NumberType
from pretrain.runtime.console import format_duration
from pretrain.runtime.entrypoint import DONE

STEPS_PER_MINUTE = {"pretrain": 70, "finetune": 110}
"""Steps of scenes-conv and vqa on these scenes that two CPU cores take in a minute; a little less than measured."""
SEARCHES = ("a red car", "a green dog on a beach", "a striped blue boat")
"""What the report searches for."""
PRETRAIN_SHARE = 0.55
"""Fraction of the training time that pretraining gets."""


def build_commands(folder: Path, minutes: float) -> list[list[str]]:
    """Build the commands of the demo, without the leading `clipfuse`.

    minutes: training time of both stages together.
    """
    scenes, run, answers, index = folder / "scenes", folder / "run", folder / "answers", folder / "index"
    data = [f"data.train={scenes}/train-*.tar", f"data.val={scenes}/val-*.tar"]
    pretrain = build_length_settings(minutes * PRETRAIN_SHARE, "pretrain")
    finetune = build_length_settings(minutes * (1 - PRETRAIN_SHARE), "finetune")
    scene_count = "8000" if minutes > 2 else "2000" if minutes >= 1 else "300"
    questions = ["task.types=[colour, kind, count]", "task.questions=4"]
    parallelism = build_process_settings()
    searches = [word for text in SEARCHES for word in ("--search", text)]
    return [
        ["data", "scenes", str(scenes), "--num", scene_count, "--size", "72", "--things", "1-2"],
        ["tokenizer", f"{scenes}/train-*.tar", f"{scenes}/tokenizer", "--vocab", "512", "--caption", "txt,questions"],
        ["pretrain", "scenes-conv", f"run={run}", *data, f"text.tokenizer={scenes}/tokenizer", *parallelism, *pretrain],
        ["evaluate", str(run), "--data", f"{scenes}/test-*.tar"],
        ["evaluate", str(run), "--data", f"{scenes}/unseen-*.tar"],
        ["export", str(run), str(run / "export"), "--format", "onnx"],
        ["embed", str(run), "--data", f"{scenes}/test-*.tar", "--out", str(run / "embeddings")],
        [
            "index",
            str(run),
            "--data",
            str(run / "embeddings"),
            "--images",
            f"{scenes}/test-*.tar",
            "--db",
            str(folder / "index"),
        ],
        ["report", str(run), "--data", f"{scenes}/test-*.tar", "--db", str(index), *searches],
        ["finetune", "vqa", f"run={answers}", f"init={run}", *data, *questions, *parallelism, *finetune],
        ["evaluate", str(answers), "--data", f"{scenes}/test-*.tar"],
        ["report", str(answers), "--data", f"{scenes}/test-*.tar"],
    ]


def build_process_settings() -> list[str]:
    """Build the settings that train on two processes, for two cores without a GPU; empty elsewhere.

    Small batches gain more from processes than from threads.
    """
    import torch

    is_single = torch.cuda.is_available() or len(os.sched_getaffinity(0)) < 2
    return [] if is_single else ["--nproc", "2", "train.strategy=ddp"]


def build_length_settings(minutes: float, stage: str) -> list[str]:
    """Build the settings with which a stage, "pretrain" or "finetune", takes about `minutes` on two cores."""
    steps = max(8, round(minutes * STEPS_PER_MINUTE[stage]))
    intervals = [f"train.eval_every={max(12, -(-steps // 3))}", f"train.log_every={min(10, steps // 4)}"]
    return [f"train.steps={steps}", *intervals, f"optim.warmup={min(50, steps // 5)}"]


def main(argv: list[str] | None = None) -> int:
    """Run the demo; return the exit code of the first command that fails or is stopped, else 0."""
    parser = Parser(prog="python -m launch.demo", description=__doc__)
    parser.add_argument(
        "--minutes", type=NumberType(float, "(0, 10000]"), default=8.0, help="training time on two cores (default 8)"
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder that everything is written into (default demo)")
    args = parser.parse_args(argv)
    begin = time.monotonic()
    for output in ("run/export", "run/embeddings", "index"):  # the run may have trained on since: write them again
        shutil.rmtree(args.out / output, ignore_errors=True)
    for arguments in build_commands(args.out, args.minutes):
        print(f"\n$ clipfuse {shlex.join(arguments)}", flush=True)
        code = cli.main(arguments)
        if code != DONE:
            return code
    pages = " and ".join(str(args.out / run / "report.html") for run in ("run", "answers"))
    print(f"\nDone in {format_duration(time.monotonic() - begin)}. Open {pages} in a browser.")
    words = ["clipfuse", "serve", str(args.out / "index"), "--vqa", str(args.out / "answers")]
    print(f"`{shlex.join(words)}` opens a page that searches the test images and answers questions about them.")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
