"""Servers and networks with faults: a remote shard is read rightly, or one line says why not; nothing damaged stays cached."""

import hashlib
import io
import itertools
import json
import random
import socket
import struct
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pretrain.data.shards import retries, transfer
from pretrain.data.shards.cache import ShardCache
from pretrain.data.shards.paths import count_samples, expand_shards
from pretrain.data.shards.reader import ShardReader
from pretrain.errors import UserError
from tests.support import Small, read_losses, read_sample_keys, run_clipfuse
from tests.support.mutations import BoundedMemory, assert_one_line, count_cases, mutate_bytes
from tests.support.range_server import RangeServer, serve_ranges

# urllib leaves the sockets of bad redirects to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def build_shard(count: int = 8, size: int = 700) -> bytes:
    """Return a tar of `count` samples."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for i in range(count):
            for extension in ("jpg", "txt"):
                info = tarfile.TarInfo(f"{i:04d}.{extension}")
                info.size = size
                tar.addfile(info, io.BytesIO(random.Random(f"{i}.{extension}").randbytes(size)))
    return out.getvalue()


def read_contents(shard: bytes) -> list[bytes]:
    """Return the content of all members."""
    with tarfile.open(fileobj=io.BytesIO(shard)) as tar:
        return [tar.extractfile(member).read() for member in tar]  # type: ignore[union-attr]


SHARD = build_shard()


class Server:
    """An HTTP server on this machine, of which `respond` answers the requests for shards."""

    def __init__(self) -> None:
        self.respond: Callable[[BaseHTTPRequestHandler], None] = send
        self.requests: list[str] = []
        self.released = threading.Event()
        """Set when stalled responses shall end."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0"

            def do_GET(self) -> None:
                server.requests.append(self.path)
                try:
                    if self.path.endswith(".tar"):
                        server.respond(self)
                    else:
                        self.send_error(404)
                except (ConnectionError, TimeoutError):
                    pass  # the client has given up

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *args: None  # type: ignore[method-assign]
        self.thread = threading.Thread(target=self.http.serve_forever)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def close(self) -> None:
        self.released.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(retries, "RETRY_SECONDS", (0.0, 0.0))
    server = Server()
    yield server
    server.close()


def send(handler: BaseHTTPRequestHandler, body: bytes = SHARD, length: object = None) -> None:
    """Send a response with a Content-Length, which may be wrong; False = none."""
    handler.send_response(200)
    if length is not False:
        handler.send_header("Content-Length", str(len(body) if length is None else length))
    handler.end_headers()
    handler.wfile.write(body)


def cached_shards(folder: Path) -> list[bytes]:
    """Return the content of all shards in a cache, and assert that nothing unfinished lies there."""
    files = [file for file in (folder / "shards").glob("*") if not file.name.endswith((".lock", ".idx"))]
    assert not [file for file in files if file.name.endswith(".partial")]
    return [file.read_bytes() for file in files]


def raw(data: bytes) -> Callable[[BaseHTTPRequestHandler], None]:
    """Return a response that is these bytes, whether or not they are HTTP."""
    return lambda handler: handler.wfile.write(data)  # type: ignore[return-value]


def build_fault(rng: random.Random) -> Callable[[BaseHTTPRequestHandler], None]:
    """Return a response that is not the shard."""
    head = b"HTTP/1.1 200 OK\r\n"
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n"
    faults: list[Callable[[BaseHTTPRequestHandler], None]] = [
        lambda handler: send(handler, mutate_bytes(rng, SHARD[:512]) + SHARD[512:]),
        lambda handler: send(handler, SHARD[: rng.randrange(len(SHARD))], False),
        lambda handler: send(handler, SHARD[: rng.randrange(len(SHARD))], len(SHARD)),
        lambda handler: send(handler, SHARD, rng.choice(["x", "-5", "", "1e9", len(SHARD) + 7, 600])),
        lambda handler: send(handler, b"<html>log in</html>"),
        lambda handler: send(handler, b""),
        lambda handler: handler.send_error(rng.choice([400, 403, 404, 408, 429, 500, 503, 599])),
        raw(b""),
        raw(b"not http\r\n\r\n"),
        raw(head + b"X: " + b"a" * 70_000 + b"\r\n\r\n"),
        raw(head + b"X: y\r\n" * 200 + b"\r\n"),
        raw(b"HTTP/1.1 999999 \r\n\r\n"),
        raw(chunked + b"zz\r\n" + SHARD),
        raw(chunked + b"%x\r\n" % (len(SHARD) + 9) + SHARD),
        raw(chunked + b"-5\r\n" + SHARD),
        raw(chunked + b"f" * 70_000),
        raw(b"HTTP/1.1 302 Found\r\nLocation: " + rng.choice([b"http://[::1/x.tar", b"file:///etc/passwd", b"/a b.tar",
            b"http://user:pw@127.0.0.1:1/x.tar", b"gopher://x/", b"//", b"\x1b[31m", b"x" * 9000]) + b"\r\n\r\n"),
        raw(b"HTTP/1.1 302 Found\r\n\r\n"),
        raw(head + b"Content-Encoding: gzip\r\n\r\n\x1f\x8b" + bytes(600)),
    ]  # fmt: skip
    return rng.choice(faults)


def test_faults_are_retried_and_become_one_line(server: Server, tmp_path: Path) -> None:
    outcomes = {"read": 0, "refused": 0}
    with BoundedMemory():
        for case in range(count_cases(150)):
            rng = random.Random(case)
            faults = [build_fault(rng) for _ in range(rng.choice([1, 1, 2, 3]))]
            server.respond = lambda handler, faults=faults: (faults.pop(0) if faults else send)(handler)  # type: ignore[misc]
            folder = tmp_path / f"cache-{case % 50}"
            url = f"{server.url}/{case}.tar"
            try:
                assert count_samples([url], ShardCache(str(folder), seconds=20.0)) == [8], case
                assert ShardReader([url], ShardCache(str(folder))).read(0, 3).members["txt"] == random.Random(
                    "3.txt"
                ).randbytes(700)
                outcomes["read"] += 1
            except UserError as error:
                assert_one_line(error, url)
                outcomes["refused"] += 1
            assert all(read_contents(data) == read_contents(SHARD) for data in cached_shards(folder)), case
    assert min(outcomes.values()) > 10


def stall(server: Server, head: bytes, rest: bytes) -> Callable[[BaseHTTPRequestHandler], None]:
    """Return a response that sends `head`, then `rest` byte by byte, and never ends by itself."""

    def respond(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(head)
        for i in range(len(rest)):
            handler.wfile.write(rest[i : i + 1])
            handler.wfile.flush()
            if server.released.wait(0.02):
                return
        server.released.wait(60)

    return respond


@pytest.mark.parametrize("where", ["body", "unknown length", "headers", "status", "nothing at all", "chunks"])
def test_a_server_that_drips_cannot_hold_a_run(server: Server, tmp_path: Path, where: str) -> None:
    length = b"Content-Length: %d\r\n" % len(SHARD)
    head = b"HTTP/1.1 200 OK\r\n"
    server.respond = {
        "body": stall(server, head + length + b"\r\n", SHARD),
        "unknown length": stall(server, head + b"\r\n" + SHARD[:-600], SHARD[-600:]),
        "headers": stall(server, head, b"X-Header: " + b"a" * 10_000),
        "status": stall(server, b"", b"HTTP/1.1 200 " + b"a" * 10_000),
        "nothing at all": stall(server, b"", b""),
        "chunks": stall(server, head + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n0\r\n" * 5000),
    }[where]
    with pytest.raises(
        UserError, match=r"/a.tar: after 1 seconds only [\d,]+ bytes had come; data.fetch_seconds sets"
    ) as error:
        count_samples([f"{server.url}/a.tar"], ShardCache(str(tmp_path), seconds=1.0))
    assert_one_line(error.value)
    # The limit is for all of it: trying again would only take as long again. The body comes after a request for the headers.
    assert server.requests.count("/a.tar") <= 2
    assert cached_shards(tmp_path) == []
    server.respond = send
    assert count_samples([f"{server.url}/a.tar"], ShardCache(str(tmp_path), seconds=20.0)) == [8]


def test_the_counts_beside_a_shard_cannot_hold_a_run(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_SMALL_FILE_SECONDS", 0.3)
    monkeypatch.setattr(transfer, "_SMALL_FILE_BYTES", 5000)
    endless = stall(server, b"HTTP/1.1 200 OK\r\n\r\n", b" " * 100_000)
    handler = server.http.RequestHandlerClass

    def do_get(self: BaseHTTPRequestHandler) -> None:
        endless(self) if self.path.endswith(".json") else send(self)

    monkeypatch.setattr(handler, "do_GET", do_get)
    assert count_samples([f"{server.url}/a.tar"], ShardCache(str(tmp_path))) == [8]


# ---- servers that send byte ranges -----------------------------------------------------------------------------------


@pytest.fixture
def ranges(monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    with serve_ranges(monkeypatch) as server:
        yield server


LARGE_SHARD = build_shard(8, 9000)
PART = 20_000


def build_range_fault(
    server: RangeServer, rng: random.Random
) -> Callable[[BaseHTTPRequestHandler, bytes, tuple[int, int] | None], bool]:
    """Return a wrong answer to one request for a range; the next one is right."""

    def head(handler: BaseHTTPRequestHandler, status: int, *headers: tuple[str, object]) -> None:
        handler.send_response(status)
        for name, value in headers:
            handler.send_header(name, str(value))
        handler.end_headers()

    def answer(handler: BaseHTTPRequestHandler, body: bytes, asked: tuple[int, int] | None) -> bool:
        start, end = asked or (0, len(body))
        size, length = len(LARGE_SHARD), len(body)
        right = ("Content-Range", f"bytes {start}-{end - 1}/{size}"), ("ETag", server.tag)
        fault = rng.choice(
            ["status", "reset", "short", "long", "other range", "other size", "other tag", "no range", "whole", "damaged"]
        )
        if fault == "status":
            handler.send_error(rng.choice([408, 429, 500, 502, 503, 504]))
        elif fault == "reset":
            head(handler, 206, *right, ("Content-Length", length))
            handler.wfile.write(body[: length // 2])
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif fault in ("short", "long"):
            head(handler, 206, *right, ("Content-Length", length + (100 if fault == "short" else -100)))
            handler.wfile.write(body)
        elif fault in ("other range", "other size", "other tag", "no range"):
            wrong = {
                "other range": (("Content-Range", f"bytes {start + 512}-{end + 511}/{size}"), right[1]),
                "other size": (("Content-Range", f"bytes {start}-{end - 1}/{size + 512}"), right[1]),
                "other tag": (right[0], ("ETag", '"other"')),
                "no range": (right[1],),
            }[fault]
            head(handler, 206, *wrong, ("Content-Length", length))
            handler.wfile.write(body)
        elif fault == "whole":
            head(handler, 200, ("Content-Length", size))
            handler.wfile.write(LARGE_SHARD)
        else:
            server.send(handler, mutate_bytes(rng, body)[:length].ljust(length, b"x"), asked, size)
        return True

    return answer


def test_faults_in_parts_of_a_shard_are_retried_and_become_one_line(
    ranges: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest beside the shard holds its digest, so that damaged bytes within an image are noticed, too."""
    monkeypatch.setattr(transfer, "PART_BYTES", PART)
    digest = hashlib.blake2b(LARGE_SHARD, digest_size=16).hexdigest()
    names = [f"{case}.tar" for case in range(count_cases(100))]
    ranges.files = dict.fromkeys(names, LARGE_SHARD)
    ranges.files["shards.json"] = json.dumps({name: [8, len(LARGE_SHARD), digest] for name in names}).encode()
    outcomes = {"read": 0, "refused": 0}
    with BoundedMemory():
        for case, name in enumerate(names):
            rng = random.Random(case)
            faults = [build_range_fault(ranges, rng) for _ in range(rng.choice([1, 1, 2, 3, 8]))]
            lock = threading.Lock()

            def fault(*request: Any, faults: list[Any] = faults, rng: random.Random = rng, lock: threading.Lock = lock) -> bool:
                with lock:
                    answer = faults.pop() if faults and rng.random() < 0.7 else None
                return answer is not None and answer(*request)

            ranges.fault = fault
            folder, url = tmp_path / f"cache-{case % 50}", f"{ranges.url}/{name}"
            try:
                reader = ShardReader([url], ShardCache(str(folder), seconds=20.0), [8])
                assert reader.read(0, 3).members["txt"] == random.Random("3.txt").randbytes(9000), case
                outcomes["read"] += 1
            except UserError as error:
                assert_one_line(error, url)
                outcomes["refused"] += 1
            assert all(data == LARGE_SHARD for data in cached_shards(folder)), case
    assert outcomes["read"] > 50
    assert sum(outcomes.values()) == len(names)


def test_a_stalled_part_cannot_hold_a_run(ranges: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PART_BYTES", PART)
    ranges.files = {"a.tar": LARGE_SHARD}

    def stall_second(handler: BaseHTTPRequestHandler, body: bytes, asked: tuple[int, int] | None) -> bool:
        if asked is None or asked[0] != PART:
            return False
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes {asked[0]}-{asked[1] - 1}/{len(LARGE_SHARD)}")
        handler.send_header("ETag", ranges.tag)
        handler.end_headers()
        handler.wfile.write(body[:10])
        handler.wfile.flush()
        ranges.released.wait(60)
        return True

    ranges.fault = stall_second
    with pytest.raises(UserError, match=r"/a.tar: after 1 seconds only [\d,]+ bytes had come; data.fetch_seconds sets"):
        ShardReader([f"{ranges.url}/a.tar"], ShardCache(str(tmp_path), seconds=1.0)).read(0, 0)
    assert cached_shards(tmp_path) == []


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_expires_is_one_line(ranges: RangeServer, tmp_path: Path, status: int) -> None:
    ranges.files = {"a.tar": LARGE_SHARD}

    def refuse(handler: BaseHTTPRequestHandler, body: bytes, asked: tuple[int, int] | None) -> bool:
        handler.send_error(status)
        return True

    ranges.fault = refuse
    for read in (lambda url: count_samples([url], ShardCache(str(tmp_path))), ShardCache(str(tmp_path)).fetch):
        with pytest.raises((UserError, OSError), match=f"HTTP Error {status}"):
            read(f"{ranges.url}/a.tar?token=abcdef")
    with pytest.raises(UserError) as error:
        count_samples([f"{ranges.url}/a.tar?token=abcdef"], ShardCache(str(tmp_path)))
    assert str(error.value).endswith("; its token may have expired")
    assert_one_line(error.value)
    assert len([request for request in ranges.requests if request.path.startswith("/a.tar")]) == 3  # none was tried again


def test_redirects_keep_the_range(ranges: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PART_BYTES", PART)
    ranges.files = {"a.tar": LARGE_SHARD, "b.tar": LARGE_SHARD}

    def redirect(handler: BaseHTTPRequestHandler, body: bytes, asked: tuple[int, int] | None) -> bool:
        if handler.path != "/a.tar":
            return False
        handler.send_response(302)
        handler.send_header("Location", "/b.tar")
        handler.end_headers()
        return True

    ranges.fault = redirect
    file = ShardCache(str(tmp_path)).fetch(f"{ranges.url}/a.tar")
    assert Path(file).read_bytes() == LARGE_SHARD
    parts = sorted(request.range for request in ranges.requests if request.path == "/b.tar" and request.range)
    assert parts == [(start, min(start + PART, len(LARGE_SHARD))) for start in range(0, len(LARGE_SHARD), PART)]


def test_training_through_faults_loses_no_sample(ranges: RangeServer, small: Small, tmp_path: Path) -> None:
    """Every third answer is a fault; losses and keys are those of the run on local files."""
    shards = expand_shards(small.train)
    ranges.files = {Path(path).name: Path(path).read_bytes() for path in shards}
    answers = itertools.count()

    def fault(handler: BaseHTTPRequestHandler, body: bytes, asked: tuple[int, int] | None) -> bool:
        number = next(answers)
        if number % 3:
            return False
        if number % 2:
            handler.send_error(503)
        else:
            handler.connection.shutdown(socket.SHUT_RDWR)
        return True

    ranges.fault = fault
    remote = "[" + ",".join(f"{ranges.url}/{Path(path).name}" for path in shards) + "]"
    for name, train in (("local", small.train), ("remote", remote)):
        settings = small.settings(tmp_path / name, "train.steps=3", "data.workers=1", "train.audit=true")
        run_clipfuse("pretrain", "scenes", *settings, f"data.train={train}", f"data.cache={tmp_path / 'cache'}", cwd=tmp_path)
    assert next(answers) > 6
    assert read_sample_keys(tmp_path / "remote") == read_sample_keys(tmp_path / "local")
    assert read_losses(tmp_path / "remote") == read_losses(tmp_path / "local")
