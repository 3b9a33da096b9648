"""Shards as others write, name and store them: keys over collections, several sources, commands, members that lie apart."""

import json
import os
import tarfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from pretrain.data import BadSample
from pretrain.data.check import check_shards
from pretrain.data.pack import pack
from pretrain.data.shards import retries
from pretrain.data.shards.cache import ShardCache
from pretrain.data.shards.index import load_index
from pretrain.data.shards.names import find_new_names, name_shard
from pretrain.data.shards.paths import count_samples, expand_shards
from pretrain.data.shards.reader import ShardReader
from pretrain.errors import ConfigError, UserError
from tests.pretrain.data.test_captions import image_bytes, write_tar

PAIRS = [(f"{i}.{kind}", data) for i in range(3) for kind, data in (("jpg", image_bytes()), ("txt", b"red"))]


def read_keys(paths: list[str], shard_cache: ShardCache | None = None) -> list[str]:
    reader = ShardReader(paths, shard_cache)
    keys = [reader.key(shard, i) for shard, path in enumerate(paths) for i in range(load_index(path, shard_cache).count)]
    assert keys == [reader.read(shard, i).key for shard in range(len(paths)) for i in range(len(keys) // len(paths))]
    return keys


# ---- keys ------------------------------------------------------------------------------------------------------------


def test_keys_are_the_same_wherever_a_shard_lies(tmp_path: Path) -> None:
    (tmp_path / "www").mkdir()
    shard = write_tar(tmp_path / "www" / "train 0.v1.tar", PAIRS)
    expected = ["train 0.v1/0", "train 0.v1/1", "train 0.v1/2"]
    shard_cache = ShardCache(str(tmp_path / "cache"), commands=True)
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path / "www")))
    thread = Thread(target=http.serve_forever)
    thread.start()
    try:
        urls = [f"http://127.0.0.1:{http.server_port}/train%200.v1.tar{end}" for end in ("", "?signature=a/b.tar#c")]
        for path in [shard, *urls, f"pipe:cat '{shard}'"]:
            if not path.startswith("pipe:"):
                assert read_keys([path], shard_cache) == expected
        assert read_keys([urls[0]], shard_cache) == expected  # from the cache
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
    (tmp_path / "b-0001.tar").write_bytes(Path(shard).read_bytes())
    assert read_keys([f"pipe:cat {tmp_path}/b-0001.tar | cat"], shard_cache)[0] == "b-0001/0"


def test_names_of_urls_and_commands() -> None:
    names = {
        "s3://bucket/a/00000.tar": "00000",
        "https://user:secret@host/a/00000.tar?X-Signature=x": "00000",
        "pipe:aws s3 cp s3://bucket/00000.tar -": "00000",
        "pipe:zcat 'x/00001.tar.gz' | cat": "00001",
        "x/\udce9.tar": "\\xe9",
    }
    assert {path: name_shard(path) for path in names} == names
    commands = [name_shard(f"pipe:make_shard {i}") for i in range(2)]
    assert commands[0] != commands[1]
    assert all(name.startswith("command-") for name in commands)


def test_shards_of_the_same_name_get_the_names_of_their_folders(tmp_path: Path) -> None:
    for folder in ("a", "b", "c/shards", "d/shards"):
        (tmp_path / folder).mkdir(parents=True)
        write_tar(tmp_path / folder / "00000.tar", PAIRS)
    write_tar(tmp_path / "a" / "00001.tar", PAIRS)
    paths = [f"{tmp_path}/{name}.tar" for name in ("a/00000", "a/00001", "b/00000")]
    assert read_keys(paths)[::3] == ["a-00000/0", "00001/0", "b-00000/0"]
    assert len(set(read_keys(paths))) == 9
    assert read_keys(paths[:2])[::3] == ["00000/0", "00001/0"]  # alone, a collection has the keys it had
    deeper = [f"{tmp_path}/{name}.tar" for name in ("c/shards/00000", "d/shards/00000")]
    assert read_keys(deeper)[::3] == ["c-shards-00000/0", "d-shards-00000/0"]


def test_new_names_differ_from_every_other_name() -> None:
    assert find_new_names(["/x/a/0.tar", "/x/b/1.tar", "/x/b/1.tar"]) == {}
    assert find_new_names(["/x/a/0.tar", "/x/b/0.tar", "/x/a-0.tar"]) == {0: "x-a-0", 1: "b-0"}
    names = find_new_names(["/a-b/c/0.tar", "/a/b-c/0.tar", "http://h/0.tar", "http://h/0.tar?v=2", "http://u:secret@h/0.tar"])
    assert len(set(names.values())) == 5
    assert not any("secret" in name or "/" in name for name in names.values())
    assert find_new_names(["a/0.tar", f"{Path.cwd()}/a/0.tar"]) == {}  # one file


def test_a_file_named_twice_is_one_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    write_tar(tmp_path / "a" / "0.tar", PAIRS)
    assert expand_shards(["a/0.tar", "./a/*.tar", str(tmp_path / "a")]) == ["./a/0.tar"]


# ---- sources ---------------------------------------------------------------------------------------------------------


def test_double_colons_separate_sources(tmp_path: Path) -> None:
    for name in ("a-0", "a-1", "b::c"):
        write_tar(tmp_path / f"{name}.tar", PAIRS)
    a = [f"{tmp_path}/a-{i}.tar" for i in range(2)]
    assert expand_shards(f"{a[0]}::{a[1]}") == a
    assert expand_shards(f"{tmp_path}/a-{{0..1}}.tar::http://[::1]:80/x.tar::") == [*a, "http://[::1]:80/x.tar"]
    assert expand_shards(f"{tmp_path}/b::c.tar") == [f"{tmp_path}/b::c.tar"]
    assert expand_shards(f"pipe:perl -MA::B x::pipe:cat y::{a[0]}") == [a[0], "pipe:cat y", "pipe:perl -MA::B x"]
    with pytest.raises(ConfigError, match=r"^data.train=.*/none.tar: no file matches .*none.tar$"):
        expand_shards(f"{a[0]}::{tmp_path}/none.tar")


@pytest.mark.parametrize(
    ("command", "shards"),
    [
        ("pipe:cat ok/train-{0000..0001}.tar", ["pipe:cat ok/train-0000.tar", "pipe:cat ok/train-0001.tar"]),
        ("pipe:aws s3 cp s3://b/{8..10}.tar -", [f"pipe:aws s3 cp s3://b/{i}.tar -" for i in (10, 8, 9)]),
        ("pipe:cat {a..b}/{0..1}.tar", [f"pipe:cat {a}/{i}.tar" for a in "ab" for i in range(2)]),
        ("pipe:cat {{0..1},{5..6}}.tar", [f"pipe:cat {i}.tar" for i in (0, 1, 5, 6)]),
        ("pipe:cat {a,b} | awk '{print $1}' ${HOME}/\\{0..1} ..", None),
        ("pipe:cat x.tar }", None),
        ("pipe:for i in {1..3}; do cat $i.tar; done", None),
        ("pipe:for i in a {0001..0003}.tar; do cat $i; done", None),
        ("pipe:cat x/{1..3}.txt | make_tar out.tar", None),
        ("pipe:seq {1..3}; cat x.tar", None),
        ("pipe:make_shard {08..10}", [f"pipe:make_shard {i}" for i in ("08", "09", "10")]),
        ("pipe:cat 'x/{1..2}-y.tar'|cat", [f"pipe:cat 'x/{i}-y.tar'|cat" for i in (1, 2)]),
        ("pipe:zcat x/{1..2}.tar.gz", [f"pipe:zcat x/{i}.tar.gz" for i in (1, 2)]),
    ],
)
def test_ranges_in_commands_are_expanded(command: str, shards: list[str] | None) -> None:
    assert expand_shards(command) == (shards or [command])


def test_double_colons_within_a_name_are_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("x::y/0.tar", "x::y/1.tar", "p/0.tar", "q/0.tar", "r.tar::s/0.tar"):
        Path(name).parent.mkdir(exist_ok=True)
        write_tar(Path(name), [("0.txt", b"a")])
    assert expand_shards("x::y/*.tar") == expand_shards("x::y/{0..1}.tar") == ["x::y/0.tar", "x::y/1.tar"]
    assert expand_shards("x::y") == ["x::y/0.tar", "x::y/1.tar"]
    assert expand_shards("r.tar::s/*.tar") == ["r.tar::s/0.tar"]
    for spec in ("http://h/a::b.tar", "pipe:curl h/a::b.tar"):
        assert expand_shards(spec) == [spec]
    assert expand_shards("x::y/*::p::q/*.tar") == ["p/0.tar", "q/0.tar", "x::y/0.tar", "x::y/1.tar"]
    assert expand_shards("http://h/a::sftp://b/c::p/") == ["http://h/a", "sftp://b/c::p/"]
    assert expand_shards(f"http://h/a::{tmp_path}/p") == [f"{tmp_path}/p/0.tar", "http://h/a"]
    assert expand_shards("pipe:aws s3 cp s3://b/0.tar -::p/0.tar") == ["p/0.tar", "pipe:aws s3 cp s3://b/0.tar -"]


def test_commands_with_ranges_are_read_where_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "RETRY_SECONDS", (0.0,))
    for i in range(2):
        write_tar(tmp_path / f"t-{i:04d}.tar", PAIRS[: 2 + 2 * i])
    paths = expand_shards(f"pipe:cat {tmp_path}/t-{{0000..0001}}.tar")
    shard_cache = ShardCache(str(tmp_path / "cache"), commands=True)
    assert count_samples(paths, shard_cache) == [1, 2]
    with pytest.raises(UserError, match=r"would run a shell command: set data\.commands=true"):
        count_samples(paths, ShardCache(str(tmp_path / "cache")))
    assert [f.name for f in (tmp_path / "cache/shards").iterdir() if not f.name.endswith((".lock", ".tar", ".idx"))] == []


def test_commands_that_fail_are_named_with_what_they_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "RETRY_SECONDS", (0.0,))
    shard_cache = ShardCache(str(tmp_path / "cache"), commands=True)
    failing = "pipe:echo no such object >&2; exit 3"
    with pytest.raises(UserError) as caught:
        count_samples([failing], shard_cache)
    reason = "the command ended with exit code 3: no such object, tried 2 times"
    assert str(caught.value) == f"cannot read {failing}: {reason}"
    with pytest.raises(
        UserError, match=r"^cannot read pipe:no-such-command x: the command ended with exit code 127: .*not found$"
    ):
        count_samples(["pipe:no-such-command x"], shard_cache)


def test_a_folder_without_shards_is_explained(tmp_path: Path) -> None:
    def explain(where: str = "data.train") -> str:
        with pytest.raises(ConfigError) as caught:
            expand_shards(str(tmp_path), where)
        return str(caught.value).removeprefix(f"{where}={tmp_path}: no *.tar in this folder")

    assert explain() == ""
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "x.jpg").touch()
    after = "; `clipfuse index` takes the folder as it is"
    pack = f"; `clipfuse data pack {tmp_path} shards"
    assert explain() == f"{pack} --caption-from path` makes shards of its images, captions: the words of each path"
    (tmp_path / "part" / "x.txt").touch()
    assert explain("--data") == f"{pack}` makes shards of its images, captions: NAME.txt beside NAME.jpg{after}"
    (tmp_path / "pairs.csv").touch()
    assert explain() == f"; `clipfuse data pack {tmp_path}/pairs.csv shards` makes shards of the table"
    write_tar(tmp_path / "part" / "0.tar", PAIRS)
    assert explain() == f", but in folders below it: give {tmp_path}/*/*.tar"
    (tmp_path / "0.tar.gz").touch()
    assert explain() == ", but 0.tar.gz: shards must be plain tar files, decompress it first"


# ---- members that lie apart ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decode", [True, False])
def test_members_that_lie_apart_are_named_for_what_they_are(tmp_path: Path, decode: bool) -> None:
    apart = sorted(PAIRS, key=lambda member: member[0].rpartition(".")[2])
    shard = write_tar(tmp_path / "apart.tar", [*apart, ("whole.jpg", image_bytes()), ("whole.txt", b"red")])
    report = check_shards([shard], decode=decode, workers=1)
    assert (report.samples, report.bad_samples, dict(report.bad)) == (7, 6, {"members apart": 6})
    rule = "do not follow one another in the tar: pack it again with `clipfuse data pack`, or with tar --sort=name"
    assert report.names["members apart"][0] == f"apart/0: .jpg of 0 and its other members {rule}"
    assert report.names["members apart"][3] == f"apart/0: .txt of 0 and its other members {rule}"
    reader = ShardReader([shard])
    with pytest.raises(BadSample, match=r"^members apart: \.txt of 1 and"):
        reader.read(0, 4)
    assert reader.read(0, 6).members["txt"] == b"red"
    assert load_index(shard).apart == frozenset(range(6))


def test_keys_that_repeat_are_not_taken_for_members_apart(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [*PAIRS, ("0.jpg", image_bytes()), ("0.json", b"{}")])
    assert load_index(shard).apart == frozenset()
    report = check_shards([shard], workers=1)
    assert (report.bad_samples, dict(report.bad)) == (1, {"duplicate key": 1})


# ---- sizes at the start ----------------------------------------------------------------------------------------------


def test_a_shard_that_was_cut_short_is_refused_at_the_start_whatever_its_stats_say(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s-0000.tar", PAIRS)
    stats = tmp_path / "s-0000_stats.json"
    stats.write_text(json.dumps({"successes": 3}))
    assert count_samples([shard]) == [3]
    assert not Path(f"{shard}.idx").exists()  # the stats are believed: nothing was indexed
    with tarfile.open(shard) as tar:
        offsets = [member.offset for member in tar][1:]
    content = Path(shard).read_bytes()
    for length in [*offsets, 0, 700, offsets[-1] + 600]:
        Path(shard).write_bytes(content[:length])
        with pytest.raises(UserError, match=r"s-0000\.tar is (damaged at byte|empty|not a tar file)"):
            count_samples([shard])
    os.remove(shard)
    with pytest.raises(UserError, match=r"cannot read .*s-0000\.tar: .*No such file"):
        count_samples([shard])


def test_sizes_in_the_stats_of_packed_shards_are_compared(tmp_path: Path) -> None:
    shard = Path(write_tar(tmp_path / "s-0000.tar", PAIRS))
    content = shard.read_bytes()
    (tmp_path / "s-0000_stats.json").write_text(json.dumps({"successes": 3, "bytes": len(content)}))
    assert count_samples([str(shard)]) == [3]
    write_tar(shard, PAIRS[:4])
    os.truncate(shard, len(content) - 512)  # still ends with zeros
    with pytest.raises(UserError, match=r"s-0000.tar holds 2 samples, but .*s-0000_stats.json says 3"):
        count_samples([str(shard)])
    shard.write_bytes(content + bytes(512))  # more padding, and the same samples
    assert count_samples([str(shard)]) == [3]


def test_a_packed_shard_of_another_size_is_indexed_again(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for i in range(6):
        (tmp_path / "source" / f"{i}.jpg").write_bytes(image_bytes())
        (tmp_path / "source" / f"{i}.txt").write_text(f"caption {i}")
    pack(str(tmp_path / "source"), tmp_path / "out", shard_size=3, workers=1)
    paths = expand_shards(str(tmp_path / "out"))
    assert count_samples(paths) == [3, 3]
    assert not list((tmp_path / "out").glob("*.idx"))
    first = Path(paths[0])
    assert json.loads(first.with_name(f"{first.stem}_stats.json").read_text())["bytes"] == first.stat().st_size
    with tarfile.open(first) as tar:
        second = [member.offset for member in tar][2]
    content = first.read_bytes()
    first.write_bytes(content[:second] + bytes(10240))  # a whole archive, of the first sample only
    with pytest.raises(UserError, match=r"shard-0000\.tar holds 1 samples, but .*_stats.json says 3"):
        count_samples(paths)


def test_packing_names_the_rule_that_names_with_dots_break(tmp_path: Path) -> None:
    members = [("a.input.jpg", image_bytes()), ("a.output.txt", b"red"), ("b.jpg", image_bytes()), ("b.cls", b"3")]
    summary = str(pack(write_tar(tmp_path / "a.tar", members), tmp_path / "out", workers=1))
    assert "KEY ends at the first dot of a file name: rename KEY.input.jpg to KEY.jpg" in summary
    reader = ShardReader(expand_shards(str(tmp_path / "out")))
    assert reader.read(0, 0).members["cls"] == b"3"
