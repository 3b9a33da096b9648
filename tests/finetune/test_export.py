"""Graphs of fine-tuned models: onnxruntime alone answers as the model does, in any batch, at any length of text.

A case costs 10 seconds of tracing; cross-attention on dense tokens is the one that the command is tried on.
"""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor

import finetune
from finetune import export
from finetune import model as models
from finetune.config import FusionSchema
from finetune.loading import Finetuned
from launch import cli
from pretrain import config as configuration
from pretrain import model as encoders
from pretrain import registry
from pretrain.data.text import load_tokenizer
from pretrain.errors import UserError
from tests.support import ROOT, TINY_TOWERS, Small

ANSWERS = "task.answers=[red, green, blue, two]"
CLASSES = "task.classes=[a, b, c]"
CASES = {
    "retrieval, merged, pooled": [
        "task.name=retrieval", "fusion.name=merged", "fusion.inner=16", "context.name=pooled", "context.latents=3",
        "context.heads=2", "text.pool=avg",
    ],
    "classification, co, local": [
        "task.name=classification", "task.text=txt", CLASSES, "fusion.name=co", "context.name=local", "context.window=3",
        "image.args.patch_size=8",
    ],
    "classification, embeddings": ["task.name=classification", CLASSES, "task.labels=multi", "fusion=null"],
}  # fmt: skip
TEXTS = ["what colour is the box?", "two red balls", "a", "left of a house on the grass, under a tree"]


def fresh(small: Small, *settings: str) -> Finetuned:
    """A model of random weights, gates too, which are 0 at the start."""
    layers = [] if "fusion=null" in settings else ["fusion.layers=1", "fusion.heads=2"]
    words = [f"text.tokenizer={small.tokenizer}", *TINY_TOWERS, *layers, *settings]
    values = configuration.load_values(ROOT / "configs/pretrain/scenes.yaml", words)
    config = configuration.build(FusionSchema, values, "test", partial=True)
    tokenizer = load_tokenizer(str(small.tokenizer))
    torch.manual_seed(0)
    encoder = encoders.build(encoders.tower_configs(config), config.model, tokenizer)
    task = registry.get_component("tasks", config.task.name).build(config.task, None)
    model = models.build(encoder, config.fusion, config.context, config.tokens)
    model.head = task.build_head(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    decoders = task.build_decoders(encoders.build_decoders(config, tokenizer, encoder, "txt"))
    return Finetuned(model.eval(), task, config, tokenizer, decoders, Path("none"), 0)


def run(folder: Path, graph: str, known: dict[str, Any]) -> dict[str, Any]:
    """One graph by onnxruntime, its inputs and outputs by the names in the file."""
    session = onnxruntime.InferenceSession(folder / f"{graph}.onnx", providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    return dict(zip(names, session.run(None, {one.name: known[one.name] for one in session.get_inputs()}), strict=True))


def pictures(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def prepared(folder: Path, images: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Any]:
    recipe = json.loads((folder / "preprocess.json").read_text())
    mean, std = (np.float32(recipe[name]).reshape(3, 1, 1) for name in ("mean", "std"))
    return {
        "pixel_values": (images.numpy().astype(np.float32) / 255 - mean) / std,
        "input_ids": ids.numpy(),
        "attention_mask": mask.numpy().astype(np.int64),
    }


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_onnxruntime_answers_as_the_model_does(case: str, small: Small, tmp_path: Path) -> None:
    tuned = fresh(small, *CASES[case])
    folder = export.export(tuned, tmp_path / "out")
    told = json.loads((folder / "task.json").read_text())
    feature = "match" if case.startswith("retrieval") else "logits"
    assert told["output"] == feature
    encode = encoders.build_decoders(tuned.config, tuned.tokenizer, tuned.model.encoder, "txt")["text"].encode
    answers = []
    for texts in (TEXTS, TEXTS[1:2]):  # two batches, two lengths
        ids, mask = encode(texts)
        images = pictures(len(texts))
        known = prepared(folder, images, ids, mask)
        for graph in ("image", "text", "head"):
            known |= run(folder, graph, known)
        ours = tuned.model({"image": images, "text": ids}, {"text": mask}, {})[feature]
        torch.testing.assert_close(torch.from_numpy(known[feature]), ours, atol=1e-5, rtol=1e-5)
        for modality, given in (("image", (images,)), ("text", (ids, mask))):
            found = torch.from_numpy(known[f"{modality}_embeds"])
            torch.testing.assert_close(found, tuned.model.encoder.encode(modality, *given), atol=1e-5, rtol=0)
        answers.append(ours)
    assert answers[0].flatten(1).std(dim=0).min() > 1e-3 if answers[0].dim() > 1 else answers[0].std() > 1e-3
    head = ["image_embeds"] if "embeddings" in case else ["image_tokens", "text_tokens", "attention_mask"]
    assert told["graphs"]["head"]["inputs"] == head  # what its answer depends on, no more
    if feature == "match":  # one picture, encoded once, and three texts about it
        ids, mask = encode(TEXTS[:3])
        known = prepared(folder, pictures(1), ids, mask)
        once = {name: np.repeat(values, 3, axis=0) for name, values in run(folder, "image", known).items()}
        found = run(folder, "head", known | run(folder, "text", known) | once)[feature]
        ours = tuned.model({"image": pictures(1).expand(3, -1, -1, -1), "text": ids}, {"text": mask}, {})[feature]
        torch.testing.assert_close(torch.from_numpy(found), ours, atol=1e-5, rtol=1e-5)
    assert isinstance(tuned.model.head.out, torch.nn.Linear)
    tuned.model.head.out.bias.add_(1e-2)  # now they are another model's graphs
    with pytest.raises(UserError, match=r"gives other answers than the run, by 0\.0"):
        export.compare(tuned, export.prepare_encoders(tuned), feature, export.load_graphs(folder))


def test_what_no_graph_can_hold_is_said_before_anything_is_written(small: Small, tmp_path: Path) -> None:
    for settings, said in (
        (["task.name=vqa", ANSWERS, "context.name=coarse_to_fine"], "context.name=coarse_to_fine"),
        (["task.name=captioning", "fusion.causal=true"], "captioning does not answer in one pass"),
        (["task.name=classification", CLASSES, "fusion=null", "task.pictures=[a.jpg, b.jpg]"], "compares two pictures"),
    ):
        with pytest.raises(UserError, match=f"^onnx cannot hold .*{said}.*; its encoders alone can be written: --format hf"):
            export.export(fresh(small, *settings), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command_and_the_cards_own_words(small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A trained run of questions: what the card says to type answers as the run does; hf writes its encoders alone."""
    assert cli.main(["pretrain", "scenes", *small.settings(in_tmp / "first", "train.steps=1")]) == 0
    tuning = small.settings(in_tmp / "vqa", "init=first", "train.steps=3", "fusion.layers=1", "fusion.heads=2")
    kept = [word for word in tuning if not word.startswith(("image.", "text.", "model."))]
    assert cli.main(["finetune", "vqa", *kept]) == 0
    capsys.readouterr()
    assert cli.main(["export", "vqa", "out", "--format", "onnx", "--license", "cc0-1.0"]) == 0
    assert capsys.readouterr().out.splitlines() == ["wrote out"]
    card = Path("out/README.md").read_text()
    assert card.startswith("---\nlicense: cc0-1.0\n")
    for said in ("| task | vqa |", "steps | 3 of 16", "head.onnx | image_tokens, text_tokens, attention_mask → logits"):
        assert said in card, said

    Image.effect_mandelbrot((60, 48), (-2, -1, 1, 1), 50).convert("RGB").save("picture.png")
    spoken, typed = io.StringIO(), card.split("```python\n")[1].split("```")[0].replace("picture.jpg", "picture.png")
    said_there: dict[str, Any] = {}
    with contextlib.redirect_stdout(spoken):
        exec(typed, said_there)
    tuned = finetune.load("vqa")
    answers = dict(tuned.predict([Path("picture.png").read_bytes()], ["what colour is the car?"], top=10_000).best[0])
    names, logits = said_there["told"]["names"], torch.from_numpy(said_there["known"]["logits"][0])
    assert spoken.getvalue().strip() == names[logits.argmax()]
    assert dict(zip(names, logits.softmax(0).tolist(), strict=True)) == pytest.approx(answers, abs=1e-3)  # another resizing

    assert cli.main(["export", "vqa", "out", "--format", "onnx"]) == 1
    assert "out exists already" in capsys.readouterr().err
    assert cli.main(["export", "vqa", "hf", "--format", "hf"]) == 0
    assert "the encoders alone: hf has no place for the fusion" in capsys.readouterr().out
