"""Schedules against closed forms and open_clip; parameter groups and averaging against their rules."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain import optim
from pretrain.errors import ConfigError
from pretrain.optim import OptimConfig, WeightAverage, build_adamw, learning_rate, parameter_groups


def test_cosine_equals_open_clip() -> None:
    scheduler = pytest.importorskip("open_clip_train.scheduler")
    config = OptimConfig(lr=3e-4, warmup=17)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    set_learning_rate = scheduler.cosine_lr(optimizer, config.lr, config.warmup, 200)
    for step in range(200):
        set_learning_rate(step)
        assert learning_rate(step, 200, config) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)


def test_constant_and_wsd() -> None:
    constant = OptimConfig(lr=2.0, warmup=4, schedule="constant")
    assert [learning_rate(s, 10, constant) for s in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    wsd = OptimConfig(lr=1.0, warmup=2, schedule="wsd", decay=0.4, final_lr=0.1)
    rates = [learning_rate(s, 10, wsd) for s in range(10)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325])


def test_the_cosine_ends_at_final_lr() -> None:
    config = OptimConfig(lr=1.0, warmup=0, final_lr=0.25)
    assert learning_rate(0, 8, config) == 1.0
    assert learning_rate(4, 8, config) == pytest.approx(0.25 + 0.75 * 0.5)
    assert learning_rate(8, 8, config) == pytest.approx(0.25)


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(2, 3)
        self.block = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)

    def layer_ids(self) -> dict[str, int]:
        return {name: {"stem": 0, "block": 1, "norm": 2}[name.split(".")[0]] for name, _ in self.named_parameters()}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleDict({"image": Tower(), "text": Tower()})
        self.projection = nn.Linear(3, 2, bias=False)
        self.logit_scale = nn.Parameter(torch.ones(1))


def test_groups_hold_every_parameter_once_with_the_configured_rates() -> None:
    model = Model()
    model.towers["text"].stem.requires_grad_(False)
    config = OptimConfig(layer_decay=0.5, lr_scale={"image": 0.1}, weight_decay=0.2, weight_decay_of={"text": 0.05})
    group_of = {}
    for group in parameter_groups(model, config):
        for p in group["params"]:
            assert id(p) not in group_of
            group_of[id(p)] = group
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert id(p) not in group_of
            continue
        group = group_of[id(p)]
        if name.startswith("towers."):
            layer = {"stem": 0, "block": 1, "norm": 2}[name.split(".")[2]]
            assert group["lr_scale"] == pytest.approx((0.1 if "image" in name else 1.0) * 0.5 ** (2 - layer)), name
        else:
            assert group["lr_scale"] == 1.0
        expected = 0.0 if p.ndim < 2 else 0.05 if ".text." in name else 0.2
        assert group["weight_decay"] == expected, name


def test_an_unknown_part_and_a_frozen_model_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'audio'.*heads, image, text"):
        parameter_groups(Model(), OptimConfig(lr_scale={"audio": 1.0}))
    with pytest.raises(ConfigError, match="nothing to train"):
        parameter_groups(Model().requires_grad_(False), OptimConfig())


@pytest.mark.parametrize(
    "values",
    [
        {"lr": 0.0},
        {"betas": [0.9]},
        {"betas": [0.9, 1.0]},
        {"layer_decay": 0.0},
        {"average": 1.0},
        {"warmup": -1},
        {"decay": 2.0},
    ],
)
def test_values_that_cannot_train_are_refused(values: dict) -> None:
    with pytest.raises(ConfigError, match=f"optim.{next(iter(values))}"):
        OptimConfig(**values).check()


def test_adamw_equals_the_published_update() -> None:
    """Three steps, against the update of Loshchilov & Hutter 2019 written out in float64."""
    torch.manual_seed(0)
    start, grads = torch.randn(5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    p = nn.Parameter(start.clone())
    config = OptimConfig(lr=0.01, weight_decay=0.3, betas=[0.8, 0.95], eps=1e-6)
    optimizer = build_adamw([{"params": [p], "weight_decay": 0.3, "lr_scale": 1.0}], config)
    w, m, v = start.clone(), torch.zeros(5).double(), torch.zeros(5).double()
    for t, g in enumerate(grads, start=1):
        p.grad = g.clone()
        optimizer.step()
        w = w * (1 - 0.01 * 0.3)
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
        w = w - 0.01 * (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-6)
    torch.testing.assert_close(p.data, w, rtol=1e-12, atol=0)


def test_the_average_follows_its_definition_and_ignores_skipped_steps() -> None:
    p = nn.Parameter(torch.tensor([1.0]))
    average = WeightAverage([("p", p)], 0.9)
    expected = 1.0
    for step in range(100):
        p.data.fill_(math.sin(step))
        applied = 0.0 if step % 7 == 3 else 1.0
        average.update([("p", p)], step, torch.tensor(applied))
        if applied:
            decay = min(0.9, (1 + step) / (10 + step))
            expected = decay * expected + (1 - decay) * math.sin(step)
    assert average.weights["p"].item() == pytest.approx(expected, rel=1e-5)


class CountOperations(TorchDispatchMode):
    """Counts the operations that reach the device, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_the_average_of_many_weights_takes_few_launches_off_the_cpu() -> None:
    weights = [(f"p{i}", torch.zeros(i + 1, 3, device="meta")) for i in range(100)]
    average = WeightAverage(weights, 0.9)
    with CountOperations() as operations:
        average.update(weights, 5, torch.tensor(1.0, device="meta"))
    assert operations.counts["lerp_"] == 0
    assert sum(count for name, count in operations.counts.items() if "foreach" in name) == 3


def test_few_launches_give_the_same_average(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    sizes = [(7,), (300, 5), (1,), (64, 64)]
    old, new = ([torch.randn(size, generator=g) for size in sizes] for _ in range(2))
    for weight in (0.0, 1e-4, 0.3, 0.9):
        expected = [a.double() * (1 - weight) + b.double() * weight for a, b in zip(old, new, strict=True)]
        moved = [a.clone() for a in old]
        monkeypatch.setattr(optim, "AVERAGE_BYTES", 28 + 6000 + 4)
        batches = list(optim._batch_by_bytes(list(zip(moved, new, strict=True))))
        assert [len(batch) for batch in batches] == [3, 1]
        for batch in batches:
            optim._move_towards([a for a, _ in batch], [b for _, b in batch], torch.tensor(weight))
        for value, reference, start in zip(moved, expected, old, strict=True):
            torch.testing.assert_close(value.double(), reference, rtol=0, atol=1e-6)
            assert weight > 0 or torch.equal(value, start)  # a skipped step


@pytest.mark.parametrize("sharded", [False, True])
def test_adamw_has_the_bits_and_the_state_of_torchs(sharded: bool) -> None:
    """Steps with a gradient that is missing, one that is skipped on the device, and a changed learning rate."""
    g = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (5,), (1,), (2, 2, 2), (7,)]
    start = [torch.randn(shape, generator=g) for shape in shapes]
    settings = [(slice(0, 2), 0.2, 1.0), (slice(2, 4), 0.0, 0.1), (slice(4, 5), 0.2, 1.0)]
    ours, reference = ([nn.Parameter(value.clone()) for value in start] for _ in range(2))
    if sharded:
        from torch.distributed.tensor import DTensor, Replicate

        from pretrain.runtime import distributed

        distributed.ensure_group()
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        ours = [nn.Parameter(DTensor.from_local(value.clone(), mesh, [Replicate()])) for value in start]
    config = OptimConfig(lr=0.01)

    def groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": parameters[part], "weight_decay": decay, "lr_scale": scale} for part, decay, scale in settings]

    optimizer = build_adamw(groups(ours), config)
    torchs = torch.optim.AdamW(groups(reference), lr=0.01, betas=tuple(config.betas), eps=config.eps, fused=True)  # type: ignore[arg-type]
    for step in range(4):
        for number, (p, q) in enumerate(zip(ours, reference, strict=True)):
            grad = None if (step, number) == (1, 2) else torch.randn(q.shape, generator=g)
            q.grad = grad
            p.grad = DTensor.from_local(grad, mesh, [Replicate()]) if sharded and grad is not None else grad  # type: ignore[assignment]
        for one in (optimizer, torchs):
            for group in one.param_groups:
                group["lr"] = 0.01 / (1 + step) * group["lr_scale"]
            one.grad_scale, one.found_inf = None, torch.tensor(float(step == 2))  # type: ignore[attr-defined]
            one.step()
            one.zero_grad()
    if sharded:
        torch.distributed.destroy_process_group()
    for p, q in zip(ours, reference, strict=True):
        assert p.grad is None
        assert torch.equal(p.to_local() if sharded else p, q)  # type: ignore[operator]
        assert optimizer.state[p].keys() == torchs.state[q].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for name, value in torchs.state[q].items():
            own = optimizer.state[p][name]
            assert torch.equal(own.to_local() if hasattr(own, "to_local") else own, value)
            assert own.dtype == value.dtype
