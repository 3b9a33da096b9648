"""Parsing of the json member of a sample, in one place for all that read its fields."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pretrain.data import BadSample


def read_json(members: Mapping[str, bytes]) -> Any:
    """Return the parsed json member of a sample, or {} where it has none.

    Args:
        members: the content of each member, by extension.

    Raises:
        BadSample: the json cannot be parsed.
    """
    try:
        return json.loads(members.get("json", b"{}"))
    except (ValueError, RecursionError) as error:
        raise BadSample("json unreadable", str(error)) from error


def read_fields(members: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the fields of a sample's json, or {} where it has none or holds no object.

    Raises:
        BadSample: the json cannot be parsed.
    """
    fields = read_json(members)
    return fields if isinstance(fields, dict) else {}
