"""Object stores: s3, gs, az and hf urls, through fsspec and the file system package of each store.

Credentials come from where each package looks for them: environment variables, profiles, metadata services. Messages of errors
never contain them.
"""

from __future__ import annotations

import base64
import logging
import os
import re
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from pretrain.errors import UserError
from pretrain.printable import HIDDEN, one_safe_line

T = TypeVar("T")


class _Store(NamedTuple):
    """What a scheme needs: its package, the extra of clipfuse that installs it, and where credentials come from."""

    package: str
    extra: str
    credentials: str


_S3 = _Store(
    "s3fs", "s3", "AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; FSSPEC_S3_ANON=true for a public bucket"
)
_GCS = _Store("gcsfs", "gcs", "GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`")
_AZURE = _Store(
    "adlfs",
    "azure",
    "AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, or AZURE_STORAGE_CONNECTION_STRING",
)
_HF = _Store("huggingface_hub", "hf", "HF_TOKEN, or `hf auth login`")

STORES = {"s3": _S3, "s3a": _S3, "gs": _GCS, "gcs": _GCS, "az": _AZURE, "abfs": _AZURE, "abfss": _AZURE, "hf": _HF}
"""The schemes of object stores."""

_LISTING_SECONDS = 300.0  # how long a folder's listing is reused
_ACCESS_KEY = re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b|\b(?:hf_|ya29\.)[\w.-]{16,}")
_MAGIC = re.compile(r"[*?\[]")

_lock = threading.Lock()
_systems: dict[tuple[int, str, str], Any] = {}


class ObjectInfo(NamedTuple):
    """Size in bytes, version tag ("" = unknown), and (algorithm, hex digest) of an object where the store states one."""

    size: int
    tag: str
    digest: tuple[str, str] | None


def is_store(path: str) -> bool:
    """Return whether a path is the url of an object store."""
    scheme, separator, _ = path.partition("://")
    return bool(separator) and scheme in STORES


def is_pattern(url: str) -> bool:
    """Return whether a store's url is to be listed: a glob or a folder."""
    last = url.rpartition("://")[2].partition("/")[2].rpartition("/")[2]
    return bool(_MAGIC.search(url)) or "." not in last


def list_shards(url: str) -> list[str]:
    """Return the urls of the objects that match a glob, or of the *.tar in a folder.

    Raises UserError where the store cannot be listed.
    """

    def find(system: Any, path: str) -> list[str]:
        if _MAGIC.search(path):
            return [str(name) for name in system.glob(path)]
        return [
            entry["name"] for entry in system.ls(path.rstrip("/"), detail=True)
            if entry["type"] == "file" and entry["name"].endswith(".tar")
        ]  # fmt: skip

    try:
        names = call_store(url, find)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(one_safe_line(f"cannot list {url}: {error}")) from error
    return [_build_url(url, name) for name in names]


def list_names(folder: str) -> set[str] | None:
    """Return the names in a folder of a store; None where it cannot be listed."""
    try:
        entries = call_store(folder, lambda system, path: system.ls(path, detail=True))
    except (OSError, UserError):
        return None
    return {entry["name"].rstrip("/").rpartition("/")[2] for entry in entries}


def read_object(url: str, start: int, end: int) -> bytes:
    """Return the bytes [start, end) of an object. Raises OSError or UserError."""
    content = call_store(url, lambda system, path: bytes(system.cat_file(path, start=start, end=end)))
    if len(content) != end - start:
        raise OSError(f"{len(content):,} bytes came of the {end - start:,} from byte {start:,} on")
    return content


def read_start(url: str, most: int) -> bytes:
    """Return an object, or the first `most` bytes of a larger one, by one request. Raises OSError or UserError."""
    return call_store(url, lambda system, path: bytes(system.cat_file(path, start=0, end=most)))


def write_object(url: str, content: bytes) -> None:
    """Write a whole object. Raises OSError or UserError."""
    call_store(url, lambda system, path: system.pipe_file(path, content))


def find_info(url: str) -> ObjectInfo:
    """Return size, version and digest of an object, as the store states them now. Raises OSError or UserError."""

    def ask(system: Any, path: str) -> dict[str, Any]:
        # Only s3fs would answer from a listing made long before.
        return dict(system.info(path, refresh=True) if "s3" in _protocols(system) else system.info(path))

    info = call_store(url, ask)
    if info.get("type") != "file" or info.get("size") is None:
        raise FileNotFoundError("there is no such object")
    tag = str(info.get("ETag") or info.get("etag") or info.get("generation") or info.get("oid") or "").strip('"')
    return ObjectInfo(int(info["size"]), tag, _find_digest(info, tag))


def call_store(url: str, action: Callable[[Any, str], T]) -> T:
    """Return action(file system, path), with errors that name no secrets.

    Where access is denied, credentials are looked for once more: a token may have expired since.

    Raises:
        FileNotFoundError: there is no such object.
        PermissionError: access is denied.
        OSError: anything else that retrying may help.
        UserError: the package of the store is not installed, or there are no credentials.
    """
    denied = None
    while True:
        system, path = _find_system(url, denied)
        try:
            return action(system, path)
        except PermissionError as error:
            if denied is not None:
                raise _translate(url, error) from None
            denied = system
        except Exception as error:
            raise _translate(url, error) from None


def _find_system(url: str, denied: Any = None) -> tuple[Any, str]:
    """Return the file system of a url, another than `denied`, and the path in it. Raises UserError."""
    scheme, _, rest = url.partition("://")
    store = STORES[scheme]
    try:
        import fsspec
        from fsspec.core import url_to_fs

        fsspec.get_filesystem_class(scheme)
    except ImportError:
        raise UserError(f"{scheme}:// needs {store.package}: pip install 'clipfuse[{store.extra}]'") from None
    key = (os.getpid(), scheme, rest.partition("/")[0])
    try:
        with _lock:
            system = _systems.get(key)
            if system is None or system is denied:
                for name in ("gcsfs", "azure"):  # they log tracebacks and long lists of what is reported here in a line
                    logging.getLogger(name).setLevel(logging.CRITICAL)
                system, _ = url_to_fs(url, listings_expiry_time=_LISTING_SECONDS, skip_instance_cache=True)
                _systems[key] = system
        return system, str(system._strip_protocol(url))
    except Exception as error:
        raise _translate(url, error) from None


def _reset_after_fork() -> None:
    """Make a new lock, as a thread of the parent process may hold it; that process's file systems are not used in this one."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_reset_after_fork)


def _protocols(system: Any) -> tuple[str, ...]:
    return (system.protocol,) if isinstance(system.protocol, str) else tuple(system.protocol)


def _build_url(url: str, name: str) -> str:
    """Return the url of an object, from another url of the same bucket and its name in the file system."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}/{name.partition('/')[2]}"


def _find_digest(info: dict[str, Any], tag: str) -> tuple[str, str] | None:
    """Return (algorithm, hex digest) of an object from what its store says of it; None where it states none."""
    lfs = info.get("lfs")
    digest = getattr(lfs, "sha256", None) or (lfs.get("sha256") if isinstance(lfs, dict) else None)
    if digest:
        return "sha256", str(digest)
    encoded = info.get("md5Hash") or info.get("content_md5") or (info.get("content_settings") or {}).get("content_md5")
    if encoded:
        return "md5", base64.b64decode(encoded).hex() if isinstance(encoded, str) else bytes(encoded).hex()
    if "StorageClass" in info and re.fullmatch("[0-9a-f]{32}", tag):  # s3; not so where a key of KMS encrypts the bucket
        return "etag", tag
    return None


def _translate(url: str, error: Exception) -> Exception:
    """Return the error to raise for one of a file system: an OSError or UserError whose message names no secrets."""
    scheme = url.partition("://")[0]
    message = _ACCESS_KEY.sub(HIDDEN, one_safe_line(str(error)))[:300]
    kind = type(error).__name__
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError("there is no such object")
    if isinstance(error, PermissionError):
        return PermissionError(f"access denied ({message}); credentials come from {STORES[scheme].credentials}")
    if isinstance(error, UserError):
        return error
    if "Credential" in kind or kind in ("ProfileNotFound", "ClientAuthenticationError", "GatedRepoError", "RefreshError"):
        return UserError(f"cannot read {url}: {message}; credentials come from {STORES[scheme].credentials}")
    if isinstance(error, ImportError):
        return UserError(f"{scheme}:// needs {STORES[scheme].package}: pip install 'clipfuse[{STORES[scheme].extra}]'")
    if not message:
        return OSError("no answer in time" if isinstance(error, TimeoutError) else kind)
    return OSError(message if isinstance(error, OSError) else f"{kind}: {message}")
