"""A run -> a folder that other libraries load: transformers, open_clip, or graphs for onnxruntime.

    export(loaded, Path("DIR"), "hf") -> Path

What is written is loaded back the way a stranger would, and its embeddings are compared with the run's: a folder that is
there gives the same. It is made under another name and renamed, so it is whole or not there.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoints import store
from pretrain.checkpoints.loading import LoadedModel
from pretrain.errors import ConfigError, UserError
from pretrain.formats import Encoders, model_card
from pretrain.formats.portable_tokenizer import PROBES

FORMATS = ("hf", "open_clip", "onnx")
TOLERANCE = 1e-5
"""Largest difference of an embedding's component in float32; embeddings have length 1."""


def check_finished(run: str | Path) -> None:
    """Refuses a run folder whose run did not end. Raises UserError. A checkpoint folder names itself, and passes."""
    path = next((p for p in (Path(run), Path("runs") / run) if (p / "status.json").is_file()), None)
    if path is None:
        return
    status = json.loads((path / "status.json").read_text())
    if status.get("state") != "done":
        newest = store.list_complete(path / "checkpoints")
        other = f"; its newest checkpoint can be exported by name: {newest[-1]}" if newest else ""
        why = f", {status['why']}" if status.get("why") else ""
        raise UserError(f"{path} is not finished ({status.get('state')} at step {status.get('step')}{why}){other}")


def export(loaded: LoadedModel, folder: Path, form: str, license: str | None = None) -> Path:
    """Writes `folder`, which must not exist yet. Returns it.

    Args:
        loaded: a run, a checkpoint, or a published model, as inference.load_model gives it.
        form: hf, open_clip or onnx.
        license: of the weights, as the hub names licences; the model card states it.

    Raises:
        UserError: the folder exists, the format has no place for a part of the model (and which formats have).
    """
    if form not in FORMATS:
        raise ConfigError(f"--format {form}: the choices are {', '.join(FORMATS)}")
    encoders = get_encoders(loaded)
    module = _module(form)
    if wrong := module.export_error(encoders):
        others = [name for name in FORMATS if name != form and _module(name).export_error(encoders) is None]
        can = f"; --format {' or '.join(others)} can hold it" if others else ""
        raise UserError(f"{form} cannot hold {wrong}{can}")
    with new_folder(folder) as partial:
        module.write(encoders, partial)
        difference = compare(encoders, module.load(partial))
        (partial / "README.md").write_text(
            model_card.render_card(encoders, loaded.folder, loaded.step, form, folder.name, license, difference)
        )
    return folder


def suggest_format(loaded: LoadedModel, name: str) -> tuple[str, str] | None:
    """The first of FORMATS that can hold the model, and the Python that loads it from a folder `name`; None: there is none."""
    if loaded.decoders.get("text") is None:
        return None
    encoders = get_encoders(loaded)
    form = next((form for form in FORMATS if _module(form).export_error(encoders) is None), None)
    return None if form is None else (form, model_card.format_loading_code(encoders, form, name))


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder`, which must not exist, to write into: it takes the name at the end, if all went well.

    Raises UserError.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already; give a folder that does not")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def get_encoders(loaded: LoadedModel) -> Encoders:
    """What formats write of a loaded model."""
    text = loaded.decoders.get("text")
    if text is None:
        raise UserError(f"{loaded.folder} has no text tower: there is nothing to export as a pair")
    return Encoders(loaded.model.to("cpu").eval(), loaded.config, text)


@torch.no_grad()
def compare(encoders: Encoders, embed: Any) -> float | None:
    """The largest difference between our embeddings and those of the written folder; None where its library is missing.

    Raises UserError beyond TOLERANCE.
    """
    if embed is None:
        return None
    size = encoders.preprocess.size
    noise = torch.randint(0, 256, (4, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    tower = encoders.image_tower
    assert tower is not None
    theirs = embed(tower.normalize(noise), PROBES)
    ours = (encoders.model.encode("image", noise), encoders.model.encode("text", *encoders.text.encode(PROBES)))
    difference = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    if not difference <= TOLERANCE:
        raise UserError(
            f"what was written gives other embeddings than the run, by {difference:.1g}: nothing was kept; please report it"
        )
    return difference


def _module(form: str) -> Any:
    return importlib.import_module(f"pretrain.formats.{form}")
