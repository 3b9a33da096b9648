"""Explains why a sample lacks an image, a sound or a caption, from the extensions of its members."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pretrain.data.audio_files import AUDIO_EXTENSIONS

UNREAD_IMAGES = ("dng", "exr", "heic", "heif", "ico", "jp2", "jxl", "npy", "npz", "pgm", "ppm", "pth", "svg", "tga")
"""Extensions under which other tools store images, but which are not read."""

UNREAD_SOUNDS = ("aac", "aif", "aiff", "au", "caf", "m4a", "mid", "mka", "mp4", "webm", "wma")
"""Extensions under which other tools store sounds, but which are not read."""

_MAX_NAMED = 6  # members named in a message: a sample whose keys hold dots has thousands


def list_members(extensions: Collection[str]) -> str:
    """Return the extensions as a short list for messages."""
    names = sorted(extensions)
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(name[:40] for name in names[:_MAX_NAMED]) + more


def explain_missing_image(extensions: Collection[str], images: Collection[str]) -> str:
    """Return why a sample has no image: the members it has, and the rule of names that they break.

    Args:
        extensions: of the sample's members.
        images: extensions that are images.
    """
    unread = sorted({name.rpartition(".")[2] for name in extensions}.intersection(UNREAD_IMAGES))
    hint = _explain_dots(extensions, images)
    if not hint and unread:
        hint = f"; .{unread[0]} is not read: convert it to .jpg, .png or .webp"
    sounds = sorted(set(AUDIO_EXTENSIONS).intersection(extensions))
    if not hint and sounds:
        hint = f"; .{sounds[0]} is a sound, which the section audio of a run reads"
    return f"members: {list_members(extensions) or 'none'}{hint}"


def explain_missing_sound(extensions: Collection[str]) -> str:
    """Return why a sample has no sound: the members it has, and the rule of names that they break.

    Args:
        extensions: of the sample's members.
    """
    hint = _explain_dots(extensions, AUDIO_EXTENSIONS)
    last = {name.rpartition(".")[2] for name in extensions}
    if not hint and (unread := sorted(last.intersection(UNREAD_SOUNDS))):
        hint = f"; .{unread[0]} is not read: convert it to .flac, .ogg, .mp3 or .wav"
    if not hint and (others := sorted(last.intersection({"opus", "oga", "wave"}))):
        hint = f"; .{others[0]} is not read: name it KEY.{'wav' if others[0] == 'wave' else 'ogg'}"
    return f"members: {list_members(extensions) or 'none'}{hint}"


def explain_missing_caption(extensions: Collection[str], member: str) -> str:
    """Return why a sample has no caption: the members it has, and the rule of names that they break.

    Args:
        extensions: of the sample's members.
        member: the extension that should hold the caption, "txt" or "json".
    """
    hint = _explain_dots(extensions, [member])
    others = sorted({"text", "caption", "captions", "cap", "md"}.intersection(extensions))
    if not hint and others:
        hint = f"; .{others[0]} is not read: name it KEY.txt"
    if not hint and member == "txt" and "json" in extensions:
        hint = "; a field of the json is read where the caption setting names it"
    if not hint and member == "json" and "txt" in extensions:
        hint = "; the caption setting txt reads KEY.txt"
    return f"no {member} member, only {list_members(extensions) or 'nothing'}{hint}"


def explain_no_pair(modalities: Sequence[str], missing: Sequence[str]) -> str:
    """Return why a sample with fewer than two modalities, and without the missing ones, has no pair."""
    return f"it has {modalities[0] if modalities else 'nothing'}, without {' and '.join(missing)}"


def _explain_dots(extensions: Collection[str], wanted: Collection[str]) -> str:
    """Return the rule of names where a wanted member has a dot in its extension, else ""."""
    dotted = sorted(name for name in extensions if "." in name and name.rpartition(".")[2] in wanted)
    if not dotted:
        return ""
    first, last = dotted[0][:40], dotted[0].rpartition(".")[2]
    new = f"KEY.{last}" if len(dotted) == 1 else f"KEY-{first.removesuffix('.' + last).replace('.', '-')}.{last}"
    return f"; KEY ends at the first dot of a file name: rename KEY.{first} to {new}"
