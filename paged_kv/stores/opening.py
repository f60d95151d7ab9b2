"""Which store a path or a url names. Knows their kinds, never what is kept in them."""

from __future__ import annotations

import os
import re
from typing import Final
from urllib.parse import unquote, urlsplit

from ..errors import ConfigError
from ..units import parse_memory
from .block_store import BlockStore
from .folder_store import FolderStore
from .fsspec_store import FsspecStore
from .redis_store import RedisStore
from .url import without_password

USUAL_SIZE: Final = "10GiB"
FOLDER: Final = ("file", "local")
REDIS: Final = ("redis", "rediss", "unix")
URL: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


def open_store(where: str | os.PathLike[str], size: int | str = USUAL_SIZE) -> BlockStore:
    """The store in a folder, or at a url: `redis://host/0`, or what fsspec knows, as `s3://...`.

    It holds at most `size` bytes, or text such as "10GiB". Raises `ConfigError` where it cannot be
    opened, `MissingDependencyError` where a package is missing for it.
    """
    max_bytes = parse_memory(size, "block_store_size")
    if not isinstance(where, (str, os.PathLike)) or not os.fspath(where):
        raise ConfigError(f"a block store is a folder or a url, got {where!r}")
    name = os.fspath(where)
    begins = URL.match(name)
    scheme = begins[1].lower() if begins else ""
    if "://" not in name:
        if scheme in (*FOLDER, *REDIS):
            raise ConfigError(f"a block store's url begins with {scheme}://, got {name!r}")
        return FolderStore(name, max_bytes)
    if begins is None or not name.startswith("://", begins.end(1)):
        told = without_password(name)
        raise ConfigError(f"a block store cannot be at {told!r}: its url has no scheme")
    name = scheme + name[begins.end(1) :]
    if scheme in FOLDER:
        return FolderStore(folder_of(name), max_bytes)
    return RedisStore(name, max_bytes) if scheme in REDIS else FsspecStore(name, max_bytes)


def folder_of(url: str) -> str:
    """The path of a file:// url; raises `ConfigError` for one that names another machine."""
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path:
        raise ConfigError(
            f"a block store cannot be at {url!r}: a folder's url has three slashes and its whole "
            "path, as file:///var/cache/kv"
        )
    return unquote(parts.path)
