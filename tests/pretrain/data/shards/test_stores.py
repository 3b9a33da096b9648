"""Object stores: an S3 server on this machine, against the same shards read from the disk."""

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as table
import pytest

from launch import cli
from pretrain.data.check import check_shards
from pretrain.data.config import list_shards_once
from pretrain.data.shards import cache, retries, stores, transfer
from pretrain.data.shards.cache import ShardCache
from pretrain.data.shards.paths import count_samples, expand_shards
from pretrain.data.shards.reader import ShardReader
from pretrain.errors import ConfigError, UserError
from tests.support import Small, random_shards, read_losses, read_sample_keys, run_clipfuse, world

# botocore and aiohttp leave closing of idle connections to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"


build_shard = partial(random_shards.build_shard, samples=4, size=60_000)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """An S3 server; yields its address."""
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    """An empty bucket of this test; returns its client of boto3 and its name."""
    import boto3

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(tmp_path / "no-config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(retries, "RETRY_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(stores, "_systems", {})
    client = boto3.client("s3")
    name = f"b{abs(hash(request.node.name)):x}"
    client.create_bucket(Bucket=name)
    return client, name


def put(bucket: Any, key: str, body: bytes) -> None:
    client, name = bucket
    client.put_object(Bucket=name, Key=key, Body=body)


def test_globs_braces_and_folders_are_listed(bucket: Any) -> None:
    name = bucket[1]
    for key in ("d/0.tar", "d/1.tar", "d/note.txt", "d/e/2.tar", "other/0.tar"):
        put(bucket, key, b"x")
    both = [f"s3://{name}/d/0.tar", f"s3://{name}/d/1.tar"]
    assert expand_shards(f"s3://{name}/d/*.tar") == both
    assert expand_shards(f"s3://{name}/d") == both
    assert expand_shards(f"s3://{name}/d/") == both
    assert expand_shards(f"s3://{name}/{{d,other}}/0*.tar") == [both[0], f"s3://{name}/other/0.tar"]
    assert expand_shards(f"s3://{name}/d/{{0..1}}.tar::s3://{name}/d/e/*") == [*both, f"s3://{name}/d/e/2.tar"]
    with pytest.raises(ConfigError, match=rf"data.train=s3://{name}/none/\*.tar: no object in the store matches"):
        expand_shards(f"s3://{name}/none/*.tar")
    with pytest.raises(ConfigError, match="no object in the store matches"):
        expand_shards(f"s3://{name}/none/")


def test_shards_are_fetched_in_parts_and_verified(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PART_BYTES", 50_000)
    shard = build_shard(0)
    put(bucket, "0.tar", shard)
    url = f"s3://{bucket[1]}/0.tar"
    for connections in (1, 5):
        file = ShardCache(str(tmp_path / str(connections)), connections=connections).fetch(url)
        assert Path(file).read_bytes() == shard
    assert count_samples([url], ShardCache(str(tmp_path / "new"))) == [4]
    assert not (tmp_path / "new").exists()  # counted by its headers
    reader = ShardReader([url], ShardCache(str(tmp_path / "new")), [4])
    assert reader.read(0, 3).key == "0/0003"
    assert reader.read(0, 3).members["txt"] == b"caption 0 3"


def test_bytes_damaged_on_the_way_are_fetched_again(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = build_shard(1)
    put(bucket, "1.tar", shard)
    url = f"s3://{bucket[1]}/1.tar"
    real, calls = stores.read_object, []

    def read_damaged(*args: Any) -> bytes:
        content = bytearray(real(*args))
        calls.append(args)
        if len(calls) == 1:
            content[2000] ^= 1  # within an image, where no checksum of the tar covers it
        return bytes(content)

    monkeypatch.setattr(stores, "read_object", read_damaged)
    with pytest.raises(OSError, match="it was damaged on the way"):
        ShardCache(str(tmp_path)).fetch(url)
    assert Path(ShardCache(str(tmp_path)).fetch(url)).read_bytes() == shard
    # Under a key of KMS an ETag is no MD5: what comes twice is what the store holds.
    put(bucket, "2.tar", shard)
    info = stores.find_info(f"s3://{bucket[1]}/2.tar")._replace(digest=("etag", "0" * 32))
    monkeypatch.setattr(stores, "find_info", lambda url: info)
    monkeypatch.setattr(cache, "_keyed_buckets", set())
    with pytest.raises(OSError, match="it was damaged on the way"):
        ShardCache(str(tmp_path)).fetch(f"s3://{bucket[1]}/2.tar")
    assert Path(ShardCache(str(tmp_path)).fetch(f"s3://{bucket[1]}/2.tar")).read_bytes() == shard


def test_errors_are_one_line_without_secrets(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"s3://{bucket[1]}/gone.tar"
    with pytest.raises(UserError) as error:
        count_samples([url], ShardCache(str(tmp_path)))
    assert str(error.value) == f"cannot read {url}: there is no such object"
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setattr(stores, "_systems", {})
    with pytest.raises(UserError, match=r"cannot read s3://.*: .*credentials; .*AWS_PROFILE, or AWS_ACCESS_KEY_ID") as error:
        count_samples([url], ShardCache(str(tmp_path)))
    assert "\n" not in str(error.value)


def test_denied_access_is_tried_with_new_credentials_and_named(bucket: Any, tmp_path: Path) -> None:
    """An expired token: the credentials are looked for once more."""
    put(bucket, "0.tar", build_shard(0))
    url = f"s3://{bucket[1]}/0.tar"
    systems: list[Any] = []

    def act(system: Any, path: str) -> str:
        systems.append(system)
        if len(systems) == 1:
            raise PermissionError("The provided token has expired. AKIAIOSFODNN7EXAMPLE")
        return path

    assert stores.call_store(url, act) == f"{bucket[1]}/0.tar"
    assert systems[0] is not systems[1]
    with pytest.raises(PermissionError) as error:
        stores.call_store(url, lambda *_: (_ for _ in ()).throw(PermissionError("The token AKIAIOSFODNN7EXAMPLE has expired.")))
    assert str(error.value).startswith("access denied (The token *** has expired.); credentials come from AWS_PROFILE")


@pytest.mark.parametrize(("error", "words"), [(TimeoutError(), "no answer in time"), (ConnectionError(), "ConnectionError")])
def test_an_error_without_a_message_is_named(bucket: Any, error: Exception, words: str) -> None:
    """As s3fs raises it where a server stalls."""

    def fail(system: Any, path: str) -> None:
        raise error

    with pytest.raises(OSError, match=f"^{words}$"):
        stores.call_store(f"s3://{bucket[1]}/0.tar", fail)


@pytest.mark.parametrize(("scheme", "package", "extra"), [("gs", "gcsfs", "gcs"), ("az", "adlfs", "azure")])
def test_a_missing_extra_is_named(scheme: str, package: str, extra: str, tmp_path: Path) -> None:
    if any((Path(folder) / package).exists() for folder in __import__("sys").path):
        pytest.skip(f"{package} is installed")
    message = rf"{scheme}:// needs {package}: pip install 'clipfuse\[{extra}\]'"
    with pytest.raises(UserError, match=message):
        count_samples([f"{scheme}://bucket/0.tar"], ShardCache(str(tmp_path)))
    with pytest.raises(UserError, match=message):
        expand_shards(f"{scheme}://bucket/*.tar")


def test_check_writes_a_manifest_by_which_runs_start(
    bucket: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        put(bucket, f"d/{i}.tar", build_shard(i, samples=i + 1))
    folder = f"s3://{bucket[1]}/d"
    cli.main(["data", "check", folder, "--no-decode", "--manifest"])
    assert f"{folder}/shards.json: samples, bytes and digests" in capsys.readouterr().out
    client, name = bucket
    manifest = json.loads(client.get_object(Bucket=name, Key="d/shards.json")["Body"].read())
    assert [(key, entry[0], entry[1]) for key, entry in manifest.items()] == [
        (f"{i}.tar", i + 1, len(build_shard(i, samples=i + 1))) for i in range(3)
    ]
    paths = expand_shards(folder)
    assert count_samples(paths, ShardCache(str(tmp_path / "new"))) == [1, 2, 3]
    assert not (tmp_path / "new").exists()
    # Other bytes than those the manifest names: another object of the same size, for example.
    put(bucket, "d/2.tar", build_shard(9, samples=3))
    with pytest.raises(OSError, match=r"its bytes are not those that .*/shards.json names"):
        ShardCache(str(tmp_path / "new")).fetch(paths[2])
    assert check_shards(paths, decode=False, record=True).samples == 6  # a new manifest can be written


def list_sources(spec: str, environment: dict[str, str]) -> list[str]:
    """Return the shards as a trainer finds them; the body of a rank."""
    os.environ.update(environment)
    return list_shards_once(spec, "data.train")


def test_one_process_of_many_lists_a_store(bucket: Any, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(3):
        put(bucket, f"d/{i}.tar", b"x")
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    caplog.set_level("INFO", logger="werkzeug")
    caplog.clear()
    results = world.run(list_sources, 3, f"s3://{bucket[1]}/d/*.tar", aws)
    assert results == [[f"s3://{bucket[1]}/d/{i}.tar" for i in range(3)]] * 3
    assert sum("list-type" in record.getMessage() for record in caplog.records) == 1


def test_training_from_s3_is_that_from_local_files(bucket: Any, small: Small, tmp_path: Path) -> None:
    for path in [*expand_shards(small.train), *expand_shards(small.val)]:
        put(bucket, f"scenes/{Path(path).name}", Path(path).read_bytes())
    remote = f"s3://{bucket[1]}/scenes/"
    runs = {"local": (small.train, small.val), "s3": (f"{remote}train-*.tar", f"{remote}val-*.tar")}
    for name, (train, val) in runs.items():
        settings = small.settings(tmp_path / name, "train.steps=2", "data.workers=1", "train.audit=true", "train.eval_every=2")
        run_clipfuse("pretrain", "scenes", *settings, f"data.train={train}", f"data.val={val}", cwd=tmp_path)
    assert read_losses(tmp_path / "s3") == read_losses(tmp_path / "local")
    assert read_sample_keys(tmp_path / "s3") == read_sample_keys(tmp_path / "local")
    assert len(read_losses(tmp_path / "s3")) == 2
    results, embeddings = [], []
    for name, (_, val) in runs.items():
        result = json.loads(run_clipfuse("evaluate", tmp_path / "local", "--data", val, "--json", cwd=tmp_path).stdout)
        results.append({key: value for key, value in result.items() if key not in ("seconds", "data")})
        out = tmp_path / f"embeddings-{name}"
        run_clipfuse("embed", tmp_path / "local", "--data", val, "--out", out, cwd=tmp_path)
        embeddings.append([table.read_table(file).to_pydict() for file in sorted(out.glob("*.parquet"))])
    assert results[0] == results[1]
    assert embeddings[0] == embeddings[1]
    assert sum(len(file["key"]) for file in embeddings[0]) == 64
    assert SECRET not in "".join(
        path.read_text(errors="replace") for path in (tmp_path / "s3").rglob("*") if path.suffix in (".json", ".yaml", ".jsonl")
    )
