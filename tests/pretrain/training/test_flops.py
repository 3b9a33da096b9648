"""The operations counted for MFU, against a count by formula."""

import pytest
import torch

from pretrain.data.batch import Batch
from pretrain.model import ModelConfig, build
from pretrain.towers import timm, transformers
from pretrain.training import flops

C, N, L, T, D = 32, 16, 2, 24, 8
"""Width, image tokens, layers, text tokens, embedding width."""


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    args = {"patch_size": 8, "embed_dim": C, "depth": L, "num_heads": 2, "global_pool": "avg", "fc_norm": False}
    image = timm.Config(name="vit_tiny_patch16_224", size=32, args=args)
    text_args = {"model_type": "clip_text_model", "hidden_size": C, "intermediate_size": 4 * C, "num_hidden_layers": L}
    text = transformers.Config(args={**text_args, "num_attention_heads": 2, "vocab_size": 50}, length=T, pool="avg")
    return build({"image": image, "text": text}, ModelConfig(dim=D, logit_scale=1.0))


def expected_operations(tokens: int) -> float:
    """Return the forward and backward operations of L blocks and the projection.

    A block has 4 C^2 + 8 C^2 weights, each with 2 operations in 3 passes.
    """
    return 3 * 2 * (tokens * L * 12 * C * C + C * D)


def test_a_batch_counts_the_operations_of_both_towers(model: torch.nn.Module) -> None:
    count = flops.build_flop_counter(model, flops.build_sample(32, T))
    patches = 2 * 2 * N * 3 * 8 * 8 * C  # the image itself needs no gradient
    full = Batch({"text": torch.ones(5, T, dtype=torch.int64), "image": torch.zeros(5, 3, 32, 32)}, {}, ["k"] * 5)
    expected = 5 * (expected_operations(N) + patches + expected_operations(T))
    # Attention, 4 N^2 C of 24 N C^2 operations a block, is counted only where torch knows its kernel.
    assert expected <= count(full) <= 1.35 * expected


def test_trimmed_texts_count_by_their_length(model: torch.nn.Module) -> None:
    count = flops.build_flop_counter(model, flops.build_sample(None, T))
    half = Batch({"text": torch.ones(3, T // 2, dtype=torch.int64)}, {}, ["k"] * 3)
    full = Batch({"text": torch.ones(3, T, dtype=torch.int64)}, {}, ["k"] * 3)
    assert count(half) == pytest.approx(count(full) / 2)


def test_each_of_several_texts_an_image_counts(model: torch.nn.Module) -> None:
    one, three = (flops.build_flop_counter(model, flops.build_sample(None, T, texts)) for texts in (1, 3))
    batch = Batch({"text": torch.ones(5, 3, T, dtype=torch.int64)}, {}, ["k"] * 5)
    assert three(batch) == pytest.approx(one(batch)) == pytest.approx(5 * 3 * expected_operations(T), rel=0.35)


def test_counting_changes_neither_weights_nor_gradients(model: torch.nn.Module) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flops.build_flop_counter(model, flops.build_sample(32, T))
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
