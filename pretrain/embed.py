"""Samples -> embeddings, streamed; every process encodes its share, each sample once.

The model is left as it was found (each module's train or eval mode), and no global random generator is drawn from.

Shapes: n = pictures, m = captions, b = pictures of a batch, D = embedding width, P = width of the image tower's pooled output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as td
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain import dist
from pretrain.config import UserError
from pretrain.data.loader import Batch
from pretrain.model import DualEncoder

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Embedded:
    """A split in the shared space, float32 on the CPU. On ranks other than 0: this rank's share."""

    image: Tensor
    """(n, D), L2-normalised."""
    text: Tensor
    """(m, D), L2-normalised; (0, D) where texts were not asked for."""
    owner: Tensor
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
) -> Embedded:
    """Every sample of `batches` (this process's share) encoded; rank 0 gets the whole split, in rank order. Collective.

    Args:
        batches: of the images and targets["captions"], a list of captions a sample; targets["json"] for classes.
        texts: encode the captions too, all of them; pooled: keep the image tower's output as well.

    Raises:
        UserError: on every process where one cannot read its share.
    """
    mine, problem = None, None
    try:
        mine = _share(model, batches, decoders, device, precision, texts, pooled, label)
    except UserError as error:
        problem = error
    problems = [said for said in dist.gather_objects(str(problem) if problem else None) if said]
    if problem or problems:
        raise problem or UserError(problems[0])
    assert mine is not None
    return mine if dist.world_size() == 1 else _whole(mine)


def _share(
    model: DualEncoder,
    batches: Iterable[Batch],
    decoders: Mapping[str, Any],
    device: torch.device,
    precision: str,
    texts: bool,
    pooled: bool,
    label: str,
) -> Embedded:
    """What this process encodes."""
    images: list[Tensor] = []
    poolings: list[Tensor] = []
    captions_of: list[Tensor] = []
    owner: list[int] = []
    written: list[str] = []
    keys: list[str] = []
    labels: list[Any] = []
    encode = text_encoder(model, decoders, device, precision)
    with evaluating(model), torch.inference_mode(), _autocast(device, precision):
        for batch in batches:
            batch = batch.to(device, non_blocking=True)
            inputs, mask = batch.inputs["image"], batch.masks.get("image")
            if pooled:  # encode() in its two halves
                output = model.tower("image")(inputs, mask).pooled
                poolings.append(output.float().cpu())
                images.append(_rows(model.projection("image")(output)))
            else:
                images.append(_rows(model.encode("image", inputs, mask)))
            if texts:
                captions = batch.targets["captions"]
                owner += [len(keys) + i for i, own in enumerate(captions) for _ in own]
                written += [caption for own in captions for caption in own]
                if all(len(own) == 1 for own in captions):  # the loader's workers have tokenized these
                    captions_of.append(_rows(model.encode("text", batch.inputs["text"], batch.masks.get("text"))))
                else:
                    captions_of.append(encode([caption for own in captions for caption in own], len(batch)))
            keys += batch.keys
            labels += [json.get(label) for json in batch.targets.get("json", [{}] * len(batch))]
    # Outside inference mode these are ordinary tensors again, which the linear probe may compute with.
    width = images[0].shape[1] if images else 0
    return Embedded(
        image=_cat(images, width),
        text=_cat(captions_of, width),
        owner=torch.tensor(owner, dtype=torch.int64),
        pooled=_cat(poolings, 0) if poolings else torch.zeros(len(keys), 0),
        keys=keys,
        captions=written,
        labels=labels,
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode inside; afterwards each module is in the mode it was in, frozen ones too."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def text_encoder(
    model: DualEncoder, decoders: Mapping[str, Any], device: torch.device, precision: str = "fp32", size: int = 256
) -> Callable[..., Tensor]:
    """(texts, texts at a time) -> (m, D) float32 on the CPU, L2-normalised: sentences in the shared space."""

    def encode(texts: list[str], at_once: int = size) -> Tensor:
        rows = []
        with evaluating(model), torch.inference_mode(), _autocast(device, precision):
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


def _cat(parts: list[Tensor], width: int) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros(0, width)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


def _whole(mine: Embedded) -> Embedded:
    """On rank 0 all shares laid end to end; on the others what they brought."""
    image, text, pooled = _to_main(mine.image), _to_main(mine.text), _to_main(mine.pooled)
    others = dist.gather_objects((mine.owner.tolist(), mine.keys, mine.captions, mine.labels))
    if not dist.is_main():
        return mine
    owner: list[int] = []
    keys: list[str] = []
    captions: list[str] = []
    labels: list[Any] = []
    for its_owner, its_keys, its_captions, its_labels in others:
        owner += [len(keys) + row for row in its_owner]
        keys, captions, labels = keys + its_keys, captions + its_captions, labels + its_labels
    return Embedded(image, text, torch.tensor(owner, dtype=torch.int64), pooled, keys, captions, labels)


def _to_main(rows: Tensor) -> Tensor:
    """On rank 0 the rows of every rank, rank-major; ranks may hold different numbers of them, or none."""
    shapes = dist.gather_objects(tuple(rows.shape))
    width = max(shape[1] for shape in shapes)
    if dist.rank() > 0:
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
