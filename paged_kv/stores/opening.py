"""Which store a path or a url names. Knows their kinds, never what is kept in them."""

from __future__ import annotations

import os
from typing import Final
from urllib.parse import unquote, urlsplit

from ..errors import ConfigError
from ..units import parse_memory
from .block_store import BlockStore
from .folder_store import FolderStore
from .fsspec_store import FsspecStore
from .redis_store import RedisStore

USUAL_SIZE: Final = "10GiB"
REDIS: Final = ("redis", "rediss", "unix")


def open_store(where: str | os.PathLike[str], size: int | str = USUAL_SIZE) -> BlockStore:
    """The store in a folder, or at a url: `redis://host/0`, or what fsspec knows, as `s3://...`.

    It holds at most `size` bytes, or text such as "10GiB". Raises `ConfigError` where it cannot be
    opened, `MissingDependencyError` where a package is missing for it.
    """
    max_bytes = parse_memory(size, "block_store_size")
    if not isinstance(where, (str, os.PathLike)) or not os.fspath(where):
        raise ConfigError(f"a block store is a folder or a url, got {where!r}")
    name = os.fspath(where)
    scheme = name.partition("://")[0] if "://" in name else ""
    if scheme == "file":
        return FolderStore(unquote(urlsplit(name).path), max_bytes)
    if scheme in REDIS:
        return RedisStore(name, max_bytes)
    return FsspecStore(name, max_bytes) if scheme else FolderStore(name, max_bytes)
