"""Shards on servers with faults, S3 and http, against the same shards read from the disk.

Each fault comes in some answers, or in all. Reading must go on with no sample lost and the order unchanged, or stop with one
line that names the shard and the cause.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from pretrain.data.shards import cache, counts, retries, stores, transfer, urls
from pretrain.data.shards.cache import ShardCache
from pretrain.data.shards.paths import count_samples
from pretrain.data.shards.reader import ShardReader
from pretrain.errors import UserError
from tests.support.fault_proxy import FAULTS, Exchange, FaultProxy
from tests.support.random_shards import build_shard
from tests.support.range_server import RangeServer

Kind = Literal["s3", "http"]
Fault = Callable[[Exchange], None]
PART_BYTES = 20_000
SHARDS, SAMPLES = 3, 8
FIRST_KEY, SECOND_KEY = "AKIAIOSFODNN7FIRST12", "AKIAIOSFODNN7SECOND1"
EXPIRED = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>ExpiredToken</Code>'
    b"<Message>The provided token has expired.</Message></Error>"
)


@dataclass(frozen=True)
class Outcome:
    """What became of reading all samples through a server with a fault."""

    read: int
    """Samples that came."""
    lost: int
    """Samples that did not come although reading went on, or came with other content."""
    is_in_order: bool
    requests: int
    error: str
    """The line that reading stopped with; empty where it went on to the end."""


class Bench:
    """A server of one kind with shards, behind a proxy.

    Attributes:
        urls: of the shards.
        credentials: the file from which S3 gets its keys.
    """

    def __init__(self, proxy: FaultProxy, prefix: str, shards: dict[str, bytes], folder: Path) -> None:
        self.proxy, self.shards, self.folder = proxy, shards, folder
        self.urls = [f"{prefix}/{name}" for name in shards]
        self.credentials = folder / "credentials"
        self._caches = 0

    def use_key(self, key: str) -> None:
        """Write an access key into the file of credentials, as a tool that refreshes tokens does."""
        self.credentials.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = secret\n")

    def read_all(self, seconds: float = 20.0) -> Outcome:
        """Read all samples in order into a cache of their own. seconds: of one fetch."""
        self._caches += 1
        shards = ShardCache(str(self.folder / f"cache-{self._caches}"), seconds=seconds)
        expected = [sample for shard in self.shards.values() for sample in _list_samples(shard)]
        before, samples, error = len(self.proxy.requests), [], ""
        try:
            counted = count_samples(self.urls, shards)
            reader = ShardReader(self.urls, shards, counted)
            for shard, count in enumerate(counted):
                for i in range(count):
                    sample = reader.read(shard, i)
                    samples.append((sample.key.rpartition("/")[2], *(sample.members[name] for name in ("jpg", "txt"))))
        except UserError as stop:
            error = str(stop)
        wanted = expected if not error else expected[: len(samples)]
        lost = len([sample for sample in wanted if sample not in samples])
        return Outcome(len(samples), lost, samples == wanted, len(self.proxy.requests) - before, error)


def _list_samples(shard: bytes) -> list[tuple[str, bytes, bytes]]:
    """Return (key, jpg, txt) of each sample by Python's own reader."""
    with tarfile.open(fileobj=io.BytesIO(shard)) as tar:
        contents = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    return [(f"{i:04d}", contents[f"{i:04d}.jpg"], contents[f"{i:04d}.txt"]) for i in range(len(contents) // 2)]


@contextmanager
def open_bench(kind: Kind, folder: Path, shards: dict[str, bytes] | None = None, has_manifest: bool = True) -> Iterator[Bench]:
    """Start a server with shards, and a proxy before it. Waits are short inside the block; no other credentials are used.

    Args:
        shards: contents by name; None = some small ones.
        has_manifest: whether an http server has a manifest beside the shards.
    """
    shards = shards or {f"{i}.tar": build_shard(i, SAMPLES, 9000) for i in range(SHARDS)}
    folder.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retries, "RETRY_SECONDS", (0.0, 0.0, 0.0))
        patch.setattr(transfer, "PART_BYTES", PART_BYTES)
        patch.setattr(urls, "IDLE_SECONDS", 0.5)
        patch.setattr(counts, "_answers", {})
        with _serve_s3(patch, folder, shards) if kind == "s3" else _serve_http(folder, shards, has_manifest) as bench:
            yield bench


@contextmanager
def _serve_http(folder: Path, shards: dict[str, bytes], has_manifest: bool) -> Iterator[Bench]:
    """Serve shards over HTTP, with the manifest that `clipfuse data check --manifest` writes: it holds their digests."""
    digests = {name: hashlib.blake2b(shard, digest_size=16).hexdigest() for name, shard in shards.items()}
    manifest = {name: [len(_list_samples(shard)), len(shard), digests[name]] for name, shard in shards.items()}
    with RangeServer() as server, FaultProxy(server.url) as proxy:
        server.files = {**shards, **({"shards.json": json.dumps(manifest).encode()} if has_manifest else {})}
        yield Bench(proxy, proxy.url, shards, folder)
        proxy.released.set()


@contextmanager
def _serve_s3(patch: pytest.MonkeyPatch, folder: Path, shards: dict[str, bytes]) -> Iterator[Bench]:
    """Serve shards by an S3 server, which states the MD5 of each as its ETag."""
    import boto3
    import fsspec.config
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        with FaultProxy(f"http://{host}:{port}") as proxy:
            bench = Bench(proxy, "s3://shards", shards, folder)
            for name in [name for name in os.environ if name.startswith("AWS_")]:
                patch.delenv(name)
            for name, value in {
                "AWS_ENDPOINT_URL": proxy.url,
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_CONFIG_FILE": str(folder / "no-config"),
                "AWS_SHARED_CREDENTIALS_FILE": str(bench.credentials),
                "AWS_EC2_METADATA_DISABLED": "true",
                "XDG_CACHE_HOME": str(folder / "cache"),
            }.items():
                patch.setenv(name, value)
            bench.use_key(FIRST_KEY)
            patch.setattr(stores, "_systems", {})
            patch.setattr(cache, "_keyed_buckets", set())
            # Few retries of botocore's own, which wait for seconds: it is ours that are tested.
            config = {"read_timeout": 0.5, "connect_timeout": 5, "retries": {"total_max_attempts": 1}}
            patch.setitem(fsspec.config.conf, "s3", {"config_kwargs": config})
            client = boto3.client("s3")
            client.create_bucket(Bucket="shards")
            for name, shard in shards.items():
                client.put_object(Bucket="shards", Key=name, Body=shard)
            yield bench
            proxy.released.set()
    finally:
        server.stop()


# ---- faults ----------------------------------------------------------------------------------------------------------


def spoil(proxy: FaultProxy, fault: Fault, every: int) -> None:
    """Let the proxy send a fault in place of each `every`-th answer with a part of a shard; 1: of all."""
    seen = 0

    def decide(exchange: Exchange) -> bool:
        nonlocal seen
        if not exchange.is_shard:
            return False
        seen += 1
        if (seen - 1) % every:
            return False
        fault(exchange)
        return True

    proxy.fault = decide


def expire(bench: Bench, after: int, renew: bool) -> None:
    """Let the first credentials expire after some requests; renew: by then others lie where credentials come from."""

    def decide(exchange: Exchange) -> bool:
        key = exchange.handler.headers.get("Authorization", "")
        if FIRST_KEY not in key and key.startswith("AWS4"):
            return False
        if exchange.number - begin < after:
            return False
        if renew:
            bench.use_key(SECOND_KEY)
        if key.startswith("AWS4"):
            exchange.send(400, EXPIRED)  # as AWS answers
        else:
            exchange.send(403, b"")
        return True

    begin = len(bench.proxy.requests)
    stores._systems.clear()  # they have read the credentials before
    bench.use_key(FIRST_KEY)
    bench.proxy.fault = decide


@dataclass(frozen=True)
class Row:
    """A fault, how often it came, and what became of it."""

    kind: Kind
    fault: str
    frequency: str
    outcome: Outcome


def try_faults(kind: Kind, folder: Path, names: Sequence[str] = tuple(FAULTS), seconds: float = 20.0) -> Iterator[Row]:
    """Yield a row for each fault in every third answer, and in all; and for credentials that expire.

    seconds: how long a fetch may take where all answers are spoiled.
    """
    with open_bench(kind, folder) as bench:
        yield Row(kind, "none", "", bench.read_all())
        for name in names:
            if kind == "s3" and name == "redirect":
                continue  # botocore would go on at an address of AWS, not of this machine
            # Damaged bytes are only noticed in the whole shard, which comes in five parts and is fetched four times at most.
            some = 11 if name == "corrupted bytes" else 3
            for every, frequency in ((some, f"1 answer in {some}"), (1, "all answers")):
                spoil(bench.proxy, FAULTS[name], every)
                yield Row(kind, name, frequency, bench.read_all(20.0 if every > 1 else seconds))
        for renew in (True, False) if kind == "s3" else (False,):
            expire(bench, 6, renew)
            frequency = "after 6 requests" + (", then renewed" if renew else "")
            yield Row(kind, "credentials expire", frequency, bench.read_all())


def find_problem(row: Row) -> str | None:
    """Return what is wrong with an outcome: a sample lost or moved, or an error that is not one line naming the shard."""
    outcome = row.outcome
    if outcome.lost or not outcome.is_in_order:
        return f"{outcome.lost} samples lost"
    if not outcome.error:
        return None if outcome.read == SHARDS * SAMPLES else f"only {outcome.read} samples came"
    if "\n" in outcome.error or not re.search(r"(s3|http)://\S+/\d\.tar", outcome.error):
        return "the error is not one line that names the shard"
    if re.search(r"\.tar: *(,|;|\(|$)", outcome.error):
        return "the error names no cause"
    is_expected = row.frequency == "all answers" or row.fault == "credentials expire"
    return None if is_expected else "a passing fault stopped it"
