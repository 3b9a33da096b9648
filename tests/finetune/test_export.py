"""Exported graphs give the outputs of the fine-tuned model, for any batch size and text length.

Each case takes 10 seconds of tracing. The test of the command covers cross-attention on dense tokens.
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
from finetune.adapt import lora
from finetune.config import FusionSchema
from finetune.loading import Finetuned
from launch import cli
from pretrain import config as configuration
from pretrain import model as encoders
from pretrain import registry
from pretrain.data.text import load_tokenizer
from pretrain.errors import UserError
from tests.support import ONE_BLOCK, ROOT, TINY_TOWERS, Small

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
TEXTS = ["what color is the box?", "two red balls", "a", "left of a house on the grass, under a tree"]


def build_tuned(small: Small, *settings: str) -> Finetuned:
    """Build a model with random weights, also in layers that are initialized with zeros."""
    layers = [] if "fusion=null" in settings else ["fusion.layers=1", "fusion.heads=2"]
    arguments = [f"text.tokenizer={small.tokenizer}", *TINY_TOWERS, *ONE_BLOCK, *layers, *settings]
    values = configuration.load_values(ROOT / "configs/pretrain/scenes.yaml", arguments)
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


def run_graph(folder: Path, graph: str, values: dict[str, Any]) -> dict[str, Any]:
    """Run one graph with onnxruntime; inputs and outputs have the names in its file."""
    session = onnxruntime.InferenceSession(folder / f"{graph}.onnx", providers=["CPUExecutionProvider"])
    inputs = {argument.name: values[argument.name] for argument in session.get_inputs()}
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, inputs), strict=True))


def random_images(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def prepare_values(folder: Path, images: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Any]:
    preprocess = json.loads((folder / "preprocess.json").read_text())
    mean, std = (np.float32(preprocess[name]).reshape(3, 1, 1) for name in ("mean", "std"))
    return {
        "pixel_values": (images.numpy().astype(np.float32) / 255 - mean) / std,
        "input_ids": ids.numpy(),
        "attention_mask": mask.numpy().astype(np.int64),
    }


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_onnxruntime_gives_the_outputs_of_the_model(case: str, small: Small, tmp_path: Path) -> None:
    tuned = build_tuned(small, *CASES[case])
    folder = export.export(tuned, tmp_path / "out")
    task_values = json.loads((folder / "task.json").read_text())
    feature = "match" if case.startswith("retrieval") else "logits"
    assert task_values["output"] == feature
    encode = encoders.build_decoders(tuned.config, tuned.tokenizer, tuned.model.encoder, "txt")["text"].encode
    outputs = []
    for texts in (TEXTS, TEXTS[1:2]):  # two batch sizes, two text lengths
        ids, mask = encode(texts)
        images = random_images(len(texts))
        values = prepare_values(folder, images, ids, mask)
        for graph in ("image", "text", "head"):
            values |= run_graph(folder, graph, values)
        expected = tuned.model({"image": images, "text": ids}, {"text": mask}, {})[feature]
        torch.testing.assert_close(torch.from_numpy(values[feature]), expected, atol=1e-5, rtol=1e-5)
        for modality, arguments in (("image", (images,)), ("text", (ids, mask))):
            embedding = torch.from_numpy(values[f"{modality}_embeds"])
            torch.testing.assert_close(embedding, tuned.model.encoder.encode(modality, *arguments), atol=1e-5, rtol=0)
        outputs.append(expected)
    assert outputs[0].flatten(1).std(dim=0).min() > 1e-3 if outputs[0].dim() > 1 else outputs[0].std() > 1e-3
    head = ["image_embeds"] if "embeddings" in case else ["image_tokens", "text_tokens", "attention_mask"]
    assert task_values["graphs"]["head"]["inputs"] == head  # only what its output depends on
    if feature == "match":  # one image, encoded once, and three texts
        ids, mask = encode(TEXTS[:3])
        values = prepare_values(folder, random_images(1), ids, mask)
        repeated = {name: np.repeat(array, 3, axis=0) for name, array in run_graph(folder, "image", values).items()}
        output = run_graph(folder, "head", values | run_graph(folder, "text", values) | repeated)[feature]
        expected = tuned.model({"image": random_images(1).expand(3, -1, -1, -1), "text": ids}, {"text": mask}, {})[feature]
        torch.testing.assert_close(torch.from_numpy(output), expected, atol=1e-5, rtol=1e-5)
    assert isinstance(tuned.model.head.out, torch.nn.Linear)
    tuned.model.head.out.bias.add_(1e-2)  # the graphs now differ from the model
    with pytest.raises(UserError, match=r"give other outputs than the run, by 0\.0"):
        export.compare(tuned, export.prepare_encoders(tuned), feature, export.load_graphs(folder))


def test_models_that_cannot_be_exported_are_refused_before_anything_is_written(small: Small, tmp_path: Path) -> None:
    for settings, message in (
        (["task.name=vqa", ANSWERS, "context.name=coarse_to_fine"], "context.name=coarse_to_fine"),
        (["task.name=captioning", "fusion.causal=true"], "captioning does not answer in one pass"),
        (["task.name=classification", CLASSES, "fusion=null", "task.pictures=[a.jpg, b.jpg]"], "compares two images"),
    ):
        tuned = build_tuned(small, *settings)
        with pytest.raises(UserError, match=f"^onnx cannot hold .*{message}.*; its encoders alone can be written: --format hf"):
            export.export(tuned, tmp_path / "out")
        line = export.describe_formats(tuned.model, tuned.task, tuned.config, tuned.tokenizer)  # it is said before training
        assert line.startswith("exports: no format can hold this model: onnx cannot hold ")
        assert message in line
        assert line.endswith("; hf and open_clip can hold its encoders")
    assert not list(tmp_path.iterdir())


def test_what_can_be_exported_is_known_before_training_and_changes_nothing(small: Small) -> None:
    """Also with adapters, which exports do not hold: checkpoints have them merged."""
    tuned = build_tuned(small, "task.name=vqa", ANSWERS)
    lora.inject_adapters(tuned.model.encoder.tower("image"), lora.LoraConfig(rank=2))
    tuned.model.train()
    before = {name: id(value) for name, value in [*tuned.model.named_modules(), *tuned.model.named_parameters()]}
    training = {name: module.training for name, module in tuned.model.named_modules()}
    generator = torch.get_rng_state()
    line = export.describe_formats(tuned.model, tuned.task, tuned.config, tuned.tokenizer)
    assert line == "exports: onnx can hold this model; hf and open_clip can hold its encoders"
    assert {name: id(value) for name, value in [*tuned.model.named_modules(), *tuned.model.named_parameters()]} == before
    assert {name: module.training for name, module in tuned.model.named_modules()} == training
    assert torch.equal(torch.get_rng_state(), generator)


def test_the_command_and_the_code_in_the_model_card(small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The code in the model card of a VQA run gives the answers of the run; hf exports the encoders alone."""
    assert cli.main(["pretrain", "scenes", *small.settings(in_tmp / "first", "train.steps=1")]) == 0
    arguments = small.settings(in_tmp / "vqa", "init=first", "train.steps=3", "fusion.layers=1", "fusion.heads=2")
    arguments = [argument for argument in arguments if not argument.startswith(("image.", "text.", "model."))]
    assert cli.main(["finetune", "vqa", *arguments]) == 0
    assert "exports: onnx can hold this model; hf and open_clip can hold its encoders\n" in capsys.readouterr().err
    assert cli.main(["export", "vqa", "out", "--format", "onnx", "--license", "cc0-1.0"]) == 0
    assert capsys.readouterr().out.splitlines() == ["wrote out"]
    card = Path("out/README.md").read_text()
    assert card.startswith("---\nlicense: cc0-1.0\n")
    for line in ("| task | vqa |", "steps | 3 of 16", "head.onnx | image_tokens, text_tokens, attention_mask → logits"):
        assert line in card, line

    Image.effect_mandelbrot((60, 48), (-2, -1, 1, 1), 50).convert("RGB").save("picture.png")
    printed, code = io.StringIO(), card.split("```python\n")[1].split("```")[0].replace("picture.jpg", "picture.png")
    variables: dict[str, Any] = {}
    with contextlib.redirect_stdout(printed):
        exec(code, variables)
    tuned = finetune.load("vqa")
    answers = dict(tuned.predict([Path("picture.png").read_bytes()], ["how many cars are there?"], top=10_000).best[0])
    names, logits = variables["task"]["names"], torch.from_numpy(variables["values"]["logits"][0])
    assert printed.getvalue().strip() == names[logits.argmax()]
    probabilities = dict(zip(names, logits.softmax(0).tolist(), strict=True))
    assert probabilities == pytest.approx(answers, abs=1e-3)  # the card resizes with another library

    assert cli.main(["export", "vqa", "out", "--format", "onnx"]) == 1
    assert "out exists already" in capsys.readouterr().err
    assert cli.main(["export", "vqa", "hf", "--format", "hf"]) == 0
    assert "the encoders alone: hf has no place for the fusion" in capsys.readouterr().out
