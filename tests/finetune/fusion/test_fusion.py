"""Every fusion with every context: identity at the start, equal paths, blocks equal to PyTorch's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.attention.multihead import Attention, Tokens, ZeroInitLinear
from finetune.attention.positions import append_positions, encode_grid_positions, encode_sequence_positions
from finetune.attention.trace import Trace
from finetune.context import coarse_to_fine, local
from finetune.fusion import co, cross, merged
from finetune.fusion.blocks import Fusion
from pretrain import registry
from pretrain.config import load
from pretrain.errors import ConfigError
from pretrain.towers import TokenSequence
from tests.support.attention_reference import DEVICES, WIDTHS, randomize_zero_init, tokens

SMALL: dict[str, dict[str, Any]] = {
    "local": {"window": 3},
    "coarse_to_fine": {"region": 2, "keep": 3},
    "pooled": {"latents": 4, "heads": 2},
}
PAIRS = [
    (f, c)
    for f in registry.component_names("fusion")
    for c in registry.component_names("context")
    if (f, c) != ("cross", "local")
]


def build(name: str, context: str = "dense", widths: dict[str, int] = WIDTHS, **settings: Any) -> Fusion:
    torch.manual_seed(0)
    module, context_module = registry.get_component("fusion", name), registry.get_component("context", context)
    config = module.Config(**{"layers": 2, "heads": 2, "inner": 16, **settings})
    fusion: Fusion = module.build(config, widths, context_module.Config(**SMALL.get(context, {})))
    return fusion


def to_device(batch: dict[str, TokenSequence], device: str) -> dict[str, TokenSequence]:
    return {
        name: TokenSequence(t.states.to(device), t.mask.to(device), t.grid, t.pooled.to(device)) for name, t in batch.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# An untrained fusion returns its inputs (invariant 7), and both attention paths agree


@pytest.mark.parametrize(("name", "context"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", DEVICES)
def test_step_0_passes_the_tokens_through_bit_for_bit(name: str, context: str, dtype: torch.dtype, device: str) -> None:
    fusion = build(name, context, dropout=0.1).to(device, dtype)
    inputs = to_device(tokens(dtype=dtype), device)
    inputs["image"].mask[1] = False
    fused = fusion(inputs)
    for modality, sequence in inputs.items():
        assert torch.equal(fused[modality].states, sequence.states)
        assert fused[modality].states.dtype == dtype
        assert fused[modality].grid == sequence.grid


@pytest.mark.parametrize(("name", "context"), PAIRS)
def test_step_0_under_autocast(name: str, context: str) -> None:
    fusion, inputs = build(name, context), tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = fusion(inputs)
    assert all(torch.equal(fused[modality].states, inputs[modality].states) for modality in inputs)


@pytest.mark.parametrize(("name", "context"), PAIRS)
def test_resetting_the_output_projections_makes_a_fusion_the_identity_again(name: str, context: str) -> None:
    fusion, inputs = build(name, context), tokens()
    nn.init.normal_(next(p for n, p in fusion.named_parameters() if "norm" in n and n.endswith("bias")))
    randomize_zero_init(fusion)
    assert not torch.equal(fusion(inputs)["text"].states, inputs["text"].states)
    for layer in fusion.modules():
        if isinstance(layer, ZeroInitLinear):
            layer.reset_parameters()
    assert torch.equal(fusion(inputs)["text"].states, inputs["text"].states)


@pytest.mark.parametrize(("name", "context"), PAIRS)
@pytest.mark.parametrize("device", DEVICES)
def test_fast_and_exact_paths_agree_also_where_all_keys_are_masked(name: str, context: str, device: str) -> None:
    fusion = build(name, context).to(device)
    randomize_zero_init(fusion)
    inputs = to_device(tokens(), device)
    inputs["image"].mask[1] = False
    inputs["text"].mask[0] = False
    fast, exact = fusion(inputs), fusion(inputs, trace=Trace())
    for modality in inputs:
        assert torch.isfinite(fast[modality].states).all()
        torch.testing.assert_close(fast[modality].states, exact[modality].states, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks compared with PyTorch's own modules


def torch_attention(attention: Attention, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
    """Return the result of PyTorch's own function with the weights of `attention`."""
    weights = {f"{n}_proj_weight": getattr(attention, n).weight for n in "qkv"}
    biases = torch.cat([getattr(attention, n).bias for n in "qkv"])
    out, _ = F.multi_head_attention_forward(
        x.transpose(0, 1),
        context.transpose(0, 1),
        context.transpose(0, 1),
        embed_dim_to_check=x.shape[2],
        num_heads=attention.heads,
        in_proj_weight=None,
        in_proj_bias=biases,
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=attention.out.weight,
        out_proj_bias=attention.out.bias,
        key_padding_mask=~mask,
        use_separate_proj_weight=True,
        **weights,
    )
    return out.transpose(0, 1)


def run_feedforward(branch: Any, x: Tensor) -> Tensor:
    return x + branch.down(F.gelu(branch.up(branch.norm(x))))


def append_reference_positions(fusion: Fusion, states: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """Append position encodings, computed number by number, each with the norm of a normalized token."""
    frequencies, width, rows = range(fusion.config.places), states.shape[2], []
    for i in range(states.shape[1]):
        if grid is None:
            angles = [i / 2**k for k in range(2 * len(frequencies))]
        else:
            H, W = grid
            center = (i // W + 0.5) / H * 2 - 1, (i % W + 0.5) / W * 2 - 1
            angles = [math.pi / 2 * 2**k * c for c in center for k in frequencies]
        length = math.hypot(*map(math.sin, angles), *map(math.cos, angles))
        rows.append([math.sqrt(width) / length * wave(angle) for wave in (math.sin, math.cos) for angle in angles])
    return torch.cat([states, torch.tensor(rows)[None].repeat(len(states), 1, 1)], dim=2)


def test_cross_computes_its_formula() -> None:
    fusion, inputs = build("cross", inner=None), tokens()
    randomize_zero_init(fusion)
    x, text, image = inputs["text"].states, inputs["text"].mask, inputs["image"].mask
    image_keys = append_reference_positions(fusion, fusion.context_norm(inputs["image"].states), inputs["image"].grid)
    for block in fusion.layers:
        n = block.self_norm(x)
        x = x + torch_attention(block.self_look.attention, n, append_reference_positions(fusion, n, None), text)
        x = x + torch_attention(block.cross_look.attention, block.cross_norm(x), image_keys, image)
        x = run_feedforward(block.feedforward, x)
    fused = fusion(inputs)
    torch.testing.assert_close(fused["text"].states, x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused["text"].pooled[1], x[1, text[1]].mean(dim=0), rtol=1e-5, atol=1e-5)
    assert fused["image"] is inputs["image"]


def test_co_computes_its_formula() -> None:
    fusion, inputs = build("co", inner=None), tokens()
    randomize_zero_init(fusion)
    x, y = inputs["text"].states, inputs["image"].states
    masks, grid = (inputs["text"].mask, inputs["image"].mask), inputs["image"].grid
    for block in fusion.layers:
        a, b = block.first, block.second
        n, m = a.self_norm(x), b.self_norm(y)
        x = x + torch_attention(a.self_look.attention, n, append_reference_positions(fusion, n, None), masks[0])
        y = y + torch_attention(b.self_look.attention, m, append_reference_positions(fusion, m, grid), masks[1])
        n, m = a.cross_norm(x), b.cross_norm(y)
        x = x + torch_attention(a.cross_look.attention, n, append_reference_positions(fusion, m, grid), masks[1])
        y = y + torch_attention(b.cross_look.attention, m, append_reference_positions(fusion, n, None), masks[0])
        x, y = run_feedforward(a.feedforward, x), run_feedforward(b.feedforward, y)
    fused = fusion(inputs)
    torch.testing.assert_close(fused["text"].states, x, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(fused["image"].states, y, rtol=1e-5, atol=2e-5)


def test_merged_computes_its_formula() -> None:
    fusion, inputs = build("merged", inner=None), tokens()
    randomize_zero_init(fusion)
    kinds = torch.tensor([0] * 5 + [1] * 35)
    mask = torch.cat([inputs["text"].mask, inputs["image"].mask], dim=1)
    x = torch.cat([F.pad(inputs["text"].states, (0, 8)), inputs["image"].states], dim=1)
    for block in fusion.layers:
        n = block.norm(x) + torch.stack([block.modality["text"], block.modality["image"]])[kinds]
        keys = torch.cat(
            [
                append_reference_positions(fusion, n[:, :5], None),
                append_reference_positions(fusion, n[:, 5:], inputs["image"].grid),
            ],
            dim=1,
        )
        x = run_feedforward(block.feedforward, x + torch_attention(block.attention, n, keys, mask))
    fused = fusion(inputs)
    torch.testing.assert_close(fused["text"].states, x[:, :5, :24], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused["image"].states, x[:, 5:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", registry.component_names("fusion"))
def test_positions_alone_tell_equal_regions_apart(name: str) -> None:
    """Regions with equal states get different attention with position encodings, and equal without."""
    inputs = tokens(grid=(4, 6))
    inputs["image"] = inputs["image"]._replace(states=torch.ones_like(inputs["image"].states))
    for frequencies, is_distinct in ((4, True), (0, False)):
        fusion = build(name, places=frequencies)
        randomize_zero_init(fusion)
        trace = Trace()
        fusion(inputs, trace=trace)
        weights = next(s for s in trace.steps if s.kind != "self").records[0].weights.to_matrix().detach()[..., :24]
        assert (float((weights - weights[..., :1]).abs().max()) > 1e-3) == is_distinct


def test_positions_span_the_image_whatever_its_grid() -> None:
    """With three times the cells per side, the middle cell of each three has the coarse cell's position."""
    coarse, fine = encode_grid_positions((2, 5), 3), encode_grid_positions((6, 15), 3)
    torch.testing.assert_close(fine.unflatten(0, (6, 15))[1::3, 1::3].flatten(0, 1), coarse)
    assert coarse.shape == (10, 12)
    assert math.isclose(float(coarse[0, 0]), math.sin(-math.pi / 4), abs_tol=1e-6)  # the middle of the upper of two rows


def test_positions_of_words_do_not_depend_on_the_length_of_the_text() -> None:
    short, long = encode_sequence_positions(5, 2), encode_sequence_positions(9, 2)
    assert torch.equal(long[:5], short)
    expected = [wave(3 / step) for wave in (math.sin, math.cos) for step in (1, 2, 4, 8)]
    torch.testing.assert_close(short[3], torch.tensor(expected))
    assert torch.equal(append_positions(Tokens(torch.ones(2, 5, 6)), 0).states, torch.ones(2, 5, 6))


# ---------------------------------------------------------------------------------------------------------------------
# Properties of every fusion


@pytest.mark.parametrize(("name", "context"), PAIRS)
def test_padding_changes_nothing_and_rows_do_not_mix(name: str, context: str) -> None:
    fusion, inputs = build(name, context).eval(), tokens()
    randomize_zero_init(fusion)
    out = fusion(inputs)
    noise = {n: t._replace(states=torch.where(t.mask[..., None], t.states, 7.0)) for n, t in inputs.items()}
    one = {n: TokenSequence(t.states[1:], t.mask[1:], t.grid, t.pooled[1:]) for n, t in noise.items()}
    alone = fusion(one)
    for modality, sequence in inputs.items():
        real = sequence.mask[1]
        torch.testing.assert_close(alone[modality].states[0, real], out[modality].states[1, real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "context"), PAIRS)
def test_several_texts_per_image_equal_a_repeated_image(name: str, context: str) -> None:
    fusion = build(name, context)
    randomize_zero_init(fusion)
    texts, images = tokens(batch=6)["text"], tokens(batch=2)["image"]
    repeated = TokenSequence(
        images.states.repeat_interleave(3, 0), images.mask.repeat_interleave(3, 0), images.grid, images.pooled
    )
    want = fusion({"text": texts, "image": repeated})["text"]
    for trace in (None, Trace()):
        fused = fusion({"text": texts, "image": images}, trace=trace)["text"]
        torch.testing.assert_close(fused.states, want.states, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="4 of image"):
        fusion({"text": texts, "image": tokens(batch=4)["image"]})


@pytest.mark.parametrize(("name", "context"), PAIRS)
def test_checkpointing_does_not_change_gradients(name: str, context: str) -> None:
    gradients = []
    for on in (False, True):
        fusion = build(name, context, checkpointing=on).train()
        randomize_zero_init(fusion)
        inputs = tokens(requires_grad=True)
        fused = fusion(inputs)
        loss = fused["text"].states.square().mean() + fused["image"].states.square().mean()
        loss.backward()
        gradients.append([p.grad for p in fusion.parameters()] + [inputs["image"].states.grad])
    for plain, recomputed in zip(*gradients, strict=True):
        assert (plain is None) == (recomputed is None)
        if plain is not None and recomputed is not None:
            torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("context", ["dense", "pooled"])
@pytest.mark.parametrize("name", ["co", "merged"])
def test_fused_query_returns_the_same_query_and_leaves_the_context(name: str, context: str) -> None:
    """The query equals that of fused=both, the context returns unchanged, all parameters have gradients."""
    both, inputs = build(name, context), tokens()
    randomize_zero_init(both)
    one = build(name, context, fused="query")
    one.load_state_dict({key: value for key, value in both.state_dict().items() if key in one.state_dict()})
    for trace in (None, Trace()):
        out = one(inputs, trace=trace)
        torch.testing.assert_close(out["text"].states, both(inputs)["text"].states)
    assert out["image"] is inputs["image"]
    one(inputs)["text"].states.square().sum().backward()
    assert all(p.grad is not None for p in one.parameters())


@pytest.mark.parametrize(("name", "context"), PAIRS)
def test_every_parameter_has_a_gradient(name: str, context: str) -> None:
    """At step 0 the zero-initialized ones, then all but key biases, whose true gradient is zero."""
    fusion, inputs = build(name, context), tokens()
    fused = fusion(inputs)
    (fused["text"].states.square().mean() + fused["image"].states.square().mean()).backward()
    for layer in fusion.modules():
        if isinstance(layer, ZeroInitLinear):
            assert layer.weight.grad is not None
            assert layer.weight.grad.abs().sum() > 0
    randomize_zero_init(fusion)
    fused = fusion(inputs)
    (fused["text"].states.square().mean() + fused["image"].states.square().mean()).backward()
    without_gradient = [n for n, p in fusion.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert not [n for n in without_gradient if not n.endswith(".k.bias")]


@pytest.mark.parametrize("name", registry.component_names("fusion"))
def test_any_pair_of_modalities_can_be_fused(name: str) -> None:
    audio, photo = tokens(widths={"text": 20, "image": 28})["text"], tokens(grid=(3, 4))["image"]
    sequences = {"audio": audio, "photo": photo, "text": tokens()["text"]}
    module = registry.get_component("fusion", name)
    widths = {"audio": 20, "photo": 32, "text": 24}
    for query, context in (("photo", "audio"), ("audio", "photo"), ("text", "audio")):
        config = module.Config(layers=1, heads=2, inner=16, query=query, context=context)
        fusion = module.build(config, widths, None, ["photo"])
        randomize_zero_init(fusion)
        fused = fusion({query: sequences[query], context: sequences[context]})
        assert fused[query].states.shape == sequences[query].states.shape
        assert not torch.equal(fused[query].states, sequences[query].states)


@pytest.mark.parametrize("context", ["dense", "local", "coarse_to_fine", "pooled"])
@pytest.mark.parametrize("name", ["cross", "co", "merged"])
def test_two_images_can_be_fused(name: str, context: str) -> None:
    module, context_module = registry.get_component("fusion", name), registry.get_component("context", context)
    config = module.Config(layers=2, heads=2, inner=16, query="before", context="after")
    fusion = module.build(
        config, {"before": 32, "after": 32}, context_module.Config(**SMALL.get(context, {})), ["before", "after"]
    )
    randomize_zero_init(fusion)
    inputs = {"before": tokens()["image"], "after": tokens(grid=(4, 3), seed=1)["image"]}
    fast, exact = fusion(inputs), fusion(inputs, trace=(trace := Trace()))
    torch.testing.assert_close(fast["before"].states, exact["before"].states, rtol=1e-5, atol=2e-5)
    for step in trace.steps:
        for (query, context_name), block in trace.split_matrices(step).items():
            assert block.shape == (2, trace.sizes[query], trace.sizes[context_name])


def test_a_mask_may_be_none() -> None:
    fusion, inputs = build("co"), tokens(ragged=False)
    randomize_zero_init(fusion)
    bare: dict[str, Any] = {n: t._replace(mask=None) for n, t in inputs.items()}
    torch.testing.assert_close(fusion(bare)["text"].states, fusion(inputs)["text"].states)
    torch.testing.assert_close(fusion(bare)["text"].pooled, fusion(inputs)["text"].pooled)


@pytest.mark.parametrize("context", ["dense", "pooled", "coarse_to_fine"])
def test_causal_cross_attention_is_a_decoder(context: str) -> None:
    context_module = registry.get_component("context", context)
    settings = {**SMALL.get(context, {}), **({"choose": "word"} if context == "coarse_to_fine" else {})}
    torch.manual_seed(0)
    fusion = cross.build(cross.Config(layers=2, heads=2, causal=True), WIDTHS, context_module.Config(**settings))
    inputs = tokens(ragged=False)
    randomize_zero_init(fusion)
    out = fusion(inputs)["text"].states
    later = inputs["text"].states.clone()
    later[:, 3:] = 0
    changed = fusion({**inputs, "text": inputs["text"]._replace(states=later)})["text"].states
    torch.testing.assert_close(changed[:, :3], out[:, :3])
    assert not torch.allclose(changed[:, 3:], out[:, 3:])
    with pytest.raises(ConfigError, match=r"set context.choose=word"):
        cross.build(cross.Config(causal=True), WIDTHS, coarse_to_fine.Config())


def test_dropout_is_active_in_training_only() -> None:
    fusion, inputs = build("cross", dropout=0.5), tokens()
    randomize_zero_init(fusion)
    assert not torch.equal(fusion(inputs)["text"].states, fusion(inputs)["text"].states)
    fusion.eval()
    assert torch.equal(fusion(inputs)["text"].states, fusion(inputs)["text"].states)


def test_half_the_inner_width_halves_the_projections() -> None:
    full, half = build("cross", inner=None, heads=2), build("cross", inner=12, heads=2)
    assert half.layers[0].cross_look.attention.k.weight.numel() * 2 == full.layers[0].cross_look.attention.k.weight.numel()


@pytest.mark.parametrize("name", registry.component_names("fusion"))
def test_fusion_learns_to_answer_about_the_named_shape(name: str) -> None:
    """The answer is the color of the cell that shows the named shape; chance is a quarter."""
    torch.manual_seed(0)
    width, shapes, colors = 32, 5, 4
    shape, color, position = torch.randn(shapes, width), torch.randn(colors, width), torch.randn(9, width)
    module = registry.get_component("fusion", name)
    fusion = module.build(module.Config(layers=1, heads=4), {"text": width, "image": width})
    head = nn.Linear(width, colors)
    optimizer = torch.optim.Adam([*fusion.parameters(), *head.parameters()], lr=3e-3)
    accuracy = []
    for _ in range(150):
        drawn_shapes, drawn_colors = torch.rand(32, shapes).argsort()[:, :3], torch.randint(colors, (32, 3))
        cells = torch.rand(32, 9).argsort()[:, :3, None].expand(-1, -1, width)
        image = position.expand(32, -1, -1).scatter_add(1, cells, 2 * (shape[drawn_shapes] + color[drawn_colors]))
        states = {"text": shape[drawn_shapes[:, :1]], "image": image}
        inputs = {n: TokenSequence(s, torch.ones(s.shape[:2], dtype=torch.bool), None, s[:, 0]) for n, s in states.items()}
        logits = head(fusion(inputs)["text"].pooled)
        loss = F.cross_entropy(logits, drawn_colors[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        accuracy.append((logits.argmax(dim=1) == drawn_colors[:, 0]).float().mean().item())
    assert sum(accuracy[-10:]) / 10 > 0.8


# ---------------------------------------------------------------------------------------------------------------------
# Refused settings and inputs


@pytest.mark.parametrize("module", [cross, co, merged])
def test_wrong_settings_are_refused(module: Any) -> None:
    with pytest.raises(ConfigError, match=r"fusion.query='txt' is no modality of this model; it has text, image"):
        module.build(module.Config(query="txt"), WIDTHS)
    with pytest.raises(ConfigError, match="both 'image'"):
        load(module.Config, None, ["query=image"])
    with pytest.raises(ConfigError, match=r"fusion.heads=7 does not divide"):
        module.build(module.Config(heads=7), WIDTHS)
    with pytest.raises(ConfigError, match=r"fusion.layers=0"):
        load(module.Config, None, ["layers=0"])


def test_windows_are_refused_where_no_image_attends_to_itself() -> None:
    with pytest.raises(ConfigError, match=r"local has no meaning with fusion.name=cross: only text attends to itself"):
        cross.build(cross.Config(), WIDTHS, local.Config())
    cross.build(cross.Config(query="image", context="text"), WIDTHS, local.Config())
    with pytest.raises(ConfigError, match="audio and text have no grid"):
        cross.build(cross.Config(query="audio", context="text"), {"audio": 8, "text": 8}, coarse_to_fine.Config())


def test_causal_fusion_refuses_an_image_as_query() -> None:
    with pytest.raises(ConfigError, match=r"fusion.causal=true .* fusion.query=image has a grid"):
        cross.build(cross.Config(query="image", context="text", causal=True), WIDTHS)


def test_a_grid_that_does_not_fit_its_tokens_is_refused() -> None:
    inputs = tokens()
    with pytest.raises(ValueError, match=r"image: a grid of \(2, 2\) cannot have 35 tokens"):
        build("cross")({**inputs, "image": inputs["image"]._replace(grid=(2, 2))})
