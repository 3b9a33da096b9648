"""The vocabulary of a data set: words for its objects, their names, colors, surfaces and sizes.

    {"name": ["tractor", "sheep"], "color": ["red", "turquoise"], "plural": {"sheep": "sheep"}}      vocabulary.json

The file is in the folder of the shards. Its keys are the fields of `objects` in the samples' json; all are optional. Where
samples have a numeric `label`, it is an index into `name`. The files `vocabularies/NAME.json` ship with the package; "scenes"
is that of the built-in data set.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pretrain.data.shards.transfer import read_small_file
from pretrain.data.shards.urls import is_remote
from pretrain.errors import UserError

FILE = "vocabulary.json"
ATTRIBUTES = ("color", "surface", "size")
"""Fields of an object, besides its name, that a vocabulary has words for."""

_BUILTIN = Path(__file__).parent / "vocabularies"


@dataclass(frozen=True)
class Vocabulary:
    """Words for the objects of a data set, in lower case."""

    names: tuple[str, ...] = ()
    attributes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Field (one of ATTRIBUTES) -> its words."""
    plurals: Mapping[str, str] = field(default_factory=dict)
    """Name -> its plural, where that is not the name plus -s or -es."""

    @cached_property
    def name_forms(self) -> dict[str, str]:
        """Singular or plural -> the name it belongs to."""
        return self.forms(self.names)

    @cached_property
    def attribute_fields(self) -> dict[str, str]:
        """Word -> its field, one of ATTRIBUTES."""
        return {word: key for key in ATTRIBUTES for word in self.attributes.get(key, ())}

    @cached_property
    def longest_name(self) -> int:
        """Number of words of the longest of `name_forms`."""
        return max((form.count(" ") + 1 for form in self.name_forms), default=0)

    def forms(self, names: Iterable[str]) -> dict[str, str]:
        """Return the singular and plural forms of some names: form -> name."""
        forms: dict[str, str] = {}
        for name in names:
            forms |= dict.fromkeys((name, self.plurals.get(name) or f"{name}s", f"{name}es"), name)
        return forms

    def to_json(self) -> str:
        """Return the content of vocabulary.json."""
        content = {"name": self.names, **{key: self.attributes[key] for key in ATTRIBUTES if key in self.attributes}}
        return json.dumps({**content, "plural": self.plurals} if self.plurals else content, indent=1) + "\n"


def normalize_word(value: Any) -> str:
    """Return a word in lower case without surrounding white space; "" for a value that is not a string."""
    return value.strip().lower() if isinstance(value, str) else ""


def vocabulary_from_objects(objects: Iterable[Any]) -> Vocabulary:
    """Build the vocabulary of some objects; values that are not objects or strings are ignored."""
    words: dict[str, dict[str, None]] = {key: {} for key in ("name", *ATTRIBUTES)}  # dicts as ordered sets
    for item in objects:
        for key in words if isinstance(item, dict) else ():
            if word := normalize_word(item.get(key)):
                words[key][word] = None
    return Vocabulary(tuple(words.pop("name")), {key: tuple(values) for key, values in words.items() if values})


def merge_vocabularies(vocabularies: Sequence[Vocabulary]) -> Vocabulary:
    """Merge several vocabularies; where two give a plural of a name, the last one counts."""
    names = dict.fromkeys(name for vocabulary in vocabularies for name in vocabulary.names)
    attributes = {}
    for key in ATTRIBUTES:
        if words := dict.fromkeys(word for vocabulary in vocabularies for word in vocabulary.attributes.get(key, ())):
            attributes[key] = tuple(words)
    plurals = {name: plural for vocabulary in vocabularies for name, plural in vocabulary.plurals.items()}
    return Vocabulary(tuple(names), attributes, plurals)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def builtin_names() -> list[str]:
    """Return the names of the data sets whose vocabulary ships with the package."""
    return sorted(path.stem for path in _BUILTIN.glob("*.json"))


def load_builtin(name: str) -> Vocabulary:
    """Load the vocabulary of a data set of `builtin_names`."""
    path = _BUILTIN / f"{name}.json"
    return parse_vocabulary(path.read_bytes(), str(path))


def find_vocabulary(shards: Iterable[str]) -> Vocabulary | None:
    """Find the vocabulary of the data set of these shards; None where any of their folders has none.

    A folder with NAME.json, the settings of a built-in data set, but without vocabulary.json was drawn before that file was
    introduced: it gets the vocabulary that ships with the package.

    Args:
        shards: paths and urls, as `expand_shards` returns them.

    Raises:
        UserError: a file is not a valid vocabulary or cannot be read.
    """
    vocabularies = [_find_in_folder(folder) for folder in dict.fromkeys(shard.rpartition("/")[0] for shard in shards)]
    present = [vocabulary for vocabulary in vocabularies if vocabulary is not None]
    return merge_vocabularies(present) if present and len(present) == len(vocabularies) else None


def _find_in_folder(folder: str) -> Vocabulary | None:
    """Find the vocabulary of a folder or of the built-in data set in it; None where there is neither."""
    path = f"{folder}/{FILE}" if folder else FILE
    content = _read_if_present(path)
    if content is not None:
        return parse_vocabulary(content, path)
    for name in builtin_names():
        if _read_if_present(os.path.join(folder, f"{name}.json")) is not None:
            return load_builtin(name)
    return None


def _read_if_present(path: str) -> bytes | None:
    """Return the content of a local or remote file; None where it does not exist."""
    if is_remote(path):
        return read_small_file(path)
    try:
        return Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def parse_vocabulary(content: bytes, path: str) -> Vocabulary:
    """Parse a vocabulary from the content of its file.

    Args:
        content: the json.
        path: that of the file, for error messages.

    Raises:
        UserError: the content is not a vocabulary; the message names the file and the key.
    """
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid json: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f'{path} must hold a json object such as {{"name": ["car", "dog"], "color": ["red"]}}')
    allowed = ("name", *ATTRIBUTES, "plural")
    for key, words in values.items():
        if key not in allowed:
            raise UserError(f"{path}: unknown key {key!r}; valid keys are {', '.join(allowed)}")
        form, example = (dict, '{"fish": "fish"}') if key == "plural" else (list, '["red", "blue"]')
        texts = [*words, *words.values()] if isinstance(words, dict) else words
        if not isinstance(words, form) or not all(map(normalize_word, texts)):
            raise UserError(f"{path}: {key!r} must be words such as {example}")
    words_of = {key: tuple(map(normalize_word, values[key])) for key in ("name", *ATTRIBUTES) if key in values}
    plurals = {normalize_word(name): normalize_word(plural) for name, plural in values.get("plural", {}).items()}
    return Vocabulary(words_of.pop("name", ()), words_of, plurals)
