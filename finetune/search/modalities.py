"""What an index holds, images or sounds: where a sample has it, and what is kept of it besides its embedding.

find_content(members, "audio")          the bytes of a sample's sound; None where it has none
preview(content, "audio")               a small picture of it, and the fields that every index of sounds has
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetune.explain.spectrogram import draw_sound
from finetune.search.fields import MODALITIES, Field, parse_fields
from pretrain.checkpoints.loading import LoadedModel
from pretrain.data import BadSample
from pretrain.data.audio_files import AUDIO_EXTENSIONS, open_audio
from pretrain.data.decode import EXTENSIONS
from pretrain.data.thumbnails import encode_jpeg, make_thumbnail
from pretrain.errors import ConfigError, UserError, closest
from pretrain.printable import get_noun

MEMBERS = {"image": EXTENSIONS, "audio": AUDIO_EXTENSIONS}
"""Extensions of the member of a sample that holds each modality."""
SECONDS = "seconds"
"""The field of a sound's length, to a millisecond."""
OWN_FIELDS: dict[str, tuple[Field, ...]] = {"image": (), "audio": (Field(SECONDS, "float"),)}
"""Fields that every index of a modality has, besides those that the user names."""


def choose_modality(loaded: LoadedModel, wanted: str = "") -> str:
    """Return what a new index of a model holds: what is wanted, else images where it has them, else sounds.

    Raises:
        ConfigError: the model has no such tower, or an index cannot hold it.
        UserError: the model has neither images nor sounds.
    """
    towers = list(loaded.model.towers)
    choices = [name for name in MODALITIES if name in towers]
    if wanted and wanted not in choices:
        names = ", ".join(choices) or "neither images nor sounds"
        raise ConfigError(f"--only {wanted}: of {loaded.folder} an index can hold {names}{closest(wanted, choices)}")
    if not choices:
        raise UserError(f"{loaded.folder} encodes {', '.join(towers)}: an index holds images or sounds")
    chosen = wanted or choices[0]
    if not hasattr(loaded.decoders[chosen], "decode_eval"):
        raise UserError(f"the {chosen} tower of {loaded.folder} reads no files of {get_noun(chosen)}s, which an index needs")
    return chosen


def join_fields(modality: str, text: str) -> tuple[Field, ...]:
    """Return the fields of an index: those that all of a modality have, and those of --fields. Raises ConfigError."""
    own, named = OWN_FIELDS[modality], parse_fields(text)
    if taken := {item.name for item in own} & {item.name for item in named}:
        raise ConfigError(f"--fields {text}: every index of {get_noun(modality)}s has a field {taken.pop()}")
    return own + named


def select_named(fields: Sequence[Field], modality: str) -> list[Field]:
    """Return those fields of an index that the json of samples fills."""
    return [item for item in fields if item not in OWN_FIELDS[modality]]


def find_content(members: Mapping[str, bytes], modality: str) -> bytes | None:
    """Return the bytes of a sample's image or sound; None where it has none."""
    return next((members[name] for name in MEMBERS[modality] if name in members), None)


def preview(content: bytes, modality: str) -> tuple[bytes, dict[str, Any]]:
    """Return the thumbnail of an image or a sound as a JPEG, and its values of OWN_FIELDS.

    The thumbnail of a sound is its spectrogram; it is empty where a part is damaged that the model does not hear.

    Raises BadSample where it cannot be decoded.
    """
    if modality == "image":
        return make_thumbnail(content).jpeg, {}
    with open_audio(content) as sound:
        values = {SECONDS: round(sound.frames / sound.rate, 3)}
    try:
        return encode_jpeg(draw_sound(content)), values
    except BadSample:
        return b"", values
