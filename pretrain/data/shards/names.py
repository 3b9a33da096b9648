"""The names of shards in sample keys: the same wherever a shard lies, and different for different shards of one collection."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from urllib.parse import unquote

_TAR_IN_COMMAND = re.compile(r"[^\s'\"=<>|;&()]+\.tar(?:\.\w+)?(?![\w.])")


def name_shard(path: str) -> str:
    """Return the name of a shard in keys: the file name without .tar.

    Of a url, what follows the path is left out. Of a command it is the name of the first tar that it mentions.
    """
    last = _split_path(path)[-1] if path.startswith("pipe:") else _without_query(path).rpartition("/")[2]
    return _clean(last.removesuffix(".tar")) or _digest(path)


def find_new_names(paths: Sequence[str]) -> dict[int, str]:
    """Return {index: name} of the shards whose file name another shard has, too: the names of folders precede it.

    The names of `a/0000.tar` and `b/0000.tar` are `a-0000` and `b-0000`. As many folders precede as make the names differ,
    or a digest of the path where no folders do. Names hold no slash, so "name/KEY" is unique where KEY is unique in its shard.

    Args:
        paths: local paths, urls and commands.
    """
    names = [name_shard(path) for path in paths]
    if len(set(names)) == len(names):
        return {}
    identities = [_identify(path) for path in paths]
    clashes = pending = _find_clashes(names, identities, range(len(names)))
    depth = 0
    while pending:
        depth += 1
        for i in pending:
            folders = [folder for folder in _split_path(paths[i])[:-1] if folder not in ("", ".")]
            prefix = folders[-depth:] if depth <= len(folders) else [_digest(identities[i])]
            names[i] = _clean("-".join([*prefix, name_shard(paths[i])]))
        pending = _find_clashes(names, identities, pending)
    return {i: names[i] for i in clashes}


def _find_clashes(names: list[str], identities: list[str], candidates: Sequence[int]) -> list[int]:
    """Return those candidates whose name another shard has, too."""
    owners: dict[str, set[str]] = {}
    for name, identity in zip(names, identities, strict=True):
        owners.setdefault(name, set()).add(identity)
    return [i for i in candidates if len(owners[names[i]]) > 1]


def _identify(path: str) -> str:
    """Return the absolute path of a local shard; a url or command as it is."""
    return path if "://" in path or path.startswith("pipe:") else os.path.abspath(path)


def _split_path(path: str) -> list[str]:
    """Return the folders and the file name of a shard; of a url the host is the first folder."""
    if path.startswith("pipe:"):
        match = _TAR_IN_COMMAND.search(path.removeprefix("pipe:"))
        if match is None:
            return [f"command-{_digest(path)}"]
        path = re.sub(r"\.tar\.\w+$", ".tar", match[0])
    if "://" in path:
        host, *folders = _without_query(path).partition("://")[2].split("/")
        return [host.rpartition("@")[2], *folders]
    return os.path.abspath(path).split("/")


def _without_query(path: str) -> str:
    """Return a web address without query and fragment, which may hold a signature, and unquoted; another path as it is."""
    return unquote(re.split("[?#]", path, maxsplit=1)[0]) if path.startswith(("http://", "https://", "file://")) else path


def _clean(name: str) -> str:
    """Return a name without slashes; bytes that are not UTF-8 are written as escapes."""
    return name.replace("/", "-").encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _digest(text: str) -> str:
    return hashlib.blake2b(os.fsencode(text), digest_size=8).hexdigest()
