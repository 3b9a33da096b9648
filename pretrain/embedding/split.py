"""A split -> embeddings in memory; every process encodes its share, each sample once.

Shapes: n = pictures, m = captions, D = embedding width, P = width of the image tower's pooled output.
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

__all__ = ["EmbeddedSplit", "embed_split", "eval_mode", "build_text_encoder"]


@dataclass
class EmbeddedSplit:
    """A split in the shared space, float32 on the CPU. On ranks other than 0: this rank's share."""

    image: Tensor
    """(n, D), L2-normalised."""
    text: Tensor
    """(m, D), L2-normalised; (0, D) where texts were not asked for."""
    image_index: Tensor
    """(m,) int64: the row of `image` that each caption describes."""
    pooled: Tensor
    """(n, P) the image tower's own output, before projection; (n, 0) where it was not asked for."""
    keys: list[str]
    """n sample keys, shard/KEY."""
    captions: list[str]
    """m captions as written."""
    labels: list[Any]
    """n classes from the samples' json; None where there is none."""


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
    """Every sample of `batches` (this process's share) encoded; rank 0 gets the whole split, in rank order. Collective.

    Args:
        batches: of the images and targets["captions"], a list of captions a sample; targets["json"] for classes.
        texts: encode the captions too, all of them; pooled: keep the image tower's output as well.

    Raises:
        UserError: on every process where one cannot read its share.
    """
    mine = on_all(lambda: _share(model, batches, decoders, device, precision, texts, pooled, label))
    return mine if distributed.world_size() == 1 else _whole(mine)


def _share(
    model: DualEncoder,
    batches: Iterable[Batch],
    decoders: Mapping[str, Any],
    device: torch.device,
    precision: str,
    texts: bool,
    pooled: bool,
    label: str,
) -> EmbeddedSplit:
    """What this process encodes."""
    images: list[Tensor] = []
    poolings: list[Tensor] = []
    captions_of: list[Tensor] = []
    image_index: list[int] = []
    written: list[str] = []
    keys: list[str] = []
    labels: list[Any] = []
    encoder = Encoder(model, decoders, device, precision, ("image", "text") if texts else ("image",), pooled=pooled)
    with eval_mode(model):
        for _, batch in encoder.stream((None, batch) for batch in batches):
            assert batch is not None
            images.append(batch.rows["image"])
            if pooled:
                poolings.append(batch.pooled["image"])
            if texts:
                image_index += [len(keys) + i for i, own in enumerate(batch.captions) for _ in own]
                written += [caption for own in batch.captions for caption in own]
                captions_of.append(batch.rows["text"])
            keys += batch.keys
            labels += [json.get(label) for json in batch.json]
    # Outside inference mode these are ordinary tensors again, which the linear probe may compute with.
    width = images[0].shape[1] if images else 0
    return EmbeddedSplit(
        image=_cat(images, width),
        text=_cat(captions_of, width),
        image_index=torch.tensor(image_index, dtype=torch.int64),
        pooled=_cat(poolings, 0) if poolings else torch.zeros(len(keys), 0),
        keys=keys,
        captions=written,
        labels=labels,
    )


def _cat(parts: list[Tensor], width: int) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros(0, width)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


def _whole(mine: EmbeddedSplit) -> EmbeddedSplit:
    """On rank 0 all shares laid end to end; on the others what they brought."""
    image, text, pooled = _to_main(mine.image), _to_main(mine.text), _to_main(mine.pooled)
    others = distributed.gather_objects((mine.image_index.tolist(), mine.keys, mine.captions, mine.labels))
    if not distributed.is_main():
        return mine
    image_index: list[int] = []
    keys: list[str] = []
    captions: list[str] = []
    labels: list[Any] = []
    for its_owner, its_keys, its_captions, its_labels in others:
        image_index += [len(keys) + row for row in its_owner]
        keys, captions, labels = keys + its_keys, captions + its_captions, labels + its_labels
    return EmbeddedSplit(image, text, torch.tensor(image_index, dtype=torch.int64), pooled, keys, captions, labels)


def _to_main(rows: Tensor) -> Tensor:
    """On rank 0 the rows of every rank, rank-major; ranks may hold different numbers of them, or none."""
    shapes = distributed.gather_objects(tuple(rows.shape))
    width = max(shape[1] for shape in shapes)
    if distributed.rank() > 0:
        if len(rows) and width:
            td.send(rows.contiguous(), dst=0)
        return rows
    parts = [rows.reshape(len(rows), width)]
    for source, (count, _) in enumerate(shapes[1:], start=1):
        part = torch.empty(count, width)
        if count and width:
            td.recv(part, src=source)
        parts.append(part)
    return torch.cat(parts)
