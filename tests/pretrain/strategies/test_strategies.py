"""Every strategy trains the same weights, saves them in one layout, and takes over from every other."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pretrain.checkpoints import store
from pretrain.errors import ConfigError
from pretrain.optim import OptimConfig
from pretrain.runtime import distributed
from pretrain.strategies import STRATEGIES, Strategy, build_strategy, check
from pretrain.training.loop import TrainConfig
from pretrain.training.step import train_step
from tests.support import tiny, world

pytestmark = pytest.mark.timeout(600)
CPU = torch.device("cpu")
SETTINGS = OptimConfig(lr=3e-3, clip_norm=0.5, weight_decay=0.1, lr_scale={"image": 0.5})
SHARDED = [word for word in STRATEGIES if word != "single"]


def needs(word: str) -> None:
    if word.startswith("zero"):
        pytest.importorskip("deepspeed")


def start(word: str, precision: str = "fp32", loss: str = "siglip", offload: bool = False, **settings: Any) -> Strategy:
    strategy = build_strategy(word, precision, SETTINGS, CPU, offload)  # type: ignore[arg-type]
    strategy.persistence_threshold = 100  # type: ignore[attr-defined]
    strategy.setup(tiny.build_model(loss, **settings))
    strategy.model.train()
    return strategy


def step(strategy: Strategy, number: int, chunks: int = 1, loss: str = "siglip", lr: float = 3e-3) -> dict[str, torch.Tensor]:
    """One step on this process's share of batch `number`."""
    share = tiny.SAMPLES // distributed.world_size()
    mine = tiny.build_batch(number).slice(share * distributed.rank(), share * (distributed.rank() + 1))
    return train_step(strategy, tiny.build_objective(loss), mine, chunks, lr, (0, number, distributed.rank()))


def close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype
        assert torch.allclose(got[name], value, rtol=tolerance, atol=tolerance), (name, (got[name] - value).abs().max())


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return math.sqrt(sum(float((a[name] - b[name]).square().sum()) for name in a))


# ---------------------------------------------------------------------------------------------------------------------
# One relay: each strategy trains a step from where the one before stopped


RELAY = [
    ("single", 1),
    ("ddp", 2),
    ("zero1", 2),
    ("fsdp2", 4),
    ("zero3", 2),
    ("zero2", 4),
    ("fsdp2", 2),
    ("zero3", 4),
    ("ddp", 1),
]


def leg(word: str, number: int, chunks: int, folder: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Takes over from `folder` (unless it is the first), trains one step, writes `folder`; what it wrote, on rank 0."""
    root = Path(folder)
    strategy = start(word)
    if number:
        strategy.load_full_weights(store.read_weights(root))
        strategy.load(root)
    distributed.barrier()
    step(strategy, number, chunks)
    weights, moments = strategy.full_weights(), strategy.optimizer_state()
    strategy.save(root)
    if distributed.is_main():
        save_file(weights, root / "model.safetensors")
    else:
        assert not weights
        assert not moments
    return weights, moments


def test_a_relay_through_all_strategies_equals_one_process(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    straight = start("single")
    for number, (word, processes) in enumerate(RELAY):
        step(straight, number)
        weights, moments = world.run(leg, processes, word, number, 1 + number % 2, str(tmp_path))[0]
        close(weights, straight.full_weights(), 2e-5)
        expected = straight.optimizer_state()
        assert moments.keys() == expected.keys()
        for name, values in expected.items():
            close(moments[name], values, 2e-5)


# ---------------------------------------------------------------------------------------------------------------------
# One world a strategy


def behaviour(word: str) -> dict[str, Any]:
    """What is asked of every strategy, in one world."""
    said: dict[str, Any] = {}
    strategy = start(word)
    said["engine"] = [type(strategy.model).__name__, type(getattr(strategy, "zero", None)).__name__]
    said["sharded"] = _share(strategy)

    # -- a step whose gradient is not finite on ONE process is skipped by all
    step(strategy, 0)
    before, moments = strategy.full_weights(), strategy.optimizer_state()
    broken = tiny.build_batch(1).slice(0, 4)
    objective = tiny.build_objective("siglip")
    score = objective.pair_loss
    poison = math.nan if distributed.rank() == distributed.world_size() - 1 else 1.0

    class Poisoned(nn.Module):
        def forward(self, *args: Any) -> Any:
            loss, report = score(*args)
            return loss * poison, report

    objective.pair_loss = Poisoned()
    out = train_step(strategy, objective, broken, 2, 1e-3, (0, 1, distributed.rank()))
    said["skipped"] = out["skipped"].item()
    said["finite"] = math.isfinite(out["grad_norm"].item())
    said["moved"] = [n for n, v in strategy.full_weights().items() if not torch.equal(v, before[n])]
    after = strategy.optimizer_state()
    said["moved"] += [n for n in after if not torch.equal(after[n]["exp_avg"], moments[n]["exp_avg"])]
    said["went on"] = step(strategy, 2)["skipped"].item()

    # -- the clamp holds, where the model computes and where the optimizer steps
    whole = distributed.broadcast_object(strategy.full_weights())
    strategy.load_full_weights({**whole, "logit_scale": torch.full((1,), 4.6)})
    objective = tiny.build_objective("siglip")
    score = objective.pair_loss

    class Upwards(nn.Module):
        def forward(self, features: Any, scale: torch.Tensor, *rest: Any) -> Any:
            loss, report = score(features, scale, *rest)
            return loss - 10 * scale.sum(), report

    objective.pair_loss = Upwards()
    mine = tiny.build_batch(3).slice(0, 4)
    for number in range(3):
        train_step(strategy, objective, mine, 1, 0.5, (0, 3 + number, distributed.rank()))
    with strategy.full_model() as model:
        said["clamped"] = [strategy.full_weights().get("logit_scale", torch.zeros(1)).item(), float(model.logit_scale.detach())]
    step(strategy, 9, lr=0.0)
    said["clamped"].append(strategy.full_weights().get("logit_scale", torch.zeros(1)).item())

    # -- local_shards are the weights: writing them changes the next forward pass; whole() computes with them, alone
    strategy.load_full_weights(whole)
    kept = {name: piece.clone() for name, piece in strategy.local_shards().items()}
    loss = step(strategy, 10, lr=0.0)["loss"].item()
    with torch.no_grad():
        for piece in strategy.local_shards().values():
            piece.mul_(0.9)
    strategy.refresh()
    changed = step(strategy, 10, lr=0.0)["loss"].item()
    share = tiny.build_batch(11).slice(0, 3 + distributed.rank())  # as many samples as it likes: nobody waits
    with strategy.full_model() as model, torch.no_grad():
        model.eval()
        for _ in range(1 + distributed.rank()):
            features = model(share.inputs, share.masks)
        said["whole"] = features["image"]
    strategy.model.train()
    with torch.no_grad():
        for name, piece in strategy.local_shards().items():
            piece.copy_(kept[name])
    strategy.refresh()
    said["loss"] = [loss, changed, step(strategy, 10, lr=0.0)["loss"].item()]
    said["back"] = [n for n, v in strategy.full_weights().items() if not torch.equal(v, whole[n])]
    said["scaled"] = {name: value * 0.9 for name, value in whole.items()}
    return said


def _share(strategy: Strategy) -> float:
    """Elements of the trainable weights that this process steps, as a share of all."""
    total = sum(p.numel() for p in tiny.build_model("siglip").parameters() if p.requires_grad)
    return sum(piece.numel() for piece in strategy.local_shards().values()) / total


ENGINES = {
    "ddp": ["DistributedDataParallel", "NoneType"],
    "fsdp2": ["FSDPDualEncoder", "NoneType"],
    "zero1": ["DeepSpeedEngine", "DeepSpeedZeroOptimizer"],
    "zero2": ["DeepSpeedEngine", "DeepSpeedZeroOptimizer"],
    "zero3": ["DeepSpeedEngine", "DeepSpeedZeroOptimizer_Stage3"],
}


@pytest.mark.parametrize("word", SHARDED)
def test_what_is_asked_of_every_strategy(word: str) -> None:
    needs(word)
    ranks = world.run(behaviour, 2, word)
    limit = torch.tensor(math.log(100)).item()
    for said in ranks:
        assert said["engine"] == ENGINES[word]
        assert said["sharded"] == pytest.approx(1.0 if word == "ddp" else 0.5, abs=0.05)
        assert said["skipped"] == 1.0
        assert not said["finite"]
        assert not said["moved"]
        assert said["went on"] == 0.0
        loss, changed, again = said["loss"]
        assert changed != loss
        assert again == pytest.approx(loss, rel=1e-6)
        assert not said["back"]
    assert ranks[0]["clamped"] == [limit] * 3
    assert ranks[1]["clamped"][1] == limit
    plain = tiny.build_model("siglip").eval()
    plain.load_state_dict(ranks[0]["scaled"])
    for rank, said in enumerate(ranks):
        share = tiny.build_batch(11).slice(0, 3 + rank)
        with torch.no_grad():
            assert torch.allclose(plain(share.inputs, share.masks)["image"], said["whole"], atol=1e-6)


def frozen_and_checkpointed(word: str) -> list[dict[str, torch.Tensor]]:
    """Weights after four steps: half of each tower frozen, activations recomputed; each precision, then offloaded."""
    tower = {"trainable_blocks": 1, "checkpointing": True}
    found = []
    for precision, offload in (("fp32", False), ("bf16", False), ("fp16", False), ("fp32", True)):
        strategy = start(word, precision, offload=offload and word.startswith("zero"), image=tower, text=tower)
        for number in range(4):
            step(strategy, number, 1 + number % 2)
        found.append(strategy.full_weights())
    return found


@pytest.mark.parametrize("word", SHARDED)
def test_frozen_parts_recomputed_activations_and_every_precision(word: str) -> None:
    needs(word)
    tower = {"trainable_blocks": 1, "checkpointing": True}
    got = world.run(frozen_and_checkpointed, 2, word)[0]
    at_first = tiny.build_model("siglip").state_dict()
    for precision, bound, weights in zip(("fp32", "bf16", "fp16", "fp32"), (1e-4, 0.2, 0.2, 1e-4), got, strict=True):
        straight = start("single", precision, image=tower, text=tower)
        for number in range(4):
            step(straight, number)
        expected = straight.full_weights()
        way = distance(expected, at_first)
        assert distance(weights, expected) < bound * way, (distance(weights, expected), way)
        still = [n for n, p in straight.module.named_parameters() if not p.requires_grad]
        assert len(still) > 10
        assert all(torch.equal(weights[name], at_first[name]) for name in still)
        assert any(not torch.equal(weights[name], at_first[name]) for name in weights if name not in still)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("dpp", "fp32", False, False), "single, ddp, fsdp2, zero1, zero2, zero3"),
        (("zero3", "fp32", True, False), "use fsdp2"),
        (("ddp", "fp32", False, True), "zero1, zero2 or zero3"),
    ],
)
def test_nonsense_is_refused_with_the_reason(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU refuses")
@pytest.mark.parametrize("settings", [{"precision": "fp16"}, {"strategy": "zero2", "offload": True}])
def test_refused_without_a_gpu(settings: dict[str, Any]) -> None:
    needs(settings.get("strategy", ""))
    with pytest.raises(ConfigError, match="GPU"):
        TrainConfig(steps=1, **settings).check()


def test_zero_without_deepspeed_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'clipfuse\[deepspeed\]'"):
        check("zero2", "fp32", False, False)


def refused(word: str) -> str:
    try:
        check("single", "fp32", False, False)
    except ConfigError as error:
        said = str(error)
    try:
        build_strategy(word, "fp32", SETTINGS, CPU).setup(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    except ConfigError as error:
        return said + str(error)
    return said


def test_batch_norm_is_refused_where_it_cannot_be_exact() -> None:
    from pretrain.strategies.batch_norm import refuse_chunks

    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    refuse_chunks(model, 1)
    with pytest.raises(ConfigError, match=r"train\.chunks=2.*BatchNorm"):
        refuse_chunks(model, 2)
    assert model.training
    said = world.run(refused, 2, "ddp")[0]
    assert "single runs in one process, not 2" in said
    assert "train in one process" in said


class Idle(nn.Module):
    """A model with a weight that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def idle(word: str) -> str:
    strategy = build_strategy(word, "fp32", replace(SETTINGS, lr_scale={}), CPU)
    strategy.setup(Idle())
    strategy.backward(strategy.model(torch.ones(1, 2)).sum())
    try:
        strategy.apply(0.1)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_weight_without_gradient_is_named_at_the_first_step() -> None:
    assert "2 trainable parameters take no part in the loss (first idle.weight)" in world.run(idle, 2, "ddp")[0]
