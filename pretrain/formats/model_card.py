"""The model card: README.md of an exported folder, written from the files of the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain import config as configuration
from pretrain.formats import Encoders
from pretrain.formats.open_clip import is_transformers_text
from pretrain.printable import format_count

OPENING_CODE = """def open_picture(path):  # as in training: upright, 16 bits to 8, transparent pixels on white, RGB
    picture = ImageOps.exif_transpose(Image.open(path))
    if picture.mode.startswith("I"):
        gray = np.asarray(picture)
        gray = gray.clip(0, 65535) // 257 if picture.mode != "I" or gray.max() > 255 else gray
        picture = Image.fromarray(gray.astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")
"""
"""Python code that opens a picture of any mode as training does (pretrain/data/decode.py), with Pillow and NumPy."""

LOADING_CODE = {
    "hf": """import numpy as np
from PIL import Image, ImageOps
from transformers import AutoModel, AutoProcessor

{opening}
model, processor = (of.from_pretrained("{name}") for of in (AutoModel, AutoProcessor))
picture = open_picture("picture.jpg")
inputs = processor(text=["a cat", "a dog"], images=picture, return_tensors="pt", padding={padding}, truncation=True)
print(model(**inputs).logits_per_image.softmax(dim=1))""",
    "clap": """import soundfile, soxr
from transformers import AutoFeatureExtractor, AutoTokenizer, ClapModel

model, extractor, tokenizer = (of.from_pretrained("{name}") for of in (ClapModel, AutoFeatureExtractor, AutoTokenizer))
sound, rate = soundfile.read("sound.flac", always_2d=True)
sound = soxr.resample(sound.mean(axis=1), rate, extractor.sampling_rate)
features = extractor(sound, sampling_rate=extractor.sampling_rate, return_tensors="pt")["input_features"].float()
words = tokenizer(["a cat", "a dog"], return_tensors="pt", padding=True, truncation=True)
print(model(input_features=features, **words).logits_per_audio.softmax(dim=1))""",
    "open_clip": """import json
import open_clip, torch
import numpy as np
from PIL import Image, ImageOps

{opening}
{create}
model.eval()
tokenizer = open_clip.get_tokenizer("local-dir:{name}")
tokenizer.clean_fn = lambda text: " ".join(text.split())  # open_clip's own also rewrites HTML entities; training did not
with torch.no_grad():
    image = model.encode_image(preprocess(open_picture("picture.jpg")).unsqueeze(0), normalize=True)
    print(image @ model.encode_text(tokenizer(["a cat", "a dog"]), normalize=True).T)""",
    "onnx": """import json
import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from transformers import AutoTokenizer

{opening}
folder = "{name}"
with open(f"{{folder}}/preprocess.json") as file:
    recipe = json.load(file)
S = recipe["size"]
picture = open_picture("picture.jpg")
{resize}
pixels = (np.asarray(picture, np.float32) / 255 - np.float32(recipe["mean"])) / np.float32(recipe["std"])
words = AutoTokenizer.from_pretrained(folder)(["a cat", "a dog"], padding={padding}, truncation=True, return_tensors="np")
given = {{"pixel_values": pixels.transpose(2, 0, 1)[None], **words}}
graphs = [onnxruntime.InferenceSession(f"{{folder}}/{{name}}.onnx") for name in ("image", "text")]
image, text = (graph.run(None, {{one.name: given[one.name] for one in graph.get_inputs()}})[0] for graph in graphs)
print(image @ text.T)  # cosines""",
}
"""By format: Python code that loads the folder without clipfuse and compares an image with two texts."""
CREATING_CODE = {
    False: 'model, preprocess = open_clip.create_model_from_pretrained("local-dir:{name}")',
    True: """with open("{name}/open_clip_config.json") as file:
    text_cfg = json.load(file)["model_cfg"]["text_cfg"]
text_cfg["hf_model_name"] = "{name}"  # whose config.json describes the text tower
model, preprocess = open_clip.create_model_from_pretrained("local-dir:{name}", text_cfg=text_cfg)""",
}
"""Python code that builds an open_clip model. True: for a text tower that open_clip builds with transformers."""
RESIZE_CODE = {
    "squash": "picture = picture.resize((S, S), Image.Resampling.{how})",
    "crop": """w, h = (max(S, S * side // min(picture.size)) for side in picture.size)  # the shorter side to S, then the center
left, top = round((w - S) / 2), round((h - S) / 2)
picture = picture.resize((w, h), Image.Resampling.{how}).crop((left, top, left + S, top + S))""",
    "pad": """w, h = (max(1, round(side * S / max(picture.size))) for side in picture.size)  # the longer side to S
square = Image.new("RGB", (S, S), {color})
square.paste(picture.resize((w, h), Image.Resampling.{how}), ((S - w) // 2, (S - h) // 2))
picture = square""",
}
"""By the value of Preprocess.resize: Python code that makes the image `picture` S pixels square."""


def format_loading_code(encoders: Encoders, format_name: str, name: str) -> str:
    """Return Python code that loads an exported folder and compares an image with two texts.

    Args:
        encoders: what was exported.
        format_name: hf, open_clip or onnx.
        name: of the folder.
    """
    if encoders.image_tower is None:
        return LOADING_CODE["clap"].format(name=json.dumps(name)[1:-1])
    recipe = encoders.preprocess
    return LOADING_CODE[format_name].format(
        name=json.dumps(name)[1:-1],
        resize=RESIZE_CODE[recipe.resize].format(how=recipe.interpolation.upper(), color=recipe.pad_color),
        opening=OPENING_CODE,
        create=CREATING_CODE[format_name == "open_clip" and is_transformers_text(encoders)].format(name=json.dumps(name)[1:-1]),
        padding=repr("max_length" if not encoders.model.tower("text").trims else True),
    )


def render_card(
    encoders: Encoders, source: Path, step: int, format_name: str, name: str, license: str | None, difference: float | None
) -> str:
    """Return the model card as Markdown.

    Args:
        encoders: what was exported.
        source: the checkpoint folder that the weights come from.
        step: the step at which they were saved.
        format_name: hf, open_clip or onnx.
        name: of the exported folder.
        license: of the weights; None if it is not stated.
        difference: largest difference of an embedding, measured when the folder was written; None if not measured.
    """
    library = {"hf": "transformers", "open_clip": "open_clip", "onnx": "onnx"}[format_name]
    lines = [
        "---",
        f"license: {license or 'unknown'}",
        f"library_name: {library}",
        f"pipeline_tag: zero-shot-{'image' if encoders.image_tower is not None else 'audio'}-classification",
        "tags: [clip, clipfuse]",
        "---",
        f"# {name}",
        "",
        "A pair of image and text encoder, trained contrastively with clipfuse."
        if encoders.audio_tower is None
        else "Encoders of sounds and texts, trained contrastively with clipfuse."
        if encoders.image_tower is None
        else "Encoders of images, texts and sounds, trained contrastively with clipfuse; audio.onnx embeds waveforms.",
        "",
        "```python",
        format_loading_code(encoders, format_name, name),
        "```",
        "",
        *_format_difference(difference),
        *(_format_notes(encoders, format_name) if encoders.image_tower is not None else []),
        *describe_model(encoders, source, step, license),
    ]
    return "\n".join(lines) + "\n"


def describe_model(
    encoders: Encoders, source: Path, step: int, license: str | None, more: Sequence[tuple[str, Any]] = ()
) -> list[str]:
    """Return the card's lines on the model, its data and training, its metrics and its license.

    Args:
        encoders: what was exported.
        source: the checkpoint folder that the weights come from.
        step: the step at which they were saved.
        license: of the weights; None if it is not stated.
        more: further rows (name, value) of the table that describes the model.
    """
    run = source.parent.parent if source.parent.name == "checkpoints" else None
    metrics = _read_metrics(run / "metrics.jsonl", step) if run is not None else []
    return [
        *_describe_architecture(encoders, more),
        *(_describe_training(run, step, metrics) if run is not None else []),
        *_describe_results(metrics),
        "## License",
        "",
        f"{license}." if license else "Not stated in the export.",
    ]


def _format_difference(difference: float | None) -> list[str]:
    if difference is None:
        return []
    result = f"differed from the run's by at most {difference:.1g}" if difference else "were equal to the run's, bit for bit"
    return [f"When it was written, the folder was loaded: on test images and texts its float32 embeddings {result}.", ""]


def _format_notes(encoders: Encoders, format_name: str) -> list[str]:
    """Return what to know about other ways to load the folder."""
    if format_name == "hf":
        notes = [
            "sentence-transformers loads this folder too. Its embeddings are not normalized unless asked: "
            "`SentenceTransformer(FOLDER).encode(..., normalize_embeddings=True)`, for texts and what `open_picture` returns.",
            "Pipelines drop transparency: give them what `open_picture` returns. For texts longer than the model reads, "
            'give them `tokenizer_kwargs={"truncation": True}`.',
        ]
    elif format_name == "open_clip" and is_transformers_text(encoders):
        notes = [
            "`hf_model_name` in open_clip_config.json is the folder whose config.json describes the text tower. Where the "
            "folder is moved, change it, or give `text_cfg` as above; on the Hugging Face hub, it is the repository.",
        ]
    else:
        notes = []
    return [line for note in notes for line in (note, "")]


def _describe_architecture(encoders: Encoders, more: Sequence[tuple[str, Any]]) -> list[str]:
    model = encoders.model
    counts = model.parameter_counts()
    tower = encoders.text_tower
    assert tower is not None
    rows = _describe_image_tower(encoders, counts["image"]["total"]) if encoders.image_tower is not None else []
    rows += [
        ("text tower", f"{tower.model.config.model_type}, {counts['text']['total']:,} parameters with its projection"),  # type: ignore[union-attr]
        ("embedding", f"{encoders.dim} numbers, length 1"),
        ("texts", f"up to {encoders.text.length} tokens, from a vocabulary of {len(encoders.text.tokenizer):,}"),
        ("special tokens in a text", _describe_special_tokens(encoders)),
        ("logit scale", f"{float(model.logit_scale.detach().exp()):.2f}"),
    ]
    if (audio := encoders.audio_tower) is not None:
        length = f"{audio.samples:,} samples ({audio.seconds:g} s)"
        rows.append(("audio tower", f"{counts['audio']['total']:,} parameters with its projection"))
        rows.append(("sounds", f"mono, {audio.rate:,} Hz, full scale 1, {length}; shorter ones: {audio.config.pad}"))
    if model.logit_bias is not None:
        rows.append(("logit bias", f"{float(model.logit_bias.detach()):.3f}"))
    return ["## The model", "", *_format_table([*rows, *more])]


def _describe_image_tower(encoders: Encoders, parameters: int) -> list[tuple[str, str]]:
    recipe = encoders.preprocess
    how = {
        "squash": "both sides to that size",
        "crop": "the shorter side to that size, then a center crop",
        "pad": "the longer side to that size, then borders of #{:02x}{:02x}{:02x}".format(*recipe.pad_color),
    }[recipe.resize]
    mean, std = _format_numbers(recipe.mean), _format_numbers(recipe.std)
    return [
        ("image tower", f"{encoders.config.image.name}, {parameters:,} parameters with its projection"),
        ("images", f"RGB, {recipe.size} px, {recipe.interpolation}: {how}"),
        ("before that", "upright as EXIF says, 16 bits reduced to 8, transparent pixels on white: `open_picture` above"),
        ("normalized with", f"mean {mean}, standard deviation {std}, of channels from 0 to 1"),
    ]


def _describe_special_tokens(encoders: Encoders) -> str:
    """Return what a text means that spells out a special token, such as the end token."""
    tokenizer, tower = encoders.text.tokenizer, encoders.text_tower
    if getattr(tokenizer, "split_special_tokens", False):
        return "are text like any other: `split_special_tokens` in tokenizer_config.json"
    ends = tower is not None and tower.causal and tower.end_id is not None
    return "become these tokens" + (f"; a text ends at the first `{tokenizer.eos_token}`" if ends else "")


def _describe_training(run: Path, step: int, metrics: list[dict[str, Any]]) -> list[str]:
    """Return the card's lines on data and training up to `step`.

    They come from config.yaml and environment.json of the run.
    """
    path = run / "config.yaml"
    if not path.is_file():
        return []
    values = configuration.read_yaml(path)
    environment = json.loads((run / "environment.json").read_text()) if (run / "environment.json").is_file() else {}
    data, optim, train = (values.get(key) or {} for key in ("data", "optim", "train"))
    last, batch, stages = _find_last(metrics, "samples_seen"), data.get("batch_size", 0), len(train.get("stages") or [])
    rows = [
        ("data", _format_shards(data.get("train"))),
        ("samples seen", f"{last['samples_seen'] + (step - last['step']) * batch:,}" if last else None),
        ("steps", f"{step:,} " + (f"in {stages + 1} stages" if stages else f"of {format_count(batch, 'sample')}")),
        ("loss", (values.get("loss") or values.get("task") or {}).get("name")),
        (
            "optimizer",
            ", ".join(f"{key} {optim[key]}" for key in ("lr", "weight_decay", "betas", "eps", "warmup") if key in optim),
        ),
        ("precision", train.get("precision")),
        ("strategy", f"{train.get('strategy')}, {format_count(environment.get('processes', 1), 'process')}"),
        ("started from", values.get("init")),
        ("seed", values.get("seed")),
        ("code", environment.get("git")),
        ("versions", ", ".join(f"{name} {version}" for name, version in (environment.get("versions") or {}).items())),
    ]
    return ["## Data and training", "", *_format_table(rows)]


def _describe_results(metrics: list[dict[str, Any]]) -> list[str]:
    line = _find_last(metrics, "val/")
    if not line:
        return []
    values = {name.removeprefix("val/"): value for name, value in line.items() if name.startswith("val/")}
    texts = {name: f"{100 * value:.1f} %" if "R@" in name or "_top" in name else f"{value:g}" for name, value in values.items()}
    return [
        f"## Measured on held-out data, at step {line['step']:,}",
        "",
        *_format_table([(name.replace("_", " "), text) for name, text in texts.items()]),
    ]


def _read_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl up to `step`, after which the run may have continued."""
    if not path.is_file():
        return []
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    return [line for line in lines if line["step"] <= step]


def _find_last(metrics: list[dict[str, Any]], prefix: str) -> dict[str, Any] | None:
    """Return the last line that has a key with this prefix, or None."""
    return next((line for line in reversed(metrics) if any(key.startswith(prefix) for key in line)), None)


def _format_shards(shards: Any) -> str:
    """Format shards by their file names alone: folders of the machine that trained mean nothing elsewhere."""
    if isinstance(shards, list):
        sources = [(s.get("shards"), s.get("weight", 1)) if isinstance(s, dict) else (s, 1) for s in shards]
        return ", ".join(f"{_format_shards(source)} (weight {weight:g})" for source, weight in sources)
    text = str(shards)
    return text if "://" in text else "/".join(Path(text).parts[-2:])


def _format_table(rows: list[tuple[str, Any]]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows if value not in (None, "", "None")), ""]


def _format_numbers(values: Any) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
