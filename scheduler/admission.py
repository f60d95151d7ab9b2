"""Which requests can be served, and which may start. Knows needs and room; starts none itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from paged_kv.blocks.block_manager import BlockManager
from paged_kv.blocks.prefix_cache import PrefixCache
from paged_kv.blocks.sink_window import SinkWindow
from paged_kv.errors import ConfigError, InvalidRequestError, PromptTooLongError

from .request import Branching, Request, RequestStatus
from .waiting_queue import WaitingQueue

MAX_PRIORITY: Final = 1 << 22
MAX_TIMES_PASSED: Final = 16  # then nobody passes a request any more until it is admitted
MAX_SKIPPED: Final = 64  # waiting requests that a step looks at in vain


def check_servable(request: Request, manager: BlockManager) -> None:
    """Raise `InvalidRequestError` for a request that can never be served."""
    name, max_tokens = request.request_id, request.max_tokens
    if not request.num_prompt_tokens:
        raise InvalidRequestError(f"request {name!r} has an empty prompt")
    if request.status is not RequestStatus.WAITING or request.has_arrived:
        raise InvalidRequestError(f"request {name!r} was served before")
    if abs(request.priority) >= MAX_PRIORITY:
        raise InvalidRequestError(f"priority must be within {MAX_PRIORITY}, got {request.priority}")
    if max_tokens is not None and max_tokens < 1:
        raise InvalidRequestError(f"max_tokens must be at least 1, got {max_tokens}")
    if request.sink_window is not None:
        check_window(request, request.sink_window, manager)
        return
    if max_tokens is None:
        raise InvalidRequestError(f"request {name!r} has neither max_tokens nor a window")
    total = request.num_prompt_tokens + max_tokens
    if total > manager.max_model_len:
        raise PromptTooLongError(
            f"{request.num_prompt_tokens} prompt tokens and max_tokens={max_tokens} "
            f"exceed the model length of {manager.max_model_len}"
        )
    # The last sampled token is never stored.
    needed = manager.max_blocks(total - 1)
    if needed > manager.num_blocks:
        raise PromptTooLongError(
            f"{request.num_prompt_tokens} prompt tokens and max_tokens={max_tokens} "
            f"need {needed} blocks; the pool has {manager.num_blocks}"
        )
    if request.branching is not None:
        check_branching(request, request.branching, manager)


def check_window(request: Request, sink_window: SinkWindow, manager: BlockManager) -> None:
    """Whatever its length, a windowed request needs no more than its window does."""
    name = request.request_id
    if request.branching is not None:
        raise InvalidRequestError(f"request {name!r} branches, which a windowed one cannot")
    try:
        manager.fitted_window(sink_window)
    except ConfigError as error:
        raise InvalidRequestError(f"request {name!r} cannot be windowed: {error}") from error


def check_branching(request: Request, branching: Branching, manager: BlockManager) -> None:
    """There must be room for all its sequences, where it is alone."""
    limits = {"max_seqs": manager.max_num_seqs, "max_blocks": manager.num_blocks}
    for name, limit in limits.items():
        value = getattr(branching, name)
        if value > limit:
            raise InvalidRequestError(
                f"request {request.request_id!r} branches with {name}={value}; there are {limit}"
            )


class Need(NamedTuple):
    """What a waiting request takes when it is admitted."""

    num_seqs: int
    num_tokens: int  # to compute in this step
    blocks_now: int  # free ones for these, shared ones that nobody uses at present included
    # Free ones until it has computed its tokens and those of `steps_ahead` steps, or all branches.
    blocks_later: int
    next_link: bytes | None  # the hash of the first that it could share if it were there
    is_pending: bool  # a running sequence is about to store it


class Lack:
    """What waiting requests lacked when they were last looked at, all of them in vain.

    Until they have it, or the list of those who wait or run has changed, nobody looks at them.
    """

    def __init__(self, cache: PrefixCache) -> None:
        self._cache = cache  # says when a link that one of them could share has come
        self._num_links = 0
        self._is_known = False
        self._last: Request | None = None  # looked at; None where all were
        self._least_blocks: dict[int, int] = {}  # by the number of sequences that it takes

    def begin(self) -> None:
        self._is_known, self._last, self._least_blocks = False, None, {}
        self._cache.awaited = set()

    def note(self, need: Need, room: Room) -> None:
        """A request of this need does not fit, or waits for a link."""
        if need.next_link is not None:
            self._cache.awaited.add(need.next_link)
        if need.is_pending:
            return
        fits_later = need.blocks_later <= room.blocks_later and need.num_seqs <= room.num_seqs
        blocks = 0 if fits_later else need.blocks_later  # what it takes now depends on the budget
        self._least_blocks[need.num_seqs] = min(
            blocks, self._least_blocks.get(need.num_seqs, blocks)
        )

    def end(self, last: Request | None) -> None:
        """Nobody could start, up to and including `last`, or among all."""
        self._is_known, self._last = True, last
        self._num_links = len(self._cache.awaited)

    def changed(self, request: Request | None = None) -> None:
        """A sequence has ended, or somebody else came to wait, left or was resumed."""
        if request is None or self._last is None or request.rank <= self._last.rank:
            self._is_known = False

    def persists(self, num_seqs: int, num_blocks: int) -> bool:
        """Whether nobody can start where so much is free."""
        return (
            self._is_known
            and len(self._cache.awaited) == self._num_links
            and not any(
                seqs <= num_seqs and blocks <= num_blocks
                for seqs, blocks in self._least_blocks.items()
            )
        )


@dataclass(eq=False, kw_only=True)
class Room:
    """What a step has left for requests that wait."""

    num_tokens: int
    most_tokens: int  # of one request
    steps_ahead: int  # for which whoever starts has to have room
    num_seqs: int
    blocks_now: int
    blocks_later: int  # when those who run have computed all their tokens, and branched
    is_empty: bool  # nobody runs

    @property
    def is_used_up(self) -> bool:
        return self.num_tokens <= 0 or self.num_seqs <= 0

    def fits(self, request: Request, need: Need, manager: BlockManager) -> bool:
        """Whether a request may start. Alone it may shrink to a chunk of one token."""
        if not self.is_empty:
            return (
                need.num_seqs <= self.num_seqs
                and need.blocks_now <= self.blocks_now
                and need.blocks_later <= self.blocks_later
            )
        least = find_need(request, 1, manager, self.steps_ahead)
        return least.num_seqs <= self.num_seqs and least.blocks_now <= self.blocks_now

    def take(self, need: Need) -> None:
        self.num_tokens -= need.num_tokens
        self.num_seqs -= need.num_seqs
        self.blocks_now -= need.blocks_now
        self.blocks_later -= need.blocks_later
        self.is_empty = False


def find_admissible(
    waiting: WaitingQueue, room: Room, lack: Lack, manager: BlockManager
) -> Iterator[tuple[Request, int]]:
    """Requests that may start now, best rank first, and how many tokens each computes.

    Each has to be started before the next is asked for: others may wait for what it will store. A
    request that does not fit may be passed by later ones that do, a limited number of times. Where
    none may start, `lack` is what they lack.
    """
    did_not_fit: list[Request] = []
    num_skipped, num_admitted, was_empty = 0, 0, room.is_empty
    last: Request | None = None
    lack.begin()
    for request in waiting:
        if room.is_used_up:
            return
        if num_skipped == MAX_SKIPPED:
            break
        if request.stands_still:
            continue
        last = request
        budget = min(room.num_tokens, room.most_tokens)
        need = find_need(request, budget, manager, room.steps_ahead)
        if need.is_pending and not room.is_empty:
            lack.note(need, room)
            num_skipped += 1
        elif not room.fits(request, need, manager):
            lack.note(need, room)
            if request.times_passed >= MAX_TIMES_PASSED:
                break
            num_skipped += 1
            did_not_fit.append(request)
        elif any(passed.times_passed >= MAX_TIMES_PASSED for passed in did_not_fit):
            break  # reached in this step, or by better ranks
        else:
            for passed in did_not_fit:
                passed.times_passed += 1
            room.take(need)
            num_admitted += 1
            yield request, need.num_tokens
    else:
        last = None
    if not num_admitted and not was_empty:
        lack.end(last)


def find_need(request: Request, budget: int, manager: BlockManager, steps_ahead: int) -> Need:
    """What admitting a request takes, where it computes no more than `budget` tokens at once."""
    geometry = manager.geometry
    length, swapped = len(request.tokens.token_ids), request.swapped
    next_link, is_pending = None, False
    if swapped is not None:
        lengths, taken = swapped.lengths, len(swapped.host_block_ids)
    elif request.brought is not None:
        lengths = request.brought.lengths
        taken = manager.count_blocks(lengths)
    else:
        match = manager.find_prefix(request.tokens)
        next_link, is_pending = match.next_link, match.is_pending
        lengths, taken = match.lengths, match.num_idle_blocks
    start = lengths[0].num_stored
    length -= lengths[0].num_evicted
    window = request.tokens.sink_window
    if window is not None:
        length = min(length, window.max_storable(geometry, start))
    num_tokens = min(length - start, budget)
    if request.max_tokens is not None and window is None:  # the last token is never stored
        num_left = request.num_prompt_tokens + request.max_tokens - 1 - length
        length += min(max(num_left, 0), steps_ahead)
    branching = request.branching
    return Need(
        num_seqs=1 if branching is None else branching.max_seqs,
        num_tokens=num_tokens,
        blocks_now=taken + manager.blocks_to_grow(lengths, num_tokens, num_tokens),
        blocks_later=taken + manager.blocks_to_grow(lengths, length - start, budget)
        if branching is None
        else branching.max_blocks,
        next_link=next_link,
        is_pending=is_pending,
    )
