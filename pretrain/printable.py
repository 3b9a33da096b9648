"""Make text safe to print, log and save, count things, and name modalities. Imports nothing of the project.

Safe is text without passwords, tokens and control characters: shard urls may hold passwords, and keys and captions may hold any
character that a terminal obeys.
"""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "***"
"""Stands where a password or a token was."""
NOUNS = {"image": "image", "text": "caption", "audio": "sound"}
"""What messages call an item of a modality; towers of others go by their own name, see `get_noun`."""

_SECRET = r"(?:token|sig|secret|pass|pwd|key|auth|cred|session|sas|jwt|bearer|hmac|policy|code|api)"

_USERINFO = re.compile(r"(\b[a-z][a-z0-9+.-]*://)([^/\s?#@:\"]*)(:?)[^/\s?#\"]*@", re.IGNORECASE)
_USERINFO_WITH_SLASH = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^/\s?#@:\"]*):(?!\d{1,5}/)[^\s@\"]*@", re.IGNORECASE)
_QUERY = re.compile(
    rf"([?&;#](?:[^=&\s'\"#]*{_SECRET}[^=&\s'\"#]*=))[^&\s'\"#]+|([?&;#][^=&\s'\"#]+=)[\w%~+/-]{{24,}}=*(?=[&\s'\"#]|$)",
    re.IGNORECASE,
)
_OF_COMMANDS = tuple(
    re.compile(pattern, flags)
    for pattern, flags in (
        (rf"(\b(?:cookie|[\w-]*{_SECRET}[\w-]*)\s*:\s*)(?!//)[^'\"\n]+", re.IGNORECASE),  # a header of curl or wget
        (rf"((?<!\S)--?[\w-]*{_SECRET}[\w-]*(?:=|\s+)['\"]?)[^\s'\"]+", re.IGNORECASE),  # an option
        (r"((?<!\S)(?:-u|--user|--proxy-user)[=\s]*['\"]?[^\s:'\"]+:)[^\s'\"]+", 0),  # user:password
        (r"(\bsshpass\s+-p\s*['\"]?)[^\s'\"]+", 0),
        (rf"(\b\w*{_SECRET}\w*=['\"]?)[^\s'\"&]+", re.IGNORECASE),  # a variable of the shell
    )
)

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def hide_secrets(text: str) -> str:
    """Return the text with *** for passwords and tokens in urls and in the commands of `pipe:` urls."""
    if "pipe:" in text:
        for pattern in _OF_COMMANDS:
            text = pattern.sub(rf"\g<1>{HIDDEN}", text)
    if "://" not in text:
        return text
    text = _USERINFO.sub(lambda m: f"{m[1]}{m[2]}:{HIDDEN}@" if m[3] else f"{m[1]}{HIDDEN}@", text)
    text = _USERINFO_WITH_SLASH.sub(rf"\g<1>:{HIDDEN}@", text)
    return _QUERY.sub(lambda m: f"{m[1] or m[2]}{HIDDEN}", text)


def hide_secrets_in(value: Any) -> Any:
    """Return plain values (dicts, lists, text, numbers) with hide_secrets applied to each text."""
    if isinstance(value, str):
        return hide_secrets(value)
    if isinstance(value, dict):
        return {key: hide_secrets_in(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(hide_secrets_in(item) for item in value)
    return value


def escape_controls(text: str) -> str:
    r"""Return the text with escapes such as \x1b for characters that a terminal obeys and for unpaired surrogates."""
    return _CONTROL.sub(lambda m: _escape(m[0]), text)


def _escape(character: str) -> str:
    number = ord(character)
    return {"\n": r"\n", "\t": r"\t", "\r": r"\r"}.get(character) or (
        f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"
    )


def one_safe_line(text: str) -> str:
    """Return the text as one line without passwords, tokens and control characters; line breaks become spaces."""
    return escape_controls(hide_secrets(re.sub(r"\s*[\r\n]+\s*", " ", text.strip("\r\n"))))


def format_count(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is 1: "1 shard", "1,200 samples"."""
    plural = f"{noun}es" if noun.endswith(("s", "x", "ch")) else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def get_noun(modality: str) -> str:
    """Return what messages call an item of a modality: sound for audio, and the name itself for a tower of the user's own."""
    return NOUNS.get(modality, modality)
