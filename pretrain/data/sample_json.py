"""Parsing of the json member of a sample, in one place for all that read its fields."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pretrain.data import BadSample

_SURROGATE = re.compile("[\ud800-\udfff]")
_WHOLE_NUMBER = re.compile(r"-?[0-9]{1,18}")


def replace_surrogates(text: str) -> str:
    """Replace each lone surrogate by U+FFFD.

    JSON may hold one ("\\ud800"), but no Unicode encoding can represent it, so tokenizers and files refuse it.
    """
    return _SURROGATE.sub("\ufffd", text)


def read_json(members: Mapping[str, bytes]) -> Any:
    """Return the parsed json member of a sample, or {} where it has none.

    A byte-order mark is skipped, and lone surrogates are replaced. The cls member, which holds the class in the shards of
    webdataset and clip_benchmark, is the field `label` where the json has none.

    Args:
        members: the content of each member, by extension.

    Raises:
        BadSample: the json cannot be parsed.
    """
    data = members.get("json", b"{}")
    try:
        value = json.loads(data)
        if _may_hold_surrogates(data):
            value = _clean(value)
    except (ValueError, RecursionError) as error:
        raise BadSample("json unreadable", str(error)) from error
    if "cls" in members and isinstance(value, dict) and value.get("label") is None:
        text = members["cls"].decode("utf-8", "replace").removeprefix("\ufeff").strip()
        if text:
            value["label"] = int(text) if _WHOLE_NUMBER.fullmatch(text) else text
    return value


def read_fields(members: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the fields of a sample's json, or {} where it has none or holds no object.

    Raises:
        BadSample: the json cannot be parsed.
    """
    fields = read_json(members)
    return fields if isinstance(fields, dict) else {}


def _may_hold_surrogates(data: bytes) -> bool:
    """Return whether a json may hold a surrogate: as an escape, encoded in UTF-8 (from 0xED on), or in UTF-16."""
    return b"\\u" in data or b"\xed" in data or data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data[:4]


def _clean(value: Any) -> Any:
    """Return a parsed json with lone surrogates replaced in every text, names of fields included."""
    if isinstance(value, str):
        return replace_surrogates(value)
    if isinstance(value, dict):
        return {replace_surrogates(name): _clean(inner) for name, inner in value.items()}
    return [_clean(inner) for inner in value] if isinstance(value, list) else value
