"""Wrong settings and damaged data give one error line: what was given, where, and what is valid."""

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
    """Return a red image as JPEG."""
    out = io.BytesIO()
    Image.new("RGB", size, "red").save(out, "JPEG")
    return out.getvalue()


def write_shard(path: Path, samples: list[dict[str, bytes]]) -> Path:
    """Write samples, {extension: content}, as a tar with the keys 00000, 00001, ..."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, members in enumerate(samples):
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{i:05d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def valid_samples(count: int) -> list[dict[str, bytes]]:
    """Return image-caption pairs that decode."""
    return [{"jpg": jpeg(), "txt": f"a red image {i}".encode()} for i in range(count)]


def assert_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, *expected: str) -> None:
    """Assert that the command exits with `code` and one error line that contains all of `expected`."""
    assert cli.main(arguments) == code
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clipfuse: ")]
    assert len(errors) == 1, errors
    for text in expected:
        assert text in errors[0], errors[0]


@pytest.mark.parametrize(
    ("setting", "expected"),
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
def test_a_wrong_setting_gives_one_line_and_no_checkpoint(
    small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str], setting: str, expected: list[str]
) -> None:
    arguments = ["pretrain", "scenes", *small.settings("r", "train.steps=2"), setting]
    code = cli.main(arguments)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clipfuse: ")]
    assert code in (1, 2)
    assert len(errors) == 1
    for text in expected:
        assert text in errors[0]
    assert not list(in_tmp.glob("runs/r/checkpoints/step*"))


def test_an_unknown_configuration_lists_the_shipped_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(capsys, ["pretrain", "vit-b-61"], 2, "vit-b-61", "vit-b-16", "scenes")


def test_damaged_tars_are_refused_at_start_with_their_name(
    small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    intact = write_shard(in_tmp / "intact.tar", valid_samples(40)).read_bytes()
    with tarfile.open(in_tmp / "intact.tar") as tar:
        header = tar.getmembers()[20].offset
    damaged = {
        "empty.tar": b"",
        "cut.tar": intact[: len(intact) // 2 + 100],
        "header.tar": intact[:header] + b"\xff" * 512 + intact[header + 512 :],
        "text.tar": b"this is no archive" * 100,
    }
    for name, data in damaged.items():
        (in_tmp / name).write_bytes(data)
        arguments = ["pretrain", "scenes", *small.settings(name, "train.steps=2", f"data.train={in_tmp / name}")]
        assert cli.main(arguments) in (1, 2), name
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clipfuse: ")]
        assert len(errors) == 1, (name, errors)
        assert name in errors[0]
        assert cli.main(["data", "check", str(in_tmp / name)]) == 1, name
        assert name in "".join(capsys.readouterr())


def test_bad_samples_are_counted_by_reason_and_replaced(small: Small, in_tmp: Path) -> None:
    bomb = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(bomb, "PNG")
    intact = jpeg((64, 64))
    bad = [
        {"txt": b"no image"},
        {"jpg": jpeg()},
        {"jpg": b"", "txt": b"zero bytes"},
        {"jpg": intact[: len(intact) // 2], "txt": b"cut"},
        {"png": bomb.getvalue(), "txt": b"too large"},
        {"jpg": b"hello, I am text", "txt": b"not an image"},
        {"jpg": jpeg(), "txt": b"   "},
    ]
    write_shard(in_tmp / "mixed.tar", valid_samples(57) + bad)
    settings = small.settings("mixed", "train.steps=8", f"data.train={in_tmp}/mixed.tar", "train.audit=true")
    run_clipfuse("pretrain", "scenes", *settings, "data.max_bad_rate=0.5", cwd=in_tmp)
    last = read_jsonl(in_tmp / "runs/mixed/metrics.jsonl")[-1]
    assert last["bad_samples"] >= 2 * len(bad)  # and bad samples that were drawn as substitutes
    assert len([name for name in last if name.startswith("bad/")]) >= 5
    audited = [key for line in read_jsonl(in_tmp / "runs/mixed/audit-0.jsonl") for key in line["keys"]]
    assert len(audited) == 128
    assert {f"mixed/{i:05d}" for i in range(57)} == set(audited)
    check = run_clipfuse("data", "check", in_tmp / "mixed.tar", cwd=in_tmp, check=None)
    assert "64" in check.stdout
    strict = run_clipfuse("pretrain", "scenes", *settings, "run=strict", "data.max_bad_rate=0.0", cwd=in_tmp, check=1)
    assert "bad" in strict.stderr


def test_a_run_folder_that_cannot_be_written(small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """root may write anywhere, so the run folder is where nobody can create one: below a file."""
    (in_tmp / "file").write_text("")
    arguments = ["pretrain", "scenes", *small.settings("file/run", "train.steps=2")]
    assert_refused(capsys, arguments, 1, "cannot write into the run folder", "file/run", "run=")


def test_a_second_run_in_the_same_folder_is_refused(small: Small, in_tmp: Path) -> None:
    arguments = ["pretrain", "scenes", *small.settings("one", "train.steps=100000")]
    first = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *arguments], cwd=in_tmp, env=environment(), stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not (in_tmp / "runs/one/status.json").exists():
            assert time.monotonic() < deadline
            assert first.poll() is None
            time.sleep(0.05)
        second = run_clipfuse(*arguments, cwd=in_tmp, check=1)
        assert f"runs/one is in use by process {first.pid}" in second.stderr
    finally:
        first.kill()
        first.wait()
    assert os.path.exists(in_tmp / "runs/one/metrics.jsonl")


def test_settings_that_a_resumed_run_must_not_change(small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def arguments(*more: str) -> list[str]:
        return ["pretrain", "scenes", *small.settings("r", *more)]

    assert cli.main(arguments("train.steps=2")) == 0
    capsys.readouterr()
    assert_refused(capsys, arguments("train.steps=4", "seed=9"), 2, "cannot resume", "seed is 9 now and was 0")
    assert_refused(capsys, arguments("train.steps=4", "data.batch_size=8"), 2, "data.batch_size is 8 now and was 16")
    assert_refused(capsys, arguments("train.steps=4", f"data.train={small.val}"), 2, "cannot resume", "data is")
    assert_refused(capsys, arguments("train.steps=4", "model.dim=8"), 1, "another architecture", "projections")
    assert_refused(capsys, arguments("train.steps=4", "resume=never"), 2, "resume=never would overwrite", "another run=NAME")
    assert cli.main(arguments("train.steps=4", "data.workers=1")) == 0


def test_a_loss_that_is_not_finite_is_skipped_counted_and_fatal(small: Small, in_tmp: Path) -> None:
    settings = small.settings("nan", "train.steps=30", "optim.lr=1e30", "optim.clip_norm=0", "train.max_skipped=4")
    result = run_clipfuse("pretrain", "scenes", *settings, cwd=in_tmp, check=1)
    assert "not finite for 4 steps in a row" in result.stderr
    assert "optim.lr" in result.stderr
    assert read_jsonl(in_tmp / "runs/nan/metrics.jsonl")[-1]["skipped"] == 4


def test_a_table_without_the_column_names_those_it_has(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (in_tmp / "pairs.csv").write_text("file,title\na.jpg,a car\n")
    arguments = ["data", "pack", "pairs.csv", "out", "--image-column", "file", "--caption-column", "caption"]
    assert cli.main(arguments) in (1, 2)
    message = capsys.readouterr().err
    for column in ("caption", "file", "title"):
        assert column in message


def test_initial_weights_of_another_architecture_are_refused(
    small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["pretrain", "scenes", *small.settings("a", "train.steps=1")]) == 0
    capsys.readouterr()
    arguments = ["pretrain", "scenes", *small.settings("b", "train.steps=1", "model.dim=8"), "init=runs/a"]
    assert_refused(capsys, arguments, 1, "another architecture", "projections")
