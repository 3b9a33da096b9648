"""Exports give the run's embeddings when transformers, open_clip and onnxruntime load them, from pictures and words on."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline

from launch import cli
from pretrain import config as configuration
from pretrain import model as models
from pretrain.checkpoints import export, loading
from pretrain.checkpoints.loading import LoadedModel
from pretrain.data.images import ImageDecoder
from pretrain.data.shards.paths import expand_shards
from pretrain.data.shards.reader import ShardReader
from pretrain.data.text import TextDecoder, load_tokenizer
from pretrain.formats import block_weights, mean_pooling, onnx, text_weights
from pretrain.model import ModelSchema
from tests.support import ROOT, TINY_TOWERS, Small

CLIP = [
    "image.name=vit_base_patch16_clip_224",
    "image.args={patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}",
    "image.size=32",
    "text.args={hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}",
    "text.length=24",
    "model.dim=16",
]
SIGLIP_TEXT = [
    "image.size=32",
    "text.args={hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, projection_size: 32}",
    "model.logit_bias=-10",
]
SIGLIP = [*SIGLIP_TEXT, "image.args={patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}", "model.dim=32"]
SCENES = [*TINY_TOWERS, "text.pool=avg", "image.args={weight_init: jax}"]


def fresh(name: str, tokenizer: Path, *settings: str) -> LoadedModel:
    """A shipped configuration, shrunk, with random weights: norms and biases too, which are 1 and 0 at the start."""
    read = load_tokenizer(str(tokenizer))
    values = configuration.load_values(ROOT / f"configs/pretrain/{name}.yaml", [f"text.tokenizer={tokenizer}", *settings])
    config = configuration.build(ModelSchema, values, name, partial=True)
    torch.manual_seed(0)
    model = models.build(models.tower_configs(config), config.model, read)
    with torch.no_grad():
        for parameter in model.towers.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.logit_scale.fill_(3.0)
    return LoadedModel(model.eval(), config, read, models.build_decoders(config, read, model, "txt"), Path("none"), 0)


@pytest.fixture(scope="module")
def samples(small: Small) -> tuple[list[bytes], list[str]]:
    """Drawn scenes, one of them cut so that nothing about its crop is even, and their captions, one much too long."""
    reader = ShardReader(expand_shards(small.val))
    raw = [reader.read(0, i) for i in range(6)]
    pictures = [next(data for name, data in one.members.items() if name in ("jpg", "png")) for one in raw]
    odd = Image.open(io.BytesIO(pictures[0])).convert("RGB").crop((0, 0, 37, 64))
    buffer = io.BytesIO()
    odd.save(buffer, "png")
    captions = [one.members["txt"].decode() for one in raw]
    return [*pictures, buffer.getvalue()], [*captions, " ".join(captions * 3)]


@torch.no_grad()
def embedded(loaded: LoadedModel, samples: tuple[list[bytes], list[str]]) -> tuple[torch.Tensor, torch.Tensor]:
    image: ImageDecoder = loaded.decoders["image"]
    text: TextDecoder = loaded.decoders["text"]
    pictures = torch.stack([image.decode_eval(data) for data in samples[0]])
    return loaded.model.encode("image", pictures), loaded.model.encode("text", *text.encode(samples[1]))


def opened(samples: tuple[list[bytes], list[str]]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(data)).convert("RGB") for data in samples[0]]


def same(ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...], atol: float = 1e-5) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# transformers


HF = {
    "dual encoder": ("clipart", TINY_TOWERS, "vision-text-dual-encoder"),
    "text pooled by its mean": ("scenes", SCENES, "vision-text-dual-encoder"),
    "convolutional": (
        "resnet-50",
        ["image.size=32", *CLIP[3:], "image.name=resnet10t", "image.args={}"],
        "vision-text-dual-encoder",
    ),
    "CLIP": ("vit-b-16", CLIP, "clip"),
    "CLIP, text pooled by its mean": ("vit-b-16", [*CLIP, "text.pool=avg"], "clip"),
    "SigLIP": ("siglip-b-16", SIGLIP, "siglip"),
}


@pytest.mark.parametrize("case", HF)
def test_transformers_gives_the_same(case: str, small: Small, samples: Any, tmp_path: Path) -> None:
    name, settings, kind = HF[case]
    loaded = fresh(name, small.tokenizer, *settings)
    folder = export.export(loaded, tmp_path / "out", "hf")
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    assert model.config.model_type == kind
    assert model.logit_scale.ndim == (1 if kind == "siglip" else 0)
    padding: Any = "max_length" if kind == "siglip" else True
    inputs = processor(images=opened(samples), text=samples[1], return_tensors="pt", padding=padding, truncation=True)
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        out = model(**inputs)
    ours = embedded(loaded, samples)
    same(ours, (out.image_embeds, out.text_embeds))
    logits = loaded.model.logit_scale.exp() * ours[0] @ ours[1].T
    if loaded.model.logit_bias is not None:
        logits = logits + loaded.model.logit_bias
    torch.testing.assert_close(out.logits_per_image, logits.detach(), atol=1e-3, rtol=1e-4)


def test_the_zero_shot_pipeline_works(small: Small, samples: Any, tmp_path: Path) -> None:
    loaded = fresh("clipart", small.tokenizer, *TINY_TOWERS)
    folder = export.export(loaded, tmp_path / "out", "hf")
    classify = pipeline("zero-shot-image-classification", model=str(folder))
    labels = ["a red ball", "two green boxes on grass"]
    found = {
        one["label"]: one["score"] for one in classify(opened(samples)[0], candidate_labels=labels, hypothesis_template="{}")
    }
    image, text = embedded(loaded, (samples[0][:1], labels))
    expected = (loaded.model.logit_scale.exp() * image @ text.T).softmax(dim=-1)[0]
    assert [found[label] for label in labels] == pytest.approx(expected.tolist(), abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# open_clip


QUICK = "text.args.hidden_act=quick_gelu"
OPEN_CLIP = {
    "mean of patches": ("clipart", TINY_TOWERS),
    "text pooled by its mean": ("scenes", SCENES),
    "OpenAI's": ("vit-b-16", [*CLIP, "image.name=vit_base_patch16_clip_quickgelu_224"]),
    "timm by name": ("vit-b-16", [*CLIP[3:], "image.name=vit_tiny_patch16_224"]),
    "SigLIP's text": ("siglip-b-16", [*SIGLIP_TEXT, "image.name=resnet10t", "model.projection=linear", "model.dim=16"]),
    "norm behind the mean": ("clipart", [*TINY_TOWERS, "image.args.fc_norm=true"]),
}


@pytest.mark.parametrize("case", OPEN_CLIP)
def test_open_clip_gives_the_same(case: str, small: Small, samples: Any, tmp_path: Path) -> None:
    name, settings = OPEN_CLIP[case]
    loaded = fresh(name, small.tokenizer, *settings)
    folder = export.export(loaded, tmp_path / "out", "open_clip")
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    assert model.logit_scale.shape == ()
    pictures = torch.stack([preprocess(picture) for picture in opened(samples)])
    with torch.no_grad():
        found = model.encode_image(pictures, normalize=True), model.encode_text(tokenizer(samples[1]), normalize=True)
    same(embedded(loaded, samples), found)
    assert model.logit_scale.item() == pytest.approx(3.0)
    if loaded.model.logit_bias is not None:
        assert model.logit_bias.item() == pytest.approx(-10)


def test_a_folder_may_be_moved(small: Small, tmp_path: Path) -> None:
    """Nothing in it names a place."""
    for form in ("hf", "open_clip"):
        folder = export.export(fresh("clipart", small.tokenizer, *TINY_TOWERS), tmp_path / form, form)
        for path in folder.glob("*.json"):
            assert str(tmp_path) not in path.read_text(), path.name


# ---------------------------------------------------------------------------------------------------------------------
# ONNX


def test_onnxruntime_gives_the_same(small: Small, samples: Any, tmp_path: Path) -> None:
    loaded = fresh("scenes", small.tokenizer, *SCENES)
    folder = export.export(loaded, tmp_path / "out", "onnx")
    recipe = json.loads((folder / "preprocess.json").read_text())
    image: ImageDecoder = loaded.decoders["image"]
    scaled = torch.stack([image.decode_eval(data) for data in samples[0]]) / 255
    pictures = (scaled - torch.tensor(recipe["mean"]).view(3, 1, 1)) / torch.tensor(recipe["std"]).view(3, 1, 1)
    ours = embedded(loaded, samples)
    same(ours, onnx.load(folder)(pictures, samples[1]))
    same(ours, onnx.load(folder, "-fp16")(pictures, samples[1]), atol=5e-3)
    one = onnx.load(folder)(pictures[:1], samples[1][:1])  # another batch, a shorter text
    same((ours[0][:1], ours[1][:1]), one)


# ---------------------------------------------------------------------------------------------------------------------
# Mean pooling as a layer


@pytest.mark.parametrize("heads", [1, 4])
def test_the_mean_written_as_attention(heads: int, small: Small) -> None:
    """In float64, against the mean itself."""
    more = ["text.pool=avg", "text.length=77", f"text.args={{num_attention_heads: {heads}}}"]
    loaded = fresh("scenes", small.tokenizer, *TINY_TOWERS, *more)
    tower: Any = loaded.model.towers["text"].double()
    made = text_weights.text_spec(tower)
    assert isinstance(made, text_weights.TextSpec)
    projection: Any = loaded.model.projection("text").double()
    new, weights = mean_pooling.to_attention_layer(
        made, {n: v.double() for n, v in text_weights.to_open_clip(tower, projection.weight).items()}
    )
    theirs = open_clip.transformer.TextTransformer(
        context_length=new.positions,
        vocab_size=new.vocab,
        width=new.width,
        heads=new.heads,
        layers=new.depth,
        mlp_ratio=block_weights.compute_mlp_ratio(new.hidden, new.width),
        output_dim=16,
        act_layer=torch.nn.GELU,
        norm_layer=lambda width: torch.nn.LayerNorm(width, eps=new.eps),
    ).double()
    theirs.load_state_dict(weights)
    ids, mask = loaded.decoders["text"].encode(["a red ball", "two green boxes on grass, left of a house", ""])
    full = torch.nn.functional.pad(ids, (0, 77 - ids.shape[1]))
    with torch.no_grad():
        ours = torch.nn.functional.normalize(projection(tower(ids, mask).pooled), dim=-1)
        found = torch.nn.functional.normalize(theirs.eval()(full), dim=-1)
    torch.testing.assert_close(ours, found, atol=1e-6, rtol=0)  # embeddings are normalised in float32


def test_mlp_ratios_are_read_back_as_the_same_width() -> None:
    for width in (32, 80, 192, 448, 513):
        for hidden in (1, 64, 767, 768, 3072, 4304):
            assert int(width * block_weights.compute_mlp_ratio(hidden, width)) == hidden


# ---------------------------------------------------------------------------------------------------------------------
# The command, its card, and what it refuses


@pytest.fixture(scope="module")
def run(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run that is done, with its recalls."""
    run = tmp_path_factory.mktemp("export") / "run"
    more = ("train.steps=4", f"data.val={small.val}", "eval.workers=0")
    assert cli.main(["pretrain", "clipart", *small.settings(run, *more)]) == 0
    return run


def test_the_command_exports_a_trained_run(run: Path, samples: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model"
    assert cli.main(["export", str(run), str(out), "--format", "open_clip", "--license", "cc0-1.0"]) == 0
    assert str(out) in capsys.readouterr().out
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: cc0-1.0\n")
    for said in ("image to text R@1", "train-*.tar", "steps | 4 of 16", "lr 0.001", "create_model_from_pretrained", "400"):
        assert said in card, said
    assert str(run) not in card
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{out}")
    with torch.no_grad():
        found = model.encode_image(torch.stack([preprocess(p) for p in opened(samples)]), normalize=True)
    torch.testing.assert_close(embedded(loading.load_model(run), samples)[0], found, atol=1e-5, rtol=0)


def test_the_card_of_an_earlier_checkpoint_tells_of_that_one(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    later = {"step": 9, "samples_seen": 9 * 16, "val/image_to_text_R@1": 0.987}
    with (copy / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(later) + "\n")
    export.export(loading.load_model(copy / "checkpoints/step-0000004"), tmp_path / "out", "open_clip")
    card = (tmp_path / "out/README.md").read_text()
    assert "98.7 %" not in card
    assert "| samples seen | 64 |" in card
    assert "| steps | 4 of 16 samples |" in card


def test_the_lines_of_the_card_load_the_graphs(run: Path, samples: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    loaded = loading.load_model(run)
    export.export(loaded, tmp_path / "model", "onnx")
    code = re.search(r"```python\n(.*?)\n```", (tmp_path / "model/README.md").read_text(), re.S)
    assert code is not None
    (tmp_path / "picture.jpg").write_bytes(samples[0][0])
    command = [sys.executable, "-c", code[1]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    image, text = embedded(loaded, (samples[0][:1], ["a cat", "a dog"]))
    told = [float(n) for n in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", done.stdout)]
    assert told == pytest.approx((image @ text.T)[0].tolist(), abs=1e-5)


def refused(*given: str | Path) -> int:
    return cli.main(["export", *map(str, given)])


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clipfuse: ")]
    assert len(lines) == 1
    return lines[0]


def test_what_exists_is_not_overwritten(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(run, tmp_path, "--format", "hf") == 1
    assert "exists already" in one_line(capsys)


def test_an_unfinished_run_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    status = json.loads((copy / "status.json").read_text()) | {"state": "stopped", "why": "stopped by SIGTERM"}
    (copy / "status.json").write_text(json.dumps(status))
    assert refused(copy, tmp_path / "out", "--format", "hf") == 1
    line = one_line(capsys)
    assert "not finished" in line
    assert "SIGTERM" in line
    assert "step-0000004" in line
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "step-0000004"
    shutil.copytree(run / "checkpoints/step-0000004", folder)
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text() + "\n")
    assert refused(folder, tmp_path / "out", "--format", "hf") == 1
    assert "its manifest says" in one_line(capsys)


def test_a_part_without_a_place_is_named_with_the_formats_that_have_one(small: Small, tmp_path: Path) -> None:
    mixed = fresh("clipart", small.tokenizer, *TINY_TOWERS, QUICK)  # gelu for pictures, quick_gelu for texts
    with pytest.raises(export.UserError, match=r"^open_clip cannot hold the activations .* --format hf or onnx can hold it$"):
        export.export(mixed, tmp_path / "out", "open_clip")
    fused = fresh("siglip-b-16", small.tokenizer, *SIGLIP, "model.projection=linear")
    with pytest.raises(export.UserError, match=r"^hf cannot hold the projection of the image tower.*--format onnx can"):
        export.export(fused, tmp_path / "out", "hf")
    bert = [
        "text.args={model_type: bert, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}"
    ]
    averaged = fresh("clipart", small.tokenizer, *TINY_TOWERS, *bert, "text.pool=avg")
    for form in ("hf", "open_clip"):
        with pytest.raises(export.UserError, match=rf"^{form} cannot hold the text tower, a bert.*--format onnx can hold it$"):
            export.export(averaged, tmp_path / "out", form)
    assert not (tmp_path / "out").exists()
