"""--dry-run: settings that differ from the defaults, device, folder, memory and `init`; the whole configuration with -v."""

import os
import signal
from pathlib import Path

import pytest
import yaml

from launch import cli
from launch.plan import GIB, estimate
from launch.plan.measure import measure_model
from pretrain.config import find_config, to_dict
from pretrain.errors import UserError
from pretrain.runtime import distributed, entrypoint
from pretrain.runtime.entrypoint import FAILED, DryRun, run_with_exit_code
from pretrain.train import load_config
from pretrain.training.run_dir import RunFolder
from tests.support import Small


@pytest.fixture(scope="module")
def run(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of two steps of four."""
    folder = tmp_path_factory.mktemp("dry") / "run"
    assert cli.main(["pretrain", "scenes", *small.settings(folder, "train.steps=2")]) == 0
    return folder


def dry_run(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0, stage: str = "pretrain") -> str:
    capsys.readouterr()
    assert cli.main([stage, *words, "--dry-run"]) == code
    return capsys.readouterr().out


def line_of(output: str, start: str) -> str:
    return next(line for line in output.splitlines() if line.startswith(start))


def test_differences_device_folder_memory_and_time(small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = small.settings("x", "train.steps=10", "loss.name=siglip", "data.augment.flip=true", "train.strategy=ddp")
    output = dry_run(capsys, "scenes", *settings, "--nproc", "2")
    lines = [line.strip() for line in output[: output.index("\n\n")].splitlines()[1:]]
    for line in (
        "image.size: 32 (224)",
        f"text.tokenizer: {small.tokenizer} (none)",
        "model.dim: 16 (512)",
        "run: x (pretrain)",
        "data.batch_size: 16 (128)",
        "data.augment.flip: true (false)",
        "loss.name: siglip (clip)",
        "train.steps: 10 (0)",
        "train.strategy: ddp (single)",
    ):
        assert line in lines
    assert not [line for line in lines if line.startswith(("image.tower", "data.window", "train.precision", "model.logit"))]
    assert line_of(output, "device: ").startswith("device: CPU, 1 thread a process; 2 processes, train.strategy=ddp")
    assert line_of(output, "folder: ") == "folder: runs/x: a new folder"
    assert line_of(output, "time: ").startswith("time: not estimated")
    assert not list(in_tmp.iterdir())
    with distributed.assume_world(2, 1, gpu=False):
        config = load_config(find_config("scenes", "pretrain"), settings)
    expected = estimate(config, measure_model(config)[0], 2, overhead=False).total / GIB  # of a model that is built anew
    assert line_of(output, "memory: ").startswith(f"memory: {expected:.2f} GiB a process (")


def test_verbose_prints_the_whole_configuration_as_yaml(small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = small.settings("x", "train.steps=10", "model.logit_scale=2")
    output = dry_run(capsys, "scenes", *settings, "-v")
    config = load_config(find_config("scenes", "pretrain"), settings)
    config.data.streams = 1  # which the loader chooses
    assert yaml.safe_load(output) == to_dict(config)
    Path("all.yaml").write_text(output)
    assert "logit_scale: 2.0" in dry_run(capsys, "all.yaml", "-v")
    assert cli.main(["pretrain", "scenes", *settings, "-v"]) == 2
    assert "-v prints the configuration with --dry-run" in capsys.readouterr().err

    job = [*settings, "train.strategy=ddp", "--on", "slurm", "--nproc", "2"]
    script = dry_run(capsys, "scenes", *job)
    assert script.startswith("#!")
    assert "#   train.strategy: ddp (single)" in script
    assert "#   log_every: 1" not in script.replace("    ", "  ")
    assert "log_every: 1" in dry_run(capsys, "scenes", *job, "-v")


def test_the_folder_is_resumed_or_refused_as_a_run_would(
    small: Small, run: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = sorted(path for path in run.rglob("*"))
    output = dry_run(capsys, "scenes", *small.settings(run, "train.steps=4"))
    assert line_of(output, "folder: ") == f"folder: {run}: resumes at step 2 of 4"
    for more, reason in (
        ("seed=1", "seed is 1 now and was 0"),
        ("image.pool=cls", "image.pool is 'cls' now"),
        ("resume=never", "resume=never would overwrite the run"),
    ):
        settings = small.settings(run, "train.steps=4", more)
        output = dry_run(capsys, "scenes", *settings, code=2)
        assert reason in line_of(output, f"folder: {run}: refused: ")
        assert "trainable" in output
    assert cli.main(["pretrain", "scenes", *settings]) == 2  # as the run itself
    other = RunFolder(str(run))
    other.open()
    output = dry_run(capsys, "scenes", *small.settings(run, "train.steps=4"), code=1)
    other.close()
    assert "is in use by process" in line_of(output, f"folder: {run}: refused: ")
    Path("file").touch()
    with pytest.raises(UserError, match=r"cannot write into the run folder file/x: .*file is a file"):
        RunFolder("file/x").refuse_unusable()
    assert sorted(path for path in run.rglob("*")) == content


def test_a_dry_run_that_is_stopped_has_nothing_to_resume(
    small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(config: object, model: object, processes: int) -> list[str]:
        os.kill(os.getpid(), signal.SIGTERM)
        return []

    settings = small.settings("x", "train.steps=1")
    assert run_with_exit_code(entrypoint.run, "scenes", settings, DryRun(estimate=stop)) == FAILED
    assert capsys.readouterr().err.splitlines()[-1] == "clipfuse: the dry run was stopped by SIGTERM; it has written nothing"
    assert not list(in_tmp.iterdir())


def test_init_is_loaded(small: Small, run: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    init = f"init={run}"
    output = dry_run(capsys, "scenes", *small.settings("x", "train.steps=1", init))
    assert line_of(output, "init: ") == f"init: {run} is there, and its weights fit"
    assert cli.main(["pretrain", "scenes", *small.settings("x", "train.steps=1", init, "model.dim=8"), "--dry-run"]) == 1
    assert "projections.image.weight" in capsys.readouterr().err
    data = [f"data.train={small.train}", f"data.val={small.val}", "data.workers=0", "data.batch_size=16"]
    output = dry_run(capsys, "classification", init, *data, "run=y", stage="finetune")
    assert line_of(output, "init: ") == f"init: {run} is there, and its weights fit"
    assert line_of(output, "folder: ") == "folder: runs/y: a new folder"
    assert "  task.name: classification (vqa)" in output.splitlines()
    assert line_of(output, "memory and time: ").startswith("memory and time: not estimated")
    assert not list(in_tmp.iterdir())
