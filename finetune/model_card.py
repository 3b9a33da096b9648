"""The model card of an exported fine-tuned model: README.md in the folder that export.py writes."""

from __future__ import annotations

from typing import Any

from finetune.loading import Finetuned
from pretrain.formats import Encoders
from pretrain.formats.model_card import OPENING_CODE, RESIZE_CODE, describe_model
from pretrain.printable import format_count

LOADING = """import json
from pathlib import Path
import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from transformers import AutoTokenizer

{opening}
folder = Path("{name}")
task, preprocess = (json.loads((folder / f"{{file}}.json").read_text()) for file in ("task", "preprocess"))
S = preprocess["size"]
picture = open_picture("picture.jpg")
{resize}
pixels = (np.asarray(picture, np.float32) / 255 - np.float32(preprocess["mean"])) / np.float32(preprocess["std"])
tokens = AutoTokenizer.from_pretrained(folder)(["{text}"], padding={padding}, truncation=True, return_tensors="np")
values = {{"pixel_values": pixels.transpose(2, 0, 1)[None], **tokens}}
for graph, names in task["graphs"].items():
    session = onnxruntime.InferenceSession(f"{{folder}}/{{graph}}.onnx")
    outputs = session.run(None, {{arg.name: values[arg.name] for arg in session.get_inputs()}})
    values.update(zip(names["outputs"], outputs))
{print}"""
PRINT = {
    "answer": 'print(task["names"][values[task["output"]][0].argmax()])',
    "sum": """similarity = (values["image_embeds"] * values["text_embeds"]).sum(axis=1)
print(values[task["output"]] + task["logit_scale"] * similarity)  # score that orders pairs; not a probability""",
    "matching": 'print(1 / (1 + np.exp(-values[task["output"]])))  # probability that image and text match',
}


def describe_output(task_values: dict[str, Any]) -> str:
    """Describe the output of the head, and how to turn it into probabilities or into a score."""
    if task_values.get("score") == "sum":
        return f"{task_values['output']}; plus logit_scale times the cosine of the embeddings it is the score that orders pairs"
    return f"{task_values['output']}; {task_values['probabilities']} turns it into probabilities"


def render_card(
    tuned: Finetuned, encoders: Encoders, task_values: dict[str, Any], name: str, license: str | None, difference: float
) -> str:
    """Render the model card as Markdown.

    Args:
        tuned: the exported model.
        encoders: its encoders and their preprocessing.
        task_values: the content of task.json.
        name: name of the exported folder.
        license: license of the weights; None = unknown.
        difference: largest difference of an output, measured when the folder was written.
    """
    preprocess, task = encoders.preprocess, task_values["task"]
    fusion = tuned.config.fusion
    code = LOADING.format(
        name=name,
        opening=OPENING_CODE,
        resize=RESIZE_CODE[preprocess.resize].format(how=preprocess.interpolation.upper(), color=preprocess.pad_color),
        text="how many cars are there?" if tuned.task.text_is_question else "a red car",
        padding=repr("max_length" if not tuned.model.encoder.tower("text").trims else True),
        print=PRINT["answer" if task_values["names"] else task_values.get("score", "matching")],
    )
    rows = [
        ("task", task),
        ("fusion", None if fusion is None else f"{fusion.name}, {format_count(fusion.layers, 'layer')}"),
        ("context", None if fusion is None else tuned.config.context.name),
        ("answers", f"{len(task_values['names']):,}, named in task.json" if task_values["names"] else None),
        ("output", describe_output(task_values)),
        *(
            (f"{graph}.onnx", f"{', '.join(names['inputs'])} → {', '.join(names['outputs'])}")
            for graph, names in task_values["graphs"].items()
        ),
    ]
    result = "were equal to the run's, bit for bit"
    if difference:
        result = f"differed from the run's by at most {difference:.1g} of the largest of them (or of 1)"
    lines = [
        "---",
        f"license: {license or 'unknown'}",
        "library_name: onnx",
        f"tags: [clipfuse, {task}]",
        "---",
        f"# {name}",
        "",
        f"Image and text encoders, fine-tuned together for {task} with clipfuse. An image is encoded once for any number of",
        "texts: repeat its rows for each text, then run the head.",
        "",
        "```python",
        code,
        "```",
        "",
        f"When they were written, the graphs were loaded: on test images and texts their float32 outputs {result}.",
        "",
        *describe_model(encoders, tuned.folder, tuned.step, license, rows),
    ]
    return "\n".join(lines) + "\n"
