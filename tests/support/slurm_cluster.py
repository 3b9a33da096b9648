"""A real Slurm cluster of two nodes on this machine: munged, slurmctld and two slurmd.

Their files are in a temporary folder; they are ended by pid.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")


def skip_reason() -> str:
    """Return why no cluster can run here, or ""."""
    absent = [name for name in PROGRAMS if _find_program(name) is None]
    if absent:
        return f"Slurm is not installed ({', '.join(absent)}): apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "slurmd needs root"


def _find_program(name: str) -> str | None:
    """Return the path of a program; Slurm's daemons are often outside PATH."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def free_ports(count: int) -> list[int]:
    """Return different TCP ports that are free now."""
    listeners = [socket.socket() for _ in range(count)]
    try:
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]
    finally:
        for listener in listeners:
            listener.close()


class Cluster:
    """A Slurm cluster in the folder `root`: its daemons, and commands against it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.conf = root / "slurm.conf"
        self._daemons: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []

    def run(self, *command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
        """Run one of Slurm's programs, or a program that calls them, and return its output."""
        done = subprocess.run(
            [str(argument) for argument in command],
            cwd=cwd or self.root,
            env={**(env or os.environ), "SLURM_CONF": str(self.conf)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def state(self, job: str) -> str:
        """Return a job's state: PENDING, RUNNING, COMPLETED, ..."""
        return self.field(job, "JobState")

    def field(self, job: str, name: str) -> str:
        """Return one field of `scontrol show job`."""
        fields = self.run("scontrol", "show", "job", "--oneliner", job).split()
        return next(field.partition("=")[2] for field in fields if field.startswith(f"{name}="))

    def wait(self, job: str, states: tuple[str, ...], seconds: float) -> str:
        """Wait until the job is in one of the states and return that state."""
        end = time.monotonic() + seconds
        while (now := self.state(job)) not in states:
            assert time.monotonic() < end, f"job {job} is {now} after {seconds} s, not {states}\n{self.logs()}"
            time.sleep(0.5)
        return now

    def logs(self) -> str:
        """Return the ends of all daemons' logs."""
        return "\n".join(
            f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in sorted(self.root.glob("*.log"))
        )

    # -----------------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Write the configuration, start the daemons and wait until both nodes are idle."""
        host = os.uname().nodename.split(".")[0]
        controller, first, second = free_ports(3)
        key, sock = self.root / "munge.key", self.root / "munge.socket"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        for name in ("state", "spool.n1", "spool.n2"):
            (self.root / name).mkdir()
        self.conf.write_text(
            f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={sock},cred_expire=10
CredType=cred/munge
StateSaveLocation={self.root}/state
SlurmdSpoolDir={self.root}/spool.%n
SlurmctldPidFile={self.root}/slurmctld.pid
SlurmdPidFile={self.root}/slurmd.%n.pid
SlurmctldLogFile={self.root}/slurmctld.log
SlurmdLogFile={self.root}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=60
MinJobAge=600
SchedulerParameters=sched_interval=2,batch_sched_delay=0,bf_interval=2
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first},{second}] CPUs=1 State=UNKNOWN
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""
        )
        munge = [f"--key-file={key}", f"--socket={sock}", f"--pid-file={self.root}/munged.pid", f"--seed-file={self.root}/seed"]
        self._spawn("munged", "--foreground", "--force", f"--log-file={self.root}/munged-own.log", *munge)
        self._wait_until(sock.exists, "munged")
        self._spawn("slurmctld", "-D", "-f", self.conf)
        for node in ("n1", "n2"):
            self._spawn("slurmd", "-D", "-f", self.conf, "-N", node, log=f"slurmd-{node}")
        self._wait_until(lambda: self.run("sinfo", "-h", "-o", "%T %D").strip() == "idle 2", "two idle nodes")

    def _spawn(self, program: str, *arguments: str | Path, log: str | None = None) -> None:
        path = _find_program(program)
        assert path is not None
        out = (self.root / f"{log or program}.log").open("wb")
        env = {**os.environ, "SLURM_CONF": str(self.conf)}
        # The daemons get this process's environment; a job gets that of its sbatch.
        process = subprocess.Popen([path, *map(str, arguments)], cwd=self.root, env=env, stdout=out, stderr=out)
        self._daemons.append((process, out))

    def _wait_until(self, is_ready: object, name: str, seconds: float = 60) -> None:
        """Wait until is_ready() is true, and fail the test if a daemon ends before.

        An AssertionError in is_ready() counts as false.
        """
        assert callable(is_ready)
        end = time.monotonic() + seconds
        while True:
            try:
                if is_ready():
                    return
            except AssertionError:
                pass
            dead = [process.args for process, _ in self._daemons if process.poll() is not None]
            assert not dead, f"ended: {dead}\n{self.logs()}"
            assert time.monotonic() < end, f"no {name} after {seconds} s\n{self.logs()}"
            time.sleep(0.3)

    def stop(self) -> None:
        """Cancel all jobs, then end the daemons in the reverse order of their start."""
        if len(self._daemons) == 4:
            subprocess.run(
                ["scancel", "--user=root"], env={**os.environ, "SLURM_CONF": str(self.conf)}, timeout=60, check=False
            )
            time.sleep(1)
        for process, out in reversed(self._daemons):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait(20)
            out.close()


@contextmanager
def run_cluster(root: Path) -> Iterator[Cluster]:
    """Start a cluster in `root`, which daemons of other users can read; stop it at the end of the block."""
    cluster = Cluster(root)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
