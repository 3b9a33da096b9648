"""Merges the values of one file or command line over those of another."""

from __future__ import annotations

import re
from typing import Any

from pretrain.config.values import COMMAND_LINE, Section, without

ALTERNATIVES = {"train": ("steps", "samples", "epochs")}
"""By section: keys that give the same quantity in different units, of which one is used."""


def merge(base: dict[str, Any], override: dict[str, Any], section: str = "") -> Section:
    """Merge `override` over `base` and return the result. Dicts merge by key; lists and values replace, and so does {}.

    section: the key of these dicts. A key of ALTERNATIVES in `override` removes the other alternatives of `base`. A `name` of
    another architecture removes the `args` of `base`.
    """
    units = ALTERNATIVES.get(section, ())
    is_overridden = any(override.get(key) for key in units)  # 0 means that this unit is not used
    merged_values = without(base, [key for key in base if is_overridden and key in units])
    if isinstance(override, Section):
        merged_values.notes += override.notes
    _drop_other_args(merged_values, override, section)
    for key, value in override.items():
        old = merged_values.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and value and not getattr(value, "replaces", False):
            new = merge(old, value, key)
        else:
            new = value
            if isinstance(value, Section) and key in merged_values and old is None:
                value.replaces = True  # null came first
        source = override.sources.get(key) if isinstance(override, Section) else None
        merged_values[key] = new
        merged_values.sources.pop(key, None)
        if source is not None:
            merged_values.sources[key] = source._replace(value=new) if source.value is value else source
    return merged_values


def _drop_other_args(values: Section, override: dict[str, Any], section: str) -> None:
    """Remove `args` from the values of a tower where `override` names an architecture of another family, and note it."""
    name, args = override.get("name"), values.get("args")
    if not isinstance(name, str) or not isinstance(args, dict) or not args:
        return
    old = values.get("name")
    source = values.source("args")
    if (source is not None and source.where == COMMAND_LINE) or (isinstance(old, str) and _family(old) == _family(name)):
        return
    del values["args"]
    of = f" of {old}" if isinstance(old, str) else ""
    values.notes.append(f"{section}.name={name}: without {section}.args{of} ({', '.join(map(str, args))})")


def _family(name: str) -> str:
    """Return the letters that the name of a model begins with: vit for vit_tiny_patch16_224, resnet for resnet18."""
    letters = re.match(r"[a-z]*", re.split(r"[/:]", name.rstrip("/"))[-1].lower())
    return letters[0] if letters is not None else ""
