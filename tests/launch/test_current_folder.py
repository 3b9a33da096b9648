"""A user's own modules in the current folder are neither started nor imported in place of ours."""

import subprocess
import sys
from pathlib import Path

import pytest

from launch import slurm
from tests.support import environment

NAMES = ("pretrain", "finetune", "launch", "clipfuse", "accelerate", "yaml", "torch")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with modules of these names, each of which leaves a file when it is imported or run."""
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / name)!r} + '.ran', 'w').close()\n")
    return tmp_path


def run_python(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.slow
def test_processes_of_nproc_are_ours(folder: Path) -> None:
    (folder / "clipfuse.py").unlink()  # python -m finds these two before any code of ours runs
    (folder / "launch.py").unlink()
    done = run_python(folder, "-m", "clipfuse", "pretrain", "scenes", "--nproc", "2", "optim.lr=-1", PYTHONPATH="")
    assert done.returncode == 2, done.stderr
    assert "clipfuse: optim.lr=-1.0 must be above 0" in done.stderr
    assert not list(folder.glob("*.ran"))


@pytest.mark.parametrize("module", ["pretrain", "finetune"])
def test_a_raw_launchers_process_with_a_safe_path_is_ours(folder: Path, module: str) -> None:
    """What torchrun, accelerate and deepspeed start with PYTHONSAFEPATH=1."""
    done = run_python(folder, "-m", module, "--help", PYTHONSAFEPATH="1")
    assert f"python -m {module}" in done.stdout
    assert not list(folder.glob("*.ran"))


def test_a_process_started_by_name_leaves_the_current_folder(folder: Path) -> None:
    (folder / "pretrain.py").unlink()
    done = run_python(folder, "-m", "pretrain", "--help")
    assert "python -m pretrain" in done.stdout
    assert not list(folder.glob("*.ran"))


def test_a_program_of_the_users_own_keeps_its_folder(tmp_path: Path) -> None:
    """`python -m mine.train` that imports us finds what lies beside it."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/__init__.py").write_text("import clipfuse, finetune, launch\n")
    (tmp_path / "mine/train.py").write_text("import beside\n")
    (tmp_path / "beside.py").write_text("import os; print('found', 'PYTHONSAFEPATH' in os.environ)\n")
    done = run_python(tmp_path, "-m", "mine.train")
    assert done.stdout == "found False\n", done.stderr


def test_slurm_jobs_have_a_safe_path(tmp_path: Path) -> None:
    lines = slurm.build_script("pretrain", ["scenes"], slurm.Job(), tmp_path).splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("srun"))
    assert "export PYTHONSAFEPATH=1" in lines[:start]
