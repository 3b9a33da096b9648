"""Checkpoints are copied to a store while a run trains, and a run goes on from there on a fresh machine, bit for bit."""

from __future__ import annotations

import json
import os
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch import cli
from pretrain.checkpoints import remote, store, writing
from pretrain.checkpoints.uploading import Uploader
from pretrain.data.shards import stores
from pretrain.errors import UserError
from tests.support import Small, read_losses

# botocore and aiohttp leave closing of idle connections to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """An S3 server on this machine with an empty bucket `bucket`; yields its client of boto3."""
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    import boto3

    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(tmp_path / "no-config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(stores, "_systems", {})
    urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    yield client
    server.stop()


def list_keys(client: Any) -> set[str]:
    return {entry["Key"] for entry in client.list_objects_v2(Bucket="bucket").get("Contents", [])}


def read_object(client: Any, key: str) -> bytes:
    content: bytes = client.get_object(Bucket="bucket", Key=key)["Body"].read()
    return content


def digests(folder: Path) -> dict[str, str]:
    files = json.loads((folder / "manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name != "config.yaml"}


def save(checkpoints: Path, step: int, **more: Any) -> Path:
    content: writing.Content = {
        "config.yaml": lambda path: path.write_text(f"step: {step}\n"),
        "state/trainer.pt": lambda path: path.write_bytes(b"state"),
    }
    return writing.save(checkpoints, step, content, **{"keep": 0, **more})


def test_a_run_goes_on_from_the_store_bit_for_bit(
    small: Small, in_tmp: Path, client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(name: str, *more: str) -> int:
        every = ["train.steps=8", "train.save_every=2", "train.keep=2", "optim.average=0.9", f"data.val={small.val}"]
        evaluation = ["train.eval_every=3", "eval.workers=0", "eval.max_samples=16"]
        return cli.main(["pretrain", "scenes", *small.settings(name, *every, *evaluation, *more)])

    copy = "train.copy_to=s3://bucket/runs/first"
    assert run("straight") == 0
    assert run("first", copy, "loss.name=tests.support.failing_loss", "loss.how=terminate", "loss.at=5") == 75
    # -- the copies are what lies here; where saves are faster, only the newest and the best are copied
    here = in_tmp / "runs/first/checkpoints"
    best = (here / "best").read_text().strip()
    names = {
        *(
            f"{step}/{file.relative_to(here / step)}"
            for step in ("step-0000005", best)
            for file in (here / step).rglob("*")
            if file.is_file()
        ),
        "latest",
        "best",
    }
    paths = {f"runs/first/checkpoints/{name}" for name in names}
    assert list_keys(client) >= paths
    for key in paths:
        assert read_object(client, key) == (in_tmp / key).read_bytes()
    # -- another machine
    capsys.readouterr()
    assert run("second", "resume=s3://bucket/runs/first", copy) == 0
    output = capsys.readouterr().err
    assert "resuming runs/second/checkpoints/step-0000005 at step 5 of 8" in output
    straight, second = (in_tmp / f"runs/{name}/checkpoints/step-0000008" for name in ("straight", "second"))
    assert digests(second) == digests(straight)
    assert read_losses(in_tmp / "runs/second") == {s: x for s, x in read_losses(in_tmp / "runs/straight").items() if s > 5}
    assert (second.parent / "best").read_text() == (straight.parent / "best").read_text()
    assert read_object(client, "runs/first/checkpoints/latest") == b"step-0000008\n"
    # -- the command may be repeated, a folder with other checkpoints is refused, and one checkpoint can be named
    assert run("second", "resume=s3://bucket/runs/first", copy) == 0
    assert "this command has begun before" in capsys.readouterr().err
    assert run("straight", "resume=s3://bucket/runs/first") == 2
    assert "resume=s3://bucket/runs/first lies outside the run folder runs/straight" in capsys.readouterr().err
    name = next(key for key in sorted(list_keys(client)) if key.endswith("manifest.json")).split("/")[-2]
    assert run("third", f"resume=s3://bucket/runs/first/checkpoints/{name}", "--dry-run") == 1
    assert "--dry-run does not download" in capsys.readouterr().out
    assert not (in_tmp / "runs/third").exists()
    assert run("third", f"resume=s3://bucket/runs/first/checkpoints/{name}") == 0
    assert digests(in_tmp / "runs/third/checkpoints/step-0000008") == digests(straight)


@pytest.mark.parametrize("damage", ["half", "changed", "cut", "gone"])
def test_a_copy_that_is_not_complete_is_not_taken(
    tmp_path: Path, client: Any, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    uploader = Uploader("s3://bucket/run/", keep=3)
    uploader.check()
    for step in (1, 2):
        uploader.start(save(tmp_path / "one", step), None)
        uploader.finish()
    prefix = "run/checkpoints/step-0000002"
    if damage == "half":
        client.delete_object(Bucket="bucket", Key=f"{prefix}/manifest.json")
    elif damage == "gone":
        client.delete_object(Bucket="bucket", Key=f"{prefix}/config.yaml")
    else:
        client.put_object(Bucket="bucket", Key=f"{prefix}/config.yaml", Body=b"step: 3\n" if damage == "changed" else b"step")
    folder = remote.download("s3://bucket/run", tmp_path / "two")
    assert folder == tmp_path / "two/step-0000001"
    assert store.integrity_error(folder) is None
    assert (tmp_path / "two/latest").read_text() == "step-0000001\n"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["latest", "step-0000001"]
    skipped = "skipping the damaged checkpoint s3://bucket/run/checkpoints/step-0000002"
    assert (skipped in capsys.readouterr().err) == (damage != "half")


def test_copies_are_rotated_like_checkpoints_and_replaced(tmp_path: Path, client: Any) -> None:
    """Those of later steps, which another branch has left, stay until this one has passed them."""
    uploader = Uploader("s3://bucket/run", keep=2)

    def upload(step: int, good: Path | None = None, best: bool = False) -> None:
        uploader.start(save(tmp_path / "c", step, best=best), good)
        uploader.finish()

    def steps() -> list[int]:
        return sorted({int(m[1]) for key in list_keys(client) if (m := re.search(r"step-(\d+)/manifest", key))})

    upload(9)
    upload(1, best=True)
    for step in (2, 3, 4, 5):
        upload(step, good=tmp_path / "c/step-0000002")
    assert steps() == [1, 2, 4, 5, 9]
    assert remote.download("s3://bucket/run", tmp_path / "d") == tmp_path / "d/step-0000005"
    assert store.read_pointer(tmp_path / "d", "best") == tmp_path / "d/step-0000001"
    upload(9)
    assert steps() == [1, 5, 9]


def test_a_folder_is_a_copy_too_and_an_upload_that_fails_is_one_line(
    small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.0,))
    words = ["train.steps=2", f"train.copy_to={in_tmp}/copy"]
    assert cli.main(["pretrain", "scenes", *small.settings("r", *words)]) == 0
    assert store.integrity_error(in_tmp / "copy/checkpoints/step-0000002") is None
    assert (in_tmp / "copy/checkpoints/latest").read_text() == "step-0000002\n"
    (in_tmp / "file").touch()
    capsys.readouterr()
    words = ["train.steps=3", f"train.copy_to={in_tmp}/file/copy"]
    assert cli.main(["pretrain", "scenes", *small.settings("r", *words)]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "could not be copied" in line]
    assert "step-0000003 could not be copied to" in line
    assert "Not a directory" in line


def test_a_store_that_is_not_there_is_an_error_at_the_start(
    small: Small, in_tmp: Path, client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for setting, message in (
        ("train.copy_to=s4://bucket/x", "train.copy_to=s4://bucket/x is the address of no store; it can begin with s3://"),
        ("resume=s3://bucket/nothing", "resume=s3://bucket/nothing holds no complete checkpoint"),
    ):
        assert cli.main(["pretrain", "scenes", *small.settings("r", "train.steps=2", setting)]) in (1, 2)
        assert message in capsys.readouterr().err
    assert not (in_tmp / "runs/r").exists()
    with pytest.raises(UserError, match=r"train\.copy_to=s3://absent-bucket/x cannot be used"):
        Uploader("s3://absent-bucket/x", 1).check()


def test_rotation_leaves_the_folder_that_is_being_uploaded(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=1, upload=lambda checkpoint, good: tmp_path / "step-0000001")
    assert [store.parse_step(folder) for folder in store.list_complete(tmp_path)] == [1, 3]
    save(tmp_path, 4, keep=1)
    assert [store.parse_step(folder) for folder in store.list_complete(tmp_path)] == [4]
