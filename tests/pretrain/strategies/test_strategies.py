"""Every strategy trains the same weights, saves the same layout, and can resume from any other."""

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
from pretrain.runtime.files import save_tensors
from pretrain.strategies import STRATEGIES, Strategy, build_strategy, check, check_saved_state
from pretrain.training.config import TrainConfig
from pretrain.training.step import train_step
from tests.support import tiny, world

pytestmark = pytest.mark.timeout(600)
CPU = torch.device("cpu")
SETTINGS = OptimConfig(lr=3e-3, clip_norm=0.5, weight_decay=0.1, lr_scale={"image": 0.5})
DISTRIBUTED = [name for name in STRATEGIES if name != "single"]


def skip_without_deepspeed(name: str) -> None:
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")


def start(name: str, precision: str = "fp32", loss: str = "siglip", offload: bool = False, **settings: Any) -> Strategy:
    """Build a strategy with the tiny model. name: as in RELAY."""
    name, _, replicas = name.partition(" x ")
    strategy = build_strategy(name, precision, SETTINGS, CPU, offload, replicas=int(replicas or 1))  # type: ignore[arg-type]
    strategy.persistence_threshold = 100  # type: ignore[attr-defined]
    strategy.setup(tiny.build_model(loss, **settings))
    strategy.model.train()
    return strategy


def step(strategy: Strategy, number: int, chunks: int = 1, loss: str = "siglip", lr: float = 3e-3) -> dict[str, torch.Tensor]:
    """Train one step on this process's samples of batch `number`."""
    b = tiny.SAMPLES // distributed.world_size()
    batch = tiny.build_batch(number).slice(b * distributed.rank(), b * (distributed.rank() + 1))
    return train_step(strategy, tiny.build_objective(loss), batch, chunks, lr, (0, number, distributed.rank()))


def assert_close(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        tensor = tensors[name]
        assert tensor.dtype == value.dtype
        assert torch.allclose(tensor, value, rtol=tolerance, atol=tolerance), (name, (tensor - value).abs().max())


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Return the Euclidean distance between two sets of weights."""
    assert a.keys() == b.keys()
    return math.sqrt(sum(float((a[name] - b[name]).square().sum()) for name in a))


# ---------------------------------------------------------------------------------------------------------------------
# A relay: each strategy trains one step from the checkpoint of the one before


RELAY = [
    ("single", 1),
    ("ddp", 2),
    ("zero1", 2),
    ("fsdp2", 4),
    ("zero3", 2),
    ("zero2", 4),
    ("fsdp2 x 2", 4),
    ("fsdp2", 2),
    ("zero3", 4),
    ("ddp", 1),
]
"""(strategy, processes); "x 2" = with train.replicas=2."""


def run_leg(name: str, number: int, chunks: int, folder: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Resume from `folder` (the first leg starts anew), train one step, save to `folder`.

    Returns the weights and the optimizer state, on rank 0.
    """
    root = Path(folder)
    strategy = start(name)
    if number:
        strategy.load_full_weights(store.read_weights(root))
        strategy.load(root)
    distributed.barrier()
    step(strategy, number, chunks)
    weights, saved_state = strategy.full_weights(), strategy.saved_state()
    optimizer_state = saved_state["optimizer"]
    if distributed.is_main():
        save_tensors(root / "optimizer.pt", saved_state)
        save_file(weights, root / "model.safetensors")
    else:
        assert not weights
        assert not optimizer_state
    return weights, optimizer_state


def test_a_relay_through_all_strategies_equals_one_process(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    straight = start("single")
    for number, (name, processes) in enumerate(RELAY):
        step(straight, number)
        weights, optimizer_state = world.run(run_leg, processes, name, number, 1 + number % 2, str(tmp_path))[0]
        assert_close(weights, straight.full_weights(), 2e-5)
        expected = straight.optimizer_state()
        assert optimizer_state.keys() == expected.keys()
        for parameter, values in expected.items():
            assert_close(optimizer_state[parameter], values, 2e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The contract of a strategy, on two processes


def observe(name: str) -> dict[str, Any]:
    """Run one strategy through its whole contract, and return what was observed on this process."""
    observed: dict[str, Any] = {}
    strategy = start(name)
    observed["engine"] = [type(strategy.model).__name__, type(getattr(strategy, "zero", None)).__name__]
    observed["sharded"] = _local_fraction(strategy)

    # -- a step whose gradient is not finite on ONE process is skipped by all
    step(strategy, 0)
    before, state_before = strategy.full_weights(), strategy.optimizer_state()
    poisoned = tiny.build_batch(1).slice(0, 4)
    objective = tiny.build_objective("siglip")
    score = objective.pair_loss
    poison = math.nan if distributed.rank() == distributed.world_size() - 1 else 1.0

    class Poisoned(nn.Module):
        def forward(self, *args: Any) -> Any:
            loss, report = score(*args)
            return loss * poison, report

    objective.pair_loss = Poisoned()
    out = train_step(strategy, objective, poisoned, 2, 1e-3, (0, 1, distributed.rank()))
    observed["skipped"] = out["skipped"].item()
    observed["is_finite"] = math.isfinite(out["grad_norm"].item())
    observed["changed"] = [n for n, v in strategy.full_weights().items() if not torch.equal(v, before[n])]
    state = strategy.optimizer_state()
    observed["changed"] += [n for n in state if not torch.equal(state[n]["exp_avg"], state_before[n]["exp_avg"])]
    observed["next step skipped"] = step(strategy, 2)["skipped"].item()

    # -- a save in the background writes copies: further steps do not change them
    copies = {"weights": strategy.full_weights(), **strategy.saved_state()["optimizer"]}
    expected = {part: {name: value.clone() for name, value in values.items()} for part, values in copies.items()}
    step(strategy, 2)
    observed["changed copies"] = [
        (part, name)
        for part, values in copies.items()
        for name in values
        if not torch.equal(values[name], expected[part][name])
    ]

    # -- the logit scale is clamped, both where the model computes and where the optimizer steps
    weights = distributed.broadcast_object(strategy.full_weights())
    strategy.load_full_weights({**weights, "logit_scale": torch.full((1,), 4.6)})
    objective = tiny.build_objective("siglip")
    score = objective.pair_loss

    class Upwards(nn.Module):
        def forward(self, features: Any, scale: torch.Tensor, *rest: Any) -> Any:
            loss, report = score(features, scale, *rest)
            return loss - 10 * scale.sum(), report

    objective.pair_loss = Upwards()
    batch = tiny.build_batch(3).slice(0, 4)
    for number in range(3):
        train_step(strategy, objective, batch, 1, 0.5, (0, 3 + number, distributed.rank()))
    with strategy.full_model() as model:
        saved = strategy.full_weights().get("logit_scale", torch.zeros(1)).item()
        observed["clamped"] = [saved, float(model.logit_scale.detach())]
    step(strategy, 9, lr=0.0)
    observed["clamped"].append(strategy.full_weights().get("logit_scale", torch.zeros(1)).item())

    # -- writing into the local shards changes the next forward pass, and what full_model() computes
    strategy.load_full_weights(weights)
    original_shards = {key: shard.clone() for key, shard in strategy.local_shards().items()}
    loss = step(strategy, 10, lr=0.0)["loss"].item()
    with torch.no_grad():
        for shard in strategy.local_shards().values():
            shard.mul_(0.9)
    strategy.refresh()
    changed_loss = step(strategy, 10, lr=0.0)["loss"].item()
    batch = tiny.build_batch(11).slice(0, 3 + distributed.rank())
    with strategy.full_model() as model, torch.no_grad():
        model.eval()
        for _ in range(1 + distributed.rank()):  # another number of passes on each rank: they must not be collective
            features = model(batch.inputs, batch.masks)
        observed["features"] = features["image"]
    strategy.model.train()
    with torch.no_grad():
        for key, shard in strategy.local_shards().items():
            shard.copy_(original_shards[key])
    strategy.refresh()
    observed["loss"] = [loss, changed_loss, step(strategy, 10, lr=0.0)["loss"].item()]
    observed["not restored"] = [n for n, v in strategy.full_weights().items() if not torch.equal(v, weights[n])]
    observed["scaled weights"] = {parameter: value * 0.9 for parameter, value in weights.items()}
    return observed


def _local_fraction(strategy: Strategy) -> float:
    """Return the fraction of the trainable weights' elements that this process's optimizer updates."""
    total = sum(p.numel() for p in tiny.build_model("siglip").parameters() if p.requires_grad)
    return sum(shard.numel() for shard in strategy.local_shards().values()) / total


ENGINES = {
    "ddp": ["DistributedDataParallel", "NoneType"],
    "fsdp2": ["FSDPDualEncoder", "NoneType"],
    "zero1": ["DeepSpeedEngine", "DeepSpeedZeroOptimizer"],
    "zero2": ["DeepSpeedEngine", "DeepSpeedZeroOptimizer"],
    "zero3": ["DeepSpeedEngine", "DeepSpeedZeroOptimizer_Stage3"],
}


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_every_strategy_keeps_the_contract(name: str) -> None:
    skip_without_deepspeed(name)
    ranks = world.run(observe, 2, name)
    limit = torch.tensor(math.log(100)).item()
    for observed in ranks:
        assert observed["engine"] == ENGINES[name]
        assert observed["sharded"] == pytest.approx(1.0 if name == "ddp" else 0.5, abs=0.05)
        assert observed["skipped"] == 1.0
        assert not observed["is_finite"]
        assert not observed["changed"]
        assert not observed["changed copies"]
        assert observed["next step skipped"] == 0.0
        loss, changed_loss, restored_loss = observed["loss"]
        assert changed_loss != loss
        assert restored_loss == pytest.approx(loss, rel=1e-6)
        assert not observed["not restored"]
    assert ranks[0]["clamped"] == [limit] * 3
    assert ranks[1]["clamped"][1] == limit
    reference = tiny.build_model("siglip").eval()
    reference.load_state_dict(ranks[0]["scaled weights"])
    for rank, observed in enumerate(ranks):
        batch = tiny.build_batch(11).slice(0, 3 + rank)
        with torch.no_grad():
            assert torch.allclose(reference(batch.inputs, batch.masks)["image"], observed["features"], atol=1e-6)


def train_frozen_and_checkpointed(name: str) -> list[dict[str, torch.Tensor]]:
    """Return the weights after four steps, half of each tower frozen and activations recomputed.

    One entry for each precision, and one for an offloaded optimizer.
    """
    tower = {"trainable_blocks": 1, "checkpointing": True}
    weights = []
    for precision, offload in (("fp32", False), ("bf16", False), ("fp16", False), ("fp32", True)):
        strategy = start(name, precision, offload=offload and name.startswith("zero"), image=tower, text=tower)
        for number in range(4):
            step(strategy, number, 1 + number % 2)
        weights.append(strategy.full_weights())
    return weights


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_frozen_blocks_recomputed_activations_and_every_precision(name: str) -> None:
    skip_without_deepspeed(name)
    tower = {"trainable_blocks": 1, "checkpointing": True}
    results = world.run(train_frozen_and_checkpointed, 2, name)[0]
    initial = tiny.build_model("siglip").state_dict()
    for precision, bound, weights in zip(("fp32", "bf16", "fp16", "fp32"), (1e-4, 0.2, 0.2, 1e-4), results, strict=True):
        straight = start("single", precision, image=tower, text=tower)
        for number in range(4):
            step(straight, number)
        expected = straight.full_weights()
        moved = distance(expected, initial)
        assert distance(weights, expected) < bound * moved, (distance(weights, expected), moved)
        frozen = [n for n, p in straight.module.named_parameters() if not p.requires_grad]
        assert len(frozen) > 10
        assert all(torch.equal(weights[n], initial[n]) for n in frozen)
        assert any(not torch.equal(weights[n], initial[n]) for n in weights if n not in frozen)


# ---------------------------------------------------------------------------------------------------------------------
# Settings that are refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dpp", "fp32", "false", False), "single, ddp, fsdp2, zero1, zero2, zero3"),
        (("zero3", "fp32", "true", False), "use fsdp2"),
        (("fsdp2", "fp32", "reduce-overhead", False), "train.compile=reduce-overhead records CUDA graphs.*fsdp2 moves"),
        (("zero1", "fp32", "reduce-overhead", False), "use train.compile=true, or train.strategy=ddp"),
        (
            ("ddp", "fp32", "fast", False),
            "train.compile=fast must be one of false, true, default, reduce-overhead",
        ),
        (("ddp", "fp32", "false", True), "zero1, zero2 or zero3"),
        (("ddp", "fp32", "false", False, None, 2), "train.replicas=2 needs train.strategy=fsdp2, not ddp"),
        (("fsdp2", "fp32", "false", False, None, 2), "train.replicas=2 must divide the number of processes, which is 1"),
        (("fsdp2", "fp32", "false", False, None, 0), "train.replicas=0 must divide"),
        (("fsdp2", "fp32", "false", False, None, 1, "bf16"), "train.gradient_compression=bf16 needs train.strategy=ddp"),
    ],
)
def test_impossible_settings_are_refused_with_the_reason(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what is refused on a machine without a GPU")
@pytest.mark.parametrize("settings", [{"precision": "fp16"}, {"strategy": "zero2", "offload": True}])
def test_settings_for_gpus_are_refused_without_a_gpu(settings: dict[str, Any]) -> None:
    skip_without_deepspeed(settings.get("strategy", ""))
    with pytest.raises(ConfigError, match="GPU"):
        TrainConfig(steps=1, **settings).check()


def test_zero_without_deepspeed_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'clipfuse\[deepspeed\]'"):
        check("zero2", "fp32", "false", False)


def collect_refusals(name: str) -> str:
    """Return the messages that refuse strategy single on several processes, and BatchNorm on CPUs."""
    try:
        check("single", "fp32", "false", False)
    except ConfigError as error:
        message = str(error)
    try:
        build_strategy(name, "fp32", SETTINGS, CPU).setup(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    except ConfigError as error:
        return message + str(error)
    return message


def test_batch_norm_is_refused_where_it_cannot_be_exact() -> None:
    from pretrain.strategies.batch_norm import refuse_chunks

    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    refuse_chunks(model, 1)
    with pytest.raises(ConfigError, match=r"train\.chunks=2.*BatchNorm"):
        refuse_chunks(model, 2)
    assert model.training
    messages = world.run(collect_refusals, 2, "ddp")[0]
    assert "single runs in one process, not 2" in messages
    assert "train in one process" in messages


class UnusedLayer(nn.Module):
    """A model with a layer that forward() does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def train_unused_layer(name: str) -> str:
    """Return the message of the error that the first step raises."""
    strategy = build_strategy(name, "fp32", replace(SETTINGS, lr_scale={}), CPU)
    strategy.setup(UnusedLayer())
    strategy.backward(strategy.model(torch.ones(1, 2)).sum())
    try:
        strategy.apply(0.1)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_weight_without_gradient_is_named_at_the_first_step() -> None:
    message = world.run(train_unused_layer, 2, "ddp")[0]
    assert "2 trainable parameters take no part in the loss (first unused.weight)" in message


def test_saved_state_of_a_scalar_parameter_is_accepted() -> None:
    """AdamW's moments have the shape of their parameter, so those of a 0-dim gain are 0-dim; `step` always is."""
    gain = torch.nn.Parameter(torch.tensor(1.0))
    optimizer = torch.optim.AdamW([gain])
    gain.sum().backward()
    optimizer.step()
    state = {"optimizer": {"gain": dict(optimizer.state[gain])}, "scaler": {}}
    check_saved_state(state)
    state["optimizer"]["gain"]["step"] = torch.zeros(2)
    with pytest.raises(ValueError, match="step of 'gain' is not a tensor as AdamW keeps it"):
        check_saved_state(state)


def ddp_buckets() -> tuple[list[int], int]:
    """Return the sizes of DDP's buckets, and of all trainable weights, in bytes, for a model of about 60 MB."""
    strategy = start("ddp", image={"args": {"embed_dim": 512, "depth": 5}})
    sizes: list[int] = []

    def record(_, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings
        sizes.append(bucket.buffer().nbytes)
        reduced: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        reduced.set_result(bucket.buffer())  # one process: nothing to reduce
        return reduced

    strategy.model.register_comm_hook(None, record)  # type: ignore[operator]
    step(strategy, 0)
    sizes.clear()  # DDP starts with one bucket, and sorts its weights into others after the first step
    step(strategy, 1)
    return sizes, sum(p.nbytes for p in strategy.module.parameters() if p.requires_grad)


def test_ddp_reduces_a_small_model_in_one_bucket() -> None:
    sizes, total = world.run(ddp_buckets, 1)[0]
    assert total > 2 * 25 * 2**20  # by default torch makes three or more
    assert sizes == [total]
