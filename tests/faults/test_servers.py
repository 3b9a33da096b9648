"""Servers with faults, S3 and http, against the same shards on the disk; `python -m tests.faults servers` tries all of them."""

import itertools
from pathlib import Path

import pytest

from pretrain.data.shards.paths import expand_shards
from tests.faults import servers
from tests.support import Small, read_losses, read_sample_keys, run_clipfuse
from tests.support.fault_proxy import FAULTS, Exchange

# botocore, aiohttp and urllib leave closing of connections to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

S3_FAULTS = ("500", "reset half-way", "corrupted bytes")


@pytest.mark.parametrize(("kind", "names"), [("http", tuple(FAULTS)), ("s3", S3_FAULTS)])
def test_reading_goes_on_or_stops_with_one_line(kind: servers.Kind, names: tuple[str, ...], tmp_path: Path) -> None:
    if kind == "s3":
        pytest.importorskip("moto.server")
        pytest.importorskip("s3fs")
    rows = list(servers.try_faults(kind, tmp_path, names, seconds=1.5))
    problems = {(row.fault, row.frequency): problem for row in rows if (problem := servers.find_problem(row))}
    assert not problems, [row for row in rows if (row.fault, row.frequency) in problems]
    stopped = {row.fault for row in rows if row.outcome.error}
    assert stopped >= {"500", "reset half-way", "corrupted bytes", "credentials expire"}


@pytest.mark.parametrize("name", ["short body", "Content-Length too small", "another file"])
def test_a_part_that_is_short_is_noticed_without_a_digest(name: str, tmp_path: Path) -> None:
    """Where no manifest lies beside the shards, a hole within an image would go unnoticed for ever."""
    for start in (0, servers.PART_BYTES):
        with servers.open_bench("http", tmp_path / f"{start}", has_manifest=False) as bench:
            spoiled: list[str] = []

            def spoil_once(exchange: Exchange, start: int = start, spoiled: list[str] = spoiled) -> bool:
                part = f"bytes={start}-{start + servers.PART_BYTES - 1}"
                if spoiled or not exchange.is_shard or exchange.handler.headers["Range"] != part:
                    return False
                spoiled.append(part)
                FAULTS[name](exchange)
                return True

            bench.proxy.fault = spoil_once
            outcome = bench.read_all()
        assert spoiled
        assert (outcome.error, outcome.lost, outcome.is_in_order) == ("", 0, True), start


def test_training_through_faults_of_s3_loses_no_sample(small: Small, tmp_path: Path) -> None:
    """Every second answer is one of four faults; losses and keys are those of the run on local files."""
    pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    names = ("500", "reset half-way", "short body", "Content-Length too small")
    shards = {Path(path).name: Path(path).read_bytes() for path in expand_shards(small.train)}
    number, faults = itertools.count(), itertools.count()

    def spoil(exchange: Exchange) -> bool:
        if not exchange.is_shard or next(number) % 2:
            return False
        FAULTS[names[next(faults) % len(names)]](exchange)
        return True

    with servers.open_bench("s3", tmp_path / "bench", shards) as bench:
        bench.proxy.fault = spoil
        for name, train in (("local", small.train), ("s3", "s3://shards/train-*.tar")):
            settings = small.settings(tmp_path / name, "train.steps=3", "data.workers=1", "train.audit=true")
            words = [*settings, f"data.train={train}", f"data.cache={tmp_path / 'cache'}"]
            run_clipfuse("pretrain", "scenes", *words, cwd=tmp_path)
    assert next(faults) >= len(names)
    assert read_sample_keys(tmp_path / "s3") == read_sample_keys(tmp_path / "local")
    assert read_losses(tmp_path / "s3") == read_losses(tmp_path / "local")
