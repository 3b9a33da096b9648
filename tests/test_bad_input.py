"""What goes wrong in practice gives one line that names what was given, where, and what would be valid; nothing hangs."""

import io
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from PIL import Image

from launch import cli
from tests.support import Small, environment, read_jsonl, run_clipfuse
from tests.support.launches import TIMEOUT_SECONDS


def jpeg(size: tuple[int, int] = (40, 30)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, "red").save(out, "JPEG")
    return out.getvalue()


def shard(path: Path, samples: list[dict[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, members in enumerate(samples):
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{i:05d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def good(count: int) -> list[dict[str, bytes]]:
    return [{"jpg": jpeg(), "txt": f"a red picture {i}".encode()} for i in range(count)]


def refused(capsys: pytest.CaptureFixture[str], words: list[str], code: int, *said: str) -> None:
    """The command ends with `code` and exactly one line of error, which holds every word of `said`."""
    assert cli.main(words) == code
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clipfuse: ")]
    assert len(errors) == 1, errors
    for word in said:
        assert word in errors[0], errors[0]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("data.train=gone-*.tar", ["data.train", "gone-*.tar"]),
        ("data.val=gone-*.tar", ["data.val", "gone-*.tar"]),
        ("image.tower=tim", ["'tim'", "timm", "transformers"]),
        ("image.name=vit_bas_patch16_224", ["vit_bas_patch16_224", "vit_base_patch16_224"]),
        ("loss.name=clipp", ["'clipp'", "clip", "siglip"]),
        ("text.tokenizer=no/such/folder", ["no/such/folder"]),
        ("optim.lr=fast", ["optim.lr", "fast", "a number"]),
        ("optim.learning_rate=1", ["optim.learning_rate", "valid"]),
        ("data.batch_size=1000", ["data.batch_size=1000", "300"]),
        ("train.epochs=-3", ["train.epochs=-3", "above 0"]),
        ("train.strategy=horovod", ["horovod", "single"]),
        ("train.chunks=3", ["train.chunks", "16"]),
        ("train.precision=int8", ["int8", "fp32", "bf16"]),
        ("train.trackers=[paper]", ["paper", "tensorboard"]),
        ("init=no/such/run", ["no/such/run"]),
        ("text.length=1000000000000", ["text"]),
        ("data.caption=title", ["title"]),
        ("data.draw=0", ["data.draw=0", "at least 1"]),
    ],
)
def test_a_wrong_setting_of_a_run(
    small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str], setting: str, said: list[str]
) -> None:
    words = ["pretrain", "scenes", *small.settings("r", "train.steps=2"), setting]
    code = cli.main(words)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clipfuse: ")]
    assert code in (1, 2)
    assert len(errors) == 1
    for word in said:
        assert word in errors[0]
    assert not list(in_tmp.glob("runs/r/checkpoints/step*"))


def test_an_unknown_configuration_lists_the_shipped_ones(capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, ["pretrain", "vit-b-61"], 2, "vit-b-61", "vit-b-16", "scenes")


def test_damaged_tars_are_refused_at_start_with_their_name(
    small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = shard(in_tmp / "whole.tar", good(40)).read_bytes()
    with tarfile.open(in_tmp / "whole.tar") as tar:
        header = tar.getmembers()[20].offset
    damaged = {
        "empty.tar": b"",
        "cut.tar": whole[: len(whole) // 2 + 100],
        "header.tar": whole[:header] + b"\xff" * 512 + whole[header + 512 :],
        "text.tar": b"this is no archive" * 100,
    }
    for name, data in damaged.items():
        (in_tmp / name).write_bytes(data)
        words = ["pretrain", "scenes", *small.settings(name, "train.steps=2", f"data.train={in_tmp / name}")]
        assert cli.main(words) in (1, 2), name
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clipfuse: ")]
        assert len(errors) == 1, (name, errors)
        assert name in errors[0]
        assert cli.main(["data", "check", str(in_tmp / name)]) == 1, name
        assert name in "".join(capsys.readouterr())


def test_bad_samples_are_counted_by_reason_and_replaced(small: Small, in_tmp: Path) -> None:
    bomb = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(bomb, "PNG")
    whole = jpeg((64, 64))
    bad = [
        {"txt": b"no picture"},
        {"jpg": jpeg()},
        {"jpg": b"", "txt": b"zero bytes"},
        {"jpg": whole[: len(whole) // 2], "txt": b"cut"},
        {"png": bomb.getvalue(), "txt": b"too large"},
        {"jpg": b"hello, I am text", "txt": b"not a picture"},
        {"jpg": jpeg(), "txt": b"   "},
    ]
    shard(in_tmp / "mixed.tar", good(57) + bad)
    settings = small.settings("mixed", "train.steps=8", f"data.train={in_tmp}/mixed.tar", "train.audit=true")
    run_clipfuse("pretrain", "scenes", *settings, "data.max_bad_rate=0.5", cwd=in_tmp)
    last = read_jsonl(in_tmp / "runs/mixed/metrics.jsonl")[-1]
    assert last["bad_samples"] >= 2 * len(bad)  # and the bad ones that were drawn as substitutes
    assert len([name for name in last if name.startswith("bad/")]) >= 5
    audited = [key for line in read_jsonl(in_tmp / "runs/mixed/audit-0.jsonl") for key in line["keys"]]
    assert len(audited) == 128
    assert {f"mixed/{i:05d}" for i in range(57)} == set(audited)
    checked = run_clipfuse("data", "check", in_tmp / "mixed.tar", cwd=in_tmp, check=None)
    assert "64" in checked.stdout
    stopped = run_clipfuse("pretrain", "scenes", *settings, "run=strict", "data.max_bad_rate=0.0", cwd=in_tmp, check=1)
    assert "bad" in stopped.stderr


def test_a_read_only_run_folder(small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """root may write anywhere, so the folder lies where nobody can create one: below a file."""
    (in_tmp / "file").write_text("")
    words = ["pretrain", "scenes", *small.settings("file/run", "train.steps=2")]
    refused(capsys, words, 1, "cannot write into the run folder", "file/run", "run=")


def test_two_runs_in_one_folder(small: Small, in_tmp: Path) -> None:
    words = ["pretrain", "scenes", *small.settings("one", "train.steps=100000")]
    first = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *words], cwd=in_tmp, env=environment(), stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not (in_tmp / "runs/one/status.json").exists():
            assert time.monotonic() < deadline
            assert first.poll() is None
            time.sleep(0.05)
        second = run_clipfuse(*words, cwd=in_tmp, check=1)
        assert f"runs/one is in use by process {first.pid}" in second.stderr
    finally:
        first.kill()
        first.wait()
    assert os.path.exists(in_tmp / "runs/one/metrics.jsonl")


def test_what_a_resumed_run_must_not_change(small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def words(*more: str) -> list[str]:
        return ["pretrain", "scenes", *small.settings("r", *more)]

    assert cli.main(words("train.steps=2")) == 0
    capsys.readouterr()
    refused(capsys, words("train.steps=4", "seed=9"), 2, "cannot resume", "seed is 9 now and was 0")
    refused(capsys, words("train.steps=4", "data.batch_size=8"), 2, "data.batch_size is 8 now and was 16")
    refused(capsys, words("train.steps=4", f"data.train={small.val}"), 2, "cannot resume", "data is")
    refused(capsys, words("train.steps=4", "model.dim=8"), 1, "another architecture", "projections")
    refused(capsys, words("train.steps=4", "resume=never"), 2, "resume=never would overwrite", "another run=NAME")
    assert cli.main(words("train.steps=4", "data.workers=1")) == 0


def test_a_loss_that_is_not_finite_is_skipped_counted_and_fatal(small: Small, in_tmp: Path) -> None:
    settings = small.settings("nan", "train.steps=30", "optim.lr=1e30", "optim.clip_norm=0", "train.max_skipped=4")
    ended = run_clipfuse("pretrain", "scenes", *settings, cwd=in_tmp, check=1)
    assert "not finite for 4 steps in a row" in ended.stderr
    assert "optim.lr" in ended.stderr
    assert read_jsonl(in_tmp / "runs/nan/metrics.jsonl")[-1]["skipped"] == 4


def test_a_table_without_the_column_names_those_it_has(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (in_tmp / "pairs.csv").write_text("file,title\na.jpg,a thing\n")
    words = ["data", "pack", "pairs.csv", "out", "--image-column", "file", "--caption-column", "caption"]
    assert cli.main(words) in (1, 2)
    message = capsys.readouterr().err
    for word in ("caption", "file", "title"):
        assert word in message


def test_a_checkpoint_of_another_architecture(small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrain", "scenes", *small.settings("a", "train.steps=1")]) == 0
    capsys.readouterr()
    words = ["pretrain", "scenes", *small.settings("b", "train.steps=1", "model.dim=8"), "init=runs/a"]
    refused(capsys, words, 1, "another architecture", "projections")
