"""How much a store may hold. Knows sizes and times of entries, never what is in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Final, NamedTuple

from ..units import MAX_BYTES
from ..validation import require_count

PARTS_OF_LIMIT: Final = 32  # one of them is put before it is looked again what there is
PARTS_LEFT_FREE: Final = 4  # of them, when entries have to go


class StoredEntry(NamedTuple):
    """What a store has, as its medium tells it."""

    last_used: float
    num_bytes: int
    name: str


class SizeLimit:
    """Makes room for new entries by removing those that were used least lately.

    Counts what this process puts; what others put is seen when the medium is looked at, which
    happens whenever the limit seems to be reached, or one part in 32 of it was put. So one process
    keeps the limit, and of several each may be over it by such a part, until it looks again.
    """

    def __init__(
        self,
        max_bytes: int,
        look: Callable[[], Sequence[StoredEntry]],
        remove: Callable[[str], None],
    ) -> None:
        self.max_bytes: int = require_count("max_bytes", max_bytes, most=MAX_BYTES)
        self._look = look
        self._remove = remove
        self._lock = Lock()
        self._num_known: int | None = None  # bytes, when it was last looked
        self._num_put = 0  # bytes, since then

    def make_room(self, num_bytes: int) -> None:
        """Before an entry of so many bytes is put; raises `OSError` for one that never fits."""
        if num_bytes > self.max_bytes:
            raise OSError(
                f"an entry of {num_bytes} bytes is larger than the store's limit of "
                f"{self.max_bytes}"
            )
        with self._lock:
            self._num_put += num_bytes
            if (
                self._num_known is None
                or self._num_known + self._num_put > self.max_bytes
                or self._num_put > self.max_bytes // PARTS_OF_LIMIT
            ):
                self._num_known = self._remove_oldest(num_bytes)
                self._num_put = num_bytes

    def _remove_oldest(self, num_new: int) -> int:
        """Bytes that are there, after what had to go is gone."""
        entries = sorted(self._look())
        total = sum(entry.num_bytes for entry in entries)
        if total + num_new <= self.max_bytes:
            return total
        most = max(
            self.max_bytes * (PARTS_OF_LIMIT - PARTS_LEFT_FREE) // PARTS_OF_LIMIT - num_new, 0
        )
        for entry in entries:
            if total <= most:
                break
            self._remove(entry.name)
            total -= entry.num_bytes
        return total
