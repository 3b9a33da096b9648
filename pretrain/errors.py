"""UserError and ConfigError, whose message is one line for the user. Imports nothing of the project but printable."""

from __future__ import annotations

import difflib

from pretrain.printable import one_safe_line


class UserError(Exception):
    """An expected failure: its message is the one line that the user reads. The command exits with 1.

    Messages quote urls, keys and captions: passwords, tokens and control characters in them are replaced.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(one_safe_line(str(message)))


class ConfigError(UserError):
    """Wrong configuration or usage, detected before any work was done. The command exits with 2."""


def closest(name: str, choices: list[str], prefix: str = "") -> str:
    """Return the end of an error message that suggests the nearest choice, behind `prefix`, or "" where none is near."""
    by_lower_case = {choice.lower(): choice for choice in choices}
    matches = difflib.get_close_matches(name.lower(), list(by_lower_case), n=1)
    return f"; did you mean {prefix + by_lower_case[matches[0]]!r}?" if matches else ""
