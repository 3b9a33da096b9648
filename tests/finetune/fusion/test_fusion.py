"""Every fusion with every context: the identity at first, both paths alike, and blocks against torch's own modules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.attention.multihead import Attention, Tokens, ZeroInitLinear
from finetune.attention.positions import in_picture, in_sequence, placed
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
    part, how = registry.get_component("fusion", name), registry.get_component("context", context)
    config = part.Config(**{"layers": 2, "heads": 2, "inner": 16, **settings})
    made: Fusion = part.build(config, widths, how.Config(**SMALL.get(context, {})))
    return made


def moved(batch: dict[str, TokenSequence], device: str) -> dict[str, TokenSequence]:
    return {
        name: TokenSequence(t.states.to(device), t.mask.to(device), t.grid, t.pooled.to(device)) for name, t in batch.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# Invariant 7


@pytest.mark.parametrize(("name", "context"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", DEVICES)
def test_step_0_passes_the_tokens_through_bit_for_bit(name: str, context: str, dtype: torch.dtype, device: str) -> None:
    fusion = build(name, context, dropout=0.1).to(device, dtype)
    given = moved(tokens(dtype=dtype), device)
    given["image"].mask[1] = False
    fused = fusion(given)
    for modality, sequence in given.items():
        assert torch.equal(fused[modality].states, sequence.states)
        assert fused[modality].states.dtype == dtype
        assert fused[modality].grid == sequence.grid


@pytest.mark.parametrize(("name", "context"), PAIRS)
def test_step_0_under_autocast(name: str, context: str) -> None:
    fusion, given = build(name, context), tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = fusion(given)
    assert all(torch.equal(fused[modality].states, given[modality].states) for modality in given)


@pytest.mark.parametrize(("name", "context"), PAIRS)
def test_closing_the_gates_of_a_trained_fusion_makes_it_the_identity_again(name: str, context: str) -> None:
    fusion, given = build(name, context), tokens()
    nn.init.normal_(next(p for n, p in fusion.named_parameters() if "norm" in n and n.endswith("bias")))
    randomize_zero_init(fusion)
    assert not torch.equal(fusion(given)["text"].states, given["text"].states)
    for part in fusion.modules():
        if isinstance(part, ZeroInitLinear):
            part.reset_parameters()
    assert torch.equal(fusion(given)["text"].states, given["text"].states)


@pytest.mark.parametrize(("name", "context"), PAIRS)
@pytest.mark.parametrize("device", DEVICES)
def test_fast_and_exact_agree_also_where_nothing_can_be_seen(name: str, context: str, device: str) -> None:
    fusion = build(name, context).to(device)
    randomize_zero_init(fusion)
    given = moved(tokens(), device)
    given["image"].mask[1] = False
    given["text"].mask[0] = False
    fast, exact = fusion(given), fusion(given, trace=Trace())
    for modality in given:
        assert torch.isfinite(fast[modality].states).all()
        torch.testing.assert_close(fast[modality].states, exact[modality].states, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks against torch's own modules


def theirs(attention: Attention, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
    """torch's function on our weights."""
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


def thought(part: Any, x: Tensor) -> Tensor:
    return x + part.down(F.gelu(part.up(part.norm(x))))


def told(fusion: Fusion, states: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """States with their places beside them, number by number, as long as a token of which each channel has variance 1."""
    frequencies, width, rows = range(fusion.config.places), states.shape[2], []
    for i in range(states.shape[1]):
        if grid is None:
            angles = [i / 2**k for k in range(2 * len(frequencies))]
        else:
            H, W = grid
            middle = (i // W + 0.5) / H * 2 - 1, (i % W + 0.5) / W * 2 - 1
            angles = [math.pi / 2 * 2**k * c for c in middle for k in frequencies]
        length = math.hypot(*map(math.sin, angles), *map(math.cos, angles))
        rows.append([math.sqrt(width) / length * wave(angle) for wave in (math.sin, math.cos) for angle in angles])
    return torch.cat([states, torch.tensor(rows)[None].repeat(len(states), 1, 1)], dim=2)


def test_cross_is_its_formula() -> None:
    fusion, given = build("cross", inner=None), tokens()
    randomize_zero_init(fusion)
    x, text, image = given["text"].states, given["text"].mask, given["image"].mask
    picture = told(fusion, fusion.context_norm(given["image"].states), given["image"].grid)
    for block in fusion.layers:
        n = block.self_norm(x)
        x = x + theirs(block.self_look.attention, n, told(fusion, n, None), text)
        x = x + theirs(block.cross_look.attention, block.cross_norm(x), picture, image)
        x = thought(block.feedforward, x)
    fused = fusion(given)
    torch.testing.assert_close(fused["text"].states, x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused["text"].pooled[1], x[1, text[1]].mean(dim=0), rtol=1e-5, atol=1e-5)
    assert fused["image"] is given["image"]


def test_co_is_its_formula() -> None:
    fusion, given = build("co", inner=None), tokens()
    randomize_zero_init(fusion)
    x, y = given["text"].states, given["image"].states
    masks, grid = (given["text"].mask, given["image"].mask), given["image"].grid
    for block in fusion.layers:
        a, b = block.first, block.second
        n, m = a.self_norm(x), b.self_norm(y)
        x = x + theirs(a.self_look.attention, n, told(fusion, n, None), masks[0])
        y = y + theirs(b.self_look.attention, m, told(fusion, m, grid), masks[1])
        n, m = a.cross_norm(x), b.cross_norm(y)
        x = x + theirs(a.cross_look.attention, n, told(fusion, m, grid), masks[1])
        y = y + theirs(b.cross_look.attention, m, told(fusion, n, None), masks[0])
        x, y = thought(a.feedforward, x), thought(b.feedforward, y)
    fused = fusion(given)
    torch.testing.assert_close(fused["text"].states, x, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(fused["image"].states, y, rtol=1e-5, atol=2e-5)


def test_merged_is_its_formula() -> None:
    fusion, given = build("merged", inner=None), tokens()
    randomize_zero_init(fusion)
    kinds = torch.tensor([0] * 5 + [1] * 35)
    mask = torch.cat([given["text"].mask, given["image"].mask], dim=1)
    x = torch.cat([F.pad(given["text"].states, (0, 8)), given["image"].states], dim=1)
    for block in fusion.layers:
        n = block.norm(x) + torch.stack([block.modality["text"], block.modality["image"]])[kinds]
        keys = torch.cat([told(fusion, n[:, :5], None), told(fusion, n[:, 5:], given["image"].grid)], dim=1)
        x = thought(block.feedforward, x + theirs(block.attention, n, keys, mask))
    fused = fusion(given)
    torch.testing.assert_close(fused["text"].states, x[:, :5, :24], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused["image"].states, x[:, 5:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", registry.component_names("fusion"))
def test_a_picture_of_one_colour_shows_where_its_regions_are(name: str) -> None:
    """Regions alike in everything but their place are alike to whoever asks, unless told apart by it; on any grid."""
    given = tokens(grid=(4, 6))
    given["image"] = given["image"]._replace(states=torch.ones_like(given["image"].states))
    for places, known in ((4, True), (0, False)):
        fusion = build(name, places=places)
        randomize_zero_init(fusion)
        trace = Trace()
        fusion(given, trace=trace)
        seen = next(s for s in trace.steps if s.kind != "self").records[0].weights.matrix().detach()[..., :24]
        assert (float((seen - seen[..., :1]).abs().max()) > 1e-3) == known


def test_places_span_the_picture_whatever_its_grid() -> None:
    """A grid with three times the cells has the same place in the middle of each three."""
    coarse, fine = in_picture((2, 5), 3), in_picture((6, 15), 3)
    torch.testing.assert_close(fine.unflatten(0, (6, 15))[1::3, 1::3].flatten(0, 1), coarse)
    assert coarse.shape == (10, 12)
    assert math.isclose(float(coarse[0, 0]), math.sin(-math.pi / 4), abs_tol=1e-6)  # the middle of the upper of two rows


def test_words_have_numbers_whatever_the_length_of_the_text() -> None:
    short, long = in_sequence(5, 2), in_sequence(9, 2)
    assert torch.equal(long[:5], short)
    expected = [wave(3 / step) for wave in (math.sin, math.cos) for step in (1, 2, 4, 8)]
    torch.testing.assert_close(short[3], torch.tensor(expected))
    assert torch.equal(placed(Tokens(torch.ones(2, 5, 6)), 0).states, torch.ones(2, 5, 6))


# ---------------------------------------------------------------------------------------------------------------------
# What they promise


@pytest.mark.parametrize(("name", "context"), PAIRS)
def test_padding_changes_nothing_and_rows_do_not_mix(name: str, context: str) -> None:
    fusion, given = build(name, context).eval(), tokens()
    randomize_zero_init(fusion)
    out = fusion(given)
    noise = {n: t._replace(states=torch.where(t.mask[..., None], t.states, 7.0)) for n, t in given.items()}
    one = {n: TokenSequence(t.states[1:], t.mask[1:], t.grid, t.pooled[1:]) for n, t in noise.items()}
    alone = fusion(one)
    for modality, sequence in given.items():
        real = sequence.mask[1]
        torch.testing.assert_close(alone[modality].states[0, real], out[modality].states[1, real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "context"), PAIRS)
def test_several_texts_about_one_picture(name: str, context: str) -> None:
    fusion = build(name, context)
    randomize_zero_init(fusion)
    texts, pictures = tokens(batch=6)["text"], tokens(batch=2)["image"]
    each = TokenSequence(
        pictures.states.repeat_interleave(3, 0), pictures.mask.repeat_interleave(3, 0), pictures.grid, pictures.pooled
    )
    want = fusion({"text": texts, "image": each})["text"]
    for trace in (None, Trace()):
        fused = fusion({"text": texts, "image": pictures}, trace=trace)["text"]
        torch.testing.assert_close(fused.states, want.states, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="4 of image"):
        fusion({"text": texts, "image": tokens(batch=4)["image"]})


@pytest.mark.parametrize(("name", "context"), PAIRS)
def test_checkpointing_leaves_the_gradients_as_they_are(name: str, context: str) -> None:
    gradients = []
    for on in (False, True):
        fusion = build(name, context, checkpointing=on).train()
        randomize_zero_init(fusion)
        given = tokens(requires_grad=True)
        fused = fusion(given)
        loss = fused["text"].states.square().mean() + fused["image"].states.square().mean()
        loss.backward()
        gradients.append([p.grad for p in fusion.parameters()] + [given["image"].states.grad])
    for plain, recomputed in zip(*gradients, strict=True):
        assert (plain is None) == (recomputed is None)
        if plain is not None and recomputed is not None:
            torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("context", ["dense", "pooled"])
@pytest.mark.parametrize("name", ["co", "merged"])
def test_a_fusion_of_which_only_the_query_is_read(name: str, context: str) -> None:
    """The query is the same, the context returns as it came, and no parameter waits for a gradient that never comes."""
    both, given = build(name, context), tokens()
    randomize_zero_init(both)
    one = build(name, context, fused="query")
    one.load_state_dict({key: value for key, value in both.state_dict().items() if key in one.state_dict()})
    for trace in (None, Trace()):
        out = one(given, trace=trace)
        torch.testing.assert_close(out["text"].states, both(given)["text"].states)
    assert out["image"] is given["image"]
    one(given)["text"].states.square().sum().backward()
    assert all(p.grad is not None for p in one.parameters())


@pytest.mark.parametrize(("name", "context"), PAIRS)
def test_every_parameter_learns(name: str, context: str) -> None:
    """From step 0 on the gates, and once they are open everything else, but the key biases, whose gradient is zero."""
    fusion, given = build(name, context), tokens()
    fused = fusion(given)
    (fused["text"].states.square().mean() + fused["image"].states.square().mean()).backward()
    for part in fusion.modules():
        if isinstance(part, ZeroInitLinear):
            assert part.weight.grad is not None
            assert part.weight.grad.abs().sum() > 0
    randomize_zero_init(fusion)
    fused = fusion(given)
    (fused["text"].states.square().mean() + fused["image"].states.square().mean()).backward()
    still = [n for n, p in fusion.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert not [n for n in still if not n.endswith(".k.bias")]


@pytest.mark.parametrize("name", registry.component_names("fusion"))
def test_any_pair_of_modalities(name: str) -> None:
    audio, picture = tokens(widths={"text": 20, "image": 28})["text"], tokens(grid=(3, 4))["image"]
    sequences = {"audio": audio, "photo": picture, "text": tokens()["text"]}
    part = registry.get_component("fusion", name)
    widths = {"audio": 20, "photo": 32, "text": 24}
    for query, context in (("photo", "audio"), ("audio", "photo"), ("text", "audio")):
        config = part.Config(layers=1, heads=2, inner=16, query=query, context=context)
        fusion = part.build(config, widths, None, ["photo"])
        randomize_zero_init(fusion)
        fused = fusion({query: sequences[query], context: sequences[context]})
        assert fused[query].states.shape == sequences[query].states.shape
        assert not torch.equal(fused[query].states, sequences[query].states)


@pytest.mark.parametrize("context", ["dense", "local", "coarse_to_fine", "pooled"])
@pytest.mark.parametrize("name", ["cross", "co", "merged"])
def test_two_pictures(name: str, context: str) -> None:
    part, how = registry.get_component("fusion", name), registry.get_component("context", context)
    config = part.Config(layers=2, heads=2, inner=16, query="before", context="after")
    fusion = part.build(config, {"before": 32, "after": 32}, how.Config(**SMALL.get(context, {})), ["before", "after"])
    randomize_zero_init(fusion)
    given = {"before": tokens()["image"], "after": tokens(grid=(4, 3), seed=1)["image"]}
    fast, exact = fusion(given), fusion(given, trace=(trace := Trace()))
    torch.testing.assert_close(fast["before"].states, exact["before"].states, rtol=1e-5, atol=2e-5)
    for step in trace.steps:
        for (query, asked), block in trace.blocks(step).items():
            assert block.shape == (2, trace.sizes[query], trace.sizes[asked])


def test_a_mask_may_be_left_out() -> None:
    fusion, given = build("co"), tokens(ragged=False)
    randomize_zero_init(fusion)
    bare: dict[str, Any] = {n: t._replace(mask=None) for n, t in given.items()}
    torch.testing.assert_close(fusion(bare)["text"].states, fusion(given)["text"].states)
    torch.testing.assert_close(fusion(bare)["text"].pooled, fusion(given)["text"].pooled)


@pytest.mark.parametrize("context", ["dense", "pooled", "coarse_to_fine"])
def test_causal_cross_attention_is_a_decoder(context: str) -> None:
    how = registry.get_component("context", context)
    settings = {**SMALL.get(context, {}), **({"choose": "word"} if context == "coarse_to_fine" else {})}
    torch.manual_seed(0)
    fusion = cross.build(cross.Config(layers=2, heads=2, causal=True), WIDTHS, how.Config(**settings))
    given = tokens(ragged=False)
    randomize_zero_init(fusion)
    out = fusion(given)["text"].states
    later = given["text"].states.clone()
    later[:, 3:] = 0
    changed = fusion({**given, "text": given["text"]._replace(states=later)})["text"].states
    torch.testing.assert_close(changed[:, :3], out[:, :3])
    assert not torch.allclose(changed[:, 3:], out[:, 3:])
    with pytest.raises(ConfigError, match=r"set context.choose=word"):
        cross.build(cross.Config(causal=True), WIDTHS, coarse_to_fine.Config())


def test_dropout_is_on_what_is_added() -> None:
    fusion, given = build("cross", dropout=0.5), tokens()
    randomize_zero_init(fusion)
    assert not torch.equal(fusion(given)["text"].states, fusion(given)["text"].states)
    fusion.eval()
    assert torch.equal(fusion(given)["text"].states, fusion(given)["text"].states)


def test_half_width_attention_costs_half() -> None:
    full, half = build("cross", inner=None, heads=2), build("cross", inner=12, heads=2)
    assert half.layers[0].cross_look.attention.k.weight.numel() * 2 == full.layers[0].cross_look.attention.k.weight.numel()


@pytest.mark.parametrize("name", registry.component_names("fusion"))
def test_it_learns_to_find_what_a_word_names(name: str) -> None:
    """The colour of the cell that shows the asked shape: chance is a quarter."""
    torch.manual_seed(0)
    width, shapes, colours = 32, 5, 4
    shape, colour, place = torch.randn(shapes, width), torch.randn(colours, width), torch.randn(9, width)
    part = registry.get_component("fusion", name)
    fusion = part.build(part.Config(layers=1, heads=4), {"text": width, "image": width})
    head = nn.Linear(width, colours)
    optimizer = torch.optim.Adam([*fusion.parameters(), *head.parameters()], lr=3e-3)
    right = []
    for _ in range(150):
        shown, painted = torch.rand(32, shapes).argsort()[:, :3], torch.randint(colours, (32, 3))
        cells = torch.rand(32, 9).argsort()[:, :3, None].expand(-1, -1, width)
        picture = place.expand(32, -1, -1).scatter_add(1, cells, 2 * (shape[shown] + colour[painted]))
        states = {"text": shape[shown[:, :1]], "image": picture}
        given = {n: TokenSequence(s, torch.ones(s.shape[:2], dtype=torch.bool), None, s[:, 0]) for n, s in states.items()}
        logits = head(fusion(given)["text"].pooled)
        loss = F.cross_entropy(logits, painted[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right.append((logits.argmax(dim=1) == painted[:, 0]).float().mean().item())
    assert sum(right[-10:]) / 10 > 0.8


# ---------------------------------------------------------------------------------------------------------------------
# What they refuse


@pytest.mark.parametrize("part", [cross, co, merged])
def test_wrong_settings(part: Any) -> None:
    with pytest.raises(ConfigError, match=r"fusion.query='txt' is no modality of this model; it has text, image"):
        part.build(part.Config(query="txt"), WIDTHS)
    with pytest.raises(ConfigError, match="both 'image'"):
        load(part.Config, None, ["query=image"])
    with pytest.raises(ConfigError, match=r"fusion.heads=7 does not divide"):
        part.build(part.Config(heads=7), WIDTHS)
    with pytest.raises(ConfigError, match=r"fusion.layers=0"):
        load(part.Config, None, ["layers=0"])


def test_windows_have_no_meaning_where_words_ask() -> None:
    with pytest.raises(ConfigError, match=r"local has no meaning with fusion.name=cross: only text attends to itself"):
        cross.build(cross.Config(), WIDTHS, local.Config())
    cross.build(cross.Config(query="image", context="text"), WIDTHS, local.Config())
    with pytest.raises(ConfigError, match="audio and text have no grid"):
        cross.build(cross.Config(query="audio", context="text"), {"audio": 8, "text": 8}, coarse_to_fine.Config())


def test_a_picture_cannot_be_written_token_by_token() -> None:
    with pytest.raises(ConfigError, match=r"fusion.causal=true .* image is a picture"):
        cross.build(cross.Config(query="image", context="text", causal=True), WIDTHS)


def test_a_grid_that_does_not_fit_its_tokens() -> None:
    given = tokens()
    with pytest.raises(ValueError, match=r"image: a grid of \(2, 2\) cannot have 35 tokens"):
        build("cross")({**given, "image": given["image"]._replace(grid=(2, 2))})
