"""--on slurm: the script it writes, and a real Slurm of two nodes in which a job is stopped, requeued, and finishes.

Everything that needs Slurm is skipped with a reason where it is not installed (apt-get install slurm-wlm munge).
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import cli, slurm
from launch.nodes import parse_nodes
from pretrain.errors import ConfigError
from tests.support import ROOT, Small, environment, read_losses
from tests.support.launches import STEPS, clipfuse_command, start_launcher, tiny_run_args
from tests.support.slurm_cluster import Cluster, run_cluster, skip_reason

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
needs_slurm = pytest.mark.skipif(bool(skip_reason()), reason=skip_reason())
TEMPLATES = sorted((ROOT / "launch" / "slurm").glob("*.sbatch"))


def body(text: str) -> str:
    """A script without its first comment, options and the lines that carry the run's words."""
    return text[text.index("# The nodes meet") :].strip()


def test_the_script_is_the_template_with_the_words_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = slurm.Job(nodes=2, nproc=8, time="12:00:00", partition="a b", account="me", more=["--mem=64G"])
    run = tmp_path / "runs" / "it's"
    text = slurm.build_script("pretrain", ["scenes", "run=it's", "image.args={a: $HOME}"], job, run)
    assert body(text) == body((ROOT / "launch" / "slurm" / "pretrain.sbatch").read_text())
    options = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {
        "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=8", "--time=12:00:00", "--partition='a b'", "--account=me",
        "--signal=USR1@300", "--requeue", "--mem=64G",
    } <= set(options)  # fmt: skip
    # what bash makes of it: the very words, whatever they hold
    line = next(line for line in text.splitlines() if line.startswith("set -- "))
    done = subprocess.run(["bash", "-c", f'{line}; printf "%s\\n" "$@"'], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["scenes", "run=it's", "image.args={a: $HOME}"]
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_no_gpus_no_requeue_and_other_gpus_than_processes(tmp_path: Path) -> None:
    options = slurm.Job(nproc=4, gpus=0, requeue=False).options(tmp_path)
    assert not [option for option in options if option.startswith("--gpus")]
    assert "--no-requeue" in options
    assert "--gpus-per-node=2" in slurm.Job(nproc=4, gpus=2).options(tmp_path)


def test_any_number_of_nodes_between_two(small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Slurm allocates it; those nodes beyond a number that divides the batch wait, as in an elastic run elsewhere."""
    settings = tiny_run_args(small, tmp_path / "run", "train.steps=4")[1:]
    slurm.submit("pretrain", "scenes", settings, slurm.Job(nodes=parse_nodes("2:3"), nproc=1), dry_run=True)
    script = capsys.readouterr().out
    assert "#SBATCH --nodes=2-3\n" in script
    assert "NPROC=1 MIN_NODES=2\n" in script
    line = "MIN_NODES=2 SLURM_NNODES=3; echo --nodes " + script.partition("--nodes ")[2].partition(" --rdzv")[0]
    assert subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout == "--nodes 2:3\n"
    with pytest.raises(ConfigError, match="--nodes 3:4 --nproc 1: the smallest run cannot start"):
        slurm.submit("pretrain", "scenes", settings, slurm.Job(nodes=parse_nodes("3:4"), nproc=1), dry_run=True)


def test_a_configuration_that_could_not_run_is_refused_before_it_waits_in_line(small: Small, tmp_path: Path) -> None:
    settings = tiny_run_args(small, tmp_path / "run", "train.steps=4")[1:]
    with pytest.raises(ConfigError, match=r"data\.batch_size=16 must be divisible"):
        slurm.submit("pretrain", "scenes", settings, slurm.Job(nodes=3, nproc=8), dry_run=True)
    with pytest.raises(ConfigError, match=r"train\.strategy=single runs in one process, not 4"):
        slurm.submit("pretrain", "scenes", [*settings, "train.strategy=single"], slurm.Job(nodes=2, nproc=2), dry_run=True)
    # fp16 needs a GPU: the nodes have some, this machine need not
    assert slurm.submit("pretrain", "scenes", [*settings, "train.precision=fp16"], slurm.Job(nproc=2), dry_run=True) == ""
    with pytest.raises(ConfigError, match="needs a GPU"):
        slurm.submit("pretrain", "scenes", [*settings, "train.precision=fp16"], slurm.Job(nproc=2, gpus=0), dry_run=True)


def test_a_fine_tuning_job_takes_the_towers_of_the_run_it_starts_from(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shipped vqa.yaml names no tower: init=RUN does."""
    encoders = tmp_path / "encoders"
    assert cli.main(["pretrain", "scenes", *small.settings(encoders, "train.steps=1")]) == 0
    capsys.readouterr()
    words = [f"run={tmp_path / 'run'}", f"data.train={small.train}", f"data.val={small.val}", "data.batch_size=16"]
    job = ["--on", "slurm", "--nproc", "2", "--dry-run"]
    assert cli.main(["finetune", "vqa", f"init={encoders}", *words, "train.strategy=ddp", *job]) == 0
    script = capsys.readouterr().out
    assert "MODULE=finetune NPROC=2" in script
    assert f"set -- vqa init={encoders} " in script
    assert cli.main(["finetune", "vqa", *words, "train.strategy=ddp", *job]) == 2
    assert "init=RUN is missing" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# A real Slurm


@pytest.fixture(scope="module")
def slurm_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    root = tmp_path_factory.mktemp("slurm")
    for folder in (root, root.parent, root.parent.parent):  # daemons of other users pass through
        folder.chmod(folder.stat().st_mode | 0o055)
    with run_cluster(root) as made:
        yield made


@needs_slurm
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_slurm_takes_the_template(template: Path, slurm_cluster: Cluster) -> None:
    slurm_cluster.run("sbatch", "--test-only", "--nodes=2", template, "scenes")


@needs_slurm
def test_a_job_that_is_preempted_twice_has_the_losses_of_an_undisturbed_run(
    small: Small, slurm_cluster: Cluster, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    # -- the job
    run = tmp_path / "the run"
    words = tiny_run_args(small, run, f"train.steps={STEPS}", "train.save_every=1000")
    options = ["--on", "slurm", "--nodes", "2", "--nproc", "1", "--gpus-per-node", "0", "--time", "30", "--warning", "60"]
    command = [sys.executable, "-m", "launch.cli", "pretrain", *words, *options]
    said = slurm_cluster.run(*command, cwd=tmp_path, env=environment(OMP_NUM_THREADS="1", PATH=os.environ["PATH"]))
    job = re.findall(r"submitted job (\d+): 2 nodes with 1 process each", said)[0]
    output = run / f"slurm-{job}.out"

    # -- out of time, nearly: USR1, the job lines up again by itself
    _until(output, rf"step 3/{STEPS} ", slurm_cluster, job)
    slurm_cluster.run("scancel", "--signal=USR1", job)
    slurm_cluster.wait(job, ("PENDING",), 120)
    assert f"job {job} stopped and saved; requeueing" in output.read_text()
    assert '"stopped by SIGUSR1"' in (run / "status.json").read_text()

    # -- preempted: SIGTERM, Slurm puts the job back
    _until(output, r"resuming .* at step \d+[\s\S]*step 1\d/", slurm_cluster, job)
    slurm_cluster.run("scontrol", "requeue", job)
    slurm_cluster.wait(job, ("PENDING",), 120)
    assert '"stopped by SIGTERM"' in (run / "status.json").read_text()

    slurm_cluster.wait(job, ("COMPLETED",), 300)
    assert slurm_cluster.field(job, "Restarts") == "2"
    assert output.read_text().count("resuming ") == 2
    assert read_losses(run) == undisturbed


@needs_slurm
def test_a_job_that_cannot_be_is_one_line(small: Small, slurm_cluster: Cluster, tmp_path: Path) -> None:
    words = tiny_run_args(small, tmp_path / "run", "train.steps=4")
    options = ["--on", "slurm", "--nproc", "2", "--gpus-per-node", "0", "--partition", "nowhere"]
    env = environment(PATH=os.environ["PATH"], SLURM_CONF=str(slurm_cluster.conf))
    with start_launcher(*clipfuse_command("pretrain", *words, *options), cwd=tmp_path, **env) as refused:
        output = refused.wait_for_exit(1)
    assert len(output.splitlines()) == 1
    assert "sbatch refused" in output
    assert "partition" in output


def _until(output: Path, pattern: str, slurm_cluster: Cluster, job: str, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not (output.exists() and re.search(pattern, output.read_text())):
        there = output.read_text()[-4000:] if output.exists() else "no output"
        state = slurm_cluster.state(job)
        assert state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), f"{state}\n{there}"
        assert time.monotonic() < end, f"no {pattern!r}, {state}\n{there}\n{slurm_cluster.logs()}"
        time.sleep(0.3)
