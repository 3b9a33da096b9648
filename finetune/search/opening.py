"""Open an index for writing, or make one: which model and modality it is of, and what options it must agree with.

with open_for("catalog", load_model("runs/first"), IndexOptions()) as index: ...
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from finetune.search import places
from finetune.search.fields import MODALITIES, parse_fields
from finetune.search.modalities import choose_modality, join_fields, select_named
from finetune.search.vector_index import Description, NoIndexError, VectorIndex
from pretrain.checkpoints.loading import LoadedModel
from pretrain.embedding.dataset import fingerprint_model
from pretrain.errors import ConfigError, UserError


@dataclass
class IndexOptions:
    """How images or sounds are indexed."""

    backend: str | None = None
    """exact or milvus; None = by the name of the place."""
    fields: str = ""
    """Fields of the json to keep, as NAME:KIND with commas between."""
    name: str = ""
    """Precedes the keys, so that sources of the same name do not clash."""
    replace: bool = False
    """Encode images again that the index has, and replace them."""
    caption: str = ""
    """Where captions are: txt, or a field of the json; empty = where the model's training read them."""
    batch_size: int = 64
    """Images encoded at a time."""
    dim: int | None = None
    """Keep the first dimensions of embeddings alone, as loss.matryoshka trained them; None = as the index has, or all."""
    modality: str = ""
    """image or audio; empty = as the index has, else images where the model has them."""

    def check(self) -> None:
        """Refuse what does not fit. Raises ConfigError."""
        parse_fields(self.fields)
        if not 1 <= self.batch_size < 2**31:
            raise ConfigError(f"--batch-size {self.batch_size} must be from 1 to 2147483647")
        if self.dim is not None and not 1 <= self.dim < 2**31:
            raise ConfigError(f"--dim {self.dim} must be from 1 to 2147483647")
        if "/" in self.name:
            raise ConfigError(f"--name {self.name} must hold no slash")


def describe_model(loaded: LoadedModel, modality: str = "image") -> dict[str, Any]:
    """Return which model makes the embeddings of a modality, for the index's description.

    The fingerprint covers weights, architecture, preprocessing and tokenizer; the other entries are for people.
    """
    decoder, text = loaded.decoders.get(modality), loaded.decoders.get("text")
    names = ("size", "resize", "interpolation", "rate", "seconds", "pad")
    preprocessing = {name: getattr(decoder, name) for name in names if hasattr(decoder, name)}
    folder = str(loaded.folder)
    return {
        "fingerprint": fingerprint_model(loaded),
        "from": os.path.abspath(folder) if os.path.exists(folder) else folder,
        "step": loaded.step,
        "preprocessing": preprocessing,
        "tokenizer": len(loaded.tokenizer) if text is not None else None,
    }


def check_model(description: Description, model: dict[str, Any], place: str) -> None:
    """Raise UserError where an index holds the embeddings of another model."""
    if description.model.get("fingerprint") != model["fingerprint"]:
        names = [f"{m.get('from')} (step {m.get('step')}, {str(m.get('fingerprint'))[:8]})" for m in (description.model, model)]
        raise UserError(f"{place} holds embeddings of {names[0]}, and this is {names[1]}: an index has one model")


def find_modality(loaded: LoadedModel, wanted: str, place: str, backend: str | None) -> str:
    """Return what the index at a place holds or, where there is none, what choose_modality says. Raises UserError."""
    if not wanted and all(name in loaded.model.towers for name in MODALITIES):
        with suppress(NoIndexError), places.open_index(place, backend) as index:
            wanted = index.describe().modality
    return choose_modality(loaded, wanted)


@contextmanager
def open_for(place: str, loaded: LoadedModel, options: IndexOptions) -> Iterator[VectorIndex]:
    """Open the index at a place for writing, or make one there; one that got nothing is removed at the end.

    Raises UserError where it was made with another model, of another modality, or with other fields.
    """
    with _open(place, loaded, options) as index:
        try:
            yield index
        finally:
            if index.is_new and not index.count():
                index.remove()


def _open(place: str, loaded: LoadedModel, options: IndexOptions) -> VectorIndex:
    modality = find_modality(loaded, options.modality, place, options.backend)
    model, fields = describe_model(loaded, modality), join_fields(modality, options.fields)
    width = int(loaded.model.projection(modality).out_features)
    if options.dim is not None and options.dim not in (*loaded.widths, width):
        trained = "it was trained for all of them alone (loss.matryoshka)"
        if loaded.widths:
            trained = f"loss.matryoshka trained {', '.join(map(str, loaded.widths))} of them"
        raise ConfigError(f"--dim {options.dim}: embeddings of {loaded.folder} have {width} numbers, and {trained}")
    dim = options.dim or width
    try:
        index = places.open_index(place, options.backend, is_writable=True)
    except NoIndexError:
        return places.create_index(place, Description(dim, model, fields, modality), options.backend)
    try:
        description = index.describe()
        check_model(description, model, place)
        if description.modality != modality:
            raise ConfigError(f"--only {modality}: {place} is an index of {description.noun}s; choose another --db")
        if options.dim is not None and description.dim != options.dim:
            raise ConfigError(
                f"--dim {options.dim}: {place} holds embeddings of {description.dim} numbers; choose another --db"
            )
        if description.dim not in (*loaded.widths, width):
            raise UserError(f"{place} holds embeddings of {description.dim} numbers, and the model makes {width}")
        if options.fields and fields != description.fields:
            present = ",".join(f"{item.name}:{item.kind}" for item in select_named(description.fields, modality)) or "none"
            raise ConfigError(f"--fields {options.fields}: {place} was made with the fields {present}; choose another --db")
        return index
    except BaseException:
        index.close()
        raise
