"""What has become of entries of a block store, counted. Knows no store."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Final

logger: Final = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BlockStoreStatistics:
    """Of a block store, since the engine was made; an entry is one block of a group of layers."""

    num_stored: int = 0  # entries that were written
    num_stored_bytes: int = 0
    num_found: int = 0  # entries that were read and brought into the pool
    num_found_bytes: int = 0
    num_refused: int = 0  # that were corrupt or did not fit, and were removed
    num_dropped: int = 0  # that were not written, because too many waited for it
    num_failed: int = 0  # times that the store raised an exception


@dataclass(eq=False)
class StoreCounts:
    """The same, counted by several threads."""

    _now: BlockStoreStatistics = field(default_factory=BlockStoreStatistics)
    _lock: Lock = field(default_factory=Lock)
    _has_failed: bool = False

    @property
    def now(self) -> BlockStoreStatistics:
        return self._now

    def add(self, **counts: int) -> None:
        with self._lock:
            self._now = replace(
                self._now, **{name: getattr(self._now, name) + n for name, n in counts.items()}
            )

    def failed(self, error: Exception) -> None:
        """The store raised this. The first is logged, what it disturbs is told by the figures."""
        self.add(num_failed=1)
        if not self._has_failed:
            self._has_failed = True
            logger.warning("the block store fails, and requests go on without it: %r", error)
