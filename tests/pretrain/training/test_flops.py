"""The operations counted for MFU, against counts by formula."""

import hashlib
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from launch.plan.measure import PlaceholderTokenizer
from pretrain import model as models
from pretrain.config import find_config
from pretrain.data.batch import Batch
from pretrain.model import DualEncoder, ModelConfig, build
from pretrain.towers import timm, transformers
from pretrain.train import load_config
from pretrain.training.flops import FlopCounter, build_sample

C, N, L, T, D = 32, 16, 2, 24, 8
"""Width, image tokens, layers, text tokens, embedding width."""
VIT = {"patch_size": 8, "embed_dim": C, "depth": L, "num_heads": 2, "global_pool": "avg", "class_token": False}
TEXT = {"hidden_size": C, "intermediate_size": 4 * C, "num_hidden_layers": L, "num_attention_heads": 2, "vocab_size": 50}
CONFIGS = sorted(path.stem for path in find_config("vit-b-16", "pretrain").parent.glob("*.yaml"))


def build_model(image: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **model: Any) -> DualEncoder:
    """Build a ViT and a CLIP text model, with changes to the fields of their configurations."""
    image_config = timm.Config(**{"name": "vit_tiny_patch16_224", "size": 32, "args": VIT, **(image or {})})
    text = {"args": {"model_type": "clip_text_model", **TEXT}, "length": T, "pool": "avg", **(text or {})}
    return build({"image": image_config, "text": transformers.Config(**text)}, ModelConfig(dim=D, logit_scale=1.0, **model))


def count(model: DualEncoder, batch: Batch) -> int:
    counter = FlopCounter(model)
    counter.add(batch)
    return counter.take()


def images(number: int, size: int = 32) -> Batch:
    return Batch({"image": torch.zeros(number, 3, size, size, dtype=torch.uint8)}, {}, ["k"] * number)


def texts(*lengths: int, padded: int = T) -> Batch:
    mask = torch.arange(padded) < torch.tensor(lengths)[:, None]
    return Batch({"text": mask.long()}, {"text": mask}, ["k"] * len(lengths))


def forward_of_layer(tokens: int) -> int:
    """One transformer layer: 4 C^2 weights of attention, 8 C^2 of the MLP; QK^T and its product with V, 2 N^2 C each."""
    return 2 * tokens * 12 * C * C + 4 * tokens * tokens * C


PATCHES = 2 * N * 3 * 8 * 8 * C
PROJECTION = 2 * C * D


def test_a_vision_transformer_and_a_text_model_count_by_formula() -> None:
    """Twice the forward pass for the backward pass, except that the pixels need no gradient."""
    model = build_model()
    assert count(model, images(5)) == 5 * (3 * (L * forward_of_layer(N) + PROJECTION) + 2 * PATCHES)
    assert count(model, texts(T)) == 3 * (L * forward_of_layer(T) + PROJECTION)


def test_padding_is_no_work_and_attention_grows_with_the_square() -> None:
    model = build_model()
    lengths = [1, 4, 7, 13, 20]
    expected = sum(3 * (L * forward_of_layer(length) + PROJECTION) for length in lengths)
    assert count(model, texts(*lengths)) == count(model, texts(*lengths, padded=21)) == expected


def test_a_text_model_that_attends_to_its_padding_counts_it() -> None:
    args = {"model_type": "siglip_text_model", **TEXT, "max_position_embeddings": T}
    model = build_model(text={"args": args, "pool": "tower"})
    assert not model.tower("text").trims
    assert count(model, texts(3, T)) == 2 * count(model, texts(T))


def test_a_model_with_a_padding_mask_is_counted() -> None:
    model = build_model(text={"args": {"model_type": "bert", **TEXT}})
    assert count(model, texts(5, 11)) == sum(3 * (L * forward_of_layer(n) + PROJECTION) for n in (5, 11))


def test_each_of_several_texts_a_sample_counts() -> None:
    model = build_model()
    flat = texts(5, 9, 3, 7)
    batch = Batch(
        {"text": flat.inputs["text"].view(2, 2, T)}, {"text": flat.masks["text"].view(2, 2, T)}, ["k"] * 2
    )  # fmt: skip
    assert count(model, batch) == count(model, flat)


def test_patch_dropout_leaves_out_patches() -> None:
    """timm drops 3/4 of the patches after the embedding, and keeps the class token."""
    tokens = 1 + N // 4
    model = build_model(image={"patch_dropout": 0.75, "args": {**VIT, "global_pool": "token", "class_token": True}})
    assert count(model, images(1)) == 3 * (L * forward_of_layer(tokens) + PROJECTION) + 2 * PATCHES


def test_recomputed_activations_are_not_counted() -> None:
    recomputing = build_model(image={"checkpointing": True}, text={"checkpointing": True})
    assert count(recomputing, images(1)) == count(build_model(), images(1))
    assert count(recomputing, texts(T)) == count(build_model(), texts(T))


def test_frozen_parts_count_the_passes_that_they_take() -> None:
    forward = L * forward_of_layer(N) + PATCHES
    assert count(build_model(image={"trainable_blocks": 0}), images(1)) == forward + 2 * PROJECTION  # no gradient of its input
    last = build_model(image={"trainable_blocks": 1})
    layer = forward_of_layer(N)
    # The last layer's first product needs the gradient of its weight only: 3 C^2 weights of query, key and value.
    expected = forward + 2 * layer + 3 * PROJECTION
    assert count(last, images(1)) in (expected, expected - 2 * N * 3 * C * C)
    frozen = build_model(image={"trainable_blocks": 0, "args": {**VIT, "embed_dim": D}}, text={"args": {
        "model_type": "clip_text_model", **TEXT, "hidden_size": D}}, projection="none")  # fmt: skip
    assert count(frozen, images(1)) == L * (2 * N * 12 * D * D + 4 * N * N * D) + 2 * N * 3 * 8 * 8 * D


def test_a_convolutional_network_counts_as_an_eager_run() -> None:
    """torch's counter on a run with numbers: a ResNet has no attention, which the counter does not see on the CPU."""
    config = {"name": "resnet18", "size": 64, "args": {}}
    model, eager = build_model(image=config), build_model(image=config)
    with FlopCounterMode(display=False) as counter:
        eager({"image": torch.zeros(4, 3, 64, 64, dtype=torch.uint8)}, {})["image"].sum().backward()
    assert count(model, images(4, 64)) == counter.get_total_flops()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_shipped_configuration_is_counted(name: str) -> None:
    """With two layers in each transformer."""
    config = load_config(find_config(name, "pretrain"), [])
    towers = models.tower_configs(config)
    for tower in towers.values():
        tower.pretrained = False
    if not config.text.args:  # a published model, which is not here
        config.text.name, config.text.args = None, {"model_type": "bert", **TEXT, "vocab_size": 50000}
    if config.image.name.startswith("vit"):
        config.image.args = {**config.image.args, "depth": 2}
    config.text.args = {**config.text.args, "num_hidden_layers": 2}
    model = models.build(towers, config.model, PlaceholderTokenizer(49408))
    sample = build_sample(config.image.size, config.text.length)
    trained = count(model, sample)
    model.tower("image").freeze(0)
    frozen = count(model, sample)
    model.tower("text").freeze(0)
    both = count(model, sample)
    assert trained >= frozen > both > 0
    assert trained > both


def fingerprint(model: DualEncoder) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_counting_leaves_model_and_random_numbers_as_they_are(name: str) -> None:
    args = {**VIT, "proj_drop_rate": 0.1} if name.startswith("vit") else {}
    model = build_model(image={"name": name, "args": args}).eval()
    before, generator = fingerprint(model), torch.get_rng_state()
    assert count(model, Batch({**images(2).inputs, **texts(3, 5).inputs}, texts(3, 5).masks, ["k"] * 2)) > 0
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None and p.device.type == "cpu" for p in model.parameters())
    assert not any(module.training for module in model.modules())
