"""A configuration as plain values and as YAML."""

from __future__ import annotations

import dataclasses
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pretrain.printable import hide_secrets_in


def to_dict(config: Any) -> dict[str, Any]:
    """Return plain values, in the order of the schema; extra components become top-level sections again."""
    values: dict[str, Any] = {}
    for spec in fields(config):
        value = dataclasses.asdict(config)[spec.name]
        values.update(value if "extra" in spec.metadata else {spec.name: value})
    return values


def to_yaml(config: Any) -> str:
    """Return the resolved configuration as YAML; `load` of this text gives an equal one, but for passwords and tokens."""
    return OmegaConf.to_yaml(OmegaConf.create(hide_secrets_in(to_dict(config))))


def save(config: Any, path: Path) -> None:
    """Save the resolved configuration as YAML."""
    path.write_text(to_yaml(config))
