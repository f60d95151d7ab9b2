"""Which requests there are, and where each of them stands. Knows no plans, and decides nothing."""

from __future__ import annotations

from reprlib import repr as short_repr

from paged_kv.blocks.block_manager import BlockManager
from paged_kv.blocks.host_blocks import SwappedSequence
from paged_kv.change import Change
from paged_kv.errors import InvalidRequestError, OutOfBlocksError

from .admission import Lack, check_servable
from .request import BroughtBlocks, Request, RequestStatus
from .running import RunningRequests
from .statistics import SchedulerStatistics
from .step import Arrival, BlockCopy, ScheduledStep
from .waiting_queue import WaitingQueue


class Roster:
    """Requests that wait or run, those of a step in flight that are over, and the step itself.

    `swap_cost` is that of `Scheduler`.
    """

    def __init__(self, manager: BlockManager, *, swap_cost: float) -> None:
        self.manager = manager
        self.swap_cost = swap_cost
        self._num_arrived = self._num_steps = self._num_scheduled = self._num_preemptions = 0
        self._num_drafts = self._num_accepted = 0
        self._change = Change("scheduler")
        self._begin_empty()

    def _begin_empty(self) -> None:
        self.waiting: WaitingQueue = WaitingQueue()
        self._requests: dict[str, Request] = {}
        self._lack = Lack(self.manager.pool.prefix_cache)
        self._num_swapped = 0  # of those that wait
        self._running = RunningRequests(self.manager.max_num_seqs)
        self._step: ScheduledStep | None = None  # scheduled, neither updated nor cancelled
        self._ending: list[Request] = []  # finished while a step still computes them
        self._swap_outs: list[BlockCopy] = []
        self._swap_ins: list[BlockCopy] = []
        self._arrivals: list[Arrival] = []

    def recover(self) -> None:
        """Drop every request, and every sequence of the manager, whatever state they are in.

        What comes after an exception that cut off a change, which the next one is refused for. It
        may itself be cut off, and called again. `Request.restart` makes a request one that can be
        added again, with the output tokens that its owner knows of.
        """
        self._change.is_unfinished = True
        self.manager.recover()
        self._begin_empty()
        self._change.is_unfinished = False

    @property
    def is_whole(self) -> bool:
        """Whether no exception has cut off a change, here or in the manager."""
        return self.manager.is_whole and not self._change.is_unfinished

    @property
    def step(self) -> ScheduledStep | None:
        """The one that is scheduled and neither updated nor cancelled."""
        return self._step

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    @property
    def num_steps_waited(self) -> int:
        """Steps for which the first request that waits has only lacked tokens of a step to begin.

        0 where none does, or sequences or blocks are lacking too.
        """
        first, manager = self.waiting.first, self.manager
        if first is None or first.stands_still or not manager.num_free_seqs:
            return 0
        if self._lack.persists(manager.num_free_seqs, manager.num_free_blocks):
            return 0
        return self._num_steps - first.step_of_arrival

    def statistics(self) -> SchedulerStatistics:
        """How busy the scheduler is now and what it has done so far."""
        manager = self.manager
        return SchedulerStatistics(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            num_swapped=self._num_swapped,
            num_free_blocks=manager.num_free_blocks,
            num_cached_blocks=manager.num_cached_blocks,
            num_steps=self._num_steps,
            num_scheduled_tokens=self._num_scheduled,
            num_preemptions=self._num_preemptions,
            num_query_tokens=manager.prefix_statistics.num_query_tokens,
            num_hit_tokens=manager.prefix_statistics.num_hit_tokens,
            num_draft_tokens=self._num_drafts,
            num_accepted_tokens=self._num_accepted,
        )

    def _held_by_others(self) -> OutOfBlocksError:
        return OutOfBlocksError(
            "no request can be scheduled beside sequences that the scheduler does not know: "
            f"{self.manager.pool.num_allocated} of {self.manager.num_blocks} blocks and "
            f"{self.manager.max_num_seqs - self.manager.num_free_seqs} of "
            f"{self.manager.max_num_seqs} sequences are in use"
        )

    # -- requests -------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request; one that can never be served raises and is not queued."""
        self.check(request)
        tokens = self.manager.chain_tokens(
            request.tokens.token_ids, request.extra_keys, request.sink_window
        )
        with self._change:
            request.tokens = tokens
            self._register(request)
            self._wait(request)

    def _register(self, request: Request) -> None:
        request.manager = self.manager
        request.arrive(self._num_arrived, self._num_steps)
        self._num_arrived += 1
        self._requests[request.request_id] = request

    def _wait(self, request: Request) -> None:
        self.waiting.push(request)
        self._lack.changed(request)

    def check(self, request: Request) -> None:
        """Raise `InvalidRequestError` if this request can never be served."""
        if not isinstance(request, Request):
            raise InvalidRequestError(f"a Request was expected, got {short_repr(request)}")
        if request.request_id in self._requests:
            raise InvalidRequestError(f"request id {request.request_id!r} is already in use")
        check_servable(request, self.manager)

    def abort(self, request_id: str) -> Request | None:
        """End a request in whatever state it is; None when it is not known or already over."""
        request = self._requests.get(request_id)
        if request is not None:
            self.finish(request)
        return request

    def finish(self, request: Request) -> None:
        """Take a request out and free its blocks, those of a step in flight when it ends."""
        is_request = isinstance(request, Request)
        if not is_request or self._requests.get(request.request_id) is not request:
            raise InvalidRequestError(f"not an unfinished request of here: {short_repr(request)}")
        with self._change:
            self._finish(request)

    def _finish(self, request: Request) -> None:
        del self._requests[request.request_id]
        if request.status is not RequestStatus.RUNNING:
            self.waiting.remove(request)
            self._lack.changed(request)
            if request.swapped is not None:
                self.manager.discard_swapped(request.swapped)
                self._num_swapped -= 1
                request.swapped = None
        elif self._step is not None:
            self._ending.append(request)
        else:
            self._stop_running(request)
        request.status = RequestStatus.FINISHED

    def _start(self, request: Request) -> None:
        """Start a request's sequence, with the blocks that it can share, brings or had in host
        memory."""
        self.waiting.remove(request)
        if request.swapped is not None:
            seq_id = self._swap_in(request, request.swapped)
        elif request.brought is not None:
            seq_id = self._bring_in(request, request.brought)
        else:
            seq_id = self.manager.add_sequence(request.tokens)
            its = self.manager.stored_lengths(seq_id)[0]
            request.began_with(its.num_stored + its.num_evicted)
        self._running.begin(request, seq_id)

    def _swap_in(self, request: Request, swapped: SwappedSequence) -> int:
        swapped_in = self.manager.swap_in(swapped)
        assert swapped_in is not None, "its need was checked"
        seq_id, block_ids = swapped_in
        self._swap_ins.append(BlockCopy(request.request_id, block_ids, swapped.host_block_ids))
        self._num_swapped -= 1
        request.swapped = None
        return seq_id

    def _bring_in(self, request: Request, brought: BroughtBlocks) -> int:
        seq_id, _ = self.manager.place_sequence(request.tokens, brought.lengths)
        block_ids = [tables.block_ids(seq_id) for tables in self.manager.groups]
        self._arrivals.append(Arrival(request.request_id, block_ids, brought.records))
        request.began_with(brought.lengths[0].num_stored + brought.lengths[0].num_evicted)
        request.brought = None
        return seq_id

    def pause(self, request: Request) -> None:
        """Compute nothing for this request until `resume`; it is the first to make room.

        One that branches goes on.
        """
        if request.branching is not None:
            return
        with self._change:
            request.is_paused = True
            self._lack.changed()
            self._running.paused.update(request.seq_ids)

    def resume(self, request: Request) -> None:
        """Go on with a request that was paused."""
        with self._change:
            request.is_paused = False
            self._lack.changed()
            self._running.paused.difference_update(request.seq_ids)

    def hold(self, request: Request) -> None:
        """Do not start this request, which waits, until it is let go: it keeps its place."""
        with self._change:
            request.is_held = True

    def let_go(self, request: Request) -> None:
        """A request that was held may start."""
        with self._change:
            request.is_held = False
            self._lack.changed()

    def _stop_running(self, request: Request) -> None:
        assert request.seq_id is not None
        if request.branching is None:  # or it has the tokens of its prompt
            request.tokens = self.manager.chain_of(request.seq_id)
        for seq_id in request.seq_ids:
            self.manager.remove_sequence(seq_id)
        self._running.vacate(request)
        self._lack.changed()

    def _preempt(self, request: Request, *, may_swap: bool = True) -> None:
        assert request.seq_id is not None
        manager, seq_id = self.manager, request.seq_id
        num_blocks = len(manager.all_block_ids(seq_id))
        num_computed = manager.num_computed_tokens[seq_id] + manager.num_evicted_tokens[seq_id]
        may_swap = may_swap and request.branching is None
        if may_swap and 2 * num_blocks * self.swap_cost < num_computed:
            request.swapped = manager.swap_out(seq_id)
        if request.swapped is None:
            self._stop_running(request)
        else:
            swapped = request.swapped
            self._num_swapped += 1
            request.tokens = swapped.tokens
            self._swap_outs.append(
                BlockCopy(request.request_id, swapped.device_block_ids, swapped.host_block_ids)
            )
            self._running.vacate(request)
        request.status = RequestStatus.PREEMPTED
        request.num_preemptions += 1
        self._num_preemptions += 1
        self._lack.changed()
        self._wait(request)

    def check_integrity(self) -> None:
        """Assert every invariant; for tests and debugging."""
        self.manager.check_integrity()
        self._running.check_integrity(self.manager.living_seq_ids)
        known = [*self._requests.values(), *self._ending]
        assert len(self._running) == sum(len(request.seq_ids) for request in known)
        assert len(self.waiting) == sum(not request.seq_ids for request in known)
        assert self._num_swapped == sum(request.swapped is not None for request in known)
        for request in known:
            is_running = request.status is RequestStatus.RUNNING
            assert not request.seq_ids or is_running != (request in self._ending)
