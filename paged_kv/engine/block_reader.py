"""Blocks that are looked for in a store, while the requests that want them wait.

Knows hashes and entries, never requests or when they may start.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from threading import Event
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..blocks.block_manager import BlockManager
from ..blocks.geometry import BlockIds
from ..blocks.prefix_sharing import WantedBlock
from ..blocks.token_chain import TokenChain
from ..cache.block_entries import BlockEntries, Kind
from ..errors import TransferError
from ..stores.block_store import BlockStore
from .store_counts import StoreCounts

SECONDS: Final = 5.0  # for which a store is waited for
LATE_SECONDS: Final = 1.0  # more, and nobody waits for whoever reads from it
PAUSE_SECONDS: Final = 30.0  # after which a store that took longer is asked again
NUM_READERS: Final = 8
NUM_LOOKUPS: Final = 4  # at once


class Place(NamedTuple):
    """Where a block's payload lies."""

    kind: Kind
    row: int


@dataclass(eq=False)
class Lookup:
    """What is looked for, and what was found when `is_done`."""

    tokens: TokenChain
    lacked: list[bytes]
    entries: BlockEntries
    deadline: float = field(default_factory=lambda: time.monotonic() + SECONDS)
    is_done: bool = False
    places: dict[bytes, Place] = field(default_factory=dict)  # by hash
    stacks: dict[Kind, NDArray[np.uint8]] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        return self.is_done or time.monotonic() > self.deadline + LATE_SECONDS


class BlockReader:
    """Looks for blocks in threads of its own; a store that fails has nothing.

    One that is corrupt is removed by `remove`, and counts as not there.
    """

    def __init__(
        self,
        store: BlockStore,
        counts: StoreCounts,
        manager: BlockManager,
        remove: Callable[[bytes], None],
    ) -> None:
        self._store = store
        self._counts = counts
        self._manager = manager
        self._remove = remove
        self.has_news: Event = Event()  # set when a lookup is done
        self._asks_from = 0.0
        self._lookups = ThreadPoolExecutor(NUM_LOOKUPS, thread_name_prefix="paged_kv store lookup")
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="paged_kv store reader")

    def begin(self, lookup: Lookup) -> None:
        self._lookups.submit(self._run, lookup)

    @property
    def asks(self) -> bool:
        """Whether a store is asked: not for a while after one that took too long."""
        return time.monotonic() >= self._asks_from

    def note_late(self) -> None:
        """A store took too long: a failure, as others that have a message."""
        self._asks_from = time.monotonic() + PAUSE_SECONDS
        self._counts.failed(TimeoutError(f"no answer within {SECONDS:g} seconds"))

    def close(self) -> None:
        """Nothing more is read; whoever waits for a store now is left alone."""
        for threads in (self._lookups, self._readers):
            threads.shutdown(wait=False, cancel_futures=True)

    def write(self, lookup: Lookup, wanted: list[WantedBlock], block_ids: BlockIds) -> None:
        """Write what was found into as many blocks."""
        for kind, stack in lookup.stacks.items():
            own = [
                (lookup.places[each.block_hash].row, block_id)
                for each, block_id in zip(wanted, block_ids.tolist(), strict=True)
                if lookup.places[each.block_hash].kind == kind
            ]
            if own:
                rows, ids = zip(*own, strict=True)
                its = stack if rows == tuple(range(len(stack))) else stack[list(rows)]
                lookup.entries.write(kind, its, np.array(ids, dtype=np.int32))

    # -- in its threads -------------------------------------------------------------------------

    def _run(self, lookup: Lookup) -> None:
        try:
            for kind, payloads in self._find(lookup).items():
                self._keep(lookup, kind, payloads)
        except Exception as error:
            lookup.places.clear()
            self._counts.failed(error)
        finally:
            lookup.is_done = True
            self.has_news.set()

    def _find(self, lookup: Lookup) -> dict[Kind, dict[bytes, NDArray[np.uint8]]]:
        """Payloads by kind and hash, of what a store has in time."""
        entries = lookup.entries
        is_there = self._store.contains([entries.key(each) for each in lookup.lacked])
        stored = {each for each, found in zip(lookup.lacked, is_there, strict=True) if found}
        wanted = self._manager.wanted(lookup.tokens, stored)
        kinds = [entries.kind_of(each.block_hash, each.is_sealed) for each in wanted]
        # The end of a prefix first: what is read last is the last to be evicted.
        futures: list[Future[NDArray[np.uint8] | None]] = [
            self._readers.submit(self._read, entries, entries.key(each.block_hash), kind)
            for each, kind in zip(reversed(wanted), reversed(kinds), strict=True)
        ][::-1]
        found: dict[Kind, dict[bytes, NDArray[np.uint8]]] = {}
        is_late = False
        for each, kind, future in zip(wanted, kinds, futures, strict=True):
            try:
                payload = future.result(timeout=max(lookup.deadline - time.monotonic(), 0))
            except FutureTimeoutError:
                payload, is_late = None, True
                future.cancel()
            if payload is not None:
                found.setdefault(kind, {})[each.block_hash] = payload
        if is_late:
            self.note_late()
        return found

    def _read(self, entries: BlockEntries, key: bytes, kind: Kind) -> NDArray[np.uint8] | None:
        try:
            data = self._store.get(key)
        except Exception as error:
            self._counts.failed(error)
            return None
        if data is None:
            return None
        try:
            return entries.payload(key, kind, data)
        except TransferError:
            self._refuse(key)
            return None

    def _keep(self, lookup: Lookup, kind: Kind, payloads: dict[bytes, NDArray[np.uint8]]) -> None:
        stack, are_finite = lookup.entries.stacked(kind, list(payloads.values()))
        for row, (block_hash, is_finite) in enumerate(zip(payloads, are_finite, strict=True)):
            if is_finite:
                lookup.places[block_hash] = Place(kind, row)
            else:
                self._refuse(lookup.entries.key(block_hash))
        lookup.stacks[kind] = stack

    def _refuse(self, key: bytes) -> None:
        self._counts.add(num_refused=1)
        self._remove(key)
