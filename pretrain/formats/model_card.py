"""The model card: README.md of an exported folder, written from the run that made the weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain import config as configuration
from pretrain.formats import Encoders

LOADING_CODE = {
    "hf": """from PIL import Image
from transformers import AutoModel, AutoProcessor

model, processor = (of.from_pretrained("{name}") for of in (AutoModel, AutoProcessor))
picture = Image.open("picture.jpg").convert("RGB")
inputs = processor(text=["a cat", "a dog"], images=picture, return_tensors="pt", padding={padding})
print(model(**inputs).logits_per_image.softmax(dim=1))""",
    "open_clip": """import open_clip, torch
from PIL import Image

model, preprocess = open_clip.create_model_from_pretrained("local-dir:{name}")
tokenizer = open_clip.get_tokenizer("local-dir:{name}")
with torch.no_grad():
    image = model.encode_image(preprocess(Image.open("picture.jpg")).unsqueeze(0), normalize=True)
    print(image @ model.encode_text(tokenizer(["a cat", "a dog"]), normalize=True).T)""",
    "onnx": """import json
import numpy as np
import onnxruntime
from PIL import Image
from transformers import AutoTokenizer

folder = "{name}"
with open(f"{{folder}}/preprocess.json") as file:
    recipe = json.load(file)
S = recipe["size"]
picture = Image.open("picture.jpg").convert("RGB")
{resize}
pixels = (np.asarray(picture, np.float32) / 255 - np.float32(recipe["mean"])) / np.float32(recipe["std"])
words = AutoTokenizer.from_pretrained(folder)(["a cat", "a dog"], padding={padding}, truncation=True, return_tensors="np")
given = {{"pixel_values": pixels.transpose(2, 0, 1)[None], **words}}
graphs = [onnxruntime.InferenceSession(f"{{folder}}/{{name}}.onnx") for name in ("image", "text")]
image, text = (graph.run(None, {{one.name: given[one.name] for one in graph.get_inputs()}})[0] for graph in graphs)
print(image @ text.T)  # cosines""",
}
"""By format: what loads the folder."""
RESIZE_CODE = {
    "squash": "picture = picture.resize((S, S), Image.Resampling.{how})",
    "crop": """w, h = (max(S, S * side // min(picture.size)) for side in picture.size)  # the shorter side to S, then the centre
left, top = round((w - S) / 2), round((h - S) / 2)
picture = picture.resize((w, h), Image.Resampling.{how}).crop((left, top, left + S, top + S))""",
}
"""By preprocess' way of resizing: the lines that make `picture` S pixels square."""


def format_loading_code(encoders: Encoders, form: str, name: str) -> str:
    """Python that loads the folder `name` without clipfuse and compares a picture with two texts."""
    recipe = encoders.preprocess
    return LOADING_CODE[form].format(
        name=json.dumps(name)[1:-1],
        resize=RESIZE_CODE[recipe.resize].format(how=recipe.interpolation.upper()),
        padding=repr("max_length" if not encoders.model.tower("text").trims else True),
    )


def render_card(
    encoders: Encoders, source: Path, step: int, form: str, name: str, license: str | None, difference: float | None
) -> str:
    """The card.

    Args:
        source: the checkpoint folder the weights come from; step: the step they were saved at.
        name: of the exported folder.
        difference: largest difference of an embedding, measured when the folder was written; None: not measured.
    """
    library = {"hf": "transformers", "open_clip": "open_clip", "onnx": "onnx"}[form]
    lines = [
        "---",
        f"license: {license or 'unknown'}",
        f"library_name: {library}",
        "pipeline_tag: zero-shot-image-classification",
        "tags: [clip, clipfuse]",
        "---",
        f"# {name}",
        "",
        "A contrastive pair of encoders, one for pictures and one for text, trained with clipfuse.",
        "",
        "```python",
        format_loading_code(encoders, form, name),
        "```",
        "",
        *_measured(difference),
        *describe_model(encoders, source, step, license),
    ]
    return "\n".join(lines) + "\n"


def describe_model(
    encoders: Encoders, source: Path, step: int, license: str | None, more: Sequence[tuple[str, Any]] = ()
) -> list[str]:
    """What the model is (with `more` rows), what it learned from and how, what it reached, its licence; as `text` has it."""
    run = source.parent.parent if source.parent.name == "checkpoints" else None
    said = _said(run / "metrics.jsonl", step) if run is not None else []
    return [
        *_model(encoders, more),
        *(_run(run, step, said) if run is not None else []),
        *_recalls(said),
        "## License",
        "",
        f"{license}." if license else "Not stated by those who exported it.",
    ]


def _measured(difference: float | None) -> list[str]:
    if difference is None:
        return []
    return [f"Loaded back, its embeddings differ from the run's by at most {difference:.1g} in float32.", ""]


def _model(encoders: Encoders, more: Sequence[tuple[str, Any]]) -> list[str]:
    recipe, model = encoders.preprocess, encoders.model
    counts = model.parameter_counts()
    tower = encoders.text_tower
    assert tower is not None
    how = "both sides to that size" if recipe.resize == "squash" else "the shorter side to that size, then the centre"
    rows = [
        ("image tower", f"{encoders.config.image.name}, {counts['image']['total']:,} parameters with its projection"),
        ("text tower", f"{tower.model.config.model_type}, {counts['text']['total']:,} parameters with its projection"),  # type: ignore[union-attr]
        ("shared space", f"{encoders.dim} numbers, length 1"),
        ("pictures", f"RGB, {recipe.size} px, {recipe.interpolation}: {how}"),
        ("normalised with", f"mean {_short(recipe.mean)}, deviation {_short(recipe.std)}, of channels in 0 to 1"),
        ("texts", f"up to {encoders.text.length} tokens of a vocabulary of {len(encoders.text.tokenizer):,}"),
        ("logit scale", f"{float(model.logit_scale.detach().exp()):.2f}"),
    ]
    if model.logit_bias is not None:
        rows.append(("logit bias", f"{float(model.logit_bias.detach()):.3f}"))
    return ["## The model", "", *_table([*rows, *more])]


def _run(run: Path, step: int, said: list[dict[str, Any]]) -> list[str]:
    """Data and recipe, from the run's own files, of the weights at `step`."""
    path = run / "config.yaml"
    if not path.is_file():
        return []
    values = configuration.read_yaml(path)
    environment = json.loads((run / "environment.json").read_text()) if (run / "environment.json").is_file() else {}
    data, optim, train = (values.get(key) or {} for key in ("data", "optim", "train"))
    last = _last(said, "samples_seen")
    rows = [
        ("data", _source(data.get("train"))),
        ("samples seen", f"{last['samples_seen'] * step // last['step']:,}" if last else None),
        ("steps", f"{step:,} of {data.get('batch_size', 0):,} samples"),
        ("loss", (values.get("loss") or values.get("task") or {}).get("name")),
        (
            "optimizer",
            ", ".join(f"{key} {optim[key]}" for key in ("lr", "weight_decay", "betas", "eps", "warmup") if key in optim),
        ),
        ("precision", train.get("precision")),
        ("strategy", f"{train.get('strategy')}, {environment.get('processes', 1)} processes"),
        ("started from", values.get("init")),
        ("seed", values.get("seed")),
        ("code", environment.get("git")),
        ("versions", ", ".join(f"{name} {version}" for name, version in (environment.get("versions") or {}).items())),
    ]
    return ["## Data and recipe", "", *_table(rows)]


def _recalls(said: list[dict[str, Any]]) -> list[str]:
    line = _last(said, "val/")
    if not line:
        return []
    found = {name.removeprefix("val/"): value for name, value in line.items() if name.startswith("val/")}
    shares = {name: f"{100 * value:.1f} %" if "R@" in name or "_top" in name else f"{value:g}" for name, value in found.items()}
    return [
        f"## Measured on held-out data, at step {line['step']:,}",
        "",
        *_table([(n.replace("_", " "), v) for n, v in shares.items()]),
    ]


def _said(path: Path, step: int) -> list[dict[str, Any]]:
    """The lines of a run's metrics up to a step: it may have gone on from these weights."""
    if not path.is_file():
        return []
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    return [line for line in lines if line["step"] <= step]


def _last(said: list[dict[str, Any]], begin: str) -> dict[str, Any] | None:
    """The last line with a key that begins so."""
    return next((line for line in reversed(said) if any(key.startswith(begin) for key in line)), None)


def _source(given: Any) -> str:
    """Shards by their file names: folders of the machine that trained say nothing to others."""
    if isinstance(given, list):
        parts = [(one.get("shards"), one.get("weight", 1)) if isinstance(one, dict) else (one, 1) for one in given]
        return ", ".join(f"{_source(shards)} (weight {weight:g})" for shards, weight in parts)
    text = str(given)
    return text if "://" in text else "/".join(Path(text).parts[-2:])


def _table(rows: list[tuple[str, Any]]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows if value not in (None, "", "None")), ""]


def _short(values: Any) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
