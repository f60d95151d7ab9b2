"""Entries as files of one folder, which several processes may share. Knows files, no contents."""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Final

from ..private_folder import private_folder_at
from .size_limit import SizeLimit, StoredEntry

SUFFIX: Final = ".kv"
PART_SUFFIX: Final = ".part"
OURS: Final = re.compile(r"[0-9a-f]+\.kv|\.[0-9a-f]+\.\d+\.[0-9a-f]+\.part")
STALE_SECONDS: Final = 3600.0  # nobody writes a file for so long: its process was killed


class FolderStore:
    """A file for each entry, named by its key in hexadecimal, in a folder nobody else writes to.

    A file appears as a whole or not at all, whoever is killed meanwhile. Beyond `max_bytes` the
    files that were read or written least lately are removed. Raises `ConfigError` for a folder
    that cannot be made, or where others could write: they could make up what is read here.
    """

    def __init__(self, path: str | os.PathLike[str], max_bytes: int) -> None:
        self.path: Path = private_folder_at(Path(path))
        self._limit = SizeLimit(max_bytes, self._entries, self._unlink)
        self._limit.make_room(0)  # in a folder that had a larger limit

    def put(self, key: bytes, data: bytes) -> None:
        if not self.path.is_dir():  # somebody has removed it
            private_folder_at(self.path)
        self._limit.make_room(len(data))
        part = self.path / f".{key.hex()}.{os.getpid()}.{token_hex(4)}{PART_SUFFIX}"
        try:
            with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(data)
            os.replace(part, self._path(key))
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def get(self, key: bytes) -> bytes | None:
        path = self._path(key)
        if not path.is_file():  # nor is a folder read, or a pipe, which would be waited for
            return None
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        with suppress(OSError):  # removed meanwhile
            os.utime(path)
        return data

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return [self._path(key).is_file() for key in keys]

    def remove(self, key: bytes) -> None:
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: bytes) -> Path:
        return self.path / f"{key.hex()}{SUFFIX}"

    def _unlink(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)  # another process may have been faster

    def _entries(self) -> list[StoredEntry]:
        return list(self._look())

    def _look(self) -> Iterator[StoredEntry]:
        """What is there of ours; files that a killed process has left are removed."""
        stale = time.time() - STALE_SECONDS
        with os.scandir(self.path) as found:
            for each in found:
                if not OURS.fullmatch(each.name):
                    continue
                try:
                    status = each.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if stat.S_ISDIR(status.st_mode):
                    continue
                if each.name.endswith(PART_SUFFIX) and status.st_mtime < stale:
                    self._unlink(each.name)
                    continue
                yield StoredEntry(status.st_mtime_ns / 1e9, status.st_size, each.name)
