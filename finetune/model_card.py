"""The model card of a fine-tuned model's graphs: README.md of the folder that export.py writes."""

from __future__ import annotations

from typing import Any

from finetune.loading import Finetuned
from pretrain.formats import Encoders
from pretrain.formats.model_card import RESIZE_CODE, describe_model

LOADING = """import json
from pathlib import Path
import numpy as np
import onnxruntime
from PIL import Image
from transformers import AutoTokenizer

folder = Path("{name}")
told, recipe = (json.loads((folder / f"{{file}}.json").read_text()) for file in ("task", "preprocess"))
S = recipe["size"]
picture = Image.open("picture.jpg").convert("RGB")
{resize}
pixels = (np.asarray(picture, np.float32) / 255 - np.float32(recipe["mean"])) / np.float32(recipe["std"])
words = AutoTokenizer.from_pretrained(folder)(["{text}"], padding={padding}, truncation=True, return_tensors="np")
known = {{"pixel_values": pixels.transpose(2, 0, 1)[None], **words}}
for graph, names in told["graphs"].items():
    session = onnxruntime.InferenceSession(f"{{folder}}/{{graph}}.onnx")
    found = session.run(None, {{one.name: known[one.name] for one in session.get_inputs()}})
    known.update(zip(names["outputs"], found))
{print}"""
PRINT = {
    True: 'print(told["names"][known[told["output"]][0].argmax()])',
    False: 'print(1 / (1 + np.exp(-known[told["output"]])))  # how likely they belong together',
}


def text(tuned: Finetuned, encoders: Encoders, said: dict[str, Any], name: str, license: str | None, difference: float) -> str:
    """The card.

    Args:
        said: what task.json holds.
        name: of the exported folder.
        difference: largest difference of an answer, measured when the folder was written.
    """
    recipe, task = encoders.preprocess, said["task"]
    fusion = tuned.config.fusion
    code = LOADING.format(
        name=name,
        resize=RESIZE_CODE[recipe.resize].format(how=recipe.interpolation.upper()),
        text="what colour is the car?" if tuned.task.text_is_question else "a red car",
        padding=repr("max_length" if not tuned.model.encoder.tower("text").trims else True),
        print=PRINT[bool(said["names"])],
    )
    rows = [
        ("task", task),
        ("fusion", None if fusion is None else f"{fusion.name}, {fusion.layers} layers"),
        ("context", None if fusion is None else tuned.config.context.name),
        ("answers", f"{len(said['names']):,}, named in task.json" if said["names"] else None),
        ("numbers", f"{said['output']}, made probabilities by {said['probabilities']}"),
        *((f"{graph}.onnx", f"{', '.join(n['inputs'])} → {', '.join(n['outputs'])}") for graph, n in said["graphs"].items()),
    ]
    lines = [
        "---",
        f"license: {license or 'unknown'}",
        "library_name: onnx",
        f"tags: [clipfuse, {task}]",
        "---",
        f"# {name}",
        "",
        f"Encoders of pictures and texts, fine-tuned together for {task} with clipfuse. A picture is encoded once for all",
        "texts about it: repeat its rows beside theirs, then run the head.",
        "",
        "```python",
        code,
        "```",
        "",
        f"Loaded back, its answers differ from the run's by at most {difference:.1g} of the largest (or of 1), in float32.",
        "",
        *describe_model(encoders, tuned.folder, tuned.step, license, rows),
    ]
    return "\n".join(lines) + "\n"
