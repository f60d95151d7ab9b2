"""Which blocks a replica has cached, and what changed since when. Knows hashes, never tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from threading import Lock
from typing import Final

from ...blocks.events import BlockRemoved, BlockStored, CacheEvent
from ...engine.intake import is_nobody_elses
from .order import BlockChanges

MOST_KEPT: Final = 1 << 14  # changes; who knows less than the oldest of them is told everything


class BlockLog:
    """The blocks of the first group of layers, which needs the longest part of a prefix.

    The engine's thread notes, others ask.
    """

    def __init__(self, most_kept: int = MOST_KEPT) -> None:
        self._lock = Lock()  # of what follows
        self._stored: dict[bytes, None] = {}
        self._changes: deque[bytes] = deque(maxlen=most_kept)  # hashes, stored or removed
        self._number = 0  # of the last change

    def note(self, events: Iterable[CacheEvent]) -> None:
        with self._lock:
            for event in events:
                self._note(event)

    def _note(self, event: CacheEvent) -> None:
        if not isinstance(event, (BlockStored, BlockRemoved)):
            self._stored.clear()
            self._changes.clear()
            self._number += self._changes.maxlen or 1  # nobody knows of what is there from now on
            return
        if event.group:
            return
        if isinstance(event, BlockRemoved):
            if event.block_hash not in self._stored:
                return  # nobody was told of it
            del self._stored[event.block_hash]
        elif is_nobody_elses(event.extra_keys):
            return
        else:
            self._stored[event.block_hash] = None
        self._changes.append(event.block_hash)
        self._number += 1

    def since(self, number: int) -> BlockChanges:
        """What changed after the change of this number; all that is there, where that is too long
        ago, or 0.
        """
        with self._lock:
            num_new = self._number - number
            if number <= 0 or not 0 <= num_new <= len(self._changes):
                return BlockChanges(0, self._number, tuple(self._stored), ())
            oldest = len(self._changes) - num_new
            changed = dict.fromkeys(list(self._changes)[oldest:])
        return BlockChanges(
            number,
            self._number,
            tuple(each for each in changed if each in self._stored),
            tuple(each for each in changed if each not in self._stored),
        )
