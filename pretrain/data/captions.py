"""The captions of a sample as cleaned text, from KEY.txt, a field of KEY.json or of another json member, or several of them.

txt   txt:lines   caption   syn.json:syn_text   txt+syn.json:syn_text
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from typing import Any

from pretrain.data import BadSample, MissingContent
from pretrain.data.members import explain_missing_caption
from pretrain.data.sample_json import read_json, replace_surrogates
from pretrain.errors import ConfigError

TXT, TXT_LINES, TXT_WHOLE = "txt", "txt:lines", "txt:whole"
"""Sources of captions that are not a json field: KEY.txt as one caption, or as one a line.

`txt` is one caption too, except that evaluation reads it as lines where most samples hold several. `txt:whole` is always one.
"""


SYNTHETIC = "syn.json:syn_text"
"""Source of the synthetic captions of DataCompDR."""

_OF_MEMBER = re.compile(r"([^:+/]+\.json):(.+)", re.DOTALL)
"""A field of another json member than KEY.json: its extension and the name of the field."""


def split_sources(source: str) -> tuple[str, ...]:
    """Return the sources that one joins by "+", where one of them names a json member; otherwise the source itself."""
    return tuple(source.split("+")) if ".json:" in source else (source,)


def check_caption_source(source: str, where: str) -> None:
    """Raise ConfigError for a source that begins as those of KEY.txt do but is none; any other text names a json field.

    Args:
        source: where captions are.
        where: the setting or option that holds it, for the message.
    """
    parts = split_sources(source)
    for part in parts:
        is_txt = part.startswith("txt:") and part not in (TXT_LINES, TXT_WHOLE)
        if is_txt or (len(parts) > 1 and not part) or (".json:" in part and not _OF_MEMBER.fullmatch(part)):
            raise ConfigError(
                f"{where}={source}: valid are {TXT}, {TXT_LINES} (each line of KEY.txt is a caption), {TXT_WHOLE}, the name of "
                "a json field, a field of another member (syn.json:syn_text), and several joined by + (txt+syn.json:syn_text)"
            )
    if len(set(parts)) < len(parts):
        raise ConfigError(f"{where}={source} names a source of captions twice")


def caption_members(source: str) -> tuple[str, ...]:
    """Return the extensions of the members that hold the captions of a source: "txt", "json" or such as "syn.json"."""
    return tuple(dict.fromkeys(_split_field(part)[0] for part in split_sources(source)))


def _split_field(part: str) -> tuple[str, str]:
    """Return the extension of the member of a single source, and the field of its json; "" for KEY.txt."""
    if part in (TXT, TXT_LINES, TXT_WHOLE):
        return "txt", ""
    match = _OF_MEMBER.fullmatch(part)
    return (match[1], match[2]) if match else ("json", part)


def has_several_captions(source: str) -> bool:
    """Return whether a sample may have several captions in a source."""
    return source not in (TXT, TXT_WHOLE)


def normalize_whitespace(text: str) -> str:
    """Replace each run of white space by one space; strip the ends and a leading byte-order mark.

    Lone surrogates, which no tokenizer can read, become U+FFFD.
    """
    return " ".join(replace_surrogates(text).removeprefix("\ufeff").split())


def caption_id(text: str) -> int:
    """Return a signed 64-bit hash of a caption.

    It is equal for captions that differ only in case, white space or Unicode composition. It is the same on every machine
    and in every version, so it may be stored.
    """
    canonical = normalize_whitespace(unicodedata.normalize("NFC", text).casefold())
    return int.from_bytes(hashlib.blake2b(canonical.encode(), digest_size=8).digest(), "big", signed=True)


def read_captions(members: dict[str, bytes], source: str = TXT) -> list[str]:
    """Return all captions of a sample, at least one, with white space normalized.

    Args:
        members: the content of each member, by extension.
        source: "txt" or "txt:whole" (one caption), "txt:lines" (one a line), or the name of a json field that holds a
            string or a list of strings; null in a list is skipped. Of sources joined by "+" all captions, in order.

    Raises:
        BadSample: the sample has no caption, only empty ones, or one that cannot be read.
    """
    return [caption for captions in read_caption_groups(members, source) for caption in captions.values()]


def read_caption_groups(members: dict[str, bytes], source: str) -> list[dict[int, str]]:
    """Return the captions of each of the sources joined by "+"; {} for one that the sample lacks.

    They are by place: among the lines that are not empty, or in the list of the json field.

    Raises:
        BadSample: no source has a caption, or one has only empty ones, or one that cannot be read.
    """
    groups: list[dict[int, str]] = []
    missing: MissingContent | None = None
    for part in split_sources(source):
        try:
            groups.append(_read_single(members, part))
        except MissingContent as error:
            groups.append({})
            missing = missing or error
    if missing is not None and not any(groups):
        raise missing
    return groups


def number_captions(groups: list[dict[int, str]]) -> dict[int, str]:
    """Return the captions of all groups by place; the places of a group continue those of the groups before it."""
    numbered: dict[int, str] = {}
    for captions in groups:
        start = max(numbered, default=-1) + 1
        numbered |= {start + place: caption for place, caption in captions.items()}
    return numbered


def _read_single(members: dict[str, bytes], source: str) -> dict[int, str]:
    """Return the captions of one source by place, at least one. Raises BadSample."""
    member, field = _split_field(source)
    if member not in members:
        raise MissingContent("no caption", explain_missing_caption(members, member))
    if member == "txt":
        entries = dict(enumerate(_read_txt(members["txt"], source)))
    else:
        entries = _read_field(members if member == "json" else {"json": members[member]}, field)
    places, values = list(entries), list(entries.values())
    if not all(isinstance(caption, str) for caption in values):
        raise BadSample("caption not text", f"{source}={values!r}"[:200])
    cleaned = [normalize_whitespace(caption) for caption in values]
    if not any(cleaned):
        raise BadSample("empty caption", f"{source} holds {values!r}"[:200])
    if member == "txt":
        return dict(enumerate(filter(None, cleaned)))
    return {place: caption for place, caption in zip(places, cleaned, strict=True) if caption}


_SENTENCE_END = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["')\]”’]))\s+(?=["'(\[“‘]?[^\W\d_a-z])|(?<=[。！？])(?=\S)""")


def split_sentences(caption: str) -> list[str]:
    """Return the sentences of a caption with normalized white space, at least one.

    A sentence ends with . ! or ? before a letter that is no small a to z, or with a full-width mark. A single word with a
    period ("Dr.", "U.S.") is no sentence, but the beginning of the next.
    """
    sentences: list[str] = []
    for part in _SENTENCE_END.split(caption):
        if sentences and sentences[-1].endswith(".") and " " not in sentences[-1]:
            sentences[-1] += f" {part}"
        else:
            sentences.append(part)
    return sentences


def count_lines(data: bytes) -> int:
    """Return the number of lines of a KEY.txt that are not empty."""
    return sum(bool(normalize_whitespace(line)) for line in split_lines(data.decode("utf-8", "replace")))


def split_lines(text: str) -> list[str]:
    """Split at line feeds and carriage returns only: str.splitlines also splits inside captions, at U+2028 and others."""
    return re.split(r"[\r\n]+", text)


def _read_txt(data: bytes, source: str) -> list[str]:
    """Return the content of KEY.txt, or its lines. Raises BadSample."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSample("caption not UTF-8", str(error)) from error
    return split_lines(text) if source == TXT_LINES else [text]


def _read_field(members: dict[str, bytes], source: str) -> dict[int, Any]:
    """Return the values of a json field by their place in its list, without null.

    Raises:
        BadSample: the json is not an object, or the field is absent, null, or a list without a value.
    """
    fields = read_json(members)
    if not isinstance(fields, dict):
        kind = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}.get(type(fields), "a number")
        raise BadSample("no caption", f"the json is {kind}, not an object with a field {source}")
    if source not in fields:
        names = ", ".join(sorted(map(str, fields)))[:150]
        raise MissingContent("no caption", f"json has no {source}, but {'fields ' + names if names else 'no fields'}")
    value = fields[source]
    values = {place: item for place, item in enumerate(value if isinstance(value, list) else [value]) if item is not None}
    if value is None or not values:
        content = "null" if value is None else "a list of null" if value else "an empty list"
        raise MissingContent("no caption", f"the field {source} of the json is {content}")
    return values
