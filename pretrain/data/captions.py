"""What a sample says: its captions as text, from KEY.txt or a field of KEY.json."""

from __future__ import annotations

import hashlib
import unicodedata
from typing import Any

from pretrain.data import BadSample
from pretrain.data.sample_json import read_json


def normalize_whitespace(text: str) -> str:
    """Runs of white space become one space, none at the ends; a byte-order mark goes. Nothing else changes."""
    return " ".join(text.removeprefix("\ufeff").split())


def caption_id(text: str) -> int:
    """A signed 64-bit hash, equal for captions that differ in case, white space or Unicode composition only.

    The same on every machine and in every version: it may be stored."""
    same = normalize_whitespace(unicodedata.normalize("NFC", text).casefold())
    return int.from_bytes(hashlib.blake2b(same.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big", signed=True)


def read_captions(members: dict[str, bytes], source: str = "txt") -> list[str]:
    """All captions of a sample, cleaned; at least one.

    Args:
        members: content by extension.
        source: "txt", or the name of a json field that holds a string or a list of strings.

    Raises:
        BadSample: there is none, it is empty, or it cannot be read.
    """
    member = "txt" if source == "txt" else "json"
    data = members.get(member)
    if data is None:
        raise BadSample("no caption", f"no {member} member, only {', '.join(sorted(members)) or 'nothing'}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSample("caption not UTF-8", str(error)) from error
    found: list[Any] = [text] if member == "txt" else _read_field(members, source)
    if not all(isinstance(caption, str) for caption in found):
        raise BadSample("caption not text", f"{source}={found!r}"[:200])
    cleaned = [caption for caption in map(normalize_whitespace, found) if caption]
    if not cleaned:
        raise BadSample("empty caption", f"{source} holds {found!r}"[:200])
    return cleaned


def _read_field(members: dict[str, bytes], source: str) -> list[Any]:
    values = read_json(members)
    value = values.get(source) if isinstance(values, dict) else None
    if value is None or value == []:
        has = f"fields {', '.join(sorted(map(str, values)))[:150]}" if isinstance(values, dict) else "no fields"
        raise BadSample("no caption", f"json has no {source}, but {has}")
    return value if isinstance(value, list) else [value]
