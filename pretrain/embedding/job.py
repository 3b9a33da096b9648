"""python -m pretrain.embedding.job RUN --data SHARDS --out DIR: a whole collection -> embeddings, on one process or many.

    embed(load_model("runs/first"), Options(["shards"], "embeddings"), device) -> Summary

`clipfuse embed` and torchrun start this module once per process. Workers read and decode, this process encodes, a thread
writes; what there is to do, and what was done before a kill, is collection.py's to know. Exit codes as everywhere: 75 after
SIGTERM, SIGINT or SIGUSR1; the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoints.loading import LoadedModel, load_model
from pretrain.data.batch import Batch
from pretrain.data.config import count_samples_once
from pretrain.data.shards.cache import ShardCache
from pretrain.data.shards.paths import expand_shards
from pretrain.data.shards.reader import ShardReader
from pretrain.data.worker import EvaluationDataset
from pretrain.data.worker_pool import run_workers
from pretrain.embedding import dataset, options
from pretrain.embedding.dataset import EmbeddingFolder, EmbeddingPlan, WorkUnit
from pretrain.embedding.encoder import Encoder, eval_mode
from pretrain.embedding.options import Options
from pretrain.embedding.parquet import Layout, Writer
from pretrain.embedding.work_queue import ProgressBar, WorkQueue
from pretrain.errors import ConfigError, UserError, closest
from pretrain.runtime import distributed, preflight
from pretrain.runtime.agree import on_main
from pretrain.runtime.console import format_duration, log_info
from pretrain.runtime.entrypoint import DONE, STOPPED, EarlyStop, raise_on_stop_signals, run_with_exit_code
from pretrain.runtime.memory import is_out_of_memory

PER_FILE = 16384
"""Samples of a file: a few minutes' work of a CPU, seconds of a GPU."""
SHARES = 4
"""Files that a process should have at least to choose from, so that processes end together."""


@dataclass
class Summary:
    """What there is now, and how long it took."""

    out: str
    files: int
    samples: int
    """Rows in all files."""
    left_out: dict[str, int]
    """Samples without a row because of their content, by reason."""
    embedded: int
    """Samples this command went through; the others were there."""
    seconds: float
    samples_per_second: float
    encoder_samples_per_second: float
    """Of the towers alone, all processes together: the rate if reading, decoding and writing took no time."""
    encoder_share: float
    """Share of the processes' time in which the towers worked."""

    def __str__(self) -> str:
        bad = sum(self.left_out.values())
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in Counter(self.left_out).most_common(5))
        there = f"{self.out}: {self.samples:,} samples in {self.files:,} file{'' if self.files == 1 else 's'}"
        there += f", {bad:,} left out because of their content ({reasons})" if bad else ""
        if not self.embedded:
            return f"{there}; complete, nothing to do"
        return (
            f"{there}; {self.samples_per_second:,.1f} samples/s, the encoder alone {self.encoder_samples_per_second:,.1f} "
            f"(it worked {100 * self.encoder_share:.0f}% of the {format_duration(self.seconds)})"
        )


def embed(loaded: LoadedModel, options: Options, device: torch.device) -> Summary | None:
    """Embeds what is not there yet; the summary on rank 0. Collective.

    Raises:
        ConfigError: options that do not fit the model, shards that are not there.
        UserError: a folder of another model, of other data or of something else; shards that cannot be read.
    """
    layout, modalities = _layout(loaded, options)
    paths: list[str] = []

    def find() -> dict[str, Any]:
        paths.extend(expand_shards(options.data, "--data"))
        return preflight.data_fingerprint(paths)

    preflight.require_equal("the data", find)
    numbers = count_samples_once(paths, ShardCache(), "--data")
    names = [path.rsplit("/", 1)[-1] for path in paths]
    manifest = _manifest(loaded, options, layout, paths, numbers)
    folder = EmbeddingFolder(Path(options.out))
    try:
        plan = on_main(lambda: folder.open(manifest, names, numbers))
        board = WorkQueue()
        decoders = {name: loaded.decoders[name] for name in modalities}
        encoder = Encoder(
            loaded.model.to(device), decoders, device, options.precision, modalities,
            tokens=options.tokens or None, dtype=getattr(torch, options.dtype),
        )  # fmt: skip
        begin = time.perf_counter()
        if plan.todo:
            evaluation = EvaluationDataset(ShardReader(paths, ShardCache(), numbers, max_open=8), decoders)
            about = {"model": manifest["model"]["fingerprint"]}
            _work(plan, board, evaluation, encoder, lambda: Writer(folder.path, layout, about), options)
        if not distributed.is_main():
            return None
        everyone = board.results()
        rows, bad = folder.seal(manifest, plan.parts)
        seconds, done = time.perf_counter() - begin, sum(each["samples"] for each in everyone)
        busy = sum(each["encoder"] for each in everyone)
        return Summary(
            out=options.out,
            files=len(plan.parts),
            samples=rows,
            left_out=dict(bad),
            embedded=int(done),
            seconds=round(seconds, 3),
            samples_per_second=round(done / seconds, 1),
            encoder_samples_per_second=round(sum(e["samples"] / e["encoder"] for e in everyone if e["encoder"]), 1),
            encoder_share=round(busy / (seconds * max(len(everyone), 1)), 4),
        )
    finally:
        folder.close()


def _layout(loaded: LoadedModel, options: Options) -> tuple[Layout, tuple[str, ...]]:
    """The columns that the options ask for. Raises ConfigError for what this model does not have."""
    model, text = loaded.model, loaded.decoders.get("text")
    has = [name for name in model.towers if name in loaded.decoders]
    if options.only and options.only not in has:
        raise ConfigError(f"--only {options.only}: the model has {', '.join(has)}{closest(options.only, has)}")
    modalities = tuple([options.only] if options.only else has)
    if options.caption and text is not None:
        text.caption = options.caption
    several = "text" in modalities and text is not None and text.caption != "txt"
    if options.tokens and several:
        raise ConfigError(
            f"--tokens {options.tokens}: captions in a json field may be several a sample, whose tokens have no column; "
            "add --only image, or take captions from txt"
        )
    dim = model.projection(modalities[0]).out_features
    tokens: dict[str, int] = {}
    for name in modalities if options.tokens else ():
        tower = model.tower(name)
        if options.tokens == "shared" and not tower.pools_mean:
            raise ConfigError(
                f"--tokens shared: the {name} tower does not pool by the mean of its tokens, so they have no place in the "
                "shared space; take --tokens own"
            )
        tokens[name] = dim if options.tokens == "shared" else tower.width
    return Layout(modalities, dim, options.dtype, several, tokens), modalities


def _manifest(loaded: LoadedModel, options: Options, layout: Layout, paths: list[str], numbers: list[int]) -> dict[str, Any]:
    """Whose embeddings, of what; the same on every process. Raises UserError where it is not. Collective."""
    model = dataset.fingerprint_model(loaded)
    preflight.require_equal("the model", model)
    share = -(-sum(numbers) // (SHARES * distributed.world_size())) if distributed.world_size() > 1 else PER_FILE
    text = loaded.decoders.get("text")
    return {
        "format": dataset.FORMAT,
        "complete": False,
        "model": {"fingerprint": model, "from": str(loaded.folder), "step": loaded.step},
        "data": {
            "shards": len(paths),
            "samples": sum(numbers),
            "fingerprint": dataset.fingerprint_json([preflight.data_fingerprint(paths), numbers]),
        },
        "settings": {
            "only": options.only,
            "tokens": options.tokens,
            "dtype": options.dtype,
            "precision": options.precision,
            "caption": text.caption if text is not None and "text" in layout.modalities else "",
        },
        "dim": layout.dim,
        "per_file": options.per_file or max(options.batch_size, min(PER_FILE, share)),
    }


# ---------------------------------------------------------------------------------------------------------------------
# One process


def _work(
    plan: EmbeddingPlan,
    board: WorkQueue,
    evaluation: EvaluationDataset,
    encoder: Encoder,
    write: Callable[[], Writer],
    options: Options,
) -> None:
    """Takes parts until there are none. Rank 0 comes back when all have finished."""
    workers = options.workers if options.workers is not None else _default_workers(encoder.device)
    total = sum(part.samples for part in plan.parts)
    left: dict[str, Counter[str]] = {}
    mine = 0
    writer: Writer | None = None
    with ProgressBar(plan.there, total, board) as shown, eval_mode(encoder.model):
        try:
            jobs = _Jobs(plan, board, options.batch_size)
            with run_workers(evaluation, iter(jobs), workers) as pieces:
                writer = write()  # its thread starts after the workers were forked
                for (part, slots, last), batch in encoder.stream(_batches(jobs, pieces, left)):
                    footer = {"part": part.ranges, "bad": dict(left.pop(part.file, {}))} if last else None
                    writer.put(part.file, batch, footer)
                    mine += slots
                    board.add("samples", slots)
                    board.check()
                    shown.update()
            writer.close()
            writer = None
            board.finish({"samples": mine, "encoder": encoder.seconds})
            if distributed.is_main():
                shown.until_finished()
        except UserError as error:
            board.fail(str(error))
            raise
        except OSError as error:
            said = f"cannot write into {options.out}: {error.strerror or error}; whole files stay, the same command goes on"
            board.fail(said)
            raise UserError(said) from error
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise UserError(f"out of memory: lower --batch-size {options.batch_size}") from error
            raise
        finally:
            if writer is not None:
                writer.close(abandon=True)


class _Jobs:
    """What the workers decode next: a batch of places in a part, from parts that this process takes as it gets to them."""

    def __init__(self, plan: EmbeddingPlan, board: WorkQueue, size: int) -> None:
        self.plan, self.board, self.size = plan, board, size
        self.given: deque[tuple[WorkUnit, int, bool]] = deque()
        """(part, places, whether they are its last) of the jobs handed out and not yet back."""

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        while (at := self.board.add("next", 1) - 1) < len(self.plan.todo):
            part = self.plan.parts[self.plan.todo[at]]
            places = [(shard, i) for shard, first, end in part.ranges for i in range(first, end)]
            for start in range(0, len(places), self.size):
                job = places[start : start + self.size]
                self.given.append((part, len(job), start + self.size >= len(places)))
                yield job


def _batches(
    jobs: _Jobs, pieces: Iterator[Any], left: dict[str, Counter[str]]
) -> Iterator[tuple[tuple[WorkUnit, int, bool], Batch | None]]:
    """What the workers made of the jobs. Raises UserError where a shard cannot be read."""
    for piece in pieces:
        job = jobs.given.popleft()
        if piece.problem:
            raise UserError(piece.problem)
        for bad in piece.bad:
            left.setdefault(job[0].file, Counter())[bad.reason] += 1
        yield job, piece.batch


def _default_workers(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # the towers have the cores
    return max(1, min(16, len(os.sched_getaffinity(0)) // distributed.local_world_size() - 1))


# ---------------------------------------------------------------------------------------------------------------------
# The command


def run(args: argparse.Namespace) -> int:
    """One process of `clipfuse embed`; the exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are the parallelism
    chosen = options.build_options(args)
    try:
        with raise_on_stop_signals():
            preflight.check_launcher()
            preflight.watch_parent()
            distributed.setup()
            distributed.pin_threads(0)
            summary = embed(load_model(args.run), chosen, distributed.device())
            if summary is not None:
                print(json.dumps(asdict(summary)) if args.json else summary, flush=True)
            return DONE
    except EarlyStop as stop:
        log_info(f"stopped by {stop}; the files that are whole stay, the same command goes on")
        return STOPPED
    finally:
        distributed.shutdown()


def main(argv: list[str] | None = None) -> int:
    """Entry point for launchers."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.embedding.job", description=__doc__)
    options.add_arguments(parser)
    return run_with_exit_code(lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
