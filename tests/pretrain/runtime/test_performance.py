"""Settings of torch: what is set is in force where models are computed, and put back; the CPU's numbers do not change."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from launch import cli
from pretrain import registry
from pretrain.checkpoints.loading import load_model
from pretrain.config import load_values
from pretrain.errors import ConfigError, UserError
from pretrain.model import read_performance, set_performance
from pretrain.runtime import performance
from pretrain.runtime.performance import PerformanceConfig, choose_attention, prepare_environment, process_settings
from tests.support import Small, read_losses, run_clipfuse

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CONVNEXT = ["image.name=test_convnext", "image.args={}"]
"""A convolutional tower without BatchNorm, of 0.3 million weights."""


def build_image_tower(name: str, **settings: Any) -> nn.Module:
    module = registry.get_component("towers", "timm")
    torch.manual_seed(0)
    return module.build(module.Config(name=name, size=32, **settings))  # type: ignore[no-any-return]


def flags() -> list[Any]:
    """Return what process_settings may change, by torch's own getters."""
    cudnn: Any = torch.backends.cudnn
    return [
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cuda.matmul.allow_tf32,
        torch.get_float32_matmul_precision(),
        cudnn.conv.fp32_precision,
        cudnn.allow_tf32,
        cudnn.benchmark,
        cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        torch.backends.cuda.flash_sdp_enabled(),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Settings of the process


def test_flags_of_torch_are_set_inside_the_block_and_put_back_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(performance.CUBLAS_VARIABLE, ":4096:8")
    before = flags()
    with process_settings(PerformanceConfig()):
        assert flags() == ["tf32", True, "high", "tf32", True, True, False, False, True, True]
        with process_settings(PerformanceConfig(tf32=False), deterministic=True):
            assert flags() == ["ieee", False, "highest", "none", False, False, True, True, False, True]
        assert flags() == ["tf32", True, "high", "tf32", True, True, False, False, True, True]
        choose_attention(77, "cpu", "bf16")
        assert not flags()[-1]
    assert flags() == before


@pytest.mark.parametrize(
    ("tokens", "device", "precision", "is_fused"),
    [
        (77, "cpu", "bf16", False),
        (0, "cpu", "bf16", True),
        (257, "cpu", "bf16", True),
        (77, "cpu", "fp32", True),
        (77, "cuda", "bf16", True),
    ],
)
def test_attention_of_short_sequences_in_bf16_is_as_exact_without_the_fused_kernel(
    tokens: int, device: str, precision: str, is_fused: bool
) -> None:
    """The reference is the formula in float64."""
    torch.manual_seed(0)
    n = tokens or 16  # 0: the length is not known
    q, k, v = (torch.randn(2, 2, n, 16, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(2, 1, n, n) < 0.7
    expected = (q @ k.mT / 4).masked_fill(~mask, -torch.inf).softmax(dim=-1) @ v
    with process_settings(PerformanceConfig()), _Operations() as operations:
        choose_attention(tokens, device, precision)
        out = nn.functional.scaled_dot_product_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), attn_mask=mask)
    assert ("aten::_scaled_dot_product_flash_attention_for_cpu" in operations.names) == is_fused
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=0.02)


class _Operations(TorchDispatchMode):
    """Notes the names of the operations that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_float32_products_of_cpus_stay_float32() -> None:
    x, y = torch.randn(64, 300), torch.randn(300, 50)
    expected = x @ y
    with process_settings(PerformanceConfig()):
        assert torch.equal(x @ y, expected)
        assert torch.backends.mkldnn.matmul.fp32_precision == "none"  # type: ignore[attr-defined]


def test_variables_of_the_environment_are_set_only_where_the_user_has_set_none(monkeypatch: pytest.MonkeyPatch) -> None:
    names = (*performance.ALLOCATOR_VARIABLES, performance.CUBLAS_VARIABLE)

    def prepare(config: PerformanceConfig, deterministic: bool = False, **variables: str) -> dict[str, str]:
        for name in names:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        prepare_environment(config, deterministic)
        return {name: os.environ[name] for name in names if name in os.environ}

    expandable = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert prepare(PerformanceConfig()) == expandable
    assert prepare(PerformanceConfig(expandable_segments=False)) == {}
    assert prepare(PerformanceConfig(), True) == {**expandable, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    for name in performance.ALLOCATOR_VARIABLES:
        assert prepare(PerformanceConfig(), **{name: "max_split_size_mb:512"}) == {name: "max_split_size_mb:512"}
    own = prepare(PerformanceConfig(expandable_segments=False), True, CUBLAS_WORKSPACE_CONFIG=":16:8")
    assert own == {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}


def test_an_operation_that_cannot_be_deterministic_is_one_line() -> None:
    x = torch.zeros(4)
    with (
        pytest.raises(UserError, match=r"train\.deterministic=true: put_ has no deterministic implementation"),
        process_settings(PerformanceConfig(), deterministic=True),
    ):
        x.put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    x.put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))


def test_early_settings_are_those_of_file_and_command_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("performance: {expandable_segments: false}\ntrain: {steps: 3, deterministic: true}\n")
    early = performance.read_early(load_values(tmp_path / "a.yaml", ["performance.tf32=false", "run=x"]), "a.yaml")
    assert early.performance == PerformanceConfig(tf32=False, expandable_segments=False)
    assert early.train.deterministic
    with pytest.raises(ConfigError, match=r"performance\.tf32='blue'.*must be true or false"):
        performance.read_early(load_values(tmp_path / "a.yaml", ["performance.tf32=blue"]), "a.yaml")


# ---------------------------------------------------------------------------------------------------------------------
# Settings of a model


def test_channels_last_is_for_convolutional_towers_on_gpus() -> None:
    towers = {
        "vit": build_image_tower("vit_tiny_patch16_224", args={"embed_dim": 32, "depth": 1, "num_heads": 2}),
        "stem": build_image_tower(
            "vit_tiny_patch16_224", stem=[8, 8, 16, 16], args={"embed_dim": 32, "depth": 1, "num_heads": 2}
        ),
        "resnet": build_image_tower("resnet10t"),
        "convnext": build_image_tower("test_convnext"),
    }
    model = nn.ModuleDict(towers)

    def chosen(setting: Any, device: torch.device) -> list[str]:
        set_performance(model, PerformanceConfig(channels_last=setting), device)
        return [name for name, tower in towers.items() if tower.channels_last]

    assert chosen("auto", CPU) == []
    assert chosen("auto", CUDA) == chosen("true", CPU) == ["stem", "resnet", "convnext"]
    assert chosen("false", CUDA) == []


@pytest.mark.parametrize("name", ["resnet10t", "test_convnext", "test_efficientnet"])
def test_channels_last_gives_the_same_outputs_gradients_and_weights(name: str) -> None:
    tower = build_image_tower(name)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    results = []
    for channels_last in ("false", "true"):
        set_performance(tower, PerformanceConfig(channels_last=channels_last), CPU)  # type: ignore[arg-type]
        tower.zero_grad()
        with convolution_outputs() as outputs:
            out = tower.eval()(images)
        assert all(is_channels_last(x) for x in outputs) == (channels_last == "true")  # some of ConvNeXt's are in any case
        out.pooled.square().sum().backward()
        grads = {name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None}
        results.append((out, grads, {key: value.clone() for key, value in tower.state_dict().items()}))
    (plain, grads, weights), (other, other_grads, other_weights) = results
    torch.testing.assert_close(other.pooled, plain.pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other.states, plain.states, rtol=1e-4, atol=1e-5)
    scale = max(float(grad.abs().max()) for grad in grads.values())
    for key, grad in grads.items():
        assert (other_grads[key] - grad).abs().max() <= 1e-5 * scale, key
        assert other_grads[key].is_contiguous()
    for key, value in weights.items():
        assert torch.equal(other_weights[key], value)
        assert other_weights[key].is_contiguous()


@pytest.mark.parametrize(("device", "dtype"), [(CPU, torch.float32), (CUDA, torch.bfloat16)])
def test_fast_norm_reads_and_writes_half_precision_on_gpus(device: torch.device, dtype: torch.dtype) -> None:
    """The flags are those for `device`; the model itself is computed on the CPU, where timm's layer does the same."""
    tower = build_image_tower("vit_tiny_patch16_224", args={"embed_dim": 32, "depth": 1, "num_heads": 2})
    set_performance(tower, PerformanceConfig(), device)
    assert read_performance(tower)["fast_norm"] == (device == CUDA)
    norm: Any = tower.get_submodule("model.norm")
    x = torch.randn(4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x)
    assert out.dtype == dtype
    expected = F.layer_norm(x.to(dtype), (32,), norm.weight.to(dtype), norm.bias.to(dtype), norm.eps)
    assert torch.equal(out, expected)
    assert norm(x).dtype == torch.float32  # without autocast it changes nothing


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@contextmanager
def convolution_outputs() -> Iterator[list[Tensor]]:
    """Collect outputs of convolutions whose strides tell the memory format; not of one image, with which models are probed."""
    outputs: list[Tensor] = []

    def collect(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, nn.Conv2d) and output.device.type != "meta" and min(output.shape) > 1:
            outputs.append(output.detach())

    handle = nn.modules.module.register_module_forward_hook(collect)
    try:
        yield outputs
    finally:
        handle.remove()


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def environment_of(run: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((run / "environment.json").read_text())["performance"]
    return settings


@pytest.fixture(scope="module")
def convolutional(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps with a convolutional tower in channels_last."""
    run = tmp_path_factory.mktemp("convolutional") / "run"
    more = [*CONVNEXT, "performance.channels_last=true", "performance.cudnn_benchmark=false", "train.steps=3"]
    with convolution_outputs() as outputs:
        assert cli.main(["pretrain", "scenes", *small.settings(run, *more)]) == 0
    assert outputs
    assert all(is_channels_last(x) for x in outputs)
    return run


def test_a_run_records_what_was_in_force(convolutional: Path) -> None:
    settings = environment_of(convolutional)
    assert settings["channels_last"] == ["image"]
    assert (settings["tf32_products"], settings["tf32_convolutions"], settings["cudnn_benchmark"]) == (True, True, False)
    assert (settings["deterministic_algorithms"], settings["fast_norm"]) == (False, False)
    assert settings["fused_attention"]


def test_its_checkpoint_has_the_format_of_every_checkpoint(convolutional: Path) -> None:
    weights = load_file(next(convolutional.glob("checkpoints/step-*")) / "model.safetensors")
    model = load_model(convolutional).model
    assert not read_performance(model)["channels_last"]  # the caller decides, who knows the device
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])
        assert value.is_contiguous()


def test_evaluation_embedding_and_finetuning_use_the_run_s_settings(
    small: Small, convolutional: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = tmp_path / "tuned"
    data = [f"data.train={small.train}", "data.batch_size=16", "data.workers=0"]
    more = ["train.steps=2", "train.trackers=[]", "train.threads=1", "eval.workers=0", "performance.channels_last=true"]
    for command in (
        ["evaluate", str(convolutional), "--data", small.val, "--json"],
        ["embed", str(convolutional), "--data", small.val, "--out", str(tmp_path / "embedded"), "--workers", "0"],
        [
            "finetune",
            "retrieval",
            f"init={convolutional}",
            f"run={tuned}",
            *data,
            "data.val=null",
            *more,
            "train.precision=bf16",
        ],
        ["evaluate", str(tuned), "--data", small.val, "--json"],
    ):
        with convolution_outputs() as outputs:
            assert cli.main(command) == 0, command
        assert outputs
        is_expected = [is_channels_last(x) for x in outputs]
        assert all(is_expected), f"{command}: {is_expected.count(False)} of {len(is_expected)} are not"
    capsys.readouterr()
    assert environment_of(tuned)["channels_last"] == ["image"]
    assert not environment_of(tuned)["fused_attention"]


def test_settings_may_change_when_a_run_resumes(small: Small, convolutional: Path, tmp_path: Path) -> None:
    plain, run = tmp_path / "plain", tmp_path / "run"
    common = [*CONVNEXT, "optim.schedule=constant"]
    assert cli.main(["pretrain", "scenes", *small.settings(plain, *common, "train.steps=4")]) == 0
    other = ["performance.channels_last=true", "performance.tf32=false", "train.deterministic=true"]
    assert cli.main(["pretrain", "scenes", *small.settings(run, *common, *other, "train.steps=2")]) == 0
    assert environment_of(run)["deterministic_algorithms"]
    assert not environment_of(run)["tf32_products"]
    assert cli.main(["pretrain", "scenes", *small.settings(run, *common, "train.steps=4")]) == 0
    assert environment_of(run)["tf32_products"]
    assert read_losses(run) == pytest.approx(read_losses(plain), rel=1e-4)


@pytest.mark.slow
def test_every_process_of_a_launcher_has_the_settings(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*performance.ALLOCATOR_VARIABLES, performance.CUBLAS_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    more = ["train.steps=1", "train.strategy=ddp", "train.deterministic=true"]
    more += ["loss.name=tests.support.settings_loss", f"loss.folder={tmp_path}"]
    run_clipfuse("pretrain", "scenes", "--nproc", "2", *small.settings(tmp_path / "run", *more), cwd=tmp_path)
    for rank in range(2):
        settings = json.loads((tmp_path / f"{rank}.json").read_text())
        assert settings["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
        assert settings["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert settings["precision"] == "high"
        assert settings["deterministic_algorithms"]


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.gpu
@pytest.mark.slow
def test_on_a_gpu_all_settings_are_in_force(small: Small, tmp_path: Path) -> None:
    more = [*CONVNEXT, "train.steps=2", "train.precision=bf16", "loss.name=tests.support.settings_loss"]
    for number, deterministic in enumerate(("false", "true", "true")):
        run = tmp_path / f"run{number}"
        settings = small.settings(run, *more, f"loss.folder={tmp_path}", f"train.deterministic={deterministic}")
        run_clipfuse("pretrain", "scenes", *settings, cwd=tmp_path)
        recorded = environment_of(run)
        assert recorded["expandable_segments"]
        assert recorded["tf32_products"]
        assert recorded["fast_norm"]
        assert recorded["channels_last"] == ["image"]
        assert recorded["deterministic_algorithms"] == (deterministic == "true")
    assert read_losses(tmp_path / "run1") == read_losses(tmp_path / "run2")


@pytest.mark.gpu
def test_on_a_gpu_tf32_rounds_products_and_only_where_it_is_allowed() -> None:
    x, y = torch.randn(256, 512, device="cuda"), torch.randn(512, 256, device="cuda")
    exact = x.double() @ y.double()
    errors = []
    for is_allowed in (False, True):
        with process_settings(PerformanceConfig(tf32=is_allowed)):
            errors.append(float(((x @ y) - exact).abs().max()))
    assert errors[0] < 1e-3
    assert errors[1] > 5 * errors[0]  # GPUs before Ampere have no TF32


@pytest.mark.gpu
def test_on_a_gpu_channels_last_gives_the_same_outputs() -> None:
    tower = build_image_tower("resnet10t").cuda().eval()
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, device="cuda")
    plain = tower(images).pooled
    set_performance(tower, PerformanceConfig(), CUDA)
    with process_settings(PerformanceConfig(tf32=False)), convolution_outputs() as outputs:
        torch.testing.assert_close(tower(images).pooled, plain, rtol=1e-3, atol=1e-3)
    assert all(is_channels_last(x) for x in outputs)
