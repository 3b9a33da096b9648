"""A run may resume under another strategy and on another number of processes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import Small, read_losses, read_sample_keys, run_clipfuse

STEPS = 8
LEGS = [("zero3", 2, 3), ("fsdp2", 4, STEPS)]
"""(strategy, processes, step at which it stops)."""


def settings(small: Small, run: Path, strategy: str, steps: int, *more: str) -> list[str]:
    return small.settings(
        run,
        f"train.strategy={strategy}",
        f"train.steps={steps}",
        "optim.schedule=constant",  # a cosine would depend on train.steps, which differs between the legs
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
def test_a_run_resumes_under_other_strategies_and_numbers_of_processes(small: Small, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    straight, relay = tmp_path / "straight", tmp_path / "relay"
    run_clipfuse("pretrain", "scenes", *settings(small, straight, "single", STEPS), cwd=tmp_path)
    expected_keys = read_sample_keys(straight)
    relay_keys: dict[int, list[str]] = {}
    for number, (strategy, processes, stop) in enumerate(LEGS):
        launcher = ["--nproc", str(processes)]
        run_clipfuse(
            "pretrain",
            "scenes",
            *launcher,
            *settings(small, relay, strategy, stop, f"train.chunks={1 + number % 2}"),
            cwd=tmp_path,
        )
        keys_by_rank = [read_sample_keys(relay, rank) for rank in range(processes)]
        begin = max(relay_keys, default=0)
        for step in range(begin + 1, stop + 1):
            relay_keys[step] = [key for keys in keys_by_rank for key in keys[step]]
    assert relay_keys == expected_keys
    relay_losses, expected_losses = read_losses(relay), read_losses(straight)
    assert list(relay_losses) == list(expected_losses) == list(range(1, STEPS + 1))
    assert relay_losses == pytest.approx(expected_losses, rel=2e-5)
    checkpoint = f"checkpoints/step-{STEPS:07d}/"
    for file in ("model.safetensors", "state/weights/model.safetensors"):
        weights, expected = load_file(relay / checkpoint / file), load_file(straight / checkpoint / file)
        assert weights.keys() == expected.keys()
        for key, value in expected.items():
            assert weights[key].dtype == torch.float32
            assert torch.allclose(weights[key], value, rtol=1e-3, atol=2e-5), key
