"""A fine-tuned model as graphs for onnxruntime: what encoders say of a picture and of a text, and what a task makes of it.

    image.onnx   pixel_values (b, 3, S, S) float32, normalised -> image_embeds (b, D), and what the head reads of a picture
    text.onnx    input_ids, attention_mask (b, T) int64 -> text_embeds (b, D), and what the head reads of a text
    head.onnx    fusion and head: what they read, attention_mask -> the task's numbers (b, ...)
    task.json    the names of those numbers, of the graphs' inputs and outputs; preprocess.json  tokenizer files  README.md

Three, so that a picture is encoded once for any number of texts about it. b is any number, T any length up to the tower's,
unless the tower attends to padding (SigLIP): then T is the tower's length. All in float32. May import inference, tasks, and
pretrain's export.

Shapes: b = pictures, each with one text; N, T = tokens of picture and text, C = their widths, D = width of the shared space.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from finetune import model_card
from finetune.context import Context
from finetune.loading import Finetuned
from finetune.model import FusionModel
from finetune.tasks import ExportSpec
from pretrain import model as encoders
from pretrain.checkpoints.export import TOLERANCE, new_folder
from pretrain.errors import UserError
from pretrain.formats import Encoders, onnx, portable_tokenizer, unsupported
from pretrain.formats.portable_tokenizer import PROBES
from pretrain.towers import TokenSequence

WORDS = ["input_ids", "attention_mask"]
PARTS = ("tokens", "pooled", "embeds")
"""What a head may read of a modality: tokens (b, N, C), the tower's one vector of them, and the embedding (b, D)."""


def export(tuned: Finetuned, folder: Path, license: str | None = None) -> Path:
    """Writes `folder`, which must not exist yet, if onnxruntime gives what the model gives. Returns it.

    Args:
        license: of the weights; the model card states it.

    Raises:
        UserError: the folder exists, or no graph can hold this model (and why).
    """
    encoders = encoders_of(tuned)
    told = _told(tuned, encoders)
    with new_folder(folder) as partial:
        onnx.check_libraries()
        graphs = _write(tuned.model, encoders, told.feature, partial)
        said = {
            "task": tuned.config.task.name,
            "output": told.feature,
            "probabilities": told.probabilities,
            "names": told.names,
            **told.more,
            "logit_scale": float(tuned.model.encoder.logit_scale.detach().exp()),
            "graphs": graphs,
        }
        (partial / "task.json").write_text(json.dumps(said, indent=1, ensure_ascii=False))
        (partial / "preprocess.json").write_text(json.dumps(encoders.preprocess.to_open_clip(), indent=1))
        portable_tokenizer.save(encoders.text, partial)
        difference = compare(tuned, encoders, told.feature, load(partial))
        (partial / "README.md").write_text(model_card.text(tuned, encoders, said, folder.name, license, difference))
    return folder


def encoders_of(tuned: Finetuned) -> Encoders:
    """What they and their preprocessing are, under whatever the task has put around it; on the CPU."""
    tuned.model.to("cpu").eval()
    text = encoders.build_decoders(tuned.config, tuned.tokenizer, tuned.model.encoder, "txt")["text"]
    return Encoders(tuned.model.encoder, tuned.config, text)


_ALONE = "its encoders alone can be written: --format hf or open_clip"


def _told(tuned: Finetuned, encoders: Encoders) -> ExportSpec:
    """What the graphs are to say. Raises UserError where none can."""
    try:
        told = tuned.task.export_spec()
    except UserError as error:
        raise UserError(f"onnx cannot hold this model: {error}; {_ALONE}") from error
    if wrong := unsupported(encoders):
        raise UserError(f"onnx cannot hold {wrong}")
    contexts = [] if tuned.model.fusion is None else tuned.model.fusion.contexts.values()
    if any(cast(Context, one).has_hard_selection for one in contexts):
        raise UserError(
            f"onnx cannot hold context.name={tuned.config.context.name}: which parts of a picture it opens depends on the "
            f"picture, and another library's rounding would open others; {_ALONE}"
        )
    return told


# ---------------------------------------------------------------------------------------------------------------------
# The graphs


class _Reads(nn.Module):
    """One modality's tower: the `outputs` of PARTS."""

    def __init__(self, model: FusionModel, modality: str, outputs: list[str]) -> None:
        super().__init__()
        self.model, self.modality, self.outputs = model, modality, outputs

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        found, embedding = self.model.read(self.modality, inputs, None if mask is None else mask.bool())
        parts = {"tokens": found.states, "pooled": found.pooled, "embeds": cast(Tensor, embedding)}
        return tuple(parts[name] for name in self.outputs)


class _Says(nn.Module):
    """Fusion and head, from what the towers said: tensors in the order of `names`, such as text_tokens, attention_mask."""

    def __init__(self, model: FusionModel, feature: str, names: list[str], grid: tuple[int, int] | None) -> None:
        super().__init__()
        self.model, self.feature, self.names, self.grid = model, feature, names, grid

    def forward(self, *given: Tensor) -> Tensor:
        """-> (b, K), or (b,) for a single number."""
        known = dict(zip(self.names, given, strict=True))
        mask = known["attention_mask"].bool() if "attention_mask" in known else None
        stand_in = cast(FusionModel, _Given(self.model, known, mask, self.grid))
        inputs = dict.fromkeys(("image", "text"), given[0])  # a head asks them for the number of samples alone
        out: Tensor = self.model.head(stand_in, inputs, {} if mask is None else {"text": mask}, {})[self.feature]
        return out[:, 0] if out.dim() == 3 else out  # (b, m, K): one text a picture


class _Given:
    """A model whose towers have spoken already; all else is the model's own."""

    def __init__(self, model: FusionModel, known: dict[str, Tensor], mask: Tensor | None, grid: tuple[int, int] | None) -> None:
        self._model, self._known, self._mask, self._grid = model, known, mask, grid

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def tokens(self, modality: str, inputs: Tensor, mask: Tensor | None = None) -> TokenSequence:
        states = self._known[f"{modality}_tokens"]
        pooled = self._known.get(f"{modality}_pooled", states[:, 0])  # left out where nothing depends on it
        if modality == "text":
            assert self._mask is not None
            return TokenSequence(states, self._mask, None, pooled)
        return TokenSequence(states, states.new_ones(states.shape[:2], dtype=torch.bool), self._grid, pooled)

    def embed(self, modality: str, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        return self._known[f"{modality}_embeds"]

    def read(
        self, modality: str, inputs: Tensor, mask: Tensor | None = None, embed: bool = True
    ) -> tuple[TokenSequence, Tensor | None]:
        return self.tokens(modality, inputs), self.embed(modality, inputs) if embed else None


def _write(given: FusionModel, encoders: Encoders, feature: str, folder: Path) -> dict[str, dict[str, list[str]]]:
    """The three files; graph -> the names of its inputs and outputs, in the order in which they can be run."""
    model = onnx.to_exportable(given, torch.float32)
    size = encoders.preprocess.size
    ids, shape = onnx.build_trace_ids(model.encoder.tower("text").trims, encoders.text.length)
    batch = {0: shape[0]}
    inputs = {"image": (torch.zeros(2, 3, size, size),), "text": (ids, torch.ones_like(ids))}
    names = {"image": ["pixel_values"], "text": WORDS}
    parts: dict[str, Tensor] = {}
    for modality in ("image", "text"):
        with torch.no_grad():
            spoken = _Reads(model, modality, list(PARTS))(*inputs[modality])
        parts |= {f"{modality}_{part}": values for part, values in zip(PARTS, spoken, strict=True)}
    with torch.no_grad():
        grid = model.tokens("image", *inputs["image"]).grid
    reads = _needed(model, feature, parts, inputs["text"][1], grid)

    graphs: dict[str, dict[str, list[str]]] = {}
    for modality in ("image", "text"):
        outputs = [part for part in PARTS if part == "embeds" or f"{modality}_{part}" in reads]
        said = [f"{modality}_{part}" for part in sorted(outputs)]  # embeds first, as in pretrain's graphs
        shapes = (batch,) if modality == "image" else (shape, shape)
        tower = _Reads(model, modality, sorted(outputs))
        onnx.write_graph(tower, inputs[modality], names[modality], said, shapes, folder / f"{modality}.onnx")
        graphs[modality] = {"inputs": names[modality], "outputs": said}
    known = parts | {"attention_mask": inputs["text"][1]}
    free = {name: shape if name in ("text_tokens", "attention_mask") else batch for name in reads}
    head = _Says(model, feature, reads, grid)
    onnx.write_graph(head, tuple(known[n] for n in reads), reads, [feature], (tuple(free[n] for n in reads),), folder / "head.onnx")
    graphs["head"] = {"inputs": reads, "outputs": [feature]}
    return graphs


def _needed(
    model: FusionModel, feature: str, parts: dict[str, Tensor], mask: Tensor, grid: tuple[int, int] | None
) -> list[str]:
    """The parts that the head's answer depends on, and the mask where words are among them: asked of autograd."""
    leaves = {name: values.detach().clone().requires_grad_() for name, values in parts.items()}
    with torch.enable_grad():
        out = _Says(model, feature, [*leaves, "attention_mask"], grid)(*leaves.values(), mask)
        found = torch.autograd.grad(out.sum(), list(leaves.values()), allow_unused=True)
    reads = [name for name, gradient in zip(leaves, found, strict=True) if gradient is not None]
    return [*reads, "attention_mask"] if "text_tokens" in reads else reads


# ---------------------------------------------------------------------------------------------------------------------
# Loading, as a stranger would


def load(folder: Path) -> Callable[[Tensor, list[str]], dict[str, Tensor]]:
    """What onnxruntime makes of the folder: (images (b, 3, S, S) normalised, texts) -> every output by its name."""
    import onnxruntime
    from transformers import AutoTokenizer

    graphs = json.loads((folder / "task.json").read_text())["graphs"]
    sessions = {
        name: onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), providers=["CPUExecutionProvider"]) for name in graphs
    }
    tokenizer = AutoTokenizer.from_pretrained(folder)
    fixed = isinstance(sessions["text"].get_inputs()[0].shape[1], int)

    def run(images: Tensor, texts: list[str]) -> dict[str, Tensor]:
        padding = "max_length" if fixed else True
        made = tokenizer(texts, padding=padding, truncation=True, return_tensors="np", return_attention_mask=True)
        known = {"pixel_values": images.numpy(), **{name: made[name] for name in WORDS}}
        for name, session in sessions.items():
            wanted = {one.name: known[one.name] for one in session.get_inputs()}
            known |= dict(zip(graphs[name]["outputs"], session.run(None, wanted), strict=True))
        return {name: torch.from_numpy(known[name]) for graph in graphs.values() for name in graph["outputs"]}

    return run


@torch.no_grad()
def compare(tuned: Finetuned, encoders: Encoders, feature: str, run: Callable[..., dict[str, Tensor]]) -> float:
    """The largest difference between our numbers and those of the written folder, in units of the largest of ours, or of 1:
    of four samples together, and of the first, which is shorter, alone.

    Raises UserError beyond TOLERANCE.
    """
    size, tower = encoders.preprocess.size, encoders.image_tower
    assert tower is not None
    noise = torch.randint(0, 256, (4, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    worst = 0.0
    for count in (4, 1):
        ids, mask = encoders.text.encode(PROBES[:count])
        ours = tuned.model({"image": noise[:count], "text": ids}, {"text": mask}, {})[feature].flatten()
        theirs = run(tower.normalize(noise[:count]), PROBES[:count])[feature].flatten()
        worst = max(worst, float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1)))
    if not worst <= TOLERANCE:
        raise UserError(
            f"what was written gives other answers than the run, by {worst:.1g}: nothing was kept; please report it"
        )
    return worst
