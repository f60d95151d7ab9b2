"""Copies of blocks on their way to a store: a bounded queue and a thread. Knows no requests."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Final

from ..cache.block_entries import BlockCopies, BlockEntries
from ..stores.block_store import BlockStore
from .store_counts import StoreCounts

MOST_WAITING: Final = 256 << 20  # bytes of copies
CLOSING_SECONDS: Final = 30.0


class BlockWriter:
    """Writes copies in the order in which they come; what the store raises is counted."""

    def __init__(self, store: BlockStore, counts: StoreCounts) -> None:
        self._store = store
        self._counts = counts
        self._waiting: deque[tuple[BlockEntries, BlockCopies]] = deque()
        self._bad: deque[bytes] = deque()  # keys of entries that have to go
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="paged_kv store writer")

    @property
    def room(self) -> int:
        """Bytes that may come to wait."""
        waiting = list(self._waiting)
        return MOST_WAITING - sum(
            len(copies.block_hashes) * entries.num_bytes(copies.kind) for entries, copies in waiting
        )

    def put(self, entries: BlockEntries, copies: Sequence[BlockCopies], bad: list[bytes]) -> None:
        """Have copies written, and the entries of these keys removed; returns at once."""
        self._waiting.extend((entries, each) for each in copies)
        self._bad.extend(bad)
        if copies or bad:
            self._thread.submit(self._work)

    def flush(self) -> None:
        """Return when all that waits is written, or has failed."""
        self._thread.submit(self._work).result()

    def close(self) -> None:
        """Return when all that waits is written, or a store takes too long for that; nothing may
        be put afterwards."""
        try:
            self._thread.submit(self._work).result(timeout=CLOSING_SECONDS)
        except FutureTimeoutError:
            self._counts.failed(TimeoutError(f"not all was written in {CLOSING_SECONDS:g} seconds"))
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _work(self) -> None:
        """All that waits, whoever put it there."""
        while self._waiting:
            self._write(*self._waiting.popleft())
        while self._bad:
            self.remove(self._bad.popleft())

    def remove(self, key: bytes) -> None:
        """Remove an entry now."""
        try:
            self._store.remove(key)
        except Exception as error:
            self._counts.failed(error)

    def _write(self, entries: BlockEntries, copies: BlockCopies) -> None:
        try:
            found = self._store.contains([entries.key(each) for each in copies.block_hashes])
            if all(found):
                return
            found.reverse()
            for is_there, (key, data) in zip(found, entries.entries_of(copies), strict=True):
                if data is not None and not is_there:
                    self._put(key, data)
        except Exception as error:
            self._counts.failed(error)

    def _put(self, key: bytes, data: bytes) -> None:
        try:
            self._store.put(key, data)
        except Exception as error:
            self._counts.failed(error)
        else:
            self._counts.add(num_stored=1, num_stored_bytes=len(data))
