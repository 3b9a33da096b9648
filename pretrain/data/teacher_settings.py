"""The settings of teachers in the `data` section: which values data.teachers has, and what goes with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pretrain.data.captions import SYNTHETIC, split_sources
from pretrain.data.images import AugmentConfig
from pretrain.errors import ConfigError

SAMPLES = "samples"
"""Value of data.teachers that takes embeddings from the samples."""


def check_teachers(teachers: Any, widths: Sequence[int], caption: str, augment: AugmentConfig) -> None:
    """Raise ConfigError for settings that do not go together: data.teachers, .teacher_widths, .caption and .augment."""
    parse_teachers(teachers)
    if teachers != SAMPLES:
        if widths:
            raise ConfigError(f"data.teacher_widths={widths} is for data.teachers={SAMPLES}")
        return
    if any(width < 1 for width in widths):
        raise ConfigError(f"data.teacher_widths={widths} must be at least 1 each")
    if len([source for source in split_sources(caption) if source != SYNTHETIC]) > 1:
        raise ConfigError(
            f"data.caption={caption}: with data.teachers={SAMPLES} there is one source beside {SYNTHETIC}, as KEY.npz holds "
            "the embedding of one further caption"
        )
    if augment != AugmentConfig():
        raise ConfigError(
            f"data.augment={vars(augment)}: with data.teachers={SAMPLES} images are augmented as their teachers saw them; "
            "leave data.augment at its defaults"
        )


def parse_teachers(value: Any) -> list[str]:
    """Return the folders of data.teachers: none, one, or a list; none for `samples`. Raises ConfigError for another value."""
    if value is None or value == SAMPLES:
        return []
    folders = [value] if isinstance(value, str) else value
    if not isinstance(folders, list) or not folders or not all(isinstance(folder, str) and folder for folder in folders):
        raise ConfigError(
            f"data.teachers={value!r:.200} must be a folder that `clipfuse embed` wrote, a list of such folders, or {SAMPLES}"
        )
    if SAMPLES in folders:
        raise ConfigError(
            f"data.teachers={value!r:.200}: {SAMPLES} goes with no folders; the folder of this name is ./{SAMPLES}"
        )
    if len(set(folders)) < len(folders):
        raise ConfigError(f"data.teachers={value!r:.200} names a folder twice")
    return folders
