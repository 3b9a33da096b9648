"""Invariants 2 and 3 for several processes: a run may change strategy and number of processes when it goes on."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import Small, read_losses, read_sample_keys, run_clipfuse

STEPS = 8
LEGS = [("zero3", 2, 3), ("fsdp2", 4, STEPS)]
"""(strategy, processes, the step it stops at)."""


def words(small: Small, run: Path, strategy: str, steps: int, *more: str) -> list[str]:
    return small.settings(
        run,
        f"train.strategy={strategy}",
        f"train.steps={steps}",
        "optim.schedule=constant",  # a horizon that changes would change the cosine
        "optim.average=0.8",
        "train.audit=true",
        "data.augment.flip=true",
        "data.batch_size=16",
        "train.eval_every=4",
        f"data.val={small.val}",
        "eval.workers=0",
        *more,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_goes_on_under_other_strategies_and_numbers_of_processes(small: Small, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    straight, relay = tmp_path / "straight", tmp_path / "relay"
    run_clipfuse("pretrain", "scenes", *words(small, straight, "single", STEPS), cwd=tmp_path)
    whole = read_sample_keys(straight)
    seen: dict[int, list[str]] = {}
    for number, (strategy, processes, stop) in enumerate(LEGS):
        launcher = ["--nproc", str(processes)]
        run_clipfuse(
            "pretrain",
            "scenes",
            *launcher,
            *words(small, relay, strategy, stop, f"train.chunks={1 + number % 2}"),
            cwd=tmp_path,
        )
        by_rank = [read_sample_keys(relay, rank) for rank in range(processes)]
        begin = max(seen, default=0)
        for step in range(begin + 1, stop + 1):
            seen[step] = [key for mine in by_rank for key in mine[step]]
    assert seen == whole
    got, expected = read_losses(relay), read_losses(straight)
    assert list(got) == list(expected) == list(range(1, STEPS + 1))
    assert got == pytest.approx(expected, rel=2e-5)
    name = f"checkpoints/step-{STEPS:07d}/"
    for file in ("model.safetensors", "state/weights/model.safetensors"):
        mine, theirs = load_file(relay / name / file), load_file(straight / name / file)
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            assert mine[key].dtype == torch.float32
            assert torch.allclose(mine[key], value, rtol=1e-3, atol=2e-5), key
