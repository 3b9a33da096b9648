"""A sample's json: read once, in one way, by everything that looks for a field in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pretrain.data import BadSample


def read_json(members: Mapping[str, bytes]) -> Any:
    """The parsed json member of a sample (extension -> content); {} where it has none. Raises BadSample if it is damaged."""
    try:
        return json.loads(members.get("json", b"{}"))
    except (ValueError, RecursionError) as error:
        raise BadSample("json unreadable", str(error)) from error


def read_fields(members: Mapping[str, bytes]) -> dict[str, Any]:
    """The fields of a sample's json; {} where it has none or holds something else. Raises BadSample if it is damaged."""
    values = read_json(members)
    return values if isinstance(values, dict) else {}
