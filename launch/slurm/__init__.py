"""clipfuse pretrain CONFIG --on slurm --nodes N --nproc M: write a batch script into the run folder and submit it.

The script is pretrain.sbatch of this folder with the job's #SBATCH lines and the run's arguments. One srun task per node starts
`clipfuse pretrain ... --nproc M --nodes N --rdzv HOST:PORT`. SIGUSR1 arrives `warning` seconds before the time limit: the run
saves, ends with 75, and the script requeues the job. Slurm itself requeues preempted jobs. Either way the job resumes from its
newest checkpoint when it starts again. May import pretrain.
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

from launch.nodes import NodeCount, find_usable
from pretrain import config as configuration
from pretrain.config import find_config
from pretrain.errors import ConfigError, UserError
from pretrain.printable import format_count, hide_secrets
from pretrain.runtime import distributed
from pretrain.training.dry_run import list_differences
from pretrain.training.run_dir import RunFolder

ROOT = Path(__file__).resolve().parent.parent.parent
TEMPLATE = Path(__file__).resolve().parent / "pretrain.sbatch"


@dataclass(frozen=True)
class Job:
    """The resources and limits of a Slurm job."""

    nodes: int = 1
    """A NodeCount of MIN:MAX lets Slurm allocate any number between them, at each start another one."""
    nproc: int = 1
    """Processes per node; as many GPUs per node are requested, unless `gpus` is given."""
    time: str | None = None
    """Time limit as sbatch reads it (HH:MM:SS, D-HH); None = the partition's."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gpus: int | None = None
    """GPUs per node; 0 = none, None = one per process."""
    warning: int = 300
    """Seconds before the time limit at which the run saves and the job is requeued."""
    requeue: bool = True
    more: list[str] = field(default_factory=list)
    """Any other options of sbatch, passed on unchanged: --mem=64G."""

    @property
    def count(self) -> NodeCount:
        """The number of nodes, or the smallest and the largest one."""
        return self.nodes if isinstance(self.nodes, NodeCount) else NodeCount(self.nodes)

    def options(self, run: Path) -> list[str]:
        """Return the options of sbatch, one per #SBATCH line."""
        gpus = self.nproc if self.gpus is None else self.gpus
        options = {
            "job-name": f"clipfuse-{run.name}",
            "nodes": f"{self.count.least}-{int(self.nodes)}" if self.count.is_elastic else int(self.nodes),
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
        lines = [f"--{name}={shlex.quote(str(value))}" for name, value in options.items() if value is not None]
        return [*lines, "--requeue" if self.requeue else "--no-requeue", *self.more]


def build_script(module: str, words: list[str], job: Job, run: Path) -> str:
    """Return the text of the batch script. words: CONFIG key=value ...; run: the absolute path of the run folder."""
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
            f"MODULE={module} NPROC={job.nproc}" + (f" MIN_NODES={job.count.least}" if job.count.is_elastic else ""),
            f"export CLIPFUSE_COMMAND={shlex.quote('sbatch ' + shlex.quote(str(run / 'job.sbatch')))}",
            f"set -- {shlex.join(words)}",
            body,
            "",
        ]
    )


def submit(module: str, config: str, settings: list[str], job: Job, dry_run: bool = False, verbose: bool = False) -> str:
    """Check the configuration for the job's processes, write the script, submit it, and return the job's number.

    dry_run: print the script instead, and in comments after it the settings that differ from the defaults; verbose: all of
    them. Raises ConfigError for what could not run, UserError where Slurm refuses.
    """
    if job.nodes < 1 or job.nproc < 1:
        raise ConfigError(f"--nodes {job.nodes} --nproc {job.nproc}: both must be at least 1")
    if not dry_run and shutil.which("sbatch") is None:
        raise UserError("there is no sbatch on this machine: use --on slurm where Slurm jobs are submitted")
    # Check the configuration as the job's processes will see it: an error now, not after hours in the queue.
    path = find_config(config, module).resolve()
    gpus = job.nproc if job.gpus is None else job.gpus
    trainer: Any = importlib.import_module(f"{module}.train")
    nodes = find_usable(module, path, settings, job.count, job.nproc, gpus > 0)[-1] if job.count.is_elastic else job.nodes
    with distributed.assume_world(nodes * job.nproc, nodes, gpus > 0):
        loaded = trainer.load_config(path, settings)

    run = RunFolder(loaded.run).path.absolute()
    words = [str(path) if Path(config).is_file() else config, *settings]
    text = build_script(module, words, job, run)
    if dry_run:
        print(hide_secrets(text))
        settings_lines = configuration.to_yaml(loaded).splitlines() if verbose else list_differences(loaded)
        print("# settings:" if verbose else "# settings that differ from the defaults:")
        print(*(f"#   {line}" for line in settings_lines), sep="\n")
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
    job_id = done.stdout.strip().partition(";")[0]
    count = f"{job.count} nodes" if job.count.is_elastic else format_count(job.nodes, "node")
    print(f"submitted job {job_id}: {count} with {format_count(job.nproc, 'process')} each")
    print(f"script {file}, output {run}/slurm-{job_id}.out")
    print(f"to stop: scancel --signal=USR1 {job_id} saves and requeues it; scancel {job_id} saves and ends it, resumable")
    return job_id
