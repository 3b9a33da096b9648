"""UserError and ConfigError, whose message is one line for the user. Imports nothing of the project."""

from __future__ import annotations

import difflib


class UserError(Exception):
    """An expected failure: its message is the one line that the user reads. The command exits with 1."""


class ConfigError(UserError):
    """Wrong configuration or usage, detected before any work was done. The command exits with 2."""


def closest(name: str, choices: list[str]) -> str:
    """Return the end of an error message that suggests the nearest choice, or "" where none is near."""
    matches = difflib.get_close_matches(name, choices, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""
