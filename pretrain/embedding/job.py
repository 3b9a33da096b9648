"""Embed a whole data set into files, on one process or many.

    python -m pretrain.embedding.job RUN --data SHARDS --out DIR

    embed(load_model("runs/first"), Options(["shards"], "embeddings"), device) -> Summary

`clipfuse embed` and torchrun start this module once per process. Worker processes read and decode, this process encodes, a
thread writes; dataset.py knows which files there are to write. Exit codes are those of all commands: 75 after SIGTERM, SIGINT
or SIGUSR1, and the same command resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pretrain import model as models
from pretrain.checkpoints.loading import LoadedModel, load_model
from pretrain.data.batch import Batch, allow_missing
from pretrain.data.captions import TXT
from pretrain.data.config import count_samples_once, list_shards_once
from pretrain.data.eval_loader import count_caption_lines, describe_lines
from pretrain.data.shards.cache import ShardCache
from pretrain.data.shards.reader import ShardReader
from pretrain.data.worker import EvaluationDataset
from pretrain.data.worker_pool import run_workers
from pretrain.embedding import options
from pretrain.embedding.dataset import EmbeddingFolder, EmbeddingPlan, WorkUnit
from pretrain.embedding.encoder import Encoder, eval_mode
from pretrain.embedding.manifest import build_layout, build_manifest
from pretrain.embedding.options import Options
from pretrain.embedding.parquet import Writer
from pretrain.embedding.summary import Summary
from pretrain.embedding.work_queue import ProgressBar, WorkQueue
from pretrain.errors import UserError
from pretrain.printable import format_count
from pretrain.runtime import distributed, performance, preflight
from pretrain.runtime.agree import on_main
from pretrain.runtime.console import log_info
from pretrain.runtime.entrypoint import DONE, STOPPED, EarlyStop, raise_on_stop_signals, run_with_exit_code
from pretrain.runtime.memory import is_out_of_memory


def embed(loaded: LoadedModel, options: Options, device: torch.device) -> Summary | None:
    """Write the missing files of the embedding folder, and return a summary on rank 0. Collective.

    Args:
        loaded: the model.
        options: which data, and how.
        device: where the towers run.

    Raises:
        ConfigError: options do not fit the model, or shards are not there.
        UserError: the folder holds embeddings of another model or of other data, or other files; shards cannot be read; or no
            sample can be used.
    """
    layout, modalities = build_layout(loaded, options)
    paths: list[str] = []

    def fingerprint_data() -> dict[str, Any]:
        paths.extend(list_shards_once(list(options.data), "--data"))
        return preflight.data_fingerprint(paths)

    preflight.require_equal("the data", fingerprint_data)
    counts = count_samples_once(paths, ShardCache(), "--data")
    if not sum(counts):
        raise UserError(f"--data {' '.join(options.data)} holds no samples")
    names = [path.rsplit("/", 1)[-1] for path in paths]
    manifest = build_manifest(loaded, options, layout, paths, counts)
    folder = EmbeddingFolder(Path(options.out))
    try:
        plan = on_main(lambda: folder.open(manifest, names, counts))
        if plan.pending and manifest["settings"]["caption"] == TXT:
            on_main(lambda: _report_lines(paths, counts))
        queue = WorkQueue()
        decoders = {name: loaded.decoders[name] for name in modalities}
        encoder = Encoder(
            loaded.model.to(device), decoders, device, options.precision, modalities,
            tokens=options.tokens or None, dtype=getattr(torch, options.dtype),
        )  # fmt: skip
        begin = time.perf_counter()
        if plan.pending:
            read = allow_missing(decoders, train=False) if manifest["settings"]["incomplete"] else decoders
            evaluation = EvaluationDataset(ShardReader(paths, ShardCache(), counts, max_open=8), read, least=1)
            about = {"model": manifest["model"]["fingerprint"]}
            _embed_pending(plan, queue, evaluation, encoder, lambda: Writer(folder.path, layout, about), options)
        if not distributed.is_main():
            return None
        results = queue.results()
        rows, bad, missing = folder.seal(manifest, plan.units)
        if not rows:
            folder.remove(plan.units)
            reasons = ", ".join(f"{reason} {n:,}" for reason, n in bad.most_common(5))
            source = f"; captions were read from {manifest['settings']['caption']}: --caption names another field"
            raise UserError(
                f"of {format_count(sum(counts), 'sample')} none can be embedded ({reasons}), so nothing was written"
                f"{source if bad['no caption'] else ''}"
            )
        seconds, done = time.perf_counter() - begin, sum(result["samples"] for result in results)
        busy = sum(result["encoder"] for result in results)
        return Summary(
            out=options.out,
            files=len(plan.units),
            samples=rows,
            left_out=dict(bad),
            missing=dict(missing),
            embedded=int(done),
            seconds=round(seconds, 3),
            samples_per_second=round(done / seconds, 1),
            encoder_samples_per_second=round(sum(r["samples"] / r["encoder"] for r in results if r["encoder"]), 1),
            encoder_share=round(busy / (seconds * max(len(results), 1)), 4),
        )
    finally:
        folder.close()


def _report_lines(paths: list[str], counts: list[int]) -> None:
    """Log that a KEY.txt of several lines is read as one caption, where the data holds some."""
    reader = ShardReader(paths, ShardCache(), counts)
    probed = count_caption_lines(reader, counts)
    reader.close()
    if probed.with_lines:
        log_info(describe_lines(probed, paths[0], are_split=False))


# ---------------------------------------------------------------------------------------------------------------------
# The work of one process


def _embed_pending(
    plan: EmbeddingPlan,
    queue: WorkQueue,
    evaluation: EvaluationDataset,
    encoder: Encoder,
    write: Callable[[], Writer],
    options: Options,
) -> None:
    """Embed work units from the queue until none is left. Rank 0 returns when all processes have finished.

    Args:
        plan: all work units, and which are pending.
        queue: shared by all processes.
        evaluation: reads and decodes the samples, in the workers.
        encoder: encodes the batches.
        write: starts the writer.
        options: of the command.

    Raises:
        UserError: on every process, if one cannot read or write, or is out of memory.
    """
    workers = options.workers if options.workers is not None else _choose_worker_count(encoder.device)
    total = sum(unit.samples for unit in plan.units)
    skipped: dict[str, Counter[str]] = {}
    missing: dict[str, Counter[str]] = {}
    embedded = 0
    writer: Writer | None = None
    with ProgressBar(plan.samples_done, total, queue) as progress, eval_mode(encoder.model):
        try:
            jobs = _Jobs(plan, queue, options.batch_size)
            with run_workers(evaluation, iter(jobs), workers) as partial_batches:
                writer = write()  # its thread starts after the workers were forked
                for (unit, samples, is_last), batch in encoder.stream(_read_batches(jobs, partial_batches, skipped)):
                    if batch is not None:
                        counts = {name: int((~present).sum()) for name, present in batch.present.items()}
                        missing.setdefault(unit.file, Counter()).update(counts)
                    footer = None
                    if is_last:
                        footer = {"part": unit.ranges, "bad": dict(skipped.pop(unit.file, {}))}
                        footer |= {"missing": dict(lacks)} if (lacks := +missing.pop(unit.file, Counter())) else {}
                    writer.put(unit.file, batch, footer)
                    embedded += samples
                    queue.add("samples", samples)
                    queue.check()
                    progress.update()
            writer.close()
            writer = None
            queue.finish({"samples": embedded, "encoder": encoder.seconds})
            if distributed.is_main():
                progress.wait_for_others()
        except UserError as error:
            queue.fail(str(error))
            raise
        except OSError as error:
            reason = error.strerror or error
            message = f"cannot write into {options.out}: {reason}; complete files stay, and the same command resumes"
            queue.fail(message)
            raise UserError(message) from error
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise UserError(f"out of memory: lower --batch-size {options.batch_size}") from error
            raise
        finally:
            if writer is not None:
                writer.close(abandon=True)


class _Jobs:
    """The batches that the workers decode, as lists of (shard, sample).

    This process takes a work unit from the queue when the workers need its first batch.
    """

    def __init__(self, plan: EmbeddingPlan, queue: WorkQueue, size: int) -> None:
        self.plan, self.queue, self.size = plan, queue, size
        self.in_progress: deque[tuple[WorkUnit, int, bool]] = deque()
        """(work unit, samples, whether they are its last) of the batches that the workers have not returned yet."""

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        while (index := self.queue.add("next", 1) - 1) < len(self.plan.pending):
            unit = self.plan.units[self.plan.pending[index]]
            samples = [(shard, i) for shard, first, end in unit.ranges for i in range(first, end)]
            for start in range(0, len(samples), self.size):
                job = samples[start : start + self.size]
                self.in_progress.append((unit, len(job), start + self.size >= len(samples)))
                yield job


def _read_batches(
    jobs: _Jobs, partial_batches: Iterator[Any], skipped: dict[str, Counter[str]]
) -> Iterator[tuple[tuple[WorkUnit, int, bool], Batch | None]]:
    """Yield the decoded batch of each job; None if all its samples are bad.

    Each comes with (work unit, samples, whether they are its last).

    Counts the skipped samples of each file, by reason, in `skipped`. Raises UserError where a shard cannot be read.
    """
    for partial in partial_batches:
        job = jobs.in_progress.popleft()
        if partial.problem:
            raise UserError(partial.problem)
        for sample in partial.bad:
            skipped.setdefault(job[0].file, Counter())[sample.reason] += 1
        yield job, partial.batch


def _choose_worker_count(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # the towers use the cores
    return max(1, min(16, len(os.sched_getaffinity(0)) // distributed.local_world_size() - 1))


# ---------------------------------------------------------------------------------------------------------------------
# The command


def run(args: argparse.Namespace) -> int:
    """Run one process of `clipfuse embed` and return its exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are the parallelism
    parsed = options.build_options(args)
    try:
        with raise_on_stop_signals():
            preflight.check_launcher()
            preflight.watch_parent()
            performance.prepare_environment(performance.PerformanceConfig())  # before CUDA initializes, and the run is read
            distributed.setup()
            distributed.pin_threads(0)
            loaded = load_model(args.run)
            with models.on_device(loaded.model, loaded.config, distributed.device()):
                summary = embed(loaded, parsed, distributed.device())
            if summary is not None:
                print(json.dumps(asdict(summary)) if args.json else summary, flush=True)
            return DONE
    except EarlyStop as stop:
        log_info(f"stopped by {stop}; complete files stay, and the same command resumes")
        return STOPPED
    finally:
        distributed.shutdown()


def main(argv: list[str] | None = None) -> int:
    """Run one process that a launcher started, and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.embedding.job", description=__doc__)
    options.add_arguments(parser)
    return run_with_exit_code(lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
