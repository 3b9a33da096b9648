"""The model card: README.md of an exported folder, written from the run that made the weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain import config as configuration
from pretrain.formats import Encoders

LOADING = {
    "hf": """from PIL import Image
from transformers import pipeline

classify = pipeline("zero-shot-image-classification", model="{name}")
classify(Image.open("picture.jpg").convert("RGB"), candidate_labels=["a cat", "a dog"])""",
    "open_clip": """import open_clip, torch
from PIL import Image

model, preprocess = open_clip.create_model_from_pretrained("local-dir:{name}")
tokenizer = open_clip.get_tokenizer("local-dir:{name}")
with torch.no_grad():
    image = model.encode_image(preprocess(Image.open("picture.jpg")).unsqueeze(0), normalize=True)
    print(image @ model.encode_text(tokenizer(["a cat", "a dog"]), normalize=True).T)""",
    "onnx": """import onnxruntime
from transformers import AutoTokenizer

text = onnxruntime.InferenceSession("{name}/text.onnx")
tokens = AutoTokenizer.from_pretrained("{name}")(["a cat", "a dog"], padding={padding}, truncation=True, return_tensors="np")
embeddings = text.run(None, {{"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}})[0]""",
}
"""By format: what loads the folder."""


def text(encoders: Encoders, source: Path, form: str, name: str, license: str | None, difference: float | None) -> str:
    """The card.

    Args:
        source: the checkpoint folder the weights come from.
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
        LOADING[form].format(name=name, padding=repr("max_length" if not encoders.model.tower("text").trims else True)),
        "```",
        "",
        *_measured(difference),
        *about(encoders, source, license),
    ]
    return "\n".join(lines) + "\n"


def about(encoders: Encoders, source: Path, license: str | None, more: Sequence[tuple[str, Any]] = ()) -> list[str]:
    """What the model is (with `more` rows), what it learned from and how, what it reached, its licence; as `text` has it."""
    run = source.parent.parent if source.parent.name == "checkpoints" else None
    return [
        *_model(encoders, more),
        *(_run(run) if run is not None else []),
        *_recalls(run),
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


def _run(run: Path) -> list[str]:
    """Data and recipe, from the run's own files."""
    path = run / "config.yaml"
    if not path.is_file():
        return []
    values = configuration.read_yaml(path)
    environment = json.loads((run / "environment.json").read_text()) if (run / "environment.json").is_file() else {}
    data, optim, train = (values.get(key) or {} for key in ("data", "optim", "train"))
    last = _lines(run / "metrics.jsonl", "samples_seen")
    rows = [
        ("data", _source(data.get("train"))),
        ("samples seen", f"{last['samples_seen']:,}" if last else None),
        ("steps", f"{last['step']:,} of {data.get('batch_size', 0):,} samples" if last else None),
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


def _recalls(run: Path | None) -> list[str]:
    line = _lines(run / "metrics.jsonl", "val/") if run is not None else None
    if not line:
        return []
    found = {name.removeprefix("val/"): value for name, value in line.items() if name.startswith("val/")}
    shares = {name: f"{100 * value:.1f} %" if "R@" in name or "_top" in name else f"{value:g}" for name, value in found.items()}
    return [
        f"## Measured on held-out data, at step {line['step']:,}",
        "",
        *_table([(n.replace("_", " "), v) for n, v in shares.items()]),
    ]


def _lines(path: Path, begin: str) -> dict[str, Any] | None:
    """The last line of a jsonl file with a key that begins so."""
    if not path.is_file():
        return None
    for text in reversed(path.read_text().splitlines()):
        line: dict[str, Any] = json.loads(text)
        if any(key.startswith(begin) for key in line):
            return line
    return None


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
