"""Errors that speak to the user, and the hint at the nearest valid name. Imports nothing of the project."""

from __future__ import annotations

import difflib


class UserError(Exception):
    """An expected failure: its message is the one line a person reads. The command ends with 1."""


class ConfigError(UserError):
    """Wrong configuration or usage, found before any work was done. The command ends with 2."""


def closest(name: str, choices: list[str]) -> str:
    """The end of an error line that names the nearest choice, or nothing."""
    near = difflib.get_close_matches(name, choices, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
