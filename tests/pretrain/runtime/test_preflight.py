"""Mistakes of launchers, and differences between processes, are refused before training."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.errors import ConfigError
from pretrain.runtime import distributed, preflight
from tests.support import ROOT, environment
from tests.support.launches import free_port

GROUP = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1", "LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    "env",
    [
        {},
        GROUP,
        GROUP | {"SLURM_STEP_NUM_TASKS": "2", "GROUP_WORLD_SIZE": "2"},  # our own job: one agent per task
        GROUP | {"SLURM_STEP_NUM_TASKS": "2"},  # ranks that the user set for two tasks
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_NTASKS": "2"},  # a batch script, not its tasks
        {"ACCELERATE_MIXED_PRECISION": "no"},  # accelerate launch with one process
        {"MASTER_ADDR": "from an earlier run"},
    ],
)
def test_valid_environments_pass(env: dict[str, str]) -> None:
    preflight.check_launcher(env, gpus=0)


@pytest.mark.parametrize(
    ("env", "line"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, "accelerate launch was asked for several"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2 without MASTER_ADDR, MASTER_PORT"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "srun started 2 tasks that do not know each other"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun started 4 tasks that do not know each other"),
        # two tasks, each of which started a torchrun
        (GROUP | {"SLURM_STEP_NUM_TASKS": "2", "GROUP_WORLD_SIZE": "1"}, "srun started 2 tasks that do not know each other"),
        (GROUP | {"LOCAL_RANK": "2", "RANK": "2", "WORLD_SIZE": "4"}, "number 2 on its node, which has 2 GPUs"),
    ],
)
def test_processes_without_a_common_group_are_refused(env: dict[str, str], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        preflight.check_launcher(env, gpus=2 if "LOCAL_RANK" in env else 0)


def test_settings_of_accelerate_must_match_the_configuration() -> None:
    preflight.check_accelerate("bf16", "ddp", {"ACCELERATE_MIXED_PRECISION": "bf16"})
    preflight.check_accelerate("fp32", "ddp", {"ACCELERATE_MIXED_PRECISION": "no"})
    preflight.check_accelerate("bf16", "fsdp2", {"ACCELERATE_USE_FSDP": "true"})
    with pytest.raises(ConfigError, match=r"mixed_precision=bf16.*train.precision=fp32"):
        preflight.check_accelerate("fp32", "ddp", {"ACCELERATE_MIXED_PRECISION": "bf16"})
    with pytest.raises(ConfigError, match=r"FSDP.*train.strategy=ddp"):
        preflight.check_accelerate("fp32", "ddp", {"ACCELERATE_USE_FSDP": "true"})
    with pytest.raises(ConfigError, match=r"DeepSpeed.*train.strategy=ddp"):
        preflight.check_accelerate("fp32", "ddp", {"ACCELERATE_USE_DEEPSPEED": "true"})


CASES: list[tuple[str, Any, Any, str | None]] = [
    ("equal", {"a": [1, 2], "b": {"c": "x"}}, {"a": [1, 2], "b": {"c": "x"}}, None),
    ("the configuration", {"optim": {"lr": 1e-3, "eps": 1}}, {"optim": {"lr": 2e-3, "eps": 1}},
     "the configuration differs between processes: optim.lr is 0.001 on process 0 (HOST) and 0.002 on process 1 (HOST)"),
    ("the code", {"torch": "2", "x.py": "aa"}, {"torch": "2", "x.py": "bb"},
     "the code differs between processes: x.py is 'aa' on process 0"),
    ("missing", {"x": 1}, {"x": 1, "y": 2}, "missing differs between processes: y is None on process 0"),
]  # fmt: skip

SCRIPT = """
import sys
from pretrain.errors import UserError
from pretrain.runtime import distributed, preflight
from tests.pretrain.runtime.test_preflight import CASES
distributed.setup(60)
for name, zero, one, _ in CASES:
    try:
        preflight.require_equal(name, zero if distributed.rank() == 0 else one)
        print("equal", flush=True)
    except UserError as error:
        print(f"refused: {error}", flush=True)
folder = sys.argv[1 + distributed.rank()]
try:
    preflight.require_equal("data.train", lambda: preflight.data_fingerprint([f"{folder}/a.tar", f"{folder}/b.tar"]))
    print("equal", flush=True)
except UserError as error:
    print(f"refused: {error}", flush=True)
def missing():
    raise UserError("no file matches")
try:
    preflight.require_equal("data.train", missing)
except UserError as error:
    print(f"refused: {error}", flush=True)
try:
    preflight.require_equal("data.train", missing if distributed.rank() else {"number of shards": 2})
except UserError as error:
    print(f"refused: {error}", flush=True)
print(distributed.is_first_to_report("once"), flush=True)
distributed.shutdown()
"""


def test_processes_are_equal_or_raise_the_same_error(tmp_path: Path) -> None:
    import os

    for name, content in (("zero", b"first"), ("one", b"first")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.tar").write_bytes(content * 1000)
    (tmp_path / "zero" / "b.tar").write_bytes(b"second" * 1000)
    (tmp_path / "one" / "b.tar").write_bytes(b"sekond" * 1000)  # the same size, different first bytes
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "zero"), str(tmp_path / "one")],
            cwd=ROOT,
            env=environment(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1"),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=200)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0][:-1] == outputs[1][:-1]
    assert sorted([outputs[0][-1], outputs[1][-1]]) == ["False", "True"]  # one process is the first to report
    for line, (_, _, _, expected) in zip(outputs[0], CASES, strict=False):
        if expected is None:
            assert line == "equal"
        else:
            assert line.startswith("refused: " + expected.replace("HOST", os.uname().nodename)), line
    different_data, error_on_all, error_on_one = outputs[0][len(CASES) : -1]
    assert different_data.startswith("refused: data.train differs between processes: b.tar is '6,000 bytes, beginning ")
    assert error_on_all == "refused: no file matches"  # unchanged, since all processes share it
    assert error_on_one.startswith("refused: data.train differs between processes: ")
    assert "no file matches" in error_on_one


def test_a_comment_changes_the_fingerprint_of_the_code(tmp_path: Path) -> None:
    import shutil

    shutil.copytree(ROOT / "pretrain", tmp_path / "pretrain", ignore=shutil.ignore_patterns("__pycache__"))
    step = Path("pretrain/training/step.py")
    (tmp_path / step).write_text((ROOT / step).read_text() + "# another\n")
    code = (
        "import pretrain, json; from pretrain.runtime.preflight import code_fingerprint; print(json.dumps(code_fingerprint()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(PYTHONPATH=""), capture_output=True, text=True, check=True
    )
    import json

    changed, original = json.loads(result.stdout), preflight.code_fingerprint()
    assert {name for name in original if original[name] != changed.get(name)} == {"pretrain/training/step.py"}
    assert original.keys() == changed.keys()


def test_a_run_elsewhere_can_be_assumed() -> None:
    assert (distributed.world_size(), distributed.nodes()) == (1, 1)
    with distributed.assume_world(16, 2, True):
        assert (distributed.world_size(), distributed.nodes(), distributed.local_world_size(), distributed.has_gpu()) == (
            16,
            2,
            8,
            True,
        )
    assert (distributed.world_size(), distributed.nodes()) == (1, 1)
