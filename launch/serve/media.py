"""A sound over HTTP: whole, or the range of bytes that a browser asks for when its user moves along the sound."""

from __future__ import annotations

import re

from fastapi import Response

from pretrain.data.audio_files import find_media_type

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


def send_sound(content: bytes, requested: str = "") -> Response:
    """Return a response that holds an encoded sound.

    Status 404 where it is none, 206 with a part of it, and 416 where that part is not there.

    Args:
        content: the file.
        requested: the header Range; a form other than one range of bytes asks for all.
    """
    media_type, size = find_media_type(content), len(content)
    if not media_type:
        return Response(status_code=404)
    headers = {"Accept-Ranges": "bytes", "Cache-Control": "private, max-age=60"}
    match = _RANGE.fullmatch(requested.strip())
    if match is None or match.groups() == ("", ""):
        return Response(content, media_type=media_type, headers=headers)
    first, last = match.groups()
    begin = int(first) if first else max(0, size - int(last))
    end = min(size, int(last) + 1) if first and last else size
    if begin >= end:
        return Response(status_code=416, headers={**headers, "Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
    return Response(content[begin:end], 206, headers, media_type)
