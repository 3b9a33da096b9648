"""Exports give the run's embeddings when transformers, open_clip and onnxruntime load them."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import clipfuse
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
from pretrain.formats.model_card import _format_difference
from pretrain.model import ModelSchema
from tests.support import ONE_BLOCK, ROOT, TINY_TOWERS, Small, environment
from tests.support.sounds import AUDIO, make_tone

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


def build_model(name: str, tokenizer: Path, *settings: str) -> LoadedModel:
    """Build a shipped configuration, shrunk, with random weights.

    Norms and biases, which start at 1 and 0, get random values too.
    """
    loaded_tokenizer = load_tokenizer(str(tokenizer))
    values = configuration.load_values(ROOT / f"configs/pretrain/{name}.yaml", [f"text.tokenizer={tokenizer}", *settings])
    config = configuration.build(ModelSchema, values, name, partial=True)
    torch.manual_seed(0)
    model = models.build(models.tower_configs(config), config.model, loaded_tokenizer)
    with torch.no_grad():
        for parameter in model.towers.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.logit_scale.fill_(3.0)
    decoders = models.build_decoders(config, loaded_tokenizer, model, "txt")
    return LoadedModel(model.eval(), config, loaded_tokenizer, decoders, Path("none"), 0)


@pytest.fixture(scope="module")
def samples(small: Small) -> tuple[list[bytes], list[str]]:
    """Drawn scenes, one of them cropped to odd sizes, and their captions, one of them much too long."""
    reader = ShardReader(expand_shards(small.val))
    raw = [reader.read(0, i) for i in range(6)]
    images = [next(data for name, data in sample.members.items() if name in ("jpg", "png")) for sample in raw]
    odd = Image.open(io.BytesIO(images[0])).convert("RGB").crop((0, 0, 37, 64))
    buffer = io.BytesIO()
    odd.save(buffer, "png")
    captions = [sample.members["txt"].decode() for sample in raw]
    return [*images, buffer.getvalue()], [*captions, " ".join(captions * 3)]


@torch.no_grad()
def embed(loaded: LoadedModel, samples: tuple[list[bytes], list[str]]) -> tuple[torch.Tensor, torch.Tensor]:
    image: ImageDecoder = loaded.decoders["image"]
    text: TextDecoder = loaded.decoders["text"]
    images = torch.stack([image.decode_eval(data) for data in samples[0]])
    return loaded.model.encode("image", images), loaded.model.encode("text", *text.encode(samples[1]))


def open_images(samples: tuple[list[bytes], list[str]]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(data)).convert("RGB") for data in samples[0]]


def assert_close(expected: tuple[torch.Tensor, ...], actual: tuple[torch.Tensor, ...], atol: float = 1e-5) -> None:
    for a, b in zip(expected, actual, strict=True):
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
def test_transformers_gives_the_embeddings_of_the_run(case: str, small: Small, samples: Any, tmp_path: Path) -> None:
    name, settings, kind = HF[case]
    loaded = build_model(name, small.tokenizer, *settings)
    folder = export.export(loaded, tmp_path / "out", "hf")
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    assert model.config.model_type == kind
    assert model.logit_scale.ndim == (1 if kind == "siglip" else 0)
    padding: Any = "max_length" if kind == "siglip" else True
    inputs = processor(images=open_images(samples), text=samples[1], return_tensors="pt", padding=padding, truncation=True)
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        out = model(**inputs)
    expected = embed(loaded, samples)
    assert_close(expected, (out.image_embeds, out.text_embeds))
    logits = loaded.model.logit_scale.exp() * expected[0] @ expected[1].T
    if loaded.model.logit_bias is not None:
        logits = logits + loaded.model.logit_bias
    torch.testing.assert_close(out.logits_per_image, logits.detach(), atol=1e-3, rtol=1e-4)


def test_the_zero_shot_pipeline_gives_the_probabilities_of_the_run(small: Small, samples: Any, tmp_path: Path) -> None:
    loaded = build_model("clipart", small.tokenizer, *TINY_TOWERS)
    folder = export.export(loaded, tmp_path / "out", "hf")
    classify = pipeline("zero-shot-image-classification", model=str(folder))
    labels = ["a red ball", "two green boxes on grass"]
    answers = classify(open_images(samples)[0], candidate_labels=labels, hypothesis_template="{}")
    scores = {answer["label"]: answer["score"] for answer in answers}
    image, text = embed(loaded, (samples[0][:1], labels))
    expected = (loaded.model.logit_scale.exp() * image @ text.T).softmax(dim=-1)[0]
    assert [scores[label] for label in labels] == pytest.approx(expected.tolist(), abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# open_clip


QUICK = "text.args.hidden_act=quick_gelu"
OPEN_CLIP = {
    "mean of patches": ("clipart", TINY_TOWERS),
    "text pooled by its mean": ("scenes", SCENES),
    "OpenAI's": ("vit-b-16", [*CLIP, "image.name=vit_base_patch16_clip_quickgelu_224", QUICK]),
    "timm by name": ("vit-b-16", [*CLIP[3:], "image.name=vit_tiny_patch16_224"]),
    "SigLIP's text": ("siglip-b-16", [*SIGLIP_TEXT, "image.name=resnet10t", "model.projection=linear", "model.dim=16"]),
    "norm behind the mean": ("clipart", [*TINY_TOWERS, "image.args.fc_norm=true"]),
}


@pytest.mark.parametrize("case", OPEN_CLIP)
def test_open_clip_gives_the_embeddings_of_the_run(case: str, small: Small, samples: Any, tmp_path: Path) -> None:
    name, settings = OPEN_CLIP[case]
    loaded = build_model(name, small.tokenizer, *settings)
    folder = export.export(loaded, tmp_path / "out", "open_clip")
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    assert model.logit_scale.shape == ()
    images = torch.stack([preprocess(image) for image in open_images(samples)])
    with torch.no_grad():
        embeddings = model.encode_image(images, normalize=True), model.encode_text(tokenizer(samples[1]), normalize=True)
    assert_close(embed(loaded, samples), embeddings)
    assert model.logit_scale.item() == pytest.approx(3.0)
    if loaded.model.logit_bias is not None:
        assert model.logit_bias.item() == pytest.approx(-10)


def test_an_exported_folder_may_be_moved(small: Small, tmp_path: Path) -> None:
    """No file in it names its path."""
    for form in ("hf", "open_clip"):
        folder = export.export(build_model("clipart", small.tokenizer, *TINY_TOWERS), tmp_path / form, form)
        for path in folder.glob("*.json"):
            assert str(tmp_path) not in path.read_text(), path.name


# ---------------------------------------------------------------------------------------------------------------------
# ONNX


def test_onnxruntime_gives_the_embeddings_of_the_run(small: Small, samples: Any, tmp_path: Path) -> None:
    """Of images, texts and sounds, the latter through Python, too."""
    loaded = build_model("scenes", small.tokenizer, *SCENES, *ONE_BLOCK, *AUDIO)
    folder = export.export(loaded, tmp_path / "out", "onnx")
    sounds = [make_tone(330, seconds, 5) for seconds in (0.2, 0.9)]
    waveforms = torch.stack([loaded.decoders["audio"].decode_eval(sound) for sound in sounds])
    with torch.no_grad():
        expected_sounds = loaded.model.encode("audio", waveforms)
    torch.testing.assert_close(torch.from_numpy(clipfuse.load(folder).encode_audio(sounds)), expected_sounds, atol=1e-5, rtol=0)
    half = onnx.load(folder, "-fp16").embed_audio(waveforms / 32768)
    torch.testing.assert_close(half, expected_sounds, atol=5e-3, rtol=0)
    assert "| sounds | mono, 8,000 Hz, full scale 1, 3,200 samples (0.4 s); " in (folder / "README.md").read_text()
    recipe = json.loads((folder / "preprocess.json").read_text())
    image: ImageDecoder = loaded.decoders["image"]
    scaled = torch.stack([image.decode_eval(data) for data in samples[0]]) / 255
    images = (scaled - torch.tensor(recipe["mean"]).view(3, 1, 1)) / torch.tensor(recipe["std"]).view(3, 1, 1)
    expected = embed(loaded, samples)
    assert_close(expected, onnx.load(folder)(images, samples[1]))
    assert_close(expected, onnx.load(folder, "-fp16")(images, samples[1]), atol=5e-3)
    embeddings = onnx.load(folder)(images[:1], samples[1][:1])  # another batch, a shorter text
    assert_close((expected[0][:1], expected[1][:1]), embeddings)


# ---------------------------------------------------------------------------------------------------------------------
# Mean pooling as an attention layer


@pytest.mark.parametrize("heads", [1, 4])
def test_an_attention_layer_computes_the_mean(heads: int, small: Small) -> None:
    """In float64, compared with a tower that pools by the mean."""
    more = ["text.pool=avg", "text.length=77", f"text.args={{num_attention_heads: {heads}}}"]
    loaded = build_model("scenes", small.tokenizer, *TINY_TOWERS, *more)
    tower: Any = loaded.model.towers["text"].double()
    spec = text_weights.text_spec(tower)
    assert isinstance(spec, text_weights.TextSpec)
    projection: Any = loaded.model.projection("text").double()
    new_spec, weights = mean_pooling.to_attention_layer(
        spec, {n: v.double() for n, v in text_weights.to_open_clip(tower, projection.weight).items()}
    )
    text_transformer = open_clip.transformer.TextTransformer(
        context_length=new_spec.positions,
        vocab_size=new_spec.vocab,
        width=new_spec.width,
        heads=new_spec.heads,
        layers=new_spec.depth,
        mlp_ratio=block_weights.compute_mlp_ratio(new_spec.hidden, new_spec.width),
        output_dim=16,
        act_layer=torch.nn.GELU,
        norm_layer=lambda width: torch.nn.LayerNorm(width, eps=new_spec.eps),
    ).double()
    text_transformer.load_state_dict(weights)
    ids, mask = loaded.decoders["text"].encode(["a red ball", "two green boxes on grass, left of a house", ""])
    full = torch.nn.functional.pad(ids, (0, 77 - ids.shape[1]))
    with torch.no_grad():
        expected = torch.nn.functional.normalize(projection(tower(ids, mask).pooled), dim=-1)
        actual = torch.nn.functional.normalize(text_transformer.eval()(full), dim=-1)
    torch.testing.assert_close(expected, actual, atol=1e-6, rtol=0)  # embeddings are normalized in float32


def test_mlp_ratios_give_the_same_hidden_width() -> None:
    for width in (32, 80, 192, 448, 513):
        for hidden in (1, 64, 767, 768, 3072, 4304):
            assert int(width * block_weights.compute_mlp_ratio(hidden, width)) == hidden


# ---------------------------------------------------------------------------------------------------------------------
# The command, the model card, and refused exports


@pytest.fixture(scope="module")
def run(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run, with retrieval metrics."""
    run = tmp_path_factory.mktemp("export") / "run"
    more = ("train.steps=4", f"data.val={small.val}", "eval.workers=0")
    assert cli.main(["pretrain", "clipart", *small.settings(run, *ONE_BLOCK, *more)]) == 0
    return run


def test_the_command_exports_a_trained_run(run: Path, samples: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model"
    assert cli.main(["export", str(run), str(out), "--format", "open_clip", "--license", "cc0-1.0"]) == 0
    assert str(out) in capsys.readouterr().out
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: cc0-1.0\n")
    for text in (
        "image to text R@1",
        "train-*.tar",
        "steps | 4 of 16",
        "| single, 1 process |",
        "lr 0.001",
        "create_model_from_pretrained",
        "400",
    ):
        assert text in card, text
    assert str(run) not in card
    assert re.search(
        r"on test images and texts its float32 embeddings (differed from the run's by at most [1-9]|were equal)", card
    )
    assert "at most 0" not in card
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{out}")
    with torch.no_grad():
        embeddings = model.encode_image(torch.stack([preprocess(p) for p in open_images(samples)]), normalize=True)
    torch.testing.assert_close(embed(loading.load_model(run), samples)[0], embeddings, atol=1e-5, rtol=0)


def test_the_card_says_what_was_measured() -> None:
    measured = "When it was written, the folder was loaded: on test images and texts its float32 embeddings "
    assert _format_difference(None) == []
    assert _format_difference(0.0) == [f"{measured}were equal to the run's, bit for bit.", ""]
    assert _format_difference(2.4e-7) == [f"{measured}differed from the run's by at most 2e-07.", ""]


def test_the_card_of_an_earlier_checkpoint_describes_that_checkpoint(run: Path, tmp_path: Path) -> None:
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


def test_the_code_of_the_card_loads_the_graphs(run: Path, samples: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    loaded = loading.load_model(run)
    export.export(loaded, tmp_path / "model", "onnx")
    code = re.search(r"```python\n(.*?)\n```", (tmp_path / "model/README.md").read_text(), re.S)
    assert code is not None
    (tmp_path / "picture.jpg").write_bytes(samples[0][0])
    command = [sys.executable, "-c", code[1]]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert process.returncode == 0, process.stderr[-2000:]
    image, text = embed(loaded, (samples[0][:1], ["a cat", "a dog"]))
    printed = [float(n) for n in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", process.stdout)]
    assert printed == pytest.approx((image @ text.T)[0].tolist(), abs=1e-5)


def run_export(*words: str | Path) -> int:
    return cli.main(["export", *map(str, words)])


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clipfuse: ")]
    assert len(lines) == 1
    return lines[0]


def test_an_existing_folder_is_not_overwritten(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_export(run, tmp_path, "--format", "hf") == 1
    assert "exists already" in error_line(capsys)


def test_an_unfinished_run_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    status = json.loads((copy / "status.json").read_text()) | {"state": "stopped", "why": "stopped by SIGTERM"}
    (copy / "status.json").write_text(json.dumps(status))
    assert run_export(copy, tmp_path / "out", "--format", "hf") == 1
    line = error_line(capsys)
    assert "not finished" in line
    assert "SIGTERM" in line
    assert "step-0000004" in line
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "step-0000004"
    shutil.copytree(run / "checkpoints/step-0000004", folder)
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text() + "\n")
    assert run_export(folder, tmp_path / "out", "--format", "hf") == 1
    assert "its manifest says" in error_line(capsys)


def test_a_part_that_a_format_cannot_hold_is_named_with_the_formats_that_can(small: Small, tmp_path: Path) -> None:
    mixed = build_model("clipart", small.tokenizer, *TINY_TOWERS, QUICK)  # gelu for images, quick_gelu for texts
    with pytest.raises(export.UserError, match=r"^open_clip cannot hold the activations .* --format hf or onnx can hold it$"):
        export.export(mixed, tmp_path / "out", "open_clip")
    projected = build_model("siglip-b-16", small.tokenizer, *SIGLIP, "model.projection=linear")
    with pytest.raises(export.UserError, match=r"^hf cannot hold the projection of the image tower.*--format onnx can"):
        export.export(projected, tmp_path / "out", "hf")
    bert = [
        "text.args={model_type: bert, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}"
    ]
    mean_pooled = build_model("clipart", small.tokenizer, *TINY_TOWERS, *bert, "text.pool=avg")
    with pytest.raises(
        export.UserError, match=r"^hf cannot hold the text tower, a bert.*--format open_clip or onnx can hold it$"
    ):
        export.export(mean_pooled, tmp_path / "out", "hf")
    end_pooled = build_model("clipart", small.tokenizer, *TINY_TOWERS, *bert, "text.pool=eot")
    for form in ("hf", "open_clip"):
        with pytest.raises(export.UserError, match=rf"^{form} cannot hold the text tower, a bert.*--format onnx can hold it$"):
            export.export(end_pooled, tmp_path / "out", form)
    assert not (tmp_path / "out").exists()


def test_the_formats_that_can_hold_a_model_are_named_before_training(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In --dry-run and in the first lines of a run, for models that all formats, some or only one can hold."""
    bert = "text.args={model_type: bert, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}"
    cases: dict[str, tuple[str, ...]] = {
        "exports: hf, open_clip, onnx can hold this model": (),
        "exports: hf, onnx can hold this model; open_clip cannot hold the activations of the towers": (QUICK,),
        "exports: open_clip, onnx can hold this model; hf cannot hold the text tower, a bert": (bert, "text.pool=avg"),
        "exports: onnx can hold this model; hf cannot hold the text tower, a bert": (bert, "text.pool=eot"),
    }
    for number, (line, settings) in enumerate(cases.items()):
        command = ["pretrain", "clipart", *small.settings(tmp_path / f"run-{number}", "train.steps=1"), *settings]
        assert cli.main([*command, "--dry-run"]) == 0
        assert line in " ".join(capsys.readouterr().out.split()), line
    assert cli.main(command) == 0
    printed = " ".join(capsys.readouterr().err.split())
    assert line in printed
    assert printed.index("exports: ") < printed.index("loss")


def test_naming_the_formats_changes_neither_the_model_nor_the_random_numbers(small: Small) -> None:
    loaded = build_model("resnet-50", small.tokenizer, "image.size=32", *CLIP[3:], "image.name=resnet10t", "image.args={}")
    model = loaded.model.train()
    model.towers["text"].eval()  # a part that is not trained
    states = {name: value.clone() for name, value in model.state_dict().items()}
    flags, random = [module.training for module in model.modules()], torch.get_rng_state()
    assert export.describe_formats(model, loaded.config, loaded.decoders).startswith("exports: hf, ")
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == flags
    for name, value in model.state_dict().items():
        assert torch.equal(value, states[name]), name


def test_deepspeed_is_imported_without_a_word() -> None:
    """Transformers' save_pretrained imports it, through accelerate; it warned about a machine without a GPU."""
    program = "from pretrain.formats.hf import quiet_transformers\nwith quiet_transformers():\n    import deepspeed"
    env = {name: value for name, value in environment().items() if name != "DS_ACCELERATOR"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], env=env, capture_output=True, text=True, check=True)
    assert "accelerator" not in done.stdout + done.stderr
