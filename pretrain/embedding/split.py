"""Embed a split in memory: every process encodes its part of the samples, each sample once.

Shapes: n = images, m = captions, D = embedding width, P = width of the image tower's pooled output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor

from pretrain.data.loader import Batch
from pretrain.embedding.encoder import Encoder, build_text_encoder, eval_mode
from pretrain.model import DualEncoder
from pretrain.runtime import distributed
from pretrain.runtime.agree import on_all

__all__ = ["EmbeddedSplit", "build_text_encoder", "embed_split", "eval_mode"]


@dataclass
class EmbeddedSplit:
    """A split in the shared space, float32 on the CPU.

    On ranks other than 0, only the samples of that rank.
    """

    image: Tensor
    """(n, D), L2-normalized."""
    text: Tensor
    """(m, D), L2-normalized; (0, D) if texts were not requested."""
    image_index: Tensor
    """(m,) int64: the row of `image` that each caption describes."""
    pooled: Tensor
    """(n, P) the image tower's pooled output, before projection; (n, 0) if it was not requested."""
    keys: list[str]
    """n sample keys, shard/KEY."""
    captions: list[str]
    """m captions as written."""
    labels: list[Any]
    """n classes from the samples' json; None where a sample has none."""


def embed_split(
    model: DualEncoder,
    batches: Iterable[Batch],
    decoders: Mapping[str, Any],
    device: torch.device,
    precision: str = "fp32",
    texts: bool = True,
    pooled: bool = False,
    label: str = "label",
) -> EmbeddedSplit:
    """Encode every sample of `batches`; rank 0 gets the whole split, in rank order. Collective.

    Args:
        model: on `device`.
        batches: this rank's, with images, targets["captions"] (a list of captions per sample) and, for classes,
            targets["json"].
        decoders: by modality; that of text tokenizes the captions.
        device: where the towers run.
        precision: fp32, bf16 or fp16, of the towers' matrix products.
        texts: encode all captions too.
        pooled: return the image tower's pooled output too.
        label: field of the json with a sample's class.

    Raises:
        UserError: on every rank, if one rank cannot read its samples.
    """
    local = on_all(lambda: _embed_local(model, batches, decoders, device, precision, texts, pooled, label))
    return local if distributed.world_size() == 1 else _gather(local)


def _embed_local(
    model: DualEncoder,
    batches: Iterable[Batch],
    decoders: Mapping[str, Any],
    device: torch.device,
    precision: str,
    texts: bool,
    pooled: bool,
    label: str,
) -> EmbeddedSplit:
    """Encode the samples of this rank."""
    images: list[Tensor] = []
    pooled_outputs: list[Tensor] = []
    text_embeddings: list[Tensor] = []
    image_index: list[int] = []
    captions: list[str] = []
    keys: list[str] = []
    labels: list[Any] = []
    encoder = Encoder(model, decoders, device, precision, ("image", "text") if texts else ("image",), pooled=pooled)
    with eval_mode(model):
        for _, batch in encoder.stream((None, batch) for batch in batches):
            assert batch is not None
            images.append(batch.embeddings["image"])
            if pooled:
                pooled_outputs.append(batch.pooled["image"])
            if texts:
                image_index += [len(keys) + i for i, of_sample in enumerate(batch.captions) for _ in of_sample]
                captions += [caption for of_sample in batch.captions for caption in of_sample]
                text_embeddings.append(batch.embeddings["text"])
            keys += batch.keys
            labels += [json.get(label) for json in batch.json]
    # Concatenated outside inference mode, these are ordinary tensors again, which the linear probe may compute with.
    width = images[0].shape[1] if images else 0
    return EmbeddedSplit(
        image=_concatenate(images, width),
        text=_concatenate(text_embeddings, width),
        image_index=torch.tensor(image_index, dtype=torch.int64),
        pooled=_concatenate(pooled_outputs, 0) if pooled_outputs else torch.zeros(len(keys), 0),
        keys=keys,
        captions=captions,
        labels=labels,
    )


def _concatenate(tensors: list[Tensor], width: int) -> Tensor:
    return torch.cat(tensors) if tensors else torch.zeros(0, width)


# ---------------------------------------------------------------------------------------------------------------------
# Gathering from several processes


def _gather(local: EmbeddedSplit) -> EmbeddedSplit:
    """Return the samples of all ranks, in rank order, on rank 0, and `local` on the others. Collective."""
    image, text, pooled = _gather_rows(local.image), _gather_rows(local.text), _gather_rows(local.pooled)
    gathered = distributed.gather_objects((local.image_index.tolist(), local.keys, local.captions, local.labels))
    if not distributed.is_main():
        return local
    image_index: list[int] = []
    keys: list[str] = []
    captions: list[str] = []
    labels: list[Any] = []
    for rank_image_index, rank_keys, rank_captions, rank_labels in gathered:
        image_index += [len(keys) + row for row in rank_image_index]
        keys, captions, labels = keys + rank_keys, captions + rank_captions, labels + rank_labels
    return EmbeddedSplit(image, text, torch.tensor(image_index, dtype=torch.int64), pooled, keys, captions, labels)


def _gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of every rank, in rank order, on rank 0.

    Ranks may hold different numbers of rows, or none.
    """
    shapes = distributed.gather_objects(tuple(rows.shape))
    width = max(shape[1] for shape in shapes)
    if distributed.rank() > 0:
        if len(rows) and width:
            td.send(rows.contiguous(), dst=0)
        return rows
    received = [rows.reshape(len(rows), width)]
    for source, (count, _) in enumerate(shapes[1:], start=1):
        buffer = torch.empty(count, width)
        if count and width:
            td.recv(buffer, src=source)
        received.append(buffer)
    return torch.cat(received)
