"""Batches -> embeddings, one batch after the other: what whole splits (embed.py) and whole collections (collection.py) go
through.

The model's train and eval modes are left as they were found, and no global random generator is drawn from.

Shapes: b = samples of a batch, m = texts, D = embedding width, P = width of a tower's pooled output, N = tokens, C = their
width.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.data.loader import Batch
from pretrain.model import DualEncoder
from pretrain.towers import TokenSequence

T = TypeVar("T")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class EncodedBatch:
    """A batch in the shared space, on the CPU."""

    keys: list[str]
    rows: dict[str, Tensor]
    """By modality, L2-normalised: (b, D); of texts (m, D), those of a sample's captions one after the other."""
    captions: list[list[str]]
    """All captions of each sample; empty where there is no text."""
    json: list[dict[str, Any]]
    """The json of each sample."""
    pooled: dict[str, Tensor]
    """By modality (b, P): the tower's own output in float32; empty where it was not asked for."""
    tokens: dict[str, TokenSequence]
    """By modality: states (b, N, C) and their mask; empty where they were not asked for."""


class Encoder:
    """Batches -> EncodedBatch, one after the other. On a GPU the next batch is under way before the last one is waited for.

    Args:
        modalities: which of the model's; text: all captions of a sample.
        pooled: keep the towers' own pooled output too.
        tokens: keep token states: "own", the tower's (b, N, C); "shared", projected (b, N, D), of towers that pool by the
            mean of their tokens. None keeps none.
        dtype: of rows and token states; they are normalised in float32 before.
    """

    def __init__(
        self,
        model: DualEncoder,
        decoders: Mapping[str, Any],
        device: torch.device,
        precision: str = "fp32",
        modalities: Sequence[str] = ("image", "text"),
        pooled: bool = False,
        tokens: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model, self.device, self.precision, self.dtype = model, device, precision, dtype
        self.modalities, self.pooled, self.tokens = modalities, pooled, tokens
        self.seconds = 0.0
        """What the towers took so far, reading, decoding and writing left out."""
        self._encode = build_text_encoder(model, decoders, device, precision)

    def stream(self, batches: Iterable[tuple[T, Batch | None]]) -> Iterator[tuple[T, EncodedBatch | None]]:
        """Anything that comes with a batch leaves with it, in order; None stays None."""
        waiting: deque[tuple[T, Callable[[], EncodedBatch] | None]] = deque()
        ahead = 1 if self.device.type == "cuda" else 0
        for tag, batch in batches:
            waiting.append((tag, None if batch is None else self._begin(batch)))
            if len(waiting) > ahead:
                tag, finish = waiting.popleft()
                yield tag, finish and finish()
        for tag, finish in waiting:
            yield tag, finish and finish()

    def _begin(self, batch: Batch) -> Callable[[], EncodedBatch]:
        """Starts a batch; the function waits for its end. On the CPU all is done at once."""
        gpu = self.device.type == "cuda"
        # Not around a yield: what the caller does meanwhile is its own.
        with torch.inference_mode(), _autocast(self.device, self.precision):
            if not gpu:
                begin = time.perf_counter()
                out = self._encoded(batch)
                self.seconds += time.perf_counter() - begin
                return lambda: out
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            out = self._encoded(batch.pin_memory().to(self.device, non_blocking=True))
            end.record()

        def finish() -> EncodedBatch:
            end.synchronize()
            self.seconds += start.elapsed_time(end) / 1000
            return out

        return finish

    def _encoded(self, batch: Batch) -> EncodedBatch:
        out = EncodedBatch(
            batch.keys, {}, batch.targets.get("captions", []), batch.targets.get("json", [{}] * len(batch)), {}, {}
        )
        for modality in self.modalities:
            if modality == "text" and any(len(own) > 1 for own in out.captions):  # the workers tokenized the first of each
                out.rows["text"] = self._encode([text for own in out.captions for text in own], len(batch)).to(self.dtype)
                continue
            found = self.model.tower(modality)(batch.inputs[modality], batch.masks.get(modality))
            project = self.model.projection(modality)
            out.rows[modality] = self._brought(F.normalize(project(found.pooled).float(), dim=-1), self.dtype)
            if self.pooled:
                out.pooled[modality] = self._brought(found.pooled, torch.float32)
            if self.tokens:
                states = project(found.states) if self.tokens == "shared" else found.states
                brought = self._brought(states, self.dtype), self._brought(found.mask, torch.bool)
                out.tokens[modality] = TokenSequence(*brought, found.grid, out.rows[modality])
        return out

    def _brought(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """To the CPU, without waiting for the GPU."""
        return tensor.to(dtype).to("cpu", non_blocking=True)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode inside; afterwards each module is in the mode it was in, frozen ones too."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def build_text_encoder(
    model: DualEncoder, decoders: Mapping[str, Any], device: torch.device, precision: str = "fp32", size: int = 256
) -> Callable[..., Tensor]:
    """(texts, texts at a time) -> (m, D) float32 on the CPU, L2-normalised: sentences in the shared space."""

    def encode(texts: list[str], at_once: int = size) -> Tensor:
        rows = []
        with eval_mode(model), torch.inference_mode(), _autocast(device, precision):
            for start in range(0, len(texts), at_once):
                ids, mask = decoders["text"].encode(texts[start : start + at_once])
                rows.append(_rows(model.encode("text", ids.to(device), mask.to(device))))
        return torch.cat(rows)

    return encode


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def _rows(features: Tensor) -> Tensor:
    """Unit length in float32 whatever the precision they came in, on the CPU."""
    return F.normalize(features.float(), dim=-1).cpu()
