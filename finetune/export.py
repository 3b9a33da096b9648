"""Exports a fine-tuned model as three ONNX graphs: image encoder, text encoder, fusion with head.

    image.onnx   pixel_values (b, 3, S, S) float32, normalized -> image_embeds (b, D), and what the head reads of an image
    text.onnx    input_ids, attention_mask (b, T) int64 -> text_embeds (b, D), and what the head reads of a text
    head.onnx    fusion and head: the outputs above that it depends on, attention_mask -> the task's output (b, ...)
    task.json    names of that output's columns and of the inputs and outputs of each graph
    preprocess.json, tokenizer files, README.md

There are three graphs, so that an image is encoded once for any number of texts. b is free, and T is any length up to the
tower's. If the tower attends to padding (SigLIP), T is the tower's length. All values are float32. May import
finetune.loading, finetune.tasks and pretrain.checkpoints.export.

Shapes: b = images, each with one text; N, T = tokens of image and text, C = their widths, D = width of the shared space.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from finetune import model_card
from finetune.adapt import lora
from finetune.config import FusionSchema
from finetune.context import Context
from finetune.loading import Finetuned
from finetune.model import FusionModel
from finetune.tasks import Task
from pretrain import model as encoders
from pretrain.checkpoints.export import TOLERANCE, list_errors, new_folder
from pretrain.errors import UserError
from pretrain.formats import Encoders, onnx, portable_tokenizer, unsupported
from pretrain.formats.portable_tokenizer import PROBES
from pretrain.towers import TokenSequence

TEXT_INPUTS = ["input_ids", "attention_mask"]
TOWER_OUTPUTS = ("tokens", "pooled", "embeds")
"""Outputs of a tower that a head may read: tokens (b, N, C), the pooled vector (b, P), and the embedding (b, D)."""


def export(tuned: Finetuned, folder: Path, license: str | None = None) -> Path:
    """Write the graphs into a new folder, check them against the model, and return the folder.

    Args:
        tuned: the fine-tuned model.
        folder: must not exist yet; nothing is left of it if the check fails.
        license: license of the weights, for the model card.

    Raises:
        UserError: the folder exists, the model cannot be exported, or the outputs differ.
    """
    encoders = prepare_encoders(tuned)
    if error := find_error(tuned.model, tuned.task, tuned.config, encoders):
        hint = "" if unsupported(encoders) else "; its encoders alone can be written: --format hf or open_clip"
        raise UserError(f"onnx cannot hold {error}{hint}")
    spec = tuned.task.export_spec()
    with new_folder(folder) as partial:
        onnx.check_libraries()
        graphs = _write_graphs(tuned.model, encoders, spec.feature, partial)
        task_values = {
            "task": tuned.config.task.name,
            "output": spec.feature,
            "probabilities": spec.probabilities,
            "names": spec.names,
            **spec.more,
            "logit_scale": float(tuned.model.encoder.logit_scale.detach().exp()),
            "graphs": graphs,
        }
        (partial / "task.json").write_text(json.dumps(task_values, indent=1, ensure_ascii=False))
        (partial / "preprocess.json").write_text(json.dumps(encoders.preprocess.to_open_clip(), indent=1))
        portable_tokenizer.save(encoders.text, partial)
        difference = compare(tuned, encoders, spec.feature, load_graphs(partial))
        card = model_card.render_card(tuned, encoders, task_values, folder.name, license, difference)
        (partial / "README.md").write_text(card)
    return folder


def prepare_encoders(tuned: Finetuned) -> Encoders:
    """Move the model to the CPU and return its encoders with their own preprocessing, not the task's."""
    tuned.model.to("cpu").eval()
    text = encoders.build_decoders(tuned.config, tuned.tokenizer, tuned.model.encoder, "txt")["text"]
    return Encoders(tuned.model.encoder, tuned.config, text)


def find_error(model: FusionModel, task: Task, config: FusionSchema, encoders: Encoders) -> str | None:
    """Return what the graphs cannot hold of a model, trained or not, and why; None where they hold all of it."""
    try:
        task.export_spec()
    except UserError as error:
        return f"this model: {error}"
    if "audio" in model.encoder.towers:
        return "a fine-tuned model with an audio tower"
    if reason := unsupported(encoders):
        return reason
    contexts = [] if model.fusion is None else model.fusion.contexts.values()
    if any(cast(Context, context).has_hard_selection for context in contexts):
        return (
            f"context.name={config.context.name}: which regions of an image it selects depends on the image, and the rounding "
            "of another library would select others"
        )
    return None


def describe_formats(model: FusionModel, task: Task, config: FusionSchema, tokenizer: Any) -> str:
    """Return a line that says which formats can hold the model, or its encoders alone, and why the others cannot.

    The model may be about to be trained, also with adapters: neither it nor torch's random generator changes. It must be on
    the CPU.

    Args:
        model: encoders, fusion and head.
        task: with the settings that it has learned from the data.
        config: of the model.
        tokenizer: of its texts; None = it has none.
    """
    if config.text is None:
        return "exports: no format can hold a model without text tower"
    try:
        with lora.without_adapters(model.encoder) as encoder:
            text = encoders.build_decoders(config, tokenizer, encoder, "txt")["text"]
            errors = list_errors(encoder, config, text)
            error = find_error(model, task, config, Encoders(encoder, config, text))
    except UserError as refusal:
        return f"exports: {refusal}"
    whole = "onnx can hold this model" if error is None else f"no format can hold this model: onnx cannot hold {error}"
    del errors["onnx"]  # the encoders alone are exported to the other formats
    possible = [name for name, reason in errors.items() if reason is None]
    alone = f"; {' and '.join(possible)} can hold its encoders" if possible else ""
    reasons = "".join(f"; {name} cannot hold {reason}" for name, reason in errors.items() if reason is not None)
    return f"exports: {whole}{alone}{reasons}"


# ---------------------------------------------------------------------------------------------------------------------
# The graphs


class _TowerGraph(nn.Module):
    """The tower of one modality, returning the given TOWER_OUTPUTS."""

    def __init__(self, model: FusionModel, modality: str, outputs: list[str]) -> None:
        super().__init__()
        self.model, self.modality, self.outputs = model, modality, outputs

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        tokens, embedding = self.model.tokens_and_embedding(self.modality, inputs, None if mask is None else mask.bool())
        outputs = {"tokens": tokens.states, "pooled": tokens.pooled, "embeds": cast(Tensor, embedding)}
        return tuple(outputs[name] for name in self.outputs)


class _HeadGraph(nn.Module):
    """Fusion and head as a function of the towers' outputs.

    Inputs are in the order of `names`, such as text_tokens, attention_mask.
    """

    def __init__(self, model: FusionModel, feature: str, names: list[str], grid: tuple[int, int] | None) -> None:
        super().__init__()
        self.model, self.feature, self.names, self.grid = model, feature, names, grid

    def forward(self, *values: Tensor) -> Tensor:
        """Return the task's output (b, K), or (b,) for a single number."""
        outputs = dict(zip(self.names, values, strict=True))
        mask = outputs["attention_mask"].bool() if "attention_mask" in outputs else None
        model = cast(FusionModel, _PrecomputedModel(self.model, outputs, mask, self.grid))
        inputs = dict.fromkeys(("image", "text"), values[0])  # heads only use their number of samples
        out: Tensor = self.model.head(model, inputs, {} if mask is None else {"text": mask}, {})[self.feature]
        return out[:, 0] if out.dim() == 3 else out  # (b, m, K) with one text per image


class _PrecomputedModel:
    """A view of a FusionModel whose tokens and embeddings are given instead of computed by the towers."""

    def __init__(
        self, model: FusionModel, outputs: dict[str, Tensor], mask: Tensor | None, grid: tuple[int, int] | None
    ) -> None:
        self._model, self._outputs, self._mask, self._grid = model, outputs, mask, grid

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def tokens(self, modality: str, inputs: Tensor, mask: Tensor | None = None) -> TokenSequence:
        states = self._outputs[f"{modality}_tokens"]
        pooled = self._outputs.get(f"{modality}_pooled", states[:, 0])  # missing where nothing depends on it
        if modality == "text":
            assert self._mask is not None
            return TokenSequence(states, self._mask, None, pooled)
        return TokenSequence(states, states.new_ones(states.shape[:2], dtype=torch.bool), self._grid, pooled)

    def embed(self, modality: str, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        return self._outputs[f"{modality}_embeds"]

    def tokens_and_embedding(
        self, modality: str, inputs: Tensor, mask: Tensor | None = None, embed: bool = True
    ) -> tuple[TokenSequence, Tensor | None]:
        return self.tokens(modality, inputs), self.embed(modality, inputs) if embed else None


def _write_graphs(trained: FusionModel, encoders: Encoders, feature: str, folder: Path) -> dict[str, dict[str, list[str]]]:
    """Write the three graphs; return the names of their inputs and outputs, in the order to run them."""
    model = onnx.to_exportable(trained, torch.float32)
    size = encoders.preprocess.size
    ids, shape = onnx.build_trace_ids(model.encoder.tower("text").trims, encoders.text.length)
    batch = {0: shape[0]}
    inputs = {"image": (torch.zeros(2, 3, size, size),), "text": (ids, torch.ones_like(ids))}
    names = {"image": ["pixel_values"], "text": TEXT_INPUTS}
    tower_outputs: dict[str, Tensor] = {}
    for modality in ("image", "text"):
        with torch.no_grad():
            values = _TowerGraph(model, modality, list(TOWER_OUTPUTS))(*inputs[modality])
        tower_outputs |= {f"{modality}_{name}": value for name, value in zip(TOWER_OUTPUTS, values, strict=True)}
    with torch.no_grad():
        grid = model.tokens("image", *inputs["image"]).grid
    head_inputs = _find_head_inputs(model, feature, tower_outputs, inputs["text"][1], grid)

    graphs: dict[str, dict[str, list[str]]] = {}
    for modality in ("image", "text"):
        outputs = [name for name in TOWER_OUTPUTS if name == "embeds" or f"{modality}_{name}" in head_inputs]
        output_names = [f"{modality}_{name}" for name in sorted(outputs)]  # embeds first, as in pretrain's graphs
        shapes = (batch,) if modality == "image" else (shape, shape)
        tower = _TowerGraph(model, modality, sorted(outputs))
        onnx.write_graph(tower, inputs[modality], names[modality], output_names, shapes, folder / f"{modality}.onnx")
        graphs[modality] = {"inputs": names[modality], "outputs": output_names}
    values = tower_outputs | {"attention_mask": inputs["text"][1]}
    head = _HeadGraph(model, feature, head_inputs, grid)
    head_values = tuple(values[name] for name in head_inputs)
    head_shapes = (tuple(shape if name in ("text_tokens", "attention_mask") else batch for name in head_inputs),)
    onnx.write_graph(head, head_values, head_inputs, [feature], head_shapes, folder / "head.onnx")
    graphs["head"] = {"inputs": head_inputs, "outputs": [feature]}
    return graphs


def _find_head_inputs(
    model: FusionModel, feature: str, tower_outputs: dict[str, Tensor], mask: Tensor, grid: tuple[int, int] | None
) -> list[str]:
    """Find the tower outputs that the head's output depends on, by autograd.

    With text tokens the head also needs attention_mask, which is appended.
    """
    leaves = {name: values.detach().clone().requires_grad_() for name, values in tower_outputs.items()}
    with torch.enable_grad():
        out = _HeadGraph(model, feature, [*leaves, "attention_mask"], grid)(*leaves.values(), mask)
        gradients = torch.autograd.grad(out.sum(), list(leaves.values()), allow_unused=True)
    names = [name for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None]
    return [*names, "attention_mask"] if "text_tokens" in names else names


# ---------------------------------------------------------------------------------------------------------------------
# Loading the folder without clipfuse, and comparing


def load_graphs(folder: Path) -> Callable[[Tensor, list[str]], dict[str, Tensor]]:
    """Load the graphs with onnxruntime.

    Returns a function: images (b, 3, S, S), normalized, and texts -> every output by its name.
    """
    import onnxruntime
    from transformers import AutoTokenizer

    graphs = json.loads((folder / "task.json").read_text())["graphs"]
    sessions = {
        name: onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), providers=["CPUExecutionProvider"]) for name in graphs
    }
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    fixed = isinstance(sessions["text"].get_inputs()[0].shape[1], int)

    def run(images: Tensor, texts: list[str]) -> dict[str, Tensor]:
        padding = "max_length" if fixed else True
        encoded = tokenizer(texts, padding=padding, truncation=True, return_tensors="np", return_attention_mask=True)
        values = {"pixel_values": images.numpy(), **{name: encoded[name] for name in TEXT_INPUTS}}
        for name, session in sessions.items():
            inputs = {argument.name: values[argument.name] for argument in session.get_inputs()}
            values |= dict(zip(graphs[name]["outputs"], session.run(None, inputs), strict=True))
        return {name: torch.from_numpy(values[name]) for graph in graphs.values() for name in graph["outputs"]}

    return run


@torch.no_grad()
def compare(tuned: Finetuned, encoders: Encoders, feature: str, run: Callable[..., dict[str, Tensor]]) -> float:
    """Return the largest difference between the outputs of the model and of the written graphs.

    It is relative to the largest output of the model, or to 1 if that is larger. Compared are four samples together, and the
    first one alone, whose text is shorter. Raises UserError for a difference above TOLERANCE.
    """
    size, tower = encoders.preprocess.size, encoders.image_tower
    assert tower is not None
    noise = torch.randint(0, 256, (4, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    worst = 0.0
    for count in (4, 1):
        ids, mask = encoders.text.encode(PROBES[:count])
        expected = tuned.model({"image": noise[:count], "text": ids}, {"text": mask}, {})[feature].flatten()
        outputs = run(tower.normalize(noise[:count]), PROBES[:count])[feature].flatten()
        worst = max(worst, float((expected - outputs).abs().max() / expected.abs().max().clamp(min=1)))
    if not worst <= TOLERANCE:
        raise UserError(
            f"the written graphs give other outputs than the run, by {worst:.1g}: the folder was removed; please report this"
        )
    return worst
