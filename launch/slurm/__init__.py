"""clipfuse pretrain CONFIG --on slurm --nodes N --nproc M: writes a batch script into the run folder and submits it.

The script is launch/slurm/pretrain.sbatch with other #SBATCH lines and the run's words in it. One srun task a node starts
`clipfuse pretrain ... --nproc M --nodes N --rdzv HOST:PORT`. USR1 comes `warning` seconds before the time limit: the run
saves, ends with 75, and the script puts the job back in line; preempted jobs are put back by Slurm. Either way the job
resumes from its newest checkpoint when its turn comes.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.config import find_config
from pretrain.errors import ConfigError, UserError
from pretrain.runtime import distributed
from pretrain.training.run_dir import RunFolder

ROOT = Path(__file__).resolve().parent.parent.parent
TEMPLATE = Path(__file__).resolve().parent / "pretrain.sbatch"


@dataclass(frozen=True)
class Job:
    """What is asked of Slurm."""

    nodes: int = 1
    nproc: int = 1
    """Processes a node; as many GPUs a node are asked for, unless gpus says otherwise."""
    time: str | None = None
    """Limit, as sbatch reads it (HH:MM:SS, D-HH); None = the partition's."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gpus: int | None = None
    """GPUs a node; 0 = none."""
    warning: int = 300
    """Seconds before the time limit at which the run saves and lines up again."""
    requeue: bool = True
    more: list[str] = field(default_factory=list)
    """Any other options of sbatch, as they are: --mem=64G."""

    def options(self, run: Path) -> list[str]:
        """The #SBATCH lines."""
        gpus = self.nproc if self.gpus is None else self.gpus
        chosen = {
            "job-name": f"clipfuse-{run.name}",
            "nodes": self.nodes,
            "ntasks-per-node": 1,
            "gpus-per-node": gpus or None,
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "signal": f"USR1@{self.warning}",
            "open-mode": "append",
            "output": run / "slurm-%j.out",
        }
        lines = [f"--{name}={shlex.quote(str(value))}" for name, value in chosen.items() if value is not None]
        return [*lines, "--requeue" if self.requeue else "--no-requeue", *self.more]


def script(module: str, words: list[str], job: Job, run: Path) -> str:
    """The text of the batch script. words: CONFIG key=value ..., run: the run's folder, absolute."""
    head, _, body = TEMPLATE.read_text().partition("\n#SBATCH")
    body = "\n".join(line for line in body.splitlines()[1:] if not line.startswith("#SBATCH"))
    return "\n".join(
        [
            head.splitlines()[0],
            f"# sbatch {shlex.quote(str(run / 'job.sbatch'))}",
            *(f"#SBATCH {option}" for option in job.options(run)),
            "",
            f"cd {shlex.quote(os.getcwd())} || exit 1",
            f'export PYTHONPATH={shlex.quote(str(ROOT))}"${{PYTHONPATH:+:$PYTHONPATH}}"',
            f"CLIPFUSE=({shlex.quote(sys.executable)} -m launch.cli)",
            f"MODULE={module} NPROC={job.nproc}",
            f"export CLIPFUSE_COMMAND={shlex.quote('sbatch ' + shlex.quote(str(run / 'job.sbatch')))}",
            f"set -- {shlex.join(words)}",
            body,
            "",
        ]
    )


def submit(module: str, config: str, settings: list[str], job: Job, dry_run: bool = False) -> str:
    """Checks the configuration for the job's processes, writes the script and submits it; the job's number.

    Raises ConfigError for what could not run, UserError where Slurm refuses.
    """
    if job.nodes < 1 or job.nproc < 1:
        raise ConfigError(f"--nodes {job.nodes} --nproc {job.nproc}: both must be at least 1")
    if not dry_run and shutil.which("sbatch") is None:
        raise UserError("no sbatch here: --on slurm is for a machine from which Slurm jobs are submitted")
    # -- the configuration, as the job's processes will see it: an error now, not after hours in line
    path = find_config(config, module).resolve()
    gpus = job.nproc if job.gpus is None else job.gpus
    trainer: Any = importlib.import_module(f"{module}.train")
    with distributed.assume_world(job.nodes * job.nproc, job.nodes, gpus > 0):
        loaded = trainer.load_config(path, settings)

    run = RunFolder(loaded.run).path.absolute()
    words = [str(path) if Path(config).is_file() else config, *settings]
    text = script(module, words, job, run)
    if dry_run:
        print(text)
        return ""
    run.mkdir(parents=True, exist_ok=True)
    file = run / "job.sbatch"
    file.write_text(text)
    done = subprocess.run(["sbatch", "--parsable", str(file)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = re.sub(
            r"^sbatch: error: ", "", done.stderr.strip().splitlines()[0] if done.stderr.strip() else "no reason given"
        )
        raise UserError(f"sbatch refused {file}: {reason}")
    number = done.stdout.strip().partition(";")[0]
    print(f"submitted job {number}: {job.nodes} nodes of {job.nproc} processes; script {file}, output {run}/slurm-{number}.out")
    print(f"stop and save: scancel --signal=USR1 {number} lines it up again; scancel {number} ends it, resumable")
    return number
