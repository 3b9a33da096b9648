"""Adapting against peft's own layers, timm's own interpolation, the rule of the groups, closed forms."""

import math
from collections.abc import Sequence
from typing import Any

import peft
import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from finetune import model as models
from finetune import wise_ft
from finetune.adapt import freeze, lora
from finetune.adapt.freeze import AdaptConfig
from finetune.adapt.lora import LoraConfig
from finetune.model import CAPTION, FusionModel
from finetune.tasks import vqa
from finetune.tasks.with_contrastive import keep_aligned
from pretrain import registry
from pretrain.data.batch import Batch
from pretrain.errors import ConfigError, UserError
from pretrain.model import DualEncoder, ModelSchema
from pretrain.optim import OptimConfig, parameter_groups
from pretrain.towers import timm as images
from tests.support import tiny


def schema(encoder: DualEncoder) -> ModelSchema:
    return ModelSchema(image=encoder.towers["image"].config, text=None)


def applied(**settings: Any) -> DualEncoder:
    encoder = tiny.build_model("clip")
    freeze.apply(encoder, AdaptConfig(**settings), schema(encoder))
    return encoder.eval()


def trained(encoder: nn.Module) -> set[str]:
    return {name for name, p in encoder.named_parameters() if p.requires_grad}


def shaken(model: nn.Module, names: str) -> None:
    """Moves the parameters whose names hold `names`."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if names in name:
                p.add_(0.1 * torch.randn_like(p))


# ---------------------------------------------------------------------------------------------------------------------
# Freezing


def test_towers_freeze_by_blocks_and_thaw_however_they_were_pretrained() -> None:
    encoder = tiny.build_model("clip", image={"trainable_blocks": 0})
    freeze.apply(encoder, AdaptConfig(trainable_blocks={"text": 1}), schema(encoder))
    names = trained(encoder)
    assert any(name.startswith("towers.image.model.patch_embed") for name in names)
    text = {name for name in names if name.startswith("towers.text.")}
    assert {name.split("layers.")[1].split(".")[0] for name in text if "layers." in name} == {"1"}
    assert not any("embeddings" in name for name in text)
    assert "projections.text.weight" in names
    freeze.apply(encoder, AdaptConfig(trainable_blocks={"image": 0}), schema(encoder))
    names = trained(encoder)
    assert not any("image" in name for name in names)  # its projection neither
    assert any("embeddings" in name for name in names)
    encoder.train()
    assert not any(module.training for module in encoder.towers["image"].modules())


def test_parts_freeze_by_name_and_what_is_not_reached_is_found() -> None:
    encoder = applied()
    freeze.freeze_named(encoder, ["projections.text", "logit_scale"])
    still = {name for name, p in encoder.named_parameters() if not p.requires_grad}
    assert {"projections.text.weight", "logit_scale"} <= still
    assert "projections.image.weight" not in still
    batch = tiny.build_batch(samples=4)
    out = encoder.towers["image"](batch.inputs["image"]).states
    found = set(freeze.freeze_unreached(encoder, [out.sum()]))
    assert "projections.image.weight" in found
    assert any(name.startswith("towers.text") for name in found)
    out.sum().backward()
    assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"trainable_blocks": {"image": 3}}, "has 2 blocks"),
        ({"trainable_blocks": {"audio": 0}}, "no tower for 'audio'"),
        ({"trainable_blocks": {"text": 1}, "lora": LoraConfig(rank=2)}, "both speak of the text tower"),
        ({"fork": ["text"], "lora": LoraConfig(rank=2)}, "adapt.fork and adapt.lora both speak of the text tower"),
        ({"fork": ["audio"]}, "no tower for 'audio'"),
        ({"lora": LoraConfig(rank=2, targets=["qvk"])}, "did you mean 'qkv'"),
        ({"lora": LoraConfig(rank=2, towers=["depth"])}, "no tower for 'depth'"),
        ({"image_size": 20}, "multiple of .* patch of 8"),
    ],
)
def test_what_cannot_be_is_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        applied(**settings)


def test_a_wrong_name_to_freeze_lists_what_is_there() -> None:
    with pytest.raises(ConfigError, match="begin with logit_scale, projections, towers"):
        freeze.freeze_named(tiny.build_model("clip"), ["fusion"])


# ---------------------------------------------------------------------------------------------------------------------
# A copy for the fusion


def test_a_forked_tower_learns_and_the_embeddings_stay() -> None:
    batch = tiny.build_batch(samples=4)
    text = batch.inputs["text"], batch.masks["text"]
    model, _ = fused(applied(trainable_blocks={"image": 0, "text": 0}), forks=["text"])
    plain, _ = fused(applied())
    before, embedding = model.eval().read("text", *text)
    theirs, expected = plain.eval().read("text", *text)
    assert embedding is not None
    assert expected is not None
    assert torch.equal(before.states, theirs.states)
    assert torch.equal(embedding, expected)

    fused_words = model.fuse({"text": before, "image": model.tokens("image", batch.inputs["image"])})["text"]
    freeze.freeze_unreached(model, [fused_words.states.sum()])
    fused_words.states.sum().backward()
    names = trained(model)
    assert any(name.startswith("forks.text.tower.") for name in names)
    assert not any(name.startswith("encoder.") for name in names)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    shaken(model, "forks.")
    after, embedding = model.read("text", *text)
    assert not torch.allclose(after.states, before.states, atol=1e-3)
    assert torch.equal(embedding, expected)
    counts = model.parameter_counts()
    assert counts["text forked"]["total"] == sum(p.numel() for p in model.forks.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Adapters


def test_adapters_start_at_the_pretrained_model_and_only_they_train() -> None:
    encoder, batch = applied(lora=LoraConfig(rank=2, towers=["image"])), tiny.build_batch(samples=4)
    plain = tiny.build_model("clip").eval()
    for name, value in encoder(batch.inputs, batch.masks).items():
        torch.testing.assert_close(value, plain(batch.inputs, batch.masks)[name], rtol=1e-6, atol=1e-6)
    image = {name for name in trained(encoder) if name.startswith("towers.image.")}
    assert image
    assert all(".lora_" in name for name in image)
    assert {name.split(".lora_")[0].split(".")[-1] for name in image} == {"qkv", "proj", "fc1", "fc2"}
    assert any(name.startswith("towers.text.") and ".lora_" not in name for name in trained(encoder))


def test_forward_and_merged_weights_equal_pefts_own() -> None:
    settings = LoraConfig(rank=3, alpha=5.0, targets=["qkv", "fc2", "q_proj"])
    encoder, batch = applied(lora=settings), tiny.build_batch(samples=4)
    shaken(encoder, ".lora_")
    out = encoder(batch.inputs, batch.masks)

    theirs = tiny.build_model("clip").eval()
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["qkv", "fc2", "q_proj"])  # type: ignore[arg-type]
    wrapped = peft.get_peft_model(theirs, config)  # type: ignore[arg-type]
    given = {f"base_model.model.{name}": value for name, value in encoder.state_dict().items()}
    wrapped.load_state_dict(given)
    expected = wrapped(batch.inputs, batch.masks)
    merged = wrapped.merge_and_unload().state_dict()

    ours = lora.merge(encoder.state_dict(), 5.0)
    assert ours.keys() == merged.keys() == tiny.build_model("clip").state_dict().keys()
    plain = tiny.build_model("clip").eval()
    plain.load_state_dict(ours)
    for name in ("image", "text"):
        torch.testing.assert_close(out[name], expected[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(plain(batch.inputs, batch.masks)[name], expected[name], rtol=1e-4, atol=1e-5)
    for name, value in merged.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(out["image"], tiny.build_model("clip").eval()(batch.inputs, batch.masks)["image"], atol=1e-3)


def test_a_convolutional_tower_without_linear_layers_is_refused() -> None:
    from pretrain.towers import timm

    tower = timm.build(timm.Config(name="resnet10t", size=32))
    with pytest.raises(ConfigError, match="no linear layers"):
        lora.inject(tower, LoraConfig(rank=2))


class Bypassed(nn.Module):
    """Multiplies by a weight without calling its layer: an adapter there would learn nothing."""

    def __init__(self, encoder: DualEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.block = encoder.towers["image"].model.blocks[0].attn  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.block.qkv.weight, self.block.qkv.bias)  # type: ignore[union-attr, arg-type]


def test_an_adapter_that_is_passed_by_is_an_error_not_a_silence() -> None:
    model = Bypassed(applied(lora=LoraConfig(rank=2, towers=["image"])))
    out = model(torch.ones(1, 16, requires_grad=True))
    with pytest.raises(ConfigError, match=r"passes by the adapter of .*; leave its last word out"):
        freeze.freeze_unreached(model, [out])


# ---------------------------------------------------------------------------------------------------------------------
# Learning rates


def fused(encoder: DualEncoder, forks: Sequence[str] = ()) -> tuple[FusionModel, vqa.VQA]:
    task = vqa.build(vqa.Config(answers=["yes", "no", "red"]), None)
    model = models.build(encoder, registry.get_component("fusion", "cross").Config(layers=1, heads=2), None, forks=forks)
    torch.manual_seed(1)
    model.head = task.head(model)
    return model, task


@pytest.mark.parametrize("rank", [0, 2])
def test_rates_fall_by_layer_and_new_layers_have_their_own(rank: int) -> None:
    model, _ = fused(applied(lora=LoraConfig(rank=rank)), forks=[] if rank else ["text"])
    config = OptimConfig(layer_decay=0.5, lr_scale={"image": 0.1, "fusion": 10.0, "task": 20.0})
    rates = {id(p): group["lr_scale"] for group in parameter_groups(model, config) for p in group["params"]}
    assert len(rates) == sum(p.requires_grad for p in model.parameters())
    seen = set()
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        parts = ("forks.text.tower", "forks.", "towers.image", "towers.text", "fusion.", "head.", "encoder.")
        part = next(part for part in parts if part in name)
        seen.add(part)
        if "tower" in part:
            block = next((int(word) for word in name.split(".") if word.isdigit()), None)
            final = ".norm." in name or "final_layer_norm" in name
            layer = block + 1 if block is not None else 3 if final else 0  # of 2 blocks
            expected = 0.5 ** (3 - layer) * (0.1 if "image" in part else 1.0)
        else:
            expected = {"fusion.": 10.0, "head.": 20.0, "encoder.": 1.0, "forks.": 1.0}[part]
        assert rates[id(p)] == pytest.approx(expected), name
    assert len(seen) == (5 if rank else 7)


# ---------------------------------------------------------------------------------------------------------------------
# Another picture size


def test_positions_are_interpolated_as_timm_does() -> None:
    encoder = tiny.build_model("clip")
    before = encoder.towers["image"].model.pos_embed.detach().clone()  # type: ignore[union-attr, operator]
    new = freeze.apply(encoder, AdaptConfig(image_size=32), schema(encoder))
    assert new.image.size == 32
    after = encoder.towers["image"].model.pos_embed  # type: ignore[union-attr]
    prefix = before.shape[1] - 4  # 16 px of 8 px patches, and what stands before them
    expected = resample_abs_pos_embed(before, new_size=[4, 4], old_size=[2, 2], num_prefix_tokens=prefix)
    torch.testing.assert_close(after, expected)
    picture = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    found = encoder.towers["image"](picture)
    assert found.grid == (4, 4)
    assert found.states.shape[1] == 16
    built = tiny.build_model("clip", image={"size": 32})  # what a checkpoint's configuration builds
    built.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(built.eval().towers["image"](picture).pooled, encoder.eval().towers["image"](picture).pooled)


def test_a_stem_takes_another_size_with_its_positions_interpolated() -> None:
    encoder = tiny.build_model("clip")
    args = {"embed_dim": 16, "depth": 1, "num_heads": 2, "class_token": False, "global_pool": "max"}
    config = images.Config(name="vit_tiny_patch16_224", size=16, stem=[8, 16], args=args)
    encoder.towers["image"] = images.build(config)
    before = encoder.towers["image"].model.pos_embed.detach().clone()  # type: ignore[union-attr, operator]
    new = freeze.resize(encoder, 32, ModelSchema(image=config, text=None))
    after = encoder.towers["image"].model.pos_embed  # type: ignore[union-attr]
    expected = resample_abs_pos_embed(before, new_size=[8, 8], old_size=[4, 4], num_prefix_tokens=0)
    torch.testing.assert_close(after, expected)
    picture = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    built = images.build(new.image)  # what a checkpoint's configuration builds
    built.load_state_dict(encoder.towers["image"].state_dict())
    found = encoder.towers["image"].eval()(picture)
    assert found.grid == (8, 8)
    torch.testing.assert_close(built.eval()(picture).pooled, found.pooled)
    with pytest.raises(ConfigError, match=r"adapt.image_size=34 is not a multiple of .* patch of 4 px"):
        freeze.resize(encoder, 34, new)


def test_a_convolutional_tower_takes_another_size_as_it_is() -> None:
    encoder = tiny.build_model("clip")
    config = images.Config(name="resnet10t", size=32)
    encoder.towers["image"] = images.build(config)
    weights = {name: value.clone() for name, value in encoder.towers["image"].state_dict().items()}
    new = freeze.resize(encoder, 64, ModelSchema(image=config, text=None))
    assert new.image.size == 64
    assert encoder.towers["image"](torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).grid == (2, 2)
    after = encoder.towers["image"].state_dict()
    assert all(torch.equal(after[name], value) for name, value in weights.items() if name.endswith(("weight", "bias")))


# ---------------------------------------------------------------------------------------------------------------------
# The contrastive loss kept on


def questions(encoder: str) -> tuple[FusionModel, Any, Batch]:
    model, task = fused(tiny.build_model(encoder))
    aligned = keep_aligned(task, AdaptConfig(contrastive=0.5))
    aligned.head(model)
    texts, batch = tiny.build_batch(1, 8), tiny.build_batch(0, 8)
    targets = {
        "answers": torch.zeros(8, 1, 10, dtype=torch.int64),
        "scores": torch.eye(10)[0].expand(8, 1, 10),
        "asked": torch.ones(8, 1),
        "caption_id": torch.arange(8),
    }
    inputs = {"image": batch.inputs["image"], "text": texts.inputs["text"][:, None], CAPTION: batch.inputs["text"]}
    masks = {"text": texts.masks["text"][:, None], CAPTION: batch.masks["text"]}
    return model.eval(), aligned, Batch(inputs, masks, batch.keys, targets)


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_both_losses_from_one_look_at_the_picture(loss: str) -> None:
    model, task, batch = questions(loss)
    seen: list[int] = []
    handle = model.encoder.tower("image").register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    features = task.encode(model, batch)
    handle.remove()
    assert seen == [8]
    value, report = task.loss(features, batch.targets)
    alone = model.encoder({"image": batch.inputs["image"], "text": batch.inputs[CAPTION]}, {"text": batch.masks[CAPTION]})
    expected = tiny.closed_form_loss(loss, alone)
    without = Batch(
        {k: v for k, v in batch.inputs.items() if k != CAPTION}, {"text": batch.masks["text"]}, batch.keys, batch.targets
    )
    own, _ = task.task.loss(task.task.encode(model, without), batch.targets)
    torch.testing.assert_close(report["contrastive_loss"], expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(value, own + 0.5 * expected, rtol=1e-5, atol=1e-6)
    value.backward()
    assert model.encoder.logit_scale.grad is not None


def test_no_weight_no_change() -> None:
    _, task = fused(tiny.build_model("clip"))
    assert keep_aligned(task, AdaptConfig()) is task


# ---------------------------------------------------------------------------------------------------------------------
# WiSE-FT


@pytest.fixture
def two() -> tuple[dict[str, Tensor], FusionModel]:
    """A start, and what became of it."""
    model, _ = fused(tiny.build_model("clip").eval())
    start = {f"encoder.{name}": value.clone() for name, value in model.encoder.state_dict().items()}
    shaken(model, "encoder.")
    return start, model


def test_between_the_two_models(two: tuple[dict[str, Tensor], FusionModel]) -> None:
    start, model = two
    tuned = model.state_dict()
    for alpha in (0.0, 0.3, 1.0):
        mixed = wise_ft.interpolate(start, tuned, alpha)
        assert mixed.keys() == tuned.keys()
        for name, value in mixed.items():
            expected = (1 - alpha) * start[name] + alpha * tuned[name] if name in start else tuned[name]
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="another shape"):
        wise_ft.interpolate({**start, "encoder.logit_scale": torch.zeros(2)}, tuned, 0.5)


def test_the_curve_measures_each_and_puts_everything_back(two: tuple[dict[str, Tensor], FusionModel]) -> None:
    from types import SimpleNamespace

    start, model = two
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tuned: Any = SimpleNamespace(model=model)
    rows = wise_ft.curve(tuned, start, [0.0, 0.25, 1.0], lambda: {"scale": float(model.encoder.logit_scale.detach())})
    a, b = float(start["encoder.logit_scale"]), float(before["encoder.logit_scale"])
    assert [row["alpha"] for row in rows] == [0.0, 0.25, 1.0]
    assert [row["scale"] for row in rows] == pytest.approx([a, 0.75 * a + 0.25 * b, b])
    assert not math.isclose(a, b)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ConfigError, match="from 0"):
        wise_ft.curve(tuned, start, [1.5], dict)
