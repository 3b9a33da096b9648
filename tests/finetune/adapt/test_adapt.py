"""Adapted encoders compared with peft, timm's interpolation and closed forms of rates and losses."""

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
from finetune.tasks.with_contrastive import add_contrastive_loss
from pretrain import registry
from pretrain.data.batch import Batch
from pretrain.errors import ConfigError, UserError
from pretrain.model import DualEncoder, ModelSchema
from pretrain.optim import OptimConfig, parameter_groups
from pretrain.towers import timm as images
from tests.support import tiny


def build_schema(encoder: DualEncoder) -> ModelSchema:
    return ModelSchema(image=encoder.towers["image"].config, text=None)


def adapted_encoder(**settings: Any) -> DualEncoder:
    encoder = tiny.build_model("clip")
    freeze.adapt_encoder(encoder, AdaptConfig(**settings), build_schema(encoder))
    return encoder.eval()


def trainable_names(encoder: nn.Module) -> set[str]:
    return {name for name, p in encoder.named_parameters() if p.requires_grad}


def perturb(model: nn.Module, substring: str) -> None:
    """Add noise to the parameters whose names contain `substring`."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if substring in name:
                p.add_(0.1 * torch.randn_like(p))


# ---------------------------------------------------------------------------------------------------------------------
# Freezing


def test_towers_freeze_by_blocks_and_are_trainable_again_after_frozen_pretraining() -> None:
    encoder = tiny.build_model("clip", image={"trainable_blocks": 0})
    freeze.adapt_encoder(encoder, AdaptConfig(trainable_blocks={"text": 1}), build_schema(encoder))
    names = trainable_names(encoder)
    assert any(name.startswith("towers.image.model.patch_embed") for name in names)
    text = {name for name in names if name.startswith("towers.text.")}
    assert {name.split("layers.")[1].split(".")[0] for name in text if "layers." in name} == {"1"}
    assert not any("embeddings" in name for name in text)
    assert "projections.text.weight" in names
    freeze.adapt_encoder(encoder, AdaptConfig(trainable_blocks={"image": 0}), build_schema(encoder))
    names = trainable_names(encoder)
    assert not any("image" in name for name in names)  # its projection neither
    assert any("embeddings" in name for name in names)
    encoder.train()
    assert not any(module.training for module in encoder.towers["image"].modules())


def test_parameters_freeze_by_name_and_unused_ones_are_found() -> None:
    encoder = adapted_encoder()
    freeze.freeze_by_name(encoder, ["projections.text", "logit_scale"])
    frozen = {name for name, p in encoder.named_parameters() if not p.requires_grad}
    assert {"projections.text.weight", "logit_scale"} <= frozen
    assert "projections.image.weight" not in frozen
    batch = tiny.build_batch(samples=4)
    out = encoder.towers["image"](batch.inputs["image"]).states
    unused = set(freeze.freeze_unused(encoder, [out.sum()]))
    assert "projections.image.weight" in unused
    assert any(name.startswith("towers.text") for name in unused)
    out.sum().backward()
    assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainable_blocks": {"image": 3}}, "has 2 blocks"),
        ({"trainable_blocks": {"audio": 0}}, "no tower for 'audio'"),
        ({"trainable_blocks": {"text": 1}, "lora": LoraConfig(rank=2)}, "both name the text tower"),
        ({"fork": ["text"], "lora": LoraConfig(rank=2)}, "adapt.fork and adapt.lora both name the text tower"),
        ({"fork": ["audio"]}, "no tower for 'audio'"),
        ({"lora": LoraConfig(rank=2, targets=["qvk"])}, "did you mean 'qkv'"),
        ({"lora": LoraConfig(rank=2, towers=["depth"])}, "no tower for 'depth'"),
        ({"image_size": 20}, "multiple of .* patch of 8"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapted_encoder(**settings)


def test_a_wrong_prefix_to_freeze_lists_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match="begin with logit_scale, projections, towers"):
        freeze.freeze_by_name(tiny.build_model("clip"), ["fusion"])


# ---------------------------------------------------------------------------------------------------------------------
# A tower copy for the fusion


@pytest.mark.parametrize("copies", [["text"], ["image"], ["image", "text"]], ids="+".join)
def test_a_tower_copy_is_trained_and_the_embeddings_do_not_change(copies: list[str]) -> None:
    batch = tiny.build_batch(samples=4)
    inputs = {"text": (batch.inputs["text"], batch.masks["text"]), "image": (batch.inputs["image"],)}
    frozen = adapted_encoder(trainable_blocks={"image": 0, "text": 0})
    model, _ = build_fusion_model(frozen, tower_copies=copies)
    plain, _ = build_fusion_model(adapted_encoder())
    before = {name: model.eval().tokens_and_embedding(name, *values) for name, values in inputs.items()}
    expected = {name: plain.eval().tokens_and_embedding(name, *values) for name, values in inputs.items()}

    fused_words = model.fuse({name: tokens for name, (tokens, _) in before.items()})["text"]
    freeze.freeze_unused(model, [fused_words.states.sum()])
    fused_words.states.sum().backward()
    names = trainable_names(model)
    assert all(any(name.startswith(f"forks.{copy}.tower.") for name in names) for copy in copies)
    assert not any(name.startswith("encoder.") for name in names)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    perturb(model, "forks.")
    for name, values in inputs.items():
        (tokens, embedding), (plain_tokens, plain_embedding) = before[name], expected[name]
        assert embedding is not None
        assert plain_embedding is not None
        assert torch.equal(tokens.states, plain_tokens.states)
        assert torch.equal(embedding, plain_embedding)
        after, embedding = model.tokens_and_embedding(name, *values)
        assert torch.allclose(after.states, tokens.states, atol=1e-3) == (name not in copies)
        assert embedding is not None
        assert torch.equal(embedding, plain_embedding)
    counts = model.parameter_counts()
    copied = sum(counts[f"{name} forked"]["total"] for name in copies)
    assert copied == sum(p.numel() for p in model.forks.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Low-rank adapters


def test_adapters_start_at_the_pretrained_model_and_only_they_train() -> None:
    encoder, batch = adapted_encoder(lora=LoraConfig(rank=2, towers=["image"])), tiny.build_batch(samples=4)
    plain = tiny.build_model("clip").eval()
    for name, value in encoder(batch.inputs, batch.masks).items():
        torch.testing.assert_close(value, plain(batch.inputs, batch.masks)[name], rtol=1e-6, atol=1e-6)
    image = {name for name in trainable_names(encoder) if name.startswith("towers.image.")}
    assert image
    assert all(".lora_" in name for name in image)
    assert {name.split(".lora_")[0].split(".")[-1] for name in image} == {"qkv", "proj", "fc1", "fc2"}
    assert any(name.startswith("towers.text.") and ".lora_" not in name for name in trainable_names(encoder))


def test_forward_and_merged_weights_equal_those_of_peft() -> None:
    settings = LoraConfig(rank=3, alpha=5.0, targets=["qkv", "fc2", "q_proj"])
    encoder, batch = adapted_encoder(lora=settings), tiny.build_batch(samples=4)
    perturb(encoder, ".lora_")
    out = encoder(batch.inputs, batch.masks)

    reference = tiny.build_model("clip").eval()
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["qkv", "fc2", "q_proj"])  # type: ignore[arg-type]
    wrapped = peft.get_peft_model(reference, config)  # type: ignore[arg-type]
    weights = {f"base_model.model.{name}": value for name, value in encoder.state_dict().items()}
    wrapped.load_state_dict(weights)
    expected = wrapped(batch.inputs, batch.masks)
    merged = wrapped.merge_and_unload().state_dict()

    merged_here = lora.merge_adapters(encoder.state_dict(), 5.0)
    assert merged_here.keys() == merged.keys() == tiny.build_model("clip").state_dict().keys()
    plain = tiny.build_model("clip").eval()
    plain.load_state_dict(merged_here)
    for name in ("image", "text"):
        torch.testing.assert_close(out[name], expected[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(plain(batch.inputs, batch.masks)[name], expected[name], rtol=1e-4, atol=1e-5)
    for name, value in merged.items():
        torch.testing.assert_close(merged_here[name], value, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(out["image"], tiny.build_model("clip").eval()(batch.inputs, batch.masks)["image"], atol=1e-3)


def test_a_convolutional_tower_without_linear_layers_is_refused() -> None:
    from pretrain.towers import timm

    tower = timm.build(timm.Config(name="resnet10t", size=32))
    with pytest.raises(ConfigError, match="no linear layers"):
        lora.inject_adapters(tower, LoraConfig(rank=2))


class Bypassed(nn.Module):
    """A model that uses a layer's weight without calling the layer: its adapter would learn nothing."""

    def __init__(self, encoder: DualEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.block = encoder.towers["image"].model.blocks[0].attn  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.block.qkv.weight, self.block.qkv.bias)  # type: ignore[union-attr, arg-type]


def test_an_adapter_that_the_model_does_not_call_is_an_error() -> None:
    model = Bypassed(adapted_encoder(lora=LoraConfig(rank=2, towers=["image"])))
    out = model(torch.ones(1, 16, requires_grad=True))
    with pytest.raises(ConfigError, match=r"does not call the adapter of .*; leave its last word out"):
        freeze.freeze_unused(model, [out])


# ---------------------------------------------------------------------------------------------------------------------
# Learning rates


def build_fusion_model(encoder: DualEncoder, tower_copies: Sequence[str] = ()) -> tuple[FusionModel, vqa.VQA]:
    task = vqa.build(vqa.Config(answers=["yes", "no", "red"]), None)
    model = models.build(
        encoder, registry.get_component("fusion", "cross").Config(layers=1, heads=2), None, tower_copies=tower_copies
    )
    torch.manual_seed(1)
    model.head = task.build_head(model)
    return model, task


@pytest.mark.parametrize("rank", [0, 2])
def test_learning_rates_decay_by_layer_and_new_parts_have_a_scale(rank: int) -> None:
    model, _ = build_fusion_model(adapted_encoder(lora=LoraConfig(rank=rank)), tower_copies=[] if rank else ["text"])
    config = OptimConfig(layer_decay=0.5, lr_scale={"image": 0.1, "fusion": 10.0, "task": 20.0})
    rates = {id(p): group["lr_scale"] for group in parameter_groups(model, config) for p in group["params"]}
    assert len(rates) == sum(p.requires_grad for p in model.parameters())
    parts_present = set()
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        parts = ("forks.text.tower", "forks.", "towers.image", "towers.text", "fusion.", "head.", "encoder.")
        part = next(part for part in parts if part in name)
        parts_present.add(part)
        if "tower" in part:
            block = next((int(word) for word in name.split(".") if word.isdigit()), None)
            final = ".norm." in name or "final_layer_norm" in name
            layer = block + 1 if block is not None else 3 if final else 0  # of 2 blocks
            expected = 0.5 ** (3 - layer) * (0.1 if "image" in part else 1.0)
        else:
            expected = {"fusion.": 10.0, "head.": 20.0, "encoder.": 1.0, "forks.": 1.0}[part]
        assert rates[id(p)] == pytest.approx(expected), name
    assert len(parts_present) == (5 if rank else 7)


# ---------------------------------------------------------------------------------------------------------------------
# Another image size


def test_positions_are_interpolated_as_timm_does() -> None:
    encoder = tiny.build_model("clip")
    before = encoder.towers["image"].model.pos_embed.detach().clone()  # type: ignore[union-attr, operator]
    new = freeze.adapt_encoder(encoder, AdaptConfig(image_size=32), build_schema(encoder))
    assert new.image.size == 32
    after = encoder.towers["image"].model.pos_embed  # type: ignore[union-attr]
    prefix = before.shape[1] - 4  # 16 px of 8 px patches, and the class or register tokens before them
    expected = resample_abs_pos_embed(before, new_size=[4, 4], old_size=[2, 2], num_prefix_tokens=prefix)
    torch.testing.assert_close(after, expected)
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    tokens = encoder.towers["image"](image)
    assert tokens.grid == (4, 4)
    assert tokens.states.shape[1] == 16
    built = tiny.build_model("clip", image={"size": 32})  # what a checkpoint's configuration builds
    built.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(built.eval().towers["image"](image).pooled, encoder.eval().towers["image"](image).pooled)


def test_a_stem_takes_another_size_with_its_positions_interpolated() -> None:
    encoder = tiny.build_model("clip")
    args = {"embed_dim": 16, "depth": 1, "num_heads": 2, "class_token": False, "global_pool": "max"}
    config = images.Config(name="vit_tiny_patch16_224", size=16, stem=[8, 16], args=args)
    encoder.towers["image"] = images.build(config)
    before = encoder.towers["image"].model.pos_embed.detach().clone()  # type: ignore[union-attr, operator]
    new = freeze.resize_image_tower(encoder, 32, ModelSchema(image=config, text=None))
    after = encoder.towers["image"].model.pos_embed  # type: ignore[union-attr]
    expected = resample_abs_pos_embed(before, new_size=[8, 8], old_size=[4, 4], num_prefix_tokens=0)
    torch.testing.assert_close(after, expected)
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    built = images.build(new.image)  # what a checkpoint's configuration builds
    built.load_state_dict(encoder.towers["image"].state_dict())
    tokens = encoder.towers["image"].eval()(image)
    assert tokens.grid == (8, 8)
    torch.testing.assert_close(built.eval()(image).pooled, tokens.pooled)
    with pytest.raises(ConfigError, match=r"adapt.image_size=34 is not a multiple of .* patch of 4 px"):
        freeze.resize_image_tower(encoder, 34, new)


def test_a_convolutional_tower_takes_another_size_as_it_is() -> None:
    encoder = tiny.build_model("clip")
    config = images.Config(name="resnet10t", size=32)
    encoder.towers["image"] = images.build(config)
    weights = {name: value.clone() for name, value in encoder.towers["image"].state_dict().items()}
    new = freeze.resize_image_tower(encoder, 64, ModelSchema(image=config, text=None))
    assert new.image.size == 64
    assert encoder.towers["image"](torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).grid == (2, 2)
    after = encoder.towers["image"].state_dict()
    assert all(torch.equal(after[name], value) for name, value in weights.items() if name.endswith(("weight", "bias")))


# ---------------------------------------------------------------------------------------------------------------------
# The contrastive loss added to a task


def build_questions(loss: str) -> tuple[FusionModel, Any, Batch]:
    model, task = build_fusion_model(tiny.build_model(loss))
    aligned = add_contrastive_loss(task, AdaptConfig(contrastive=0.5))
    aligned.build_head(model)
    texts, batch = tiny.build_batch(1, 8), tiny.build_batch(0, 8)
    targets = {
        "answers": torch.zeros(8, 1, 10, dtype=torch.int64),
        "scores": torch.eye(10)[0].expand(8, 1, 10),
        "question_mask": torch.ones(8, 1),
        "caption_id": torch.arange(8),
    }
    inputs = {"image": batch.inputs["image"], "text": texts.inputs["text"][:, None], CAPTION: batch.inputs["text"]}
    masks = {"text": texts.masks["text"][:, None], CAPTION: batch.masks["text"]}
    return model.eval(), aligned, Batch(inputs, masks, batch.keys, targets)


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_both_losses_share_one_pass_over_the_images(loss: str) -> None:
    model, task, batch = build_questions(loss)
    batch_sizes: list[int] = []
    handle = model.encoder.tower("image").register_forward_hook(lambda module, args, out: batch_sizes.append(len(args[0])))
    features = task.encode(model, batch)
    handle.remove()
    assert batch_sizes == [8]
    value, report = task.loss(features, batch.targets)
    alone = model.encoder({"image": batch.inputs["image"], "text": batch.inputs[CAPTION]}, {"text": batch.masks[CAPTION]})
    expected = tiny.closed_form_loss(loss, alone)
    without = Batch(
        {k: v for k, v in batch.inputs.items() if k != CAPTION}, {"text": batch.masks["text"]}, batch.keys, batch.targets
    )
    task_loss, _ = task.task.loss(task.task.encode(model, without), batch.targets)
    torch.testing.assert_close(report["contrastive_loss"], expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(value, task_loss + 0.5 * expected, rtol=1e-5, atol=1e-6)
    value.backward()
    assert model.encoder.logit_scale.grad is not None


def test_a_contrastive_weight_of_0_leaves_the_task_as_it_is() -> None:
    _, task = build_fusion_model(tiny.build_model("clip"))
    assert add_contrastive_loss(task, AdaptConfig()) is task


# ---------------------------------------------------------------------------------------------------------------------
# WiSE-FT


@pytest.fixture
def start_and_tuned() -> tuple[dict[str, Tensor], FusionModel]:
    """The weights of pretrained encoders, and a model with changed weights."""
    model, _ = build_fusion_model(tiny.build_model("clip").eval())
    start = {f"encoder.{name}": value.clone() for name, value in model.encoder.state_dict().items()}
    perturb(model, "encoder.")
    return start, model


def test_interpolation_is_linear_in_the_encoders_weights(start_and_tuned: tuple[dict[str, Tensor], FusionModel]) -> None:
    start, model = start_and_tuned
    tuned = model.state_dict()
    for alpha in (0.0, 0.3, 1.0):
        mixed = wise_ft.interpolate(start, tuned, alpha)
        assert mixed.keys() == tuned.keys()
        for name, value in mixed.items():
            expected = (1 - alpha) * start[name] + alpha * tuned[name] if name in start else tuned[name]
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="another shape"):
        wise_ft.interpolate({**start, "encoder.logit_scale": torch.zeros(2)}, tuned, 0.5)


def test_the_curve_measures_each_alpha_and_restores_the_weights(start_and_tuned: tuple[dict[str, Tensor], FusionModel]) -> None:
    from types import SimpleNamespace

    start, model = start_and_tuned
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tuned: Any = SimpleNamespace(model=model)
    rows = wise_ft.measure_curve(tuned, start, [0.0, 0.25, 1.0], lambda: {"scale": float(model.encoder.logit_scale.detach())})
    a, b = float(start["encoder.logit_scale"]), float(before["encoder.logit_scale"])
    assert [row["alpha"] for row in rows] == [0.0, 0.25, 1.0]
    assert [row["scale"] for row in rows] == pytest.approx([a, 0.75 * a + 0.25 * b, b])
    assert not math.isclose(a, b)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ConfigError, match="from 0"):
        wise_ft.measure_curve(tuned, start, [1.5], dict)
