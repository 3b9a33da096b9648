"""Curation: shards with fewer samples, or a list of those that go, and a report of what went and why.

    options.py          the settings: which rules apply
    scan.py             one pass over a shard: keys, captions, and the rules of single samples
    selection.py        all rules, in order: which sample goes by which reason
    near_duplicates.py  pairs of images that are nearly equal, and which of them stays
    clusters.py         k-means, and the balance among clusters
    writer.py           writes what stays of a shard
    report.py           report.json, and the table on the console

A filtered folder contains these files:

    OUT/NAME.tar            what stays of the shard NAME: the same keys, the same bytes of each member, in the same order
    OUT/NAME_stats.json     number of samples, bytes, and what went and why, as `clipfuse data pack` writes it
    OUT/filter-plan.json    shards, settings and embeddings: a stopped run goes on only if they are equal
    OUT/report.json         appears when all is done
    OUT/skip.txt            with list_only, instead of the shards: the samples that go, for data.skip
    OUT/.filter/            intermediate results, removed at the end but for the decisions

Every file appears when it is complete. A killed run repeats at most a shard, or one block of the search for near-duplicates.
Embeddings are mapped into memory from disk; shards are read one at a time, by each process. selection.py and near_duplicates.py
say what is in memory. May import the rest of `pretrain.data`, `pretrain.runtime` and `pretrain.errors`; no torch.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pretrain.data.filter.clusters import Progress
from pretrain.data.filter.options import FilterOptions
from pretrain.data.filter.report import REPORT, FilterReport
from pretrain.data.filter.scan import load_scan, scan_shard
from pretrain.data.filter.selection import Embeddings, Selection, Stage, select
from pretrain.data.filter.writer import add_results, list_shard, read_result, write_shard
from pretrain.data.job_pool import run_jobs
from pretrain.data.pack.writer import ShardResult
from pretrain.data.shards.names import find_new_names, name_shard
from pretrain.data.shards.reader import ShardReader
from pretrain.data.shards.urls import is_remote
from pretrain.errors import ConfigError, UserError
from pretrain.runtime import files

PLAN, LIST, WORK = "filter-plan.json", "skip.txt", ".filter"
_FEW_SHARDS = 8  # below this, starting processes takes longer than the work


class Source(Protocol):
    """What the filter needs of pretrain.embedding.aligned.EmbeddingSource."""

    def describe(self) -> dict[str, Any]: ...

    def write(self, keys: np.ndarray, out: Path, progress: Progress) -> None: ...


def _no_stage(name: str) -> Any:
    return nullcontext(lambda done, total: None)


def filter_shards(
    paths: Sequence[str],
    out: Path,
    options: FilterOptions,
    *,
    source: Source | None = None,
    load_embeddings: Callable[[Path], Embeddings] | None = None,
    held_out: Sequence[str] = (),
    workers: int | None = None,
    stage: Stage = _no_stage,
) -> FilterReport:
    """Write what the rules leave of some shards into a folder. A run that was stopped goes on when it is started again.

    Args:
        paths: shards, as `expand_shards` returns them.
        out: the folder, created if it does not exist.
        options: the rules.
        source: the embeddings; None where no rule needs any.
        load_embeddings: opens what `source` wrote into a folder.
        held_out: shards whose near-duplicates go. They are not written, and their embeddings must be in `source`.
        workers: processes that read and write shards; None = one per core.
        stage: shows progress.

    Raises:
        ConfigError: settings that do not go together, or other ones than those of the run that began the folder.
        UserError: nothing would stay, shards or embeddings cannot be read, or the disk is full.
    """
    options.check()
    if options.needs_embeddings and (source is None or load_embeddings is None):
        raise ConfigError("--similarity, --keep-best, --duplicates and --clusters need --embeddings")
    if held_out and options.duplicates is None:
        raise ConfigError("--held-out goes with --duplicates: near-duplicates of held-out samples go")
    if out.resolve() in {Path(path).resolve().parent for path in paths if not is_remote(path)}:
        raise ConfigError(f"{out} holds the shards that are read: give another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _lock_folder(out):
            job = _Filtering(list(paths), list(held_out), out, options, workers or os.cpu_count() or 1, stage)
            return job.run(source if options.needs_embeddings else None, load_embeddings)
    except OSError as error:
        raise UserError(
            f"cannot write into {out}: {error.strerror or error}; what is finished stays, and the same command goes on"
        ) from error


@contextmanager
def _lock_folder(out: Path) -> Iterator[None]:
    """Lock the folder, and remove partial files of a killed run. Raises UserError if another run holds it."""
    with open(out / ".filter.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is filtering into {out} right now") from None
        for partial in [*out.glob(".*.partial"), *(out / WORK).glob(".*.partial")]:
            if partial.is_file():
                partial.unlink(missing_ok=True)
        yield


class _Filtering:
    """One run of the command, in a locked folder."""

    def __init__(
        self, paths: list[str], held_out: list[str], out: Path, options: FilterOptions, workers: int, stage: Stage
    ) -> None:
        self.paths, self.held_out, self.out, self.options, self.stage = paths, held_out, out, options, stage
        self.workers = 1 if len(paths) + len(held_out) < _FEW_SHARDS else min(workers, len(paths) + len(held_out))
        self.names = _name_shards(paths)
        """In keys, of `paths`: as training on them alone has it."""
        self.embedded_names = [*self.names, *_name_shards(held_out)]
        """In the keys of embeddings, held-out shards last: where both have the same names, as one `clipfuse embed` of all."""
        if set(self.names) & set(self.embedded_names[len(paths) :]):
            self.embedded_names = _name_shards([*paths, *held_out])
        self.work = out / WORK

    def run(self, source: Source | None, load_embeddings: Callable[[Path], Embeddings] | None) -> FilterReport:
        """Do what is left to do, and return the report."""
        settings = self._load_or_write_plan(source)
        self.work.mkdir(exist_ok=True)
        decided = self._load_selection() or self._select(source, load_embeddings)
        selection, counts = decided
        parts = np.split(selection.reasons, np.cumsum(counts[: len(self.paths)])[:-1])
        results = self._list(selection, parts) if self.options.list_only else self._write(selection, parts)
        report = self._build_report(selection, counts, results, settings)
        files.write_json(self.out / REPORT, report.as_dict())
        for folder in ("scan", "embeddings", "pairs"):
            shutil.rmtree(self.work / folder, ignore_errors=True)
        return report

    # -- the plan

    def _load_or_write_plan(self, source: Source | None) -> dict[str, Any]:
        """Write filter-plan.json, or compare it with what an earlier run wrote. Raises ConfigError, UserError."""
        plan = {
            "shards": [_identify(path) for path in self.paths],
            "held_out": [_identify(path) for path in self.held_out],
            "settings": self.options.describe(),
            "embeddings": source.describe() if source is not None else None,
        }
        plan = json.loads(json.dumps(plan))
        path = self.out / PLAN
        if not path.exists():
            others = sorted(p.name for p in self.out.iterdir() if not p.name.startswith("."))
            if others:
                raise ConfigError(f"{self.out} holds other files ({others[0]}): give a folder of its own")
            files.write_json(path, plan)
            return dict(plan["settings"])
        try:
            old = files.read_json_object(path)
            differences = [name for name in ("shards", "held_out", "embeddings") if old[name] != plan[name]]
            options = [
                f"--{name.replace('_', '-')} {old['settings'].get(name)}, now {value}"
                for name, value in plan["settings"].items()
                if old["settings"].get(name) != value
            ]
        except (KeyError, AttributeError, ValueError) as error:
            raise UserError(f"{path} is not the plan of a filtered folder: give another folder") from error
        if options or differences:
            other = {"shards": "other shards", "held_out": "other held-out shards", "embeddings": "other embeddings"}
            what = "; ".join(options) or " and ".join(other[name] for name in differences)
            raise ConfigError(f"{self.out} was begun with other settings ({what}): give another folder, or remove it")
        return dict(plan["settings"])

    # -- the decisions

    def _select(
        self, source: Source | None, load_embeddings: Callable[[Path], Embeddings] | None
    ) -> tuple[Selection, np.ndarray]:
        """Scan the shards, lay out embeddings and apply the rules; save the decisions.

        Returns the selection, and the number of samples of each shard, held-out ones last. Raises UserError.
        """
        scans = [load_scan(path) for path in self._scan()]
        own, embeddings = scans[: len(self.paths)], None
        counts = np.array([len(scan.keys) for scan in scans])
        samples = int(counts[: len(own)].sum())
        if samples == 0:
            raise UserError(f"SHARDS: no samples in {self.paths[0]}")
        if source is not None and load_embeddings is not None:
            folder = self.work / "embeddings"
            if not folder.exists():
                with self.stage("reading embeddings") as progress:
                    source.write(np.concatenate([scan.keys for scan in scans]), folder, progress)
            embeddings = load_embeddings(folder)
            self._check_shards_of_same_name(embeddings, counts)
        selection = select(own, self.options, embeddings, int(counts.sum()) - samples, self.work / "pairs", self.stage)
        if not (selection.reasons == 0).any():
            gone = np.bincount(selection.reasons, minlength=len(selection.names))
            worst = int(gone.argmax())
            seen = selection.facts.get("similarity")
            hint = f"; similarities are {seen['0%']:.3f} to {seen['100%']:.3f}, half above {seen['50%']:.3f}" if seen else ""
            self._forget_plan()
            raise UserError(
                f"no sample is left of {samples:,}: {gone[worst]:,} go by {selection.names[worst]!r}{hint}; nothing was written"
            )
        with files.replace_atomically(self.work / "selection.npz") as partial, open(partial, "wb") as file:
            about = np.frombuffer(json.dumps([selection.names, selection.facts]).encode(), dtype=np.uint8)
            np.savez(file, reasons=selection.reasons, keepers=selection.keepers, counts=counts, about=about)
        return selection, counts

    def _check_shards_of_same_name(self, embeddings: Embeddings, counts: np.ndarray) -> None:
        """Refuse embeddings whose keys do not tell a shard from a held-out one of the same name. Raises UserError."""
        starts = np.concatenate(([0], np.cumsum(counts)))
        for number, name in enumerate(self.names):
            has_vector = embeddings.has_vector[starts[number] : starts[number + 1]]
            if self.embedded_names[number] != name and len(has_vector) and not has_vector.any():
                self._forget_plan()
                raise UserError(
                    f"SHARDS and --held-out both have a shard {name}: embed them by one command, whose keys tell them apart "
                    "(clipfuse embed MODEL --data 'SHARDS::HELD-OUT' --out FOLDER)"
                )

    def _forget_plan(self) -> None:
        """Remove what the run has written, so that the user can try again with other settings."""
        shutil.rmtree(self.work, ignore_errors=True)
        (self.out / PLAN).unlink(missing_ok=True)

    def _load_selection(self) -> tuple[Selection, np.ndarray] | None:
        """Return the decisions that an earlier run saved, or None."""
        try:
            with np.load(self.work / "selection.npz") as arrays:
                names, facts = json.loads(arrays["about"].tobytes())
                return Selection(arrays["reasons"], names, arrays["keepers"], facts), arrays["counts"]
        except FileNotFoundError:
            return None

    def _scan(self) -> list[Path]:
        """Scan all shards that have not been, and return the files of all."""
        folder = self.work / "scan"
        folder.mkdir(exist_ok=True)
        outs = [folder / f"{number:06d}.npz" for number in range(len(self.embedded_names))]
        jobs = []
        for number, path in enumerate([*self.paths, *self.held_out]):
            if not outs[number].exists():
                options = self.options if number < len(self.paths) else None
                name = self.names[number] if options is not None else self.embedded_names[number]
                jobs.append((number, (path, name, self.embedded_names[number], options, outs[number])))
        with self.stage("reading captions" if self.options.reads_captions else "reading keys") as progress:
            done = len(outs) - len(jobs)
            for _ in run_jobs(scan_shard, iter(jobs), self.workers):
                done += 1
                progress(done, len(outs))
        return outs

    # -- the output

    def _write(self, selection: Selection, parts: list[np.ndarray]) -> list[ShardResult]:
        """Write the shards that an earlier run did not finish, and return the results of all."""
        results: dict[int, ShardResult] = {}
        jobs = []
        for number, reasons in enumerate(parts):
            path = self.out / f"{self.names[number]}.tar"
            finished = read_result(path, len(reasons))
            if finished is None:
                jobs.append((number, (self.paths[number], self.names[number], reasons, selection.names, path)))
            else:
                results[number] = finished
        with self.stage("writing shards") as progress:
            for number, result in run_jobs(write_shard, iter(jobs), self.workers):
                results[number] = result
                progress(len(results), len(self.paths))
        return [results[number] for number in range(len(self.paths))]

    def _list(self, selection: Selection, parts: list[np.ndarray]) -> list[ShardResult]:
        """Write the list of the samples that go, shard by shard, and return the results."""
        results: list[ShardResult] = []
        with (
            self.stage("writing the list") as progress,
            files.replace_atomically(self.out / LIST) as partial,
            open(partial, "w", encoding="utf-8") as file,
        ):
            for number, reasons in enumerate(parts):
                result, lines = list_shard(self.paths[number], self.names[number], reasons, selection.names)
                file.writelines(f"{line}\n" for line in lines)
                results.append(result)
                progress(len(results), len(self.paths))
        return results

    def _build_report(
        self, selection: Selection, counts: np.ndarray, results: list[ShardResult], settings: dict[str, Any]
    ) -> FilterReport:
        gone, examples = add_results(results)
        samples = len(selection.reasons)
        removed = {
            reason: {"count": count, "share": count / samples, "examples": examples.get(reason, [])}
            for reason, count in gone.most_common()
        }
        for reason in removed:
            if reason in selection.names:
                self._name_keepers(removed[reason], selection, counts, selection.names.index(reason))
        return FilterReport(
            str(self.out),
            len(self.paths),
            samples,
            sum(result.written for result in results),
            sum(result.written > 0 for result in results),
            removed,
            selection.facts,
            settings,
            str(self.out / LIST) if self.options.list_only else "",
        )

    def _name_keepers(self, entry: dict[str, Any], selection: Selection, counts: np.ndarray, reason: int) -> None:
        """Say of the examples of near-duplicates which samples stay in their place."""
        first = np.flatnonzero(selection.reasons == reason)[: len(entry["examples"])]
        keepers = selection.keepers[first]
        if (keepers < 0).any():
            return
        reader = ShardReader([*self.paths, *self.held_out])
        starts = np.concatenate(([0], np.cumsum(counts)))
        for i, keeper in enumerate(keepers.tolist()):
            shard = int(np.searchsorted(starts, keeper, side="right")) - 1
            name = self.names[shard] if shard < len(self.names) else self.embedded_names[shard]
            entry["examples"][i] += f" (of {name}/{reader.key(shard, keeper - int(starts[shard])).partition('/')[2]})"
        reader.close()


def _name_shards(paths: Sequence[str]) -> list[str]:
    """Return the names of shards in keys, of a run that reads these and no others."""
    new_names = find_new_names(paths)
    return [new_names.get(i) or name_shard(path) for i, path in enumerate(paths)]


def _identify(path: str) -> list[Any]:
    """Return the path of a shard, with its size and time where it is local."""
    if is_remote(path):
        return [path]
    stat = os.stat(path)
    return [os.path.abspath(path), stat.st_size, stat.st_mtime_ns]
