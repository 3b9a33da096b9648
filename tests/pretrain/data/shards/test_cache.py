"""The cache of remote shards: its limit, several processes at once, what killed fetches leave, damaged copies."""

import fcntl
import io
import multiprocessing
import os
import signal
import tarfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pretrain.data.shards import retries
from pretrain.data.shards.cache import ShardCache
from pretrain.data.shards.index import load_index
from pretrain.data.shards.paths import count_samples
from pretrain.data.shards.reader import ShardReader
from pretrain.data.shards.transfer import read_small_file
from pretrain.errors import UserError

SIZE = 100_000
SHARDS = 8


def write_shard(path: Path, number: int, size: int = SIZE) -> None:
    """Write a tar of one sample whose caption names the shard."""
    with tarfile.open(path, "w") as tar:
        for name, data in (("a.txt", f"caption {number}".encode()), ("a.jpg", bytes(size))):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder, records the requests and the authorization of each, and waits where a shard's name says so."""

    requests: ClassVar[list[tuple[str, str | None]]] = []
    released = threading.Event()

    def do_GET(self) -> None:
        self.requests.append((self.path, self.headers["Authorization"]))
        if "redirect" in self.path:
            self.send_response(302)
            self.send_header(
                "Location", self.path.replace("redirect-", "").replace("/", f"http://localhost:{self.server.server_port}/")
            )  # type: ignore[attr-defined]
            self.end_headers()
            return
        super().do_GET()

    def copyfile(self, source: Any, out: Any) -> None:
        data = source.read()
        if "slow" in self.path:
            out.write(data[:5000])
            out.flush()
            self.released.wait(60)
        out.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """Serve tmp_path/www, with the shards 0.tar to 7.tar."""
    (tmp_path / "www").mkdir()
    for i in range(SHARDS):
        write_shard(tmp_path / f"www/{i}.tar", i)
    Handler.requests = []
    Handler.released = threading.Event()
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "www")))
    http.handle_error = lambda *args: None  # type: ignore[method-assign]
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    Handler.released.set()
    http.shutdown()
    http.server_close()
    thread.join()


def list_shards(folder: Path) -> list[Path]:
    """Return the shards in a cache folder, complete or not."""
    return [file for file in (folder / "shards").iterdir() if file.name.endswith((".tar", ".partial"))]


def size_of(file: Path) -> int:
    """The bytes of a file that another process may have removed by now."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def read_all(url: str, folder: str, gib: float, first: int, errors: Any) -> None:
    """Read one sample of every shard, three times, beginning with shard `first`; the body of a process."""
    try:
        reader = ShardReader([f"{url}/{i}.tar" for i in range(SHARDS)], ShardCache(folder, gib=gib), max_open=1)
        for i in [*range(first, SHARDS), *range(SHARDS)] * 3:
            assert reader.read(i, 0).members["txt"] == f"caption {i}".encode()
            held = sum(size_of(file) for file in list_shards(Path(folder)))
            assert held <= gib * 2**30 + 4 * 1.2 * SIZE, f"{held:,} bytes"
    except BaseException as error:
        errors.put(repr(error))
        raise


def test_workers_never_lose_a_shard_to_the_limit(url: str, tmp_path: Path) -> None:
    """Four processes share a cache with room for two shards."""
    context = multiprocessing.get_context("fork")
    errors = context.Queue()
    gib = 2.4 * SIZE / 2**30
    processes = [context.Process(target=read_all, args=(url, str(tmp_path / "cache"), gib, 2 * i, errors)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4, errors.get() if not errors.empty() else ""
    assert sum(file.stat().st_size for file in list_shards(tmp_path / "cache")) <= gib * 2**30


def test_the_least_recently_used_shard_goes_first_and_a_held_one_stays(url: str, tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path), gib=2.4 * SIZE / 2**30)
    paths = [cache.cached_path(f"{url}/{i}.tar", "shards") for i in range(4)]
    cache.fetch(f"{url}/0.tar")
    with cache.hold(f"{url}/1.tar"):
        cache.fetch(f"{url}/0.tar")
        cache.fetch(f"{url}/2.tar")
        assert [path.exists() for path in paths] == [False, True, True, False]
        cache.fetch(f"{url}/3.tar")
        assert [path.exists() for path in paths] == [False, True, False, True]
    cache.fetch(f"{url}/3.tar")
    cache.fetch(f"{url}/2.tar")
    assert [path.exists() for path in paths] == [False, False, True, True]
    assert not Path(f"{paths[0]}.lock").exists()
    assert [name for name, _ in Handler.requests] == ["/shards.json", *(f"/{i}.tar" for i in (0, 1, 2, 3, 2))]


def fetch_slowly(url: str, folder: str) -> None:
    ShardCache(folder).fetch(f"{url}/slow.tar")


def test_what_a_killed_fetch_left_is_removed(url: str, tmp_path: Path) -> None:
    write_shard(tmp_path / "www/slow.tar", 0)
    folder = tmp_path / "cache"
    for _ in range(2):
        process = multiprocessing.get_context("fork").Process(target=fetch_slowly, args=(url, str(folder)))
        process.start()
        deadline = time.monotonic() + 60
        while not (folder / "shards").exists() or not list((folder / "shards").glob(".*.partial")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    cache = ShardCache(str(folder))
    (folder / "shards" / ".1.tar.idx.123.partial").write_bytes(b"x")
    cache.fetch(f"{url}/1.tar")  # of another shard: each fetch sweeps the folder
    assert [file.name.partition("-")[2] for file in list_shards(folder)] == ["1.tar"]
    (folder / "shards" / f".{cache.cached_path(f'{url}/slow.tar', 'shards').name}.123.partial").write_bytes(b"x")
    Handler.released.set()
    assert load_index(f"{url}/slow.tar", ShardCache(str(folder))).count == 1
    assert sorted(file.name.partition("-")[2] for file in list_shards(folder)) == ["1.tar", "slow.tar"]


def test_a_partial_file_in_progress_is_not_removed(url: str, tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path))
    (tmp_path / "shards").mkdir()
    target = cache.cached_path(f"{url}/7.tar", "shards")
    partial_file = target.with_name(f".{target.name}.1.partial")
    partial_file.write_bytes(b"")
    with open(f"{target}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as the process does that fetches
        cache.fetch(f"{url}/1.tar")
        assert partial_file.exists()
    cache.fetch(f"{url}/2.tar")
    assert not partial_file.exists()


def test_a_copy_that_the_disk_damaged_is_fetched_again(url: str, tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path))
    shard = f"{url}/3.tar"
    file = Path(cache.fetch(shard))
    file.write_bytes(file.read_bytes()[:5000])
    assert count_samples([shard], cache) == [1]
    assert ShardReader([shard], cache).read(0, 0).members["txt"] == b"caption 3"
    assert [name for name, _ in Handler.requests].count("/3.tar") == 2


def test_an_outdated_copy_is_fetched_again_at_the_next_start(url: str, tmp_path: Path) -> None:
    cache, shard = ShardCache(str(tmp_path)), f"{url}/3.tar"
    cache.fetch(shard)
    with tarfile.open(tmp_path / "www/3.tar", "w") as tar:
        for name in ("a.txt", "b.txt"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    (tmp_path / "www/3_stats.json").write_text('{"successes": 2}')
    with pytest.raises(UserError, match=r"holds 1 samples, but .*3_stats.json says 2"):
        load_index(shard, cache)
    assert load_index(shard, cache).count == 2


def test_a_password_is_sent_to_its_host_only_and_named_nowhere(url: str, tmp_path: Path) -> None:
    secret = url.replace("http://", "http://me:p%40ss@")
    assert load_index(f"{secret}/1.tar", ShardCache(str(tmp_path))).count == 1
    authorizations = {authorization for _, authorization in Handler.requests}
    assert authorizations == {"Basic bWU6cEBzcw=="}  # me:p@ss
    Handler.requests.clear()
    assert load_index(f"{secret}/redirect-2.tar", ShardCache(str(tmp_path))).count == 1
    assert dict(Handler.requests)["/redirect-2.tar"] is not None
    assert dict(Handler.requests)["/2.tar"] is None
    with pytest.raises(UserError) as error:
        count_samples([f"{secret}/gone.tar?sig=AbCd&part=1"], ShardCache(str(tmp_path)))
    assert (
        str(error.value)
        == f"cannot read {url.replace('//', '//me:***@')}/gone.tar?sig=***&part=1: HTTP Error 404: File not found"
    )
    names = " ".join(str(file) for file in tmp_path.rglob("*"))
    assert "p%40ss" not in names
    assert "AbCd" not in names
    with pytest.raises(UserError, match=r"me:\*\*\*@.* was saved without its password or token: name the shards again"):
        count_samples(["https://me:***@host/1.tar"], ShardCache(str(tmp_path)))


@pytest.mark.parametrize("address", ["http://[::1/a.tar", "http://a..b/a.tar", "http://host:port/a.tar", "http:///a.tar"])
def test_addresses_that_are_none(address: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a valid url"):
        count_samples([address], ShardCache(str(tmp_path)))
    assert read_small_file(address) is None


def test_a_command_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "RETRY_SECONDS", ())
    with pytest.raises(UserError, match="after 1 seconds only 0 bytes had come"):
        count_samples(["pipe:exec sleep 60"], ShardCache(str(tmp_path), commands=True, seconds=1.0))


@pytest.fixture
def without_rights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in tmp_path as a user who may not write there, with paths relative to it."""
    user = os.geteuid()
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    yield
    if os.geteuid() != user:
        os.seteuid(user)
    for folder in tmp_path.rglob("*"):
        if folder.is_dir():
            folder.chmod(0o755)


def drop_rights() -> None:
    """Become a user without rights, where this is root; others have none in a read-only folder."""
    if os.geteuid() == 0:
        os.seteuid(65534)


@pytest.mark.parametrize("has_lock", [True, False])
def test_a_read_only_cache_is_read(url: str, tmp_path: Path, without_rights: None, has_lock: bool) -> None:
    cache = ShardCache("cache")
    cached = Path(cache.fetch(f"{url}/0.tar"))
    lock = Path(f"{cached}.lock")
    lock.chmod(0o444)
    if not has_lock:
        lock.unlink()
    cached.parent.chmod(0o555)
    drop_rights()
    with cache.hold(f"{url}/0.tar") as file:
        assert file == str(cached)
        assert Path(file).stat().st_size > SIZE
    assert lock.exists() == has_lock
    with pytest.raises(PermissionError):
        cache.fetch(f"{url}/1.tar")


def test_another_user_may_lock_and_remove_a_shard(url: str, tmp_path: Path, without_rights: None) -> None:
    before = os.umask(0o077)
    try:
        cached = Path(ShardCache("cache").fetch(f"{url}/0.tar"))
    finally:
        os.umask(before)
    assert Path(f"{cached}.lock").stat().st_mode & 0o777 == 0o666
    cached.chmod(0o644)
    Path(f"{cached}.lock").chmod(0o644)  # as versions without this rule left it
    Path("cache").chmod(0o755)
    cached.parent.chmod(0o777)
    drop_rights()
    cache = ShardCache("cache", commands=True, gib=1.5 * SIZE / 2**30)
    with cache.hold("pipe:cat www/1.tar") as file:  # above the limit with both
        assert list_shards(Path("cache")) == [Path(file)]
