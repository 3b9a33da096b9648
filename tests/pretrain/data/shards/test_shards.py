"""Tests of finding, indexing and reading shards, against tarfile and webdataset; damaged archives."""

import gc
import io
import json
import logging
import os
import pickle
import random
import shutil
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain.data import BadSample
from pretrain.data.shards import retries
from pretrain.data.shards.cache import ShardCache
from pretrain.data.shards.index import load_index
from pretrain.data.shards.paths import count_samples, expand_shards
from pretrain.data.shards.reader import MAX_TEXT_BYTES, ShardReader
from pretrain.data.shards.tar import DamagedTarError, read_members
from pretrain.errors import ConfigError, UserError


def write_tar(path, members, format=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def samples(n, start=0, size=900):
    rng = random.Random(start)
    out = []
    for i in range(start, start + n):
        out += [(f"{i:05d}.jpg", rng.randbytes(rng.randrange(size))), (f"{i:05d}.txt", b"caption %d" % i)]
    return out


@pytest.fixture
def shard(tmp_path):
    return write_tar(tmp_path / "a-0000.tar", samples(20))


# webdataset leaves closing its files to the garbage collector, which Python reports
ignores_webdataset_warnings = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::UserWarning"
)


def read_with_webdataset(path):
    samples = list(wds.WebDataset(str(path), shardshuffle=False, empty_check=False, handler=wds.warn_and_stop))
    gc.collect()
    return samples


def scan(path):
    with open(path, "rb") as f:
        return read_members(f.fileno(), str(path))


def read_with_tarfile(path):
    """Return [(name, offset, length)] of the regular members."""
    with tarfile.open(path) as tar:
        return [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]


# ---- scanning headers ------------------------------------------------------------------------------------------------

names = st.text(st.characters(codec="utf-8", exclude_characters="\0/", exclude_categories=["C"]), min_size=1, max_size=90)
paths = st.lists(names.filter(lambda n: n not in (".", "..")), min_size=1, max_size=4).map("/".join)


@given(
    st.lists(st.tuples(paths, st.binary(max_size=2000)), max_size=20),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_members_are_those_of_tarfile(tmp_path, members, format):
    path = write_tar(tmp_path / "x.tar", members, format)
    assert list(zip(*scan(path), strict=True)) == read_with_tarfile(path)


def test_members_other_than_regular_files_are_left_out(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for kind, name in [
            (tarfile.DIRTYPE, "d"),
            (tarfile.SYMTYPE, "s.jpg"),
            (tarfile.LNKTYPE, "l.jpg"),
            (tarfile.FIFOTYPE, "f"),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("d/a.txt")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    assert list(zip(*scan(path), strict=True)) == read_with_tarfile(path)
    assert scan(path).names == ["d/a.txt"]


def test_ustar_prefixes_and_archives_written_by_tar(tmp_path):
    long = "/".join(["directory-with-a-long-name"] * 5) + "/file.jpg"
    path = write_tar(tmp_path / "x.tar", [(long, b"x" * 600), ("b.jpg", b"")], tarfile.USTAR_FORMAT)
    assert scan(path).names == [long, "b.jpg"]
    for i, options in enumerate([["--format=gnu"], ["--format=pax"], ["--format=v7"], ["-b", "1"]]):
        folder = tmp_path / "folder"
        folder.mkdir(exist_ok=True)
        (folder / "a.txt").write_bytes(b"x" * 513)
        path = tmp_path / f"t{i}.tar"
        assert os.system(f"tar -C {tmp_path} {' '.join(options)} -cf {path} folder") == 0
        assert list(zip(*scan(path), strict=True)) == read_with_tarfile(path)


def test_sizes_beyond_eight_gigabytes(tmp_path):
    """Octal digits end there: GNU continues in base 256, pax in an extended header.

    The file of this test is sparse.
    """
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        info = tarfile.TarInfo("a.bin")
        info.size = 9 * 2**30 + 5
        header = info.tobuf(format)
        path = tmp_path / "big.tar"
        path.write_bytes(header)
        os.truncate(path, len(header) + 9 * 2**30 + 512 + 1024)
        assert list(zip(*scan(path), strict=True)) == [("a.bin", len(header), info.size)]


# ---- damaged archives ------------------------------------------------------------------------------------------------


def assert_refused(path, message):
    with pytest.raises(DamagedTarError, match=message) as e:
        scan(path)
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)


def test_damaged_header_in_the_middle_is_named(shard):
    offsets = [o for _, o, _ in read_with_tarfile(shard)]
    for field in (0, 100, 124, 148, 156, 257):  # name, mode, size, checksum, type, magic
        with open(shard, "r+b") as f:
            f.seek(offsets[20] - 512 + field)
            original = f.read(1)
            f.seek(-1, 1)
            f.write(bytes([original[0] ^ 0x41]))
        assert_refused(shard, rf"damaged at byte {offsets[20] - 512:,} of .*after member '00009.txt': the header is damaged")
        with open(shard, "r+b") as f:
            f.seek(offsets[20] - 512 + field)
            f.write(original)
    assert len(scan(shard).names) == 40


def test_a_hole_of_zeros_is_not_the_end(shard):
    offset = read_with_tarfile(shard)[20][1]
    with open(shard, "r+b") as f:
        f.seek(offset - 512)
        f.write(bytes(512))
    assert_refused(shard, f"byte {offset - 512:,} .*a block of zeros, and data after it")
    size = os.path.getsize(shard)
    os.truncate(shard, offset - 512)
    os.truncate(shard, size + 2**21)  # a copy that reserved its space and was then killed
    assert_refused(shard, "bytes follow the block of zeros")


@ignores_webdataset_warnings
def test_every_truncation_is_detected(shard):
    """Also between two members, where other readers see only a shorter archive."""
    content = Path(shard).read_bytes()
    members = read_with_tarfile(shard)
    end = members[-1][1] + 512
    rng = random.Random(0)
    for length in {m[1] - 512 for m in members[1:]} | {end, *rng.sample(range(1, end), 60)}:
        with open(shard, "wb") as f:
            f.write(content[:length])
        assert_refused(shard, "cut short|middle of a header|not a tar file")
    assert len(read_with_webdataset(shard)) < 20


def test_files_that_are_not_shards(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(b"")
    assert_refused(path, r"is empty \(0 bytes\), not a tar file")
    for content in (b"short", b"long" * 1000, os.urandom(5000), b"<html>" + bytes(5000)):
        path.write_bytes(content)
        assert_refused(path, "is not a tar file")
    for suffix, name in (("gz", "gzip"), ("bz2", "bzip2"), ("xz", "xz")):
        with tarfile.open(path, f"w:{suffix}"):
            pass
        assert_refused(path, f"is {name}-compressed")
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.txt")
        info.pax_headers = {"GNU.sparse.major": "1"}
        tar.addfile(info)
    assert_refused(path, "sparse")


def test_damaged_extended_headers(tmp_path):
    for records in (b"99 path=x\n", b"path=x\n", b"11 size=xx\n", b"3 a=\n"):
        info = tarfile.TarInfo("x")
        info.type, info.size = tarfile.XHDTYPE, len(records)
        path = tmp_path / "x.tar"
        path.write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + records.ljust(512, b"\0") + bytes(1024))
        assert_refused(path, "extended header is damaged|no valid size")


def write_pax(path, records, content=b""):
    """Write a member `x` of which the ustar header gives size 0, after a pax header of `records`."""
    info = tarfile.TarInfo("x")
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, len(records)
    blocks = [header.tobuf(tarfile.USTAR_FORMAT), records, info.tobuf(tarfile.USTAR_FORMAT), content]
    path.write_bytes(b"".join(block.ljust(-len(block) % 512 + len(block), b"\0") for block in blocks) + bytes(1024))
    return path


def pax_record(key, value):
    length = len(key) + len(value) + 3
    while len(str(length)) + len(key) + len(value) + 3 != length:
        length = len(str(length)) + len(key) + len(value) + 3
    return b"%d %s=%s\n" % (length, key, value)


def test_pax_sizes_of_thousands_of_digits(tmp_path):
    path = write_pax(tmp_path / "x.tar", pax_record(b"size", b"0" * 5000 + b"7"), b"seven b")
    assert list(zip(*scan(path), strict=True)) == [("x", 512 + 5120 + 512, 7)]
    assert scan(write_pax(path, pax_record(b"size", b"0" * 5000))).lengths == [0]
    for digits in (b"9" * 5000, b"1" + b"0" * 4999, b"9" * 19, b"", b"-1", b"1e3", b" 7", "\u0663".encode()):
        write_pax(path, pax_record(b"size", digits))
        assert_refused(path, "gives no valid size")


# ---- index -----------------------------------------------------------------------------------------------------------


@ignores_webdataset_warnings
def test_samples_are_those_of_webdataset(tmp_path):
    members = [
        ("a.jpg", b"1"),
        ("a.seg.png", b"2"),
        ("a.TXT", b"3"),
        ("folder.v1/b.jpg", b"4"),
        ("folder.v1/b.txt", b"5"),
        ("./c.jpg", b"6"),
        ("no_extension", b"7"),
        ("__meta__/x.json", b"8"),
        ("__notes__", b"9"),
        (".hidden.txt", b"10"),
        ("d.txt", b"11"),
        ("\N{SNOWMAN}.txt", "\N{SNOWMAN}".encode()),
    ]
    path = write_tar(tmp_path / "x.tar", members, tarfile.PAX_FORMAT)
    reader = ShardReader([path])
    ours = [reader.read(0, i) for i in range(load_index(path).count)]
    reference = read_with_webdataset(path)
    assert [s.key for s in ours] == [f"x/{s['__key__']}" for s in reference]
    assert [s.members for s in ours] == [{k: v for k, v in s.items() if not k.startswith("__")} for s in reference]


def test_the_index_is_saved_and_loaded(shard, monkeypatch):
    first = load_index(shard)
    assert os.path.exists(f"{shard}.idx")
    monkeypatch.setattr("pretrain.data.shards.index.read_members", None)  # not scanned again
    second = load_index(shard)
    assert second.keys == first.keys == [f"{i:05d}" for i in range(20)]
    assert (second.members == first.members).all()
    assert second.extensions == ["jpg", "txt"]


@pytest.mark.parametrize("keep_times", [False, True])
def test_an_outdated_index_is_rebuilt(tmp_path, caplog, keep_times):
    shard = write_tar(tmp_path / "s.tar", samples(20, size=2))
    before, stat = load_index(shard), os.stat(shard)
    write_tar(shard, samples(20, start=500, size=2))  # same size
    assert os.path.getsize(shard) == before.size
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns if keep_times else stat.st_mtime_ns + 1))
    with caplog.at_level(logging.WARNING):
        assert load_index(shard).keys[0] == "00500"
    assert "s.tar.idx is outdated" in caplog.text


def test_a_damaged_index_is_rebuilt(shard, caplog):
    load_index(shard)
    saved = Path(f"{shard}.idx").read_bytes()
    for content in (b"", saved[:-100], saved[:2000] + b"damage" + saved[2006:], b"PK garbage"):
        with open(f"{shard}.idx", "wb") as f:
            f.write(content)
        assert load_index(shard).count == 20
    assert "cannot be used" in caplog.text
    with open(f"{shard}.idx", "wb") as f:  # never unpickled
        np.savez(f, meta=np.array([{"version": 1}], dtype=object))
    assert load_index(shard).count == 20


def test_the_index_of_a_read_only_folder_is_in_the_cache(shard, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    os.mkdir(f"{shard}.idx.in-the-way")
    os.rename(f"{shard}.idx.in-the-way", f"{shard}.idx")  # a folder by that name: writing there fails, for root as well
    assert load_index(shard, ShardCache(str(folder))).count == 20
    (saved,) = (folder / "index").iterdir()
    assert saved.name.endswith("a-0000.tar.idx")
    monkeypatch.setattr("pretrain.data.shards.index.read_members", None)
    assert load_index(shard, ShardCache(str(folder))).count == 20


def test_an_index_that_cannot_be_saved_is_no_error(shard, tmp_path):
    (tmp_path / "file").write_text("")
    os.mkdir(f"{shard}.idx")
    assert load_index(shard, ShardCache(str(tmp_path / "file"))).count == 20
    assert not [f for f in os.listdir(tmp_path) if "partial" in f]


def test_stats_that_disagree_are_refused(shard, tmp_path):
    (tmp_path / "a-0000_stats.json").write_text(json.dumps({"successes": 25}))
    assert count_samples([shard]) == [25]  # not verified until the shard is opened
    with pytest.raises(UserError, match=r"a-0000.tar holds 20 samples, but .*a-0000_stats.json says 25"):
        load_index(shard)
    (tmp_path / "a-0000_stats.json").write_text("not json")
    (tmp_path / "sizes.json").write_text(json.dumps({"a-0000.tar": 21}))
    with pytest.raises(UserError, match=r"sizes.json says 21"):
        load_index(shard)
    (tmp_path / "sizes.json").write_text(json.dumps({"a-0000.tar": 20}))
    assert load_index(shard).count == 20


# ---- finding and counting --------------------------------------------------------------------------------------------


def test_expand(tmp_path, monkeypatch):
    for i in range(12):
        write_tar(tmp_path / f"s-{i:04d}.tar", [])
    (tmp_path / "s-0000.tar.idx").write_text("")
    shards = [str(tmp_path / f"s-{i:04d}.tar") for i in range(12)]
    assert expand_shards(str(tmp_path)) == shards
    assert expand_shards(f"{tmp_path}/s-*.tar") == shards
    assert expand_shards(f"{tmp_path}/s-{{0000..0011}}.tar") == shards
    assert expand_shards([f"{tmp_path}/s-000{{3,1}}.tar", f"{tmp_path}/s-0001.tar"]) == [shards[1], shards[3]]
    assert expand_shards(f"file://{tmp_path}/s-0001.tar") == [shards[1]]
    assert expand_shards("https://host/x-{00..02}.tar") == [f"https://host/x-0{i}.tar" for i in range(3)]
    assert expand_shards("pipe:cat {a,b} | sort") == ["pipe:cat {a,b} | sort"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_shards("~/s-0001.tar") == [shards[1]]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{}/none-*.tar", "no file matches .*none-"),
        ("{}", r"no \*.tar in this folder"),
        ("{}/x-{{00..02}}.tar", r"no file matches .*x-00.tar \(and 2 more\)"),
        ("{}/x-{{00..02.tar", "braces are not balanced"),
    ],
)
def test_patterns_without_a_match(tmp_path, spec, message):
    with pytest.raises(ConfigError, match=f"^data.val=.*{message}"):
        expand_shards(spec.format(tmp_path), "data.val")
    with pytest.raises(ConfigError, match="names no shards"):
        expand_shards([])


def test_counts_in_parallel_and_from_saved(tmp_path, monkeypatch):
    paths = [write_tar(tmp_path / f"{i}.tar", samples(i)) for i in range(9)]
    calls = []
    assert count_samples(paths, workers=2, progress=lambda done, total: calls.append((done, total))) == list(range(9))
    assert calls[-1] == (9, 9)
    monkeypatch.setattr("pretrain.data.shards.index.read_members", None)
    assert count_samples(paths, workers=1) == list(range(9))


def test_counting_names_damaged_shards(tmp_path):
    paths = [write_tar(tmp_path / f"{i}.tar", samples(3)) for i in range(5)]
    os.truncate(paths[2], 1536)
    (tmp_path / "3.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"2.tar is damaged .*\(and 1 more shards; `clipfuse data check` lists them\)"):
        count_samples(paths, workers=2)
    with pytest.raises(UserError, match=r"cannot read .*none.tar"):
        count_samples([str(tmp_path / "none.tar")])


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_samples_are_read_as_by_tarfile(tmp_path):
    paths = [write_tar(tmp_path / f"{i}.tar", samples(30, start=30 * i, size=30000)) for i in range(5)]
    expected = {}
    for i, path in enumerate(paths):
        with tarfile.open(path) as tar:
            for m in tar:
                expected.setdefault((i, m.name[:5]), {})[m.name[6:]] = tar.extractfile(m).read()
    reader = ShardReader(paths, max_open=2)
    addresses = [(i, k) for i in range(5) for k in range(30)]
    random.Random(1).shuffle(addresses)
    for shard, sample in addresses:
        raw = reader.read(shard, sample)
        assert raw.members == expected[shard, raw.key.partition("/")[2]]
        assert raw.key == reader.key(shard, sample)
        assert reader.read(shard, sample, ["txt"]).members == {"txt": raw.members["txt"]}
    assert len(reader._open) == 2
    again = pickle.loads(pickle.dumps(reader))
    assert again.read(0, 0).members == reader.read(0, 0).members


def test_duplicate_and_oversized_members_are_bad_samples(tmp_path):
    members = [("a.txt", b"1"), ("a.TXT", b"2"), ("b.txt", b"3"), ("c.txt", b"4"), ("b.txt", b"5"), ("d.txt", b"66666")]
    path = write_tar(tmp_path / "x.tar", members)
    reader = ShardReader([path], max_bytes=4)
    with pytest.raises(BadSample, match="duplicate member"):
        reader.read(0, 0)
    assert reader.read(0, 1).members == {"txt": b"3"}
    with pytest.raises(BadSample, match="duplicate key: x/b"):
        reader.read(0, 3)
    with pytest.raises(BadSample, match="member too large"):
        reader.read(0, 4)


@pytest.mark.parametrize("extension", ["txt", "json", "cls"])
def test_text_of_many_megabytes_is_a_bad_sample(tmp_path, extension):
    large = b'"' + b"a" * (MAX_TEXT_BYTES - 1) + b'"'
    members = [("a.jpg", large), (f"a.{extension}", large), ("b.jpg", large), (f"b.{extension}", large[:-1])]
    reader = ShardReader([write_tar(tmp_path / "x.tar", members)])
    with pytest.raises(BadSample, match=rf"member too large: {extension} of 4,194,305 bytes, more than 4,194,304"):
        reader.read(0, 0)
    assert reader.read(0, 0, ["jpg"]).members == {"jpg": large}
    assert reader.read(0, 1).members == {"jpg": large, extension: large[:-1]}


def test_a_shard_that_shrinks_or_changes_stops_the_run(shard, monkeypatch):
    monkeypatch.setattr(retries, "RETRY_SECONDS", (0.0,))
    reader = ShardReader([shard])
    reader.read(0, 0)
    os.truncate(shard, 2000)
    with pytest.raises(UserError, match=r"a-0000.tar ends at byte 2,000, before the end of one of its samples"):
        reader.read(0, 19)
    write_tar(shard, samples(7))
    with pytest.raises(UserError, match="holds 7 samples, but held 20 when the run began"):
        ShardReader([shard], counts=[20]).read(0, 0)


def test_disk_errors_are_retried(shard, monkeypatch):
    monkeypatch.setattr(retries, "RETRY_SECONDS", (0.0, 0.0))
    real_pread, errors = os.pread, []

    def pread(fd, length, offset):
        if errors:
            raise errors.pop()
        return real_pread(fd, length, offset)

    reader = ShardReader([shard])
    expected = reader.read(0, 3).members
    monkeypatch.setattr("pretrain.data.shards.reader.os.pread", pread)
    errors[:] = [OSError(5, "Input/output error")] * 3
    assert reader.read(0, 3).members == expected
    errors[:] = [OSError(5, "Input/output error")] * 4
    with pytest.raises(UserError, match=r"cannot read .*a-0000.tar: \[Errno 5\] Input/output error, tried 3 times"):
        reader.read(0, 3)


# ---- remote shards ---------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path):
    """Serve tmp_path/www over HTTP; yields (url, list of the requested paths)."""
    requests = []

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, *args):
            requests.append(self.path)

        def log_message(self, *args):
            pass

        def end_headers(self):
            super().end_headers()

        def copyfile(self, source, out):
            if "short" in self.path:
                out.write(source.read(700))  # the connection ends early
            else:
                shutil.copyfileobj(source, out)

    (tmp_path / "www").mkdir()
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "www")))
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}", requests
    http.shutdown()
    http.server_close()
    thread.join()


def test_remote_shards_are_fetched_once(tmp_path, server):
    url, requests = server
    for i in range(3):
        write_tar(tmp_path / f"www/s-{i}.tar", samples(5, start=10 * i))
    shard_cache = ShardCache(str(tmp_path / "cache"))
    paths = expand_shards(url + "/s-{0..2}.tar")
    assert count_samples(paths, shard_cache) == [5, 5, 5]
    reader = ShardReader(paths, shard_cache)
    assert reader.read(2, 0).members["txt"] == b"caption 20"
    assert ShardReader(paths, shard_cache).read(2, 1).members["txt"] == b"caption 21"
    # The first is a request for headers, of which this server ignores the byte range.
    assert sorted(a for a in requests if a.endswith(".tar")) == ["/s-0.tar", "/s-0.tar", "/s-1.tar", "/s-2.tar"]
    files = sorted(f.name.partition("-")[2] for f in (tmp_path / "cache/shards").iterdir() if not f.name.endswith(".lock"))
    assert files == ["s-0.tar", "s-0.tar.idx", "s-1.tar", "s-1.tar.idx", "s-2.tar", "s-2.tar.idx"]


def test_remote_counts_need_no_shard(tmp_path, server):
    url, requests = server
    (tmp_path / "www/sizes.json").write_text(json.dumps({f"t-{i}.tar": i for i in range(50)}))
    assert count_samples([f"{url}/t-{i}.tar" for i in range(50)], ShardCache(str(tmp_path / "cache"))) == list(range(50))
    assert not any(a.endswith(".tar") for a in requests)


def test_an_interrupted_download_leaves_no_file(tmp_path, server, monkeypatch):
    monkeypatch.setattr(retries, "RETRY_SECONDS", (0.0,))
    url, requests = server
    write_tar(tmp_path / "www/short.tar", samples(5))
    with pytest.raises(UserError, match=r"cannot read .*short.tar: the connection ended [\d,]+ bytes early, tried 2 times"):
        count_samples([f"{url}/short.tar"], ShardCache(str(tmp_path / "cache")))
    assert [f.name for f in (tmp_path / "cache/shards").iterdir() if not f.name.endswith(".lock")] == []
    with pytest.raises(UserError, match=r"cannot read .*absent.tar: HTTP Error 404: File not found$"):
        count_samples([f"{url}/absent.tar"], ShardCache(str(tmp_path / "cache")))
    assert sum(a == "/absent.tar" for a in requests) == 1


def test_the_cache_has_a_limit(tmp_path, server):
    url, _ = server
    for i in range(4):
        write_tar(tmp_path / f"www/s-{i}.tar", [("a.txt", bytes(300_000))])
    shard_cache = ShardCache(str(tmp_path / "cache"), gib=0.5e6 / 2**30)
    reader = ShardReader([f"{url}/s-{i}.tar" for i in range(4)], shard_cache, max_open=2)
    for i in (0, 1, 2, 3, 0):
        assert len(reader.read(i, 0).members["txt"]) == 300_000
    assert len(list((tmp_path / "cache/shards").glob("*.tar"))) <= 3


def test_commands_are_refused_unless_allowed(tmp_path, shard, monkeypatch):
    folder = str(tmp_path / "cache")
    command = f"pipe:cat {shard}"
    with pytest.raises(UserError, match=r"would run a shell command: set data\.commands=true"):
        count_samples([command], ShardCache(folder))
    assert count_samples([command], ShardCache(folder, commands=True)) == [20]
    monkeypatch.setenv("GOPEN_REWRITE", "http://=https://")
    with pytest.raises(UserError, match="GOPEN_REWRITE is set"):
        count_samples(["http://host/x.tar"], ShardCache(folder))
    monkeypatch.delenv("GOPEN_REWRITE")
    with pytest.raises(UserError, match="cannot open urls of scheme gopher; valid schemes are"):
        count_samples(["gopher://host/x.tar"], ShardCache(folder))
