"""What a run reads before its first step: requests and bytes, counted by a server, and counts against those of tarfile."""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import cli
from pretrain.data.check import check_shards
from pretrain.data.config import count_samples_once, list_shards_once
from pretrain.data.shards import counts
from pretrain.data.shards.cache import ShardCache
from pretrain.data.shards.paths import count_samples, expand_shards
from pretrain.data.shards.reader import ShardReader
from pretrain.errors import ConfigError, UserError
from tests.support import world
from tests.support.range_server import RangeServer, serve_ranges

IMAGE_BYTES = 200_000


def build_shard(samples: int, size: int = IMAGE_BYTES, form: int = tarfile.USTAR_FORMAT, prefix: str = "") -> bytes:
    """Return a tar of samples with an image of `size` bytes, a caption and a json."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for i in range(samples):
            for extension, content in (("jpg", bytes([i % 251]) * size), ("txt", b"caption %d" % i), ("json", b"{}")):
                info = tarfile.TarInfo(f"{prefix}{i:05d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    with serve_ranges(monkeypatch) as server:
        yield server


@pytest.mark.parametrize("num", [3, 300])
@pytest.mark.parametrize("name", ["shards.json", "sizes.json"])
def test_a_file_of_all_counts_takes_the_same_requests_for_any_number_of_shards(
    server: RangeServer, tmp_path: Path, num: int, name: str
) -> None:
    entries = {f"{i:05d}.tar": [i, 10_240, ""] if name == "shards.json" else i for i in range(num)}
    server.files = {f"d/{name}": json.dumps(entries).encode()}
    paths = expand_shards(f"{server.url}/d/{{00000..{num - 1:05d}}}.tar")
    assert count_samples(paths, ShardCache(str(tmp_path))) == list(range(num))
    assert [request.path for request in server.requests] == [
        *(["/d/shards.json"] if name == "sizes.json" else []),
        f"/d/{name}",
    ]


def test_stats_files_take_one_request_for_each_shard(server: RangeServer, tmp_path: Path) -> None:
    server.files = {f"d/{i}_stats.json": json.dumps({"successes": i + 5}).encode() for i in range(40)}
    paths = [f"{server.url}/d/{i}.tar" for i in range(40)]
    assert count_samples(paths, ShardCache(str(tmp_path))) == [i + 5 for i in range(40)]
    assert sorted(request.path for request in server.requests) == sorted(
        ["/d/shards.json", "/d/sizes.json", *(f"/d/{i}_stats.json" for i in range(40))]
    )


def test_without_counts_only_headers_are_read(server: RangeServer, tmp_path: Path) -> None:
    server.files = {f"d/{i}.tar": build_shard(10 + i) for i in range(6)}
    paths = [f"{server.url}/d/{i}.tar" for i in range(6)]
    assert count_samples(paths, ShardCache(str(tmp_path))) == [10 + i for i in range(6)]
    parts = [request for request in server.requests if request.path.endswith(".tar")]
    total = sum(map(len, server.files.values()))
    assert all(request.range for request in parts)
    assert sum(request.sent for request in parts) < 0.2 * total
    assert len(parts) <= sum(10 + i + 2 for i in range(6))
    assert not tmp_path.joinpath("shards").exists()


def test_small_members_are_read_in_few_requests(server: RangeServer, tmp_path: Path) -> None:
    server.files = {"a.tar": build_shard(1000, size=3000)}
    assert count_samples([f"{server.url}/a.tar"], ShardCache(str(tmp_path))) == [1000]
    assert len([request for request in server.requests if request.path == "/a.tar"]) < 20


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("size", [0, 500, 15_000, 40_000])
def test_counts_by_headers_are_those_of_tarfile(server: RangeServer, tmp_path: Path, form: int, size: int) -> None:
    prefix = "é" * 20 + "x/" * 50 + "n" * 60 if form != tarfile.USTAR_FORMAT else "a/"
    shard = build_shard(37, size, form, prefix)
    server.files = {"a.tar": shard}
    with tarfile.open(fileobj=io.BytesIO(shard)) as tar:
        expected = len({name.rpartition("/")[2].partition(".")[0] for name in tar.getnames()})
    assert count_samples([f"{server.url}/a.tar"], ShardCache(str(tmp_path))) == [expected] == [37]
    assert not tmp_path.joinpath("shards").exists()


def test_damaged_headers_are_one_line(server: RangeServer, tmp_path: Path) -> None:
    shard = build_shard(5)
    second_header = 512 + (IMAGE_BYTES + 511) // 512 * 512
    for damaged in (shard[:450_000], shard[:second_header] + b"x" + shard[second_header + 1 :], b"x" * 3000):
        server.files = {"a.tar": damaged}
        with pytest.raises(UserError, match=r"cannot read http.*/a.tar: .*, tried 3 times") as error:
            count_samples([f"{server.url}/a.tar"], ShardCache(str(tmp_path)))
        assert "\n" not in str(error.value)


def test_a_manifest_is_written_beside_local_shards_and_used(
    tmp_path: Path, server: RangeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(3):
        (tmp_path / f"{i}.tar").write_bytes(build_shard(i + 1, size=100))
    (tmp_path / "shards.json").write_text(json.dumps({"other.tar": [7, 10_240, "ab"], "0.tar": [99, 1, ""]}))
    assert cli.main(["data", "check", str(tmp_path), "--no-decode", "--manifest"]) == 0
    assert f"{tmp_path}/shards.json: samples, bytes and digests" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "shards.json").read_text())
    for i in range(3):
        content = (tmp_path / f"{i}.tar").read_bytes()
        assert manifest[f"{i}.tar"] == [i + 1, len(content), hashlib.blake2b(content, digest_size=16).hexdigest()]
    assert manifest["other.tar"] == [7, 10_240, "ab"]
    for index in tmp_path.glob("*.idx"):
        index.unlink()
    assert count_samples(expand_shards(str(tmp_path))) == [1, 2, 3]
    assert not list(tmp_path.glob("*.idx"))  # no shard was opened
    (tmp_path / "1.tar").write_bytes(build_shard(5, size=100))  # of another size than in the manifest, which is then not used
    assert count_samples(expand_shards(str(tmp_path))) == [1, 5, 3]
    with pytest.raises(ConfigError, match=r"--manifest writes shards.json beside the shards, and http://.* cannot be written"):
        counts.manifest_paths([f"{server.url}/0.tar"])


def test_a_shard_with_another_size_or_digest_than_in_the_manifest_is_not_used(server: RangeServer, tmp_path: Path) -> None:
    shard = build_shard(4, size=1000)
    digest = hashlib.blake2b(shard, digest_size=16).hexdigest()
    damaged = bytearray(shard)
    damaged[700] ^= 1  # within an image
    url = f"{server.url}/d/a.tar"
    cache = ShardCache(str(tmp_path))
    for content, message in ((bytes(damaged), "its bytes are not those"), (build_shard(40, size=1000), "bytes came, but")):
        server.files = {"d/shards.json": json.dumps({"a.tar": [4, len(shard), digest]}).encode(), "d/a.tar": content}
        with pytest.raises(UserError, match=rf"cannot read {url}: .*{message}.*tried 3 times"):
            ShardReader([url], cache, [4]).read(0, 0)
        assert not list((tmp_path / "shards").glob("*.tar"))
    server.files["d/a.tar"] = shard
    assert ShardReader([url], cache, [4]).read(0, 3).members["txt"] == b"caption 3"
    assert check_shards([url], decode=False, cache=cache).samples == 4


def test_local_shards_are_staged_where_asked_for(tmp_path: Path) -> None:
    (tmp_path / "slow").mkdir()
    shard = tmp_path / "slow" / "a.tar"
    shard.write_bytes(build_shard(4, size=1000))
    cache = ShardCache(str(tmp_path / "cache"), stage=True)
    reader = ShardReader([str(shard)], cache, [4])
    assert reader.read(0, 2).key == "a/00002"
    copies = list((tmp_path / "cache" / "shards").glob("*.tar"))
    assert [copy.read_bytes() for copy in copies] == [shard.read_bytes()]
    assert not list((tmp_path / "slow").glob("*.idx"))
    shard.write_bytes(build_shard(5, size=1000))
    assert ShardReader([str(shard)], cache).read(0, 4).key == "a/00004"  # the copy of the old one is not used
    with pytest.raises(UserError, match="holds 5 samples, but held 4 when the run began"):
        ShardReader([str(shard)], cache, [4]).read(0, 2)
    assert ShardReader([str(shard)], ShardCache(str(tmp_path / "unused"))).read(0, 0).key == "a/00000"
    assert not (tmp_path / "unused").exists()


# ---- several processes -----------------------------------------------------------------------------------------------


def resolve_and_count(spec: str, folder: str) -> tuple[list[str], list[int]]:
    """Return the shards and counts as a trainer finds them; the body of a rank."""
    paths = list_shards_once(spec, "data.train")
    return paths, count_samples_once(paths, ShardCache(folder), "data.train")


def test_one_process_of_many_asks_for_counts(server: RangeServer, tmp_path: Path) -> None:
    server.files = {f"{i}.tar": build_shard(3 + i) for i in range(4)}
    results = world.run(resolve_and_count, 4, f"{server.url}/{{0..3}}.tar", str(tmp_path))
    assert results == [([f"{server.url}/{i}.tar" for i in range(4)], [3, 4, 5, 6])] * 4
    by_many = len(server.requests)
    server.requests.clear()
    counts._answers.clear()
    count_samples(results[0][0], ShardCache(str(tmp_path)))
    assert by_many == len(server.requests)
