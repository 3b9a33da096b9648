"""Embed a split in memory: every process encodes its part of the samples, each sample once.

Shapes: n = samples, m = captions, D = embedding width, P = width of a tower's pooled output.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor

from pretrain.data.loader import Batch
from pretrain.embedding.encoder import Encoder, build_text_encoder, eval_mode
from pretrain.errors import ConfigError
from pretrain.model import DualEncoder
from pretrain.runtime import distributed
from pretrain.runtime.agree import on_all

__all__ = ["EmbeddedSplit", "build_text_encoder", "choose_classified", "embed_split", "eval_mode"]

_LANGUAGE = re.compile(r"[A-Za-z0-9]+(-[A-Za-z0-9]+)*")


@dataclass
class EmbeddedSplit:
    """A split in the shared space, float32 on the CPU.

    On ranks other than 0, only the samples of that rank.
    """

    embeddings: dict[str, Tensor]
    """By modality but text, in the model's order: (n, D), L2-normalized."""
    text: Tensor
    """(m, D), L2-normalized; (0, D) if texts were not requested, or the model has none."""
    image_index: Tensor
    """(m,) int64: the sample that each caption describes."""
    pooled: Tensor
    """(n, P) the pooled output of one tower, before projection; (n, 0) if it was not requested."""
    keys: list[str]
    """n sample keys, shard/KEY."""
    captions: list[str]
    """m captions as written."""
    labels: list[Any]
    """n classes from the samples' json; None where a sample has none."""
    languages: list[str] = field(default_factory=list)
    """m languages of captions; "" where one is not known. Empty if they were not requested."""
    present: dict[str, list[bool]] = field(default_factory=dict)
    """By modality, whether each of n samples has it, else its embedding is that of a blank; {} where all have all."""

    @property
    def image(self) -> Tensor:
        """(n, D), L2-normalized."""
        return self.embeddings["image"]

    @property
    def num_captions(self) -> int:
        """The number of captions, without the blanks of samples that have none."""
        return sum(self.present["text"][i] for i in self.image_index.tolist()) if "text" in self.present else len(self.text)

    @property
    def has_gaps(self) -> bool:
        """Whether a sample lacks a modality."""
        return not all(all(values) for values in self.present.values())

    def __len__(self) -> int:
        return len(self.keys)

    def pair(self, first: str, second: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return (n, D) and (m, D) of two modalities, and the row of the first that each row of the second belongs to (m,).

        m = n unless `second` is text. Where samples lack modalities, n are those that have both.
        """
        columns, index = (self.text, self.image_index) if second == "text" else (self.embeddings[second], self._all_rows())
        if not self.present:
            return self.embeddings[first], columns, index
        has_both = torch.tensor(self.present[first]) & torch.tensor(self.present[second])
        kept = has_both[index]
        return self.embeddings[first][has_both], columns[kept], (has_both.cumsum(0) - 1)[index[kept]]

    def classified(self, name: str) -> tuple[Tensor, list[Any]]:
        """Return (n, D) of a modality and the n labels, of the samples that have it."""
        if name not in self.present:
            return self.embeddings[name], self.labels
        has = self.present[name]
        return self.embeddings[name][torch.tensor(has)], [label for label, h in zip(self.labels, has, strict=True) if h]

    def pair_languages(self, first: str) -> list[str]:
        """Return the languages of the captions of pair(first, "text")."""
        if not self.present or not self.languages:
            return self.languages
        has = self.present
        return [
            code for code, i in zip(self.languages, self.image_index.tolist(), strict=True) if has[first][i] and has["text"][i]
        ]

    def _all_rows(self) -> Tensor:
        return torch.arange(len(self))


def embed_split(
    model: DualEncoder,
    batches: Iterable[Batch],
    decoders: Mapping[str, Any],
    device: torch.device,
    precision: str = "fp32",
    texts: bool = True,
    pooled: bool = False,
    label: str = "label",
    language: str | None = None,
) -> EmbeddedSplit:
    """Encode every sample of `batches`; rank 0 gets the whole split, in rank order. Collective.

    Args:
        model: on `device`.
        batches: this rank's, with images and what else the model encodes, targets["captions"] (a list of captions per sample)
            and, for classes, targets["json"].
        decoders: by modality; that of text tokenizes the captions.
        device: where the towers run.
        precision: fp32, bf16 or fp16, of the towers' matrix products.
        texts: encode all modalities of the model, with all captions; False = that of `choose_classified` alone.
        pooled: return the pooled output of that tower too.
        label: field of the json with a sample's class.
        language: field of the json with the language of its captions, or a list of one for each; None = not requested.

    Raises:
        UserError: on every rank, if one rank cannot read its samples.
    """
    local = on_all(lambda: _embed_local(model, batches, decoders, device, precision, texts, pooled, label, language))
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
    language: str | None,
) -> EmbeddedSplit:
    """Encode the samples of this rank."""
    classified = choose_classified(model.towers) if pooled or not texts else ""
    modalities = list(model.towers) if texts else [classified]
    embeddings: dict[str, list[Tensor]] = {name: [] for name in modalities}
    pooled_outputs: list[Tensor] = []
    image_index: list[int] = []
    captions: list[str] = []
    keys: list[str] = []
    labels: list[Any] = []
    languages: list[str] = []
    present: dict[str, list[bool]] = {}
    encoder = Encoder(model, decoders, device, precision, modalities, pooled=pooled)
    with eval_mode(model):
        for _, batch in encoder.stream((None, batch) for batch in batches):
            assert batch is not None
            for name in modalities:
                embeddings[name].append(batch.embeddings[name])
            if pooled:
                pooled_outputs.append(batch.pooled[classified])
            if "text" in modalities:
                image_index += [len(keys) + i for i, of_sample in enumerate(batch.captions) for _ in of_sample]
                captions += [caption for of_sample in batch.captions for caption in of_sample]
                if language is not None:
                    for json, of_sample in zip(batch.json, batch.captions, strict=True):
                        languages += read_languages(json, language, len(of_sample))
            for name, values in batch.present.items():
                present.setdefault(name, []).extend(values.tolist())
            keys += batch.keys
            labels += [json.get(label) for json in batch.json]
    # Concatenated outside inference mode, these are ordinary tensors again, which the linear probe may compute with.
    width = next((rows[0].shape[1] for rows in embeddings.values() if rows), 0)
    return EmbeddedSplit(
        embeddings={name: _concatenate(rows, width) for name, rows in embeddings.items() if name != "text"},
        text=_concatenate(embeddings.get("text", []), width),
        image_index=torch.tensor(image_index, dtype=torch.int64),
        pooled=_concatenate(pooled_outputs, 0) if pooled_outputs else torch.zeros(len(keys), 0),
        keys=keys,
        captions=captions,
        labels=labels,
        languages=languages,
        present=present,
    )


def read_languages(fields: Mapping[str, Any], name: str, captions: int) -> list[str]:
    """Return the language of each caption of a sample, a code such as de or pt-BR; "" where the field holds none.

    Args:
        fields: of the sample's json.
        name: of the field: a code for all captions, or a list of one for each. A list of another length tells nothing.
        captions: how many the sample has.
    """
    value = fields.get(name)
    values = value if isinstance(value, list) else [value] * captions
    if len(values) != captions:
        return [""] * captions
    return [code if isinstance(code, str) and _LANGUAGE.fullmatch(code) else "" for code in values]


def choose_classified(modalities: Iterable[str]) -> str:
    """Return the modality that is classified: images, else the first but text. Raises ConfigError if there is none."""
    names = [name for name in modalities if name != "text"]
    if not names:
        raise ConfigError("classification needs a tower of images or of another modality than text, and the model has none")
    return "image" if "image" in names else names[0]


def _concatenate(tensors: list[Tensor], width: int) -> Tensor:
    return torch.cat(tensors) if tensors else torch.zeros(0, width)


# ---------------------------------------------------------------------------------------------------------------------
# Gathering from several processes


def _gather(local: EmbeddedSplit) -> EmbeddedSplit:
    """Return the samples of all ranks, in rank order, on rank 0, and `local` on the others. Collective."""
    embeddings = {name: _gather_rows(rows) for name, rows in local.embeddings.items()}
    text, pooled = _gather_rows(local.text), _gather_rows(local.pooled)
    gathered = distributed.gather_objects(
        (local.image_index.tolist(), local.keys, local.captions, local.labels, local.languages, local.present)
    )
    if not distributed.is_main():
        return local
    image_index: list[int] = []
    keys: list[str] = []
    captions: list[str] = []
    labels: list[Any] = []
    languages: list[str] = []
    present: dict[str, list[bool]] = {}
    for rank_image_index, rank_keys, rank_captions, rank_labels, rank_languages, rank_present in gathered:
        image_index += [len(keys) + row for row in rank_image_index]
        keys, captions, labels = keys + rank_keys, captions + rank_captions, labels + rank_labels
        languages += rank_languages
        for name, values in rank_present.items():
            present.setdefault(name, []).extend(values)
    index = torch.tensor(image_index, dtype=torch.int64)
    return EmbeddedSplit(embeddings, text, index, pooled, keys, captions, labels, languages, present)


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
