"""Measures remote shards: how fast one is fetched over a slow network, and what a run reads before its first batch.

    python -m tests.bench.remote

A server on this machine answers each request after a delay, at a limited rate for each connection, as object stores do. Prints
one JSON line of fetching (MB/s by number of connections) and one of the start with 1e5 shards and a manifest: seconds to the
first batch of the order, requests, bytes, and memory in MB above what the imports need.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
import time
from http.server import BaseHTTPRequestHandler

from pretrain.data.order import Order, ShardSource
from pretrain.data.shards import counts
from pretrain.data.shards.cache import ShardCache
from pretrain.data.shards.paths import count_samples, expand_shards
from tests.support import read_peak_mib
from tests.support.range_server import RangeServer

LATENCY = 0.05
"""Seconds before the first byte of an answer."""

RATE = 20e6
"""Bytes per second of one connection."""


class SlowServer(RangeServer):
    """Answers after LATENCY, at RATE bytes per second."""

    def send(self, handler: BaseHTTPRequestHandler, body: bytes, asked: tuple[int, int] | None, size: int) -> None:
        """Send a correct response after the time that it would take."""
        time.sleep(LATENCY + len(body) / RATE)
        super().send(handler, body, asked, size)


def build_shard(megabytes: int) -> bytes:
    """Return a tar with one member of so many MB."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo("0.jpg")
        info.size = megabytes * 10**6
        tar.addfile(info, io.BytesIO(bytes(info.size)))
    return out.getvalue()


def measure_fetching(megabytes: int = 128) -> None:
    """Fetch a shard with several numbers of connections."""
    rates = {}
    with SlowServer() as server:
        server.files = {"a.tar": build_shard(megabytes)}
        for connections in (1, 2, 4, 8, 16):
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                ShardCache(folder, connections=connections).fetch(f"{server.url}/a.tar")
                rates[str(connections)] = round(megabytes / (time.perf_counter() - start), 1)
    limit = RATE / 1e6
    figures = {"bench": "remote", "latency_seconds": LATENCY, "limit_of_a_connection": limit, "mb_per_second": rates}
    print(json.dumps(figures))


def measure_start(shards: int = 100_000) -> None:
    """Count remote shards by their manifest, and locate the first batch."""
    imported = read_peak_mib()
    with SlowServer() as server, tempfile.TemporaryDirectory() as folder:
        manifest = {f"{i:06d}.tar": [10_000, 10**9, "0" * 32] for i in range(shards)}
        server.files = {counts.MANIFEST: json.dumps(manifest).encode()}
        start = time.perf_counter()
        paths = expand_shards(f"{server.url}/{{000000..{shards - 1:06d}}}.tar")
        order = Order([ShardSource(count_samples(paths, ShardCache(folder)))], seed=0)
        order.locate(order.positions(0, 32_768))
        figures = {
            "bench": "remote start",
            "shards": shards,
            "samples": order.epoch_size,
            "first_batch_seconds": round(time.perf_counter() - start, 2),
            "requests": len(server.requests),
            "bytes": sum(request.sent for request in server.requests),
            "memory_mb": round(read_peak_mib() - imported, 1),
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    measure_start()
    measure_fetching()
