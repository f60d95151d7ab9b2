"""Entries as values of a redis server. Knows its commands, never what values hold."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

from ..errors import ConfigError, MissingDependencyError
from ..units import MAX_BYTES
from ..validation import require_count
from .url import without_password

PREFIX: Final = b"paged_kv:"
USED: Final = b"paged_kv used"  # a sorted set: entries as KEY:SIZE by when they were used
TOTAL: Final = b"paged_kv bytes"


class RedisStore:
    """A value for each entry in the database at a `url`, as `redis://host:6379/0`.

    All who use the database share one count of bytes, and whoever puts an entry beyond `max_bytes`
    removes those that were used least lately. Raises `ConfigError` for a url that cannot be,
    `MissingDependencyError` without the package redis; an own `client` may be given.
    """

    def __init__(self, url: str, max_bytes: int, client: Any = None) -> None:
        self.max_bytes: int = require_count("max_bytes", max_bytes, most=MAX_BYTES)
        self._client: Any = client_of(url) if client is None else client

    def put(self, key: bytes, data: bytes) -> None:
        if len(data) > self.max_bytes:
            raise OSError(
                f"an entry of {len(data)} bytes is larger than the store's limit of "
                f"{self.max_bytes}"
            )
        self.remove(key)
        # The entry comes last: what a killed process leaves is in the set, and goes with it.
        total = 0
        if self._client.zadd(USED, {member(key, len(data)): time.time()}):
            total = int(self._client.incrby(TOTAL, len(data)))
        while total > self.max_bytes:
            total = self._drop_oldest()
        self._client.set(PREFIX + key, data)

    def get(self, key: bytes) -> bytes | None:
        data: bytes | None = self._client.get(PREFIX + key)
        if data is not None:
            self._client.zadd(USED, {member(key, len(data)): time.time()}, xx=True)
        return data

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        with self._client.pipeline(transaction=False) as together:
            for key in keys:
                together.exists(PREFIX + key)
            return [bool(found) for found in together.execute()]

    def remove(self, key: bytes) -> None:
        size = int(self._client.strlen(PREFIX + key))
        if size and self._client.zrem(USED, member(key, size)):
            self._drop(member(key, size))

    def _drop_oldest(self) -> int:
        """Delete what was used least lately; bytes that are left."""
        oldest = self._client.zpopmin(USED)
        if not oldest:  # somebody emptied it
            self._client.delete(TOTAL)
            return 0
        return self._drop(oldest[0][0])

    def _drop(self, entry: bytes) -> int:
        """Delete an entry that is out of the set; bytes that are left."""
        key, _, size = entry.rpartition(b":")
        self._client.delete(PREFIX + key)
        return int(self._client.decrby(TOTAL, int(size)))


def member(key: bytes, size: int) -> bytes:
    return key + b":" + str(size).encode()


def client_of(url: str) -> Any:
    try:
        import redis
    except ImportError as error:
        raise MissingDependencyError(
            f"a block store at {without_password(url)!r} needs redis: pip install 'paged-kv[store]'"
        ) from error
    try:
        return redis.Redis.from_url(url)
    except ValueError as error:
        raise ConfigError(
            f"a block store cannot be at {without_password(url)!r}: {error}"
        ) from error
