"""Blocks that outlive the engine: what is published goes to a store, what is lacked comes from it.

Knows requests that wait and the prefix cache, never what a store is made of. `NoBlockTier` is what
an engine has without a store, and does nothing.

What was published is copied between steps, before anything is written to the pool again, and
written by a thread. A request that is about to start, and whose prefix the cache lacks, is held
while threads look for it; what they find is brought into free blocks, idle as those of an ended
sequence, and the request starts as if it had found them there. Whatever fails or takes too long is
as if it was not there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Final, NamedTuple
from weakref import WeakKeyDictionary

from ..blocks.prefix_cache import PublishedBlock
from ..blocks.token_chain import ExtraKey
from ..cache.block_entries import BlockCopies, BlockEntries
from ..scheduler.request import Request
from ..scheduler.scheduler import Scheduler
from ..stores.block_store import BlockStore
from .block_reader import BlockReader, Lookup
from .block_writer import BlockWriter
from .intake import is_nobody_elses
from .store_counts import BlockStoreStatistics, StoreCounts

MOST_HELD: Final = 8  # of the best ranks among those that wait
WAITING_SECONDS: Final = 0.01


class Attempt(NamedTuple):
    """When a request was looked up."""

    num_preemptions: int  # that it had by then
    num_free_blocks: int | None = None  # too few for what was found; None where that was no reason

    def is_repeated(self, request: Request, num_free_blocks: int) -> bool:
        """Whether to look again: it has lost its blocks since, or more are free."""
        if request.num_preemptions != self.num_preemptions:
            return True
        return self.num_free_blocks is not None and num_free_blocks > self.num_free_blocks


class NoBlockTier:
    """No store."""

    @property
    def statistics(self) -> BlockStoreStatistics | None:
        """What has become of entries; None without a store."""
        return None

    @property
    def holds_requests(self) -> bool:
        """Whether requests wait for what is looked for."""
        return False

    def bring_in(self) -> None:
        """Between two steps, before the next one is scheduled: bring in what was found, and look
        for what those lack that are about to start."""

    def wait(self) -> bool:
        """Wait a moment, where nobody computes, for what is looked for; whether there may be more
        to schedule now."""
        return False

    def copy(self) -> None:
        """Copy what was published, before blocks are allocated and written again."""

    def write(self) -> None:
        """Have the copies written: what they hold is known to be right."""

    def reset(self) -> None:
        """The engine begins anew: nothing is held, and copies are not written."""

    def model_changed(self) -> None:
        """From now on other entries are meant."""

    def flush(self) -> None:
        """Return when all that was published so far is written."""

    def close(self) -> None:
        """Write what is left, and end."""


class BlockTier(NoBlockTier):
    """Shares the blocks of an engine's prefix cache through a store.

    `make_entries` says what the model is now; `adapters` are those that it was told of.
    """

    def __init__(
        self,
        store: BlockStore,
        scheduler: Scheduler,
        make_entries: Callable[[], BlockEntries],
        adapters: Callable[[], tuple[str, ...]],
    ) -> None:
        self._scheduler = scheduler
        self._manager = scheduler.manager
        self._manager.pool.prefix_cache.take_news()  # and it is kept from here on
        self._make_entries = make_entries
        self._adapters = adapters
        self._counts = StoreCounts()
        self._writer = BlockWriter(store, self._counts)
        self._reader = BlockReader(store, self._counts, self._manager, self._writer.remove)
        self._is_closed = False
        self._copied: list[BlockCopies] = []
        self._bad: list[bytes] = []  # keys
        self._held: dict[Request, Lookup] = {}
        self._looked_up: WeakKeyDictionary[Request, Attempt] = WeakKeyDictionary()
        self.model_changed()

    @property
    def statistics(self) -> BlockStoreStatistics | None:
        return self._counts.now

    @property
    def holds_requests(self) -> bool:
        return bool(self._held)

    def model_changed(self) -> None:
        self._entries = self._make_entries()
        # Adapters that come later may be others under a name that was there in another process.
        self._known_adapters = {name.encode(errors="surrogatepass") for name in self._adapters()}

    def flush(self) -> None:
        self.copy()
        self.write()
        self._writer.flush()

    def close(self) -> None:
        if self._is_closed:
            return
        self.copy()
        self.write()
        self._reader.close()
        self._writer.close()
        self._is_closed = True

    def reset(self) -> None:
        self._copied, self._bad, self._held = [], [], {}
        self._looked_up = WeakKeyDictionary()

    def is_shared(self, extra_keys: tuple[ExtraKey, ...]) -> bool:
        """Whether blocks of requests with these keys may be found by other processes."""
        if is_nobody_elses(extra_keys):
            return False
        return all(each in self._known_adapters for each in extra_keys if isinstance(each, bytes))

    # -- to the store ---------------------------------------------------------------------------

    def copy(self) -> None:
        news, entries = self._manager.pool.prefix_cache.take_news(), self._entries
        room = self._writer.room if news.published else 0
        blocks: list[PublishedBlock] = []
        for block in news.published:
            if not self.is_shared(block.extra_keys):
                continue
            room -= entries.num_bytes(entries.kind_of(block.block_hash, block.is_sealed))
            if room < 0:
                self._counts.add(num_dropped=1)
            else:
                blocks.append(block)
        if blocks:
            self._copied += entries.copy(blocks)
        self._bad += [entries.key(each) for each in news.withdrawn]

    def write(self) -> None:
        copied, self._copied = self._copied, []
        bad, self._bad = self._bad, []
        self._writer.put(self._entries, copied, bad)

    # -- from the store -------------------------------------------------------------------------

    def bring_in(self) -> None:
        self._reader.has_news.clear()
        for request, lookup in list(self._held.items()):
            if lookup.is_over or not request.is_unfinished:
                if lookup.is_over and not lookup.is_done and self._reader.asks:
                    self._reader.note_late()
                if lookup.is_done and request.is_unfinished:
                    self._adopt(request, lookup)
                self._scheduler.let_go(request)
                del self._held[request]
        for request in islice(self._scheduler.waiting, MOST_HELD):
            if self._manager.num_free_seqs and self._may_look_up(request):
                self._look_up(request)

    def wait(self) -> bool:
        if not self._held:
            return False
        self._reader.has_news.wait(WAITING_SECONDS)
        return True

    def _may_look_up(self, request: Request) -> bool:
        """Whether a request is about to start, and a store could have what it lacks."""
        brings_blocks = request.swapped is not None or request.brought is not None
        if request.stands_still or brings_blocks or request.is_retried:
            return False
        before = self._looked_up.get(request)
        if before is not None and not before.is_repeated(request, self._manager.num_free_blocks):
            return False
        if not self._reader.asks or not self.is_shared(tuple(request.extra_keys)):
            return False
        manager, tokens = self._manager, request.tokens
        match = manager.find_prefix(tokens)
        if match.next_link is None or match.is_pending:
            return False
        start = match.lengths[0].num_stored
        length = len(tokens.token_ids) - match.lengths[0].num_evicted
        if tokens.sink_window is not None:
            length = min(length, tokens.sink_window.max_storable(manager.geometry, start))
        chunk = min(self._scheduler.token_budget, length - start)
        num_blocks = manager.blocks_to_grow(match.lengths, length - start, chunk)
        return match.num_idle_blocks + num_blocks <= manager.num_free_blocks

    def _look_up(self, request: Request) -> None:
        lacked = self._manager.lacked(request.tokens)
        for lookup in self._held.values():
            if lacked[0] in lookup.lacked:  # and then it is seen what is left to look for
                self._held[request] = lookup
                self._scheduler.hold(request)
                return
        self._looked_up[request] = Attempt(request.num_preemptions)
        lookup = Lookup(request.tokens, lacked, self._entries)
        self._held[request] = lookup
        self._scheduler.hold(request)
        self._reader.begin(lookup)

    def _adopt(self, request: Request, lookup: Lookup) -> None:
        if lookup.entries is not self._entries:  # of what the model was before
            return
        wanted = self._manager.wanted(request.tokens, lookup.places)
        write = partial(self._reader.write, lookup, wanted)
        if wanted and self._manager.adopt(request.tokens, wanted, write):
            kinds = [lookup.places[each.block_hash].kind for each in wanted]
            self._counts.add(
                num_found=len(wanted),
                num_found_bytes=sum(self._entries.num_bytes(kind) for kind in kinds),
            )
        elif wanted:
            num_free = self._manager.num_free_blocks
            self._looked_up[request] = Attempt(request.num_preemptions, num_free)
