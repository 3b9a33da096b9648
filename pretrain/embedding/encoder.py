"""Encode batches one after the other; split.py and job.py embed splits and data sets with it.

A model keeps its train and eval modes, and no global random generator is drawn from.

Shapes: b = samples of a batch, m = texts, D = embedding width, P = width of a tower's pooled output, N = tokens, C = width
of a tower's tokens.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
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
    """The embeddings of a batch, on the CPU."""

    keys: list[str]
    embeddings: dict[str, Tensor]
    """By modality, L2-normalized: (b, D); of texts (m, D), the captions of each sample one after the other."""
    captions: list[list[str]]
    """All captions of each sample; empty if the batch has no text."""
    json: list[dict[str, Any]]
    """The json of each sample."""
    pooled: dict[str, Tensor]
    """By modality (b, P): the tower's pooled output in float32; empty unless requested."""
    tokens: dict[str, TokenSequence]
    """By modality: states (b, N, C) and their mask; empty unless requested."""
    present: dict[str, Tensor] = field(default_factory=dict)
    """By modality (b,) bool, whether a sample has it; what it lacks has the embedding of a blank. Empty where all have all."""


class Encoder:
    """Encodes batches, one after the other.

    On a GPU the next batch is started before the last one is waited for.

    Args:
        model: towers and projections, on `device`.
        decoders: by modality; that of text tokenizes the captions.
        device: where the towers run.
        precision: fp32, bf16 or fp16, of the towers' matrix products.
        modalities: which of the model's to encode; text means all captions of a sample.
        pooled: return the towers' pooled output too.
        tokens: return token states: "own", the tower's (b, N, C); "shared", projected (b, N, D), for towers that pool by
            the mean of their tokens. None returns none.
        dtype: of embeddings and token states; embeddings are normalized in float32 before.
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
        """Time the towers took so far, without reading, decoding and writing."""
        self._encode_texts = build_text_encoder(model, decoders, device, precision)

    def stream(self, batches: Iterable[tuple[T, Batch | None]]) -> Iterator[tuple[T, EncodedBatch | None]]:
        """Yield the encoded batches in order, each with the object that came with the batch; None stays None."""
        waiting: deque[tuple[T, Callable[[], EncodedBatch] | None]] = deque()
        ahead = 1 if self.device.type == "cuda" else 0
        for tag, batch in batches:
            waiting.append((tag, None if batch is None else self._start(batch)))
            if len(waiting) > ahead:
                tag, finish = waiting.popleft()
                yield tag, finish and finish()
        for tag, finish in waiting:
            yield tag, finish and finish()

    def _start(self, batch: Batch) -> Callable[[], EncodedBatch]:
        """Start encoding a batch and return a function that waits for the result.

        On the CPU all is done at once.
        """
        is_gpu, present = self.device.type == "cuda", batch.targets.get("present", {})  # on the CPU
        # These contexts may not span a yield: the caller's code would run in them.
        with torch.inference_mode(), _autocast(self.device, self.precision):
            if not is_gpu:
                begin = time.perf_counter()
                encoded = self._encode_batch(batch)
                encoded.present = present
                self.seconds += time.perf_counter() - begin
                return lambda: encoded
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            encoded = self._encode_batch(batch.pin_memory().to(self.device, non_blocking=True))
            encoded.present = present
            end.record()

        def finish() -> EncodedBatch:
            end.synchronize()
            self.seconds += start.elapsed_time(end) / 1000
            return encoded

        return finish

    def _encode_batch(self, batch: Batch) -> EncodedBatch:
        captions, metadata = batch.targets.get("captions", []), batch.targets.get("json", [{}] * len(batch))
        encoded = EncodedBatch(batch.keys, {}, captions, metadata, {}, {})
        for modality in self.modalities:
            if modality == "text" and any(len(texts) > 1 for texts in captions):  # workers tokenize only a sample's first
                texts = [text for texts in captions for text in texts]
                encoded.embeddings["text"] = self._encode_texts(texts, len(batch)).to(self.dtype)
                continue
            output = self.model.tower(modality)(batch.inputs[modality], batch.masks.get(modality))
            project = self.model.projection(modality)
            encoded.embeddings[modality] = _copy_to_cpu(F.normalize(project(output.pooled).float(), dim=-1), self.dtype)
            if self.pooled:
                encoded.pooled[modality] = _copy_to_cpu(output.pooled, torch.float32)
            if self.tokens:
                states = project(output.states) if self.tokens == "shared" else output.states
                copies = _copy_to_cpu(states, self.dtype), _copy_to_cpu(output.mask, torch.bool)
                encoded.tokens[modality] = TokenSequence(*copies, output.grid, encoded.embeddings[modality])
        return encoded


def _copy_to_cpu(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Start copying a tensor to the CPU, without waiting for the GPU."""
    return tensor.to(dtype).to("cpu", non_blocking=True)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode inside the block; afterwards every module has its former mode again."""
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
    """Return encode(texts, batch_size=size) -> (m, D) float32 on the CPU, L2-normalized."""

    def encode(texts: list[str], batch_size: int = size) -> Tensor:
        chunks = []
        with eval_mode(model), torch.inference_mode(), _autocast(device, precision):
            for start in range(0, len(texts), batch_size):
                ids, mask = decoders["text"].encode(texts[start : start + batch_size])
                chunks.append(_normalize(model.encode("text", ids.to(device), mask.to(device))))
        return torch.cat(chunks)

    return encode


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def _normalize(features: Tensor) -> Tensor:
    """Normalize features to unit length in float32, whatever their precision, and move them to the CPU."""
    return F.normalize(features.float(), dim=-1).cpu()
