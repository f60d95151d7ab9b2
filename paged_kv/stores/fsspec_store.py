"""Entries as objects of whatever fsspec reaches: S3 and its like. Knows paths, never contents."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from typing import Any, Final

from ..errors import ConfigError, MissingDependencyError
from .size_limit import SizeLimit, StoredEntry
from .url import without_password

SUFFIX: Final = ".kv"
OURS: Final = re.compile(r"[0-9a-f]{64}\.kv")
NUM_THREADS: Final = 16  # that ask at once whether entries are there
# How filesystems call the time when an object was written.
TIMES: Final = ("LastModified", "last_modified", "mtime", "updated", "created")


class FsspecStore:
    """An object for each entry at a `url`, as `s3://bucket/folder`, named by its key.

    Beyond `max_bytes` the oldest objects are removed: object stores do not know what was read. A
    store that many write to is better kept small by a rule of its own, as a bucket's lifecycle.
    Makes the last folder of the url, and never a bucket.
    Raises `ConfigError` for a url that fsspec does not know, `MissingDependencyError` where it, or
    what it needs for this one, is not installed.
    """

    def __init__(self, url: str, max_bytes: int) -> None:
        try:
            from fsspec.core import url_to_fs

            filesystem, root = url_to_fs(url)
        except ImportError as error:
            raise MissingDependencyError(
                f"a block store at {without_password(url)!r} needs more: pip install "
                f"'paged-kv[store]' ({error})"
            ) from error
        except ValueError as error:
            raise ConfigError(
                f"a block store cannot be at {without_password(url)!r}: {error}"
            ) from error
        self._filesystem: Any = filesystem
        self._root: str = root.rstrip("/")
        if "/" in self._root.strip("/"):  # or it may be a bucket, which is made by its owner alone
            with suppress(Exception):  # it is there; or what fails is told by `put`
                self._filesystem.mkdir(self._root, create_parents=False)
        self._limit = SizeLimit(max_bytes, self._entries, self._remove_path)

    def put(self, key: bytes, data: bytes) -> None:
        self._limit.make_room(len(data))
        self._filesystem.pipe_file(self._path(key), data)

    def get(self, key: bytes) -> bytes | None:
        try:
            data: bytes = self._filesystem.cat_file(self._path(key))
        except FileNotFoundError:
            return None
        return data

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        with ThreadPoolExecutor(NUM_THREADS) as threads:
            return list(threads.map(lambda key: bool(self._exists(key)), keys))

    def remove(self, key: bytes) -> None:
        self._remove_path(self._path(key))

    def _exists(self, key: bytes) -> bool:
        return bool(self._filesystem.exists(self._path(key)))

    def _path(self, key: bytes) -> str:
        return f"{self._root}/{key.hex()}{SUFFIX}"

    def _remove_path(self, path: str) -> None:
        with suppress(FileNotFoundError):  # another process may have been faster
            self._filesystem.rm_file(path)

    def _entries(self) -> list[StoredEntry]:
        found: dict[str, dict[str, Any]] = self._filesystem.find(
            self._root, maxdepth=1, detail=True
        )
        # Or it would go on to tell of what was there, whoever has put or removed something since.
        self._filesystem.invalidate_cache()
        return [
            StoredEntry(written_at(about), int(about.get("size") or 0), path)
            for path, about in found.items()
            if OURS.fullmatch(path.rpartition("/")[2])
        ]


def written_at(about: dict[str, Any]) -> float:
    """When an object was written, in seconds; 0 where its filesystem does not say."""
    for name in TIMES:
        value = about.get(name)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, (int, float)):
            return float(value)
        if isinstance(value, str):
            with suppress(ValueError):
                return datetime.fromisoformat(value).timestamp()
    return 0.0
