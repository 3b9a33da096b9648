"""Export a run to a folder that transformers, open_clip or onnxruntime loads.

    export(loaded, Path("DIR"), "hf") -> Path

The written folder is loaded back with that library alone, and its embeddings are compared with the run's. A folder that
exists therefore gives the run's embeddings. It is written under another name and renamed: it is complete or not there.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoints import store
from pretrain.checkpoints.loading import LoadedModel
from pretrain.data.text import TextDecoder
from pretrain.errors import ConfigError, UserError
from pretrain.formats import Encoders, model_card, portable_tokenizer
from pretrain.formats.portable_tokenizer import list_probes
from pretrain.model import DualEncoder, ModelSchema
from pretrain.runtime.files import read_json_object

FORMATS = ("hf", "open_clip", "onnx")
TOLERANCE = 1e-5
"""Largest allowed difference of an embedding's component in float32; embeddings have length 1."""


def check_finished(run: str | Path) -> None:
    """Refuse a run folder whose run has not finished. A checkpoint folder passes: it was named on purpose.

    Raises UserError.
    """
    path = next((p for p in (Path(run), Path("runs") / run) if (p / "status.json").is_file()), None)
    if path is None:
        return
    checkpoints = store.list_complete(path / "checkpoints")
    hint = f"; its newest checkpoint can be exported by name: {checkpoints[-1]}" if checkpoints else ""
    try:
        status = read_json_object(path / "status.json")
    except (OSError, ValueError) as error:
        raise UserError(f"{path / 'status.json'} does not say whether the run is finished: {error}{hint}") from error
    if status.get("state") != "done":
        why = f", {status['why']}" if status.get("why") else ""
        raise UserError(f"{path} is not finished ({status.get('state')} at step {status.get('step')}{why}){hint}")


def export(loaded: LoadedModel, folder: Path, format_name: str, license: str | None = None) -> Path:
    """Write a model to `folder`, which must not exist yet, and return the folder.

    Args:
        loaded: a run, a checkpoint, or a published model, as loading.load_model returns it.
        format_name: hf, open_clip or onnx.
        license: of the weights, by its identifier on the Hugging Face hub; the model card states it.

    Raises:
        ConfigError: `format_name` is none of FORMATS.
        UserError: the folder exists, or the format cannot hold a part of the model; the message names formats that can.
    """
    if format_name not in FORMATS:
        raise ConfigError(f"--format {format_name}: the choices are {', '.join(FORMATS)}")
    encoders = get_encoders(loaded)
    module = _import_format(format_name)
    if error := module.export_error(encoders):
        others = [name for name in FORMATS if name != format_name and _import_format(name).export_error(encoders) is None]
        hint = f"; --format {' or '.join(others)} can hold it" if others else ""
        raise UserError(f"{format_name} cannot hold {error}{hint}")
    with new_folder(folder) as partial:
        module.write(encoders, partial, folder)
        difference = compare(encoders, module.load(partial))
        (partial / "README.md").write_text(
            model_card.render_card(encoders, loaded.folder, loaded.step, format_name, folder.name, license, difference)
        )
    return folder


@torch.no_grad()
def describe_formats(model: DualEncoder, config: ModelSchema, decoders: dict[str, Any]) -> str:
    """Return a line that says which formats can hold a model, and why the others cannot.

    The model may be about to be trained: neither its state nor torch's random generator changes. It must be on the CPU.

    Args:
        model: the encoders.
        config: their configuration.
        decoders: by modality.
    """
    text = decoders.get("text")
    if text is None:
        return "exports: no format can hold a model without text tower"
    try:
        errors = list_errors(model, config, text)
    except UserError as error:
        return f"exports: {error}"
    possible = [name for name, error in errors.items() if error is None]
    reasons = "".join(f"; {name} cannot hold {error}" for name, error in errors.items() if error is not None)
    return f"exports: {', '.join(possible) or 'no format'} can hold this model{reasons}"


@torch.no_grad()
def list_errors(model: DualEncoder, config: ModelSchema, text: TextDecoder) -> dict[str, str | None]:
    """Return by format why it cannot hold these encoders, or None. Nothing changes, as in `describe_formats`.

    Raises UserError where that is the same for all formats.
    """
    is_training = {module: module.training for module in model.modules()}
    try:
        with torch.random.fork_rng(devices=[]):  # building a timm model to compare with draws initial weights
            encoders = Encoders(model.eval(), config, text)
            errors = {name: _import_format(name).export_error(encoders) for name in FORMATS}
    except Exception as error:  # towers of anybody's raise what they like, and a line of information must not end a run
        raise UserError(f"not known, for trying failed: {' '.join(str(error).split())[:200]}") from error
    finally:
        for module, was_training in is_training.items():
            module.training = was_training
    try:
        portable_tokenizer.build_portable(text)
    except UserError as error:
        raise UserError(f"no format can hold this model: {error}") from error
    return errors


def suggest_format(loaded: LoadedModel, name: str) -> tuple[str, str] | None:
    """Return the first of FORMATS that can hold the model, and Python code that loads a folder `name`.

    None if no format can hold it.
    """
    if loaded.decoders.get("text") is None:
        return None
    encoders = get_encoders(loaded)
    format_name = next((fmt for fmt in FORMATS if _import_format(fmt).export_error(encoders) is None), None)
    return None if format_name is None else (format_name, model_card.format_loading_code(encoders, format_name, name))


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder to write into, which becomes `folder` if the block succeeds.

    If the block fails, it is removed.

    Raises UserError where `folder` exists already.
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
    """Return the image and text encoder of a loaded model, as the formats write them.

    Raises UserError for a model without text tower.
    """
    text = loaded.decoders.get("text")
    if text is None:
        raise UserError(f"{loaded.folder} has no text tower: an export holds a pair of image and text encoder")
    return Encoders(loaded.model.to("cpu").eval(), loaded.config, text)


@torch.no_grad()
def compare(encoders: Encoders, embed: Any) -> float | None:
    """Return the largest difference between the run's embeddings and those of the written folder.

    Args:
        encoders: the run's.
        embed: what the format's `load` returned: (images (b, 3, S, S), texts) -> embeddings, 2 x (b, D), with embed_audio
            where it holds sounds too; of a model without images, sounds (b, S) take their place. None where the format's
            library is not installed, for which the result is None too.

    Raises:
        UserError: the difference exceeds TOLERANCE.
    """
    if embed is None:
        return None
    texts = list_probes(encoders.text)
    audio, waveforms = encoders.audio_tower, torch.zeros(0)
    if audio is not None:
        waveforms = torch.rand(4, audio.samples, generator=torch.Generator().manual_seed(0)) - 0.5
    if encoders.image_tower is not None:
        size = encoders.preprocess.size
        noise = torch.randint(0, 256, (4, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        exported = embed(encoders.image_tower.normalize(noise), texts)
        pairs = [(encoders.model.encode("image", noise), exported[0])]
        if audio is not None:
            pairs.append((encoders.model.encode("audio", waveforms), embed.embed_audio(waveforms)))
    else:
        exported = embed(waveforms, texts)
        pairs = [(encoders.model.encode("audio", waveforms), exported[0])]
    pairs.append((encoders.model.encode("text", *encoders.text.encode(texts)), exported[1]))
    difference = max(float((a - b).abs().max()) for a, b in pairs)
    if not difference <= TOLERANCE:
        raise UserError(
            f"the exported folder gives embeddings that differ from the run's by {difference:.1g} (at most {TOLERANCE} is "
            "allowed), so nothing was kept; please report it"
        )
    return difference


def _import_format(name: str) -> Any:
    return importlib.import_module(f"pretrain.formats.{name}")
