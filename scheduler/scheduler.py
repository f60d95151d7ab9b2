"""Continuous batching: which sequences compute how many tokens in the next step.

Knows token counts and block counts, never tensors or text. There are no prefill and decode phases:
each sequence's computed tokens catch up with its tokens, and a step hands out a token budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from paged_kv.blocks.block_manager import BlockManager
from paged_kv.blocks.geometry import IntArray
from paged_kv.blocks.sequences import UNLIMITED
from paged_kv.blocks.step_plan import StepPlan
from paged_kv.blocks.token_chain import as_token_ids
from paged_kv.errors import (
    ConfigError,
    InvalidRequestError,
    InvalidStepError,
    OutOfBlocksError,
)

from .admission import Room, check_servable, find_admissible
from .request import Request, RequestStatus
from .statistics import SchedulerStatistics
from .step import BlockCopy, Branches, Fork, ScheduledStep
from .waiting_queue import WaitingQueue

ARRIVAL_BITS: Final = 40  # of a rank packed into one integer; the rest is the priority


class Scheduler:
    """Shares a `BlockManager`'s pool among requests, best rank first.

    A step computes at most `token_budget` tokens; long prompts are computed in chunks. A request is
    admitted when its whole prompt fits and leaves a fraction `watermark` of the pool free for the
    growth of others. One that does not fit may be passed by later ones that do, a limited number of
    times. A request whose next blocks a running one is about to share waits for them. A branching
    request keeps room for all its sequences; of these the ones that have nothing to compute, while
    others catch up, are left out of a step.

    When blocks run out, the running request of the worst rank is preempted, the newest of the
    lowest priority, and nobody is admitted in that step. It is swapped to host blocks if these have
    room and moving its blocks there and back costs less than computing its tokens again: a block
    moved costs as much as `swap_cost` computed tokens. Otherwise it is recomputed, as a branching
    one always is.
    """

    def __init__(
        self,
        manager: BlockManager,
        *,
        token_budget: int,
        watermark: float = 0.01,
        swap_cost: float = 1.0,
    ) -> None:
        if token_budget < 1:
            raise ConfigError(f"token_budget must be at least 1, got {token_budget}")
        if not 0 <= watermark < 1:
            raise ConfigError(f"watermark must be at least 0 and below 1, got {watermark}")
        if swap_cost < 0:
            raise ConfigError(f"swap_cost must not be negative, got {swap_cost}")
        self.manager = manager
        self.token_budget = token_budget
        self.swap_cost = swap_cost
        self.waiting = WaitingQueue()
        self._watermark_blocks = int(watermark * manager.num_blocks)
        self._requests: dict[str, Request] = {}
        self._step: ScheduledStep | None = None  # scheduled, neither updated nor cancelled
        self._ending: list[Request] = []  # finished while a step still computes them
        self._swap_outs: list[BlockCopy] = []
        self._swap_ins: list[BlockCopy] = []
        self._num_arrived = self._num_steps = self._num_scheduled = self._num_preemptions = 0
        num_seqs = manager.max_num_seqs
        self._running: IntArray = np.empty(0, dtype=np.int64)  # seq_ids by rank, read-only
        self._rank: IntArray = np.zeros(num_seqs, dtype=np.int64)  # by seq_id, as all that follow
        self._max_tokens: IntArray = np.zeros(num_seqs, dtype=np.int64)  # prompt and output
        self._by_seq_id: NDArray[np.object_] = np.full(num_seqs, None, dtype=np.object_)
        self._is_branch: NDArray[np.bool_] = np.zeros(num_seqs, dtype=np.bool_)
        self._branching: list[Request] = []  # running ones

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    def statistics(self) -> SchedulerStatistics:
        """How busy the scheduler is now and what it has done so far."""
        manager = self.manager
        return SchedulerStatistics(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            num_swapped=sum(request.swapped is not None for request in self.waiting),
            num_free_blocks=manager.num_free_blocks,
            num_cached_blocks=manager.num_cached_blocks,
            num_steps=self._num_steps,
            num_scheduled_tokens=self._num_scheduled,
            num_preemptions=self._num_preemptions,
            num_query_tokens=manager.prefix_statistics.num_query_tokens,
            num_hit_tokens=manager.prefix_statistics.num_hit_tokens,
        )

    # -- requests -------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request; one that can never be served raises and is not queued."""
        self.check(request)
        request.tokens = self.manager.chain_tokens(
            request.tokens.token_ids, request.extra_keys, request.sink_window
        )
        self._register(request)
        self.waiting.push(request)

    def _register(self, request: Request) -> None:
        request.manager = self.manager
        request.arrival = self._num_arrived
        self._num_arrived += 1
        self._requests[request.request_id] = request

    def check(self, request: Request) -> None:
        """Raise `InvalidRequestError` if this request can never be served."""
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
        del self._requests[request.request_id]
        if request.status is not RequestStatus.RUNNING:
            self.waiting.remove(request)
            if request.swapped is not None:
                self.manager.discard_swapped(request.swapped)
                request.swapped = None
        elif self._step is not None:
            self._ending.append(request)
        else:
            self._stop_running([request])
        request.status = RequestStatus.FINISHED

    def _stop_running(self, requests: Sequence[Request]) -> None:
        for request in requests:
            assert request.seq_id is not None
            if request.branching is None:  # or it has the tokens of its prompt
                request.tokens = self.manager.chain_of(request.seq_id)
            for seq_id in request.seq_ids:
                self.manager.remove_sequence(seq_id)
            self._vacate(request)

    def _vacate(self, request: Request) -> None:
        """The sequences of a running request are no longer its own."""
        for seq_id in request.seq_ids:
            self._leave(seq_id)
        request.seq_ids = []
        if request.branching is not None:
            self._branching.remove(request)

    def _leave(self, seq_id: int) -> None:
        self._by_seq_id[seq_id] = None
        self._is_branch[seq_id] = False
        self._set_running(self._running[self._running != seq_id])

    def _preempt(self, request: Request) -> None:
        assert request.seq_id is not None
        manager, seq_id = self.manager, request.seq_id
        num_blocks = len(manager.block_ids(seq_id))
        num_computed = manager.num_computed_tokens[seq_id] + manager.num_evicted_tokens[seq_id]
        if request.branching is None and 2 * num_blocks * self.swap_cost < num_computed:
            request.swapped = manager.swap_out(seq_id)
        if request.swapped is None:
            self._stop_running([request])
        else:
            swapped = request.swapped
            request.tokens = swapped.tokens
            self._swap_outs.append(
                BlockCopy(request.request_id, swapped.device_block_ids, swapped.host_block_ids)
            )
            self._vacate(request)
        request.status = RequestStatus.PREEMPTED
        request.num_preemptions += 1
        self._num_preemptions += 1
        self.waiting.push(request)

    # -- steps ----------------------------------------------------------------------------------

    def schedule(self) -> ScheduledStep | None:
        """Plan the next step and reserve its blocks; None when no request is left."""
        if self._step is not None:
            raise InvalidStepError("update or cancel the step before")
        seq_ids, num_new = self._share_budget(self.token_budget)
        if len(self.waiting) and self.manager.num_free_seqs:
            seq_ids, num_new = self._admit(seq_ids, num_new)
        if not len(seq_ids):
            if self._requests:
                raise self._held_by_others()
            return None
        plan = self.manager.reserve(seq_ids, num_new)
        preempted: list[Request] = []
        budget = self.token_budget
        while plan is None:
            worst = self._by_seq_id[self._running[-1]]
            if len(self._running) > len(worst.seq_ids):
                preempted.append(worst)
                self._preempt(worst)
            elif num_new.sum() > 1:  # alone in the pool: a smaller step always fits
                budget = int(num_new.sum()) // 2
            else:  # requests are checked on arrival: one token would fit
                raise self._held_by_others()
            seq_ids, num_new = self._share_budget(budget)
            plan = self.manager.reserve(seq_ids, num_new)
        self._num_steps += 1
        self._num_scheduled += plan.num_tokens
        self._step = self._describe(plan, preempted)
        return self._step

    def _held_by_others(self) -> OutOfBlocksError:
        return OutOfBlocksError(
            "no request can be scheduled beside sequences that the scheduler does not know: "
            f"{self.manager.pool.num_allocated} of {self.manager.num_blocks} blocks and "
            f"{self.manager.max_num_seqs - self.manager.num_free_seqs} of "
            f"{self.manager.max_num_seqs} sequences are in use"
        )

    def _describe(self, plan: StepPlan, preempted: list[Request]) -> ScheduledStep:
        seq_ids, ends = plan.seq_ids, plan.context_lens + plan.num_scheduled_tokens
        if plan.num_evicted_tokens is not None:
            ends = ends + plan.num_evicted_tokens
        sampled = (ends == self.manager.num_tokens[seq_ids]).nonzero()[0]
        do_all_sample = len(sampled) == len(seq_ids)
        # The same array where all sample: the manager knows that its seq_ids are distinct.
        sampled_seq_ids = seq_ids if do_all_sample else seq_ids[sampled]
        swap_outs, self._swap_outs = self._swap_outs, []
        swap_ins, self._swap_ins = self._swap_ins, []
        if plan.is_decode and do_all_sample:
            token_ids = self.manager.last_token_ids[seq_ids]
        else:
            token_ids = self.manager.token_ids[seq_ids[plan.token_rows], plan.positions]
        return ScheduledStep(
            plan=plan,
            token_ids=token_ids.astype(np.int64),
            sampled_seq_ids=sampled_seq_ids,
            sampled_token_index=plan.query_start_loc[1:][sampled] - 1,
            preempted=preempted,
            swap_outs=swap_outs,
            swap_ins=swap_ins,
            requests_by_seq_id=self._by_seq_id,
        )

    def _share_budget(self, budget: int) -> tuple[IntArray, IntArray]:
        """Running sequences that have tokens to compute, best rank first, and how many of them."""
        seq_ids, num_new = self._running, self.manager.num_computable(self._running)
        if self._branching:
            seq_ids, num_new = seq_ids[num_new > 0], num_new[num_new > 0]
        if int(num_new.sum()) > budget:
            budget_left = budget - (np.cumsum(num_new) - num_new)
            num_new = np.minimum(num_new, budget_left)
            seq_ids, num_new = seq_ids[num_new > 0], num_new[num_new > 0]
        return seq_ids, num_new

    def _admit(self, seq_ids: IntArray, num_new: IntArray) -> tuple[IntArray, IntArray]:
        """Add waiting requests while sequences, budget and blocks for their whole prompts last."""
        room = self._room_beside(seq_ids, num_new)
        if room.blocks_now < 0:
            return seq_ids, num_new
        admitted: list[Request] = []
        counts: list[int] = []
        for request, num_tokens in find_admissible(self.waiting, room, self.manager):
            self._start(request)
            admitted.append(request)
            counts.append(num_tokens)
        if not admitted:
            return seq_ids, num_new
        admitted_seq_ids = seq_ids_of(admitted)
        self._enter(admitted_seq_ids)
        return np.concatenate([seq_ids, admitted_seq_ids]), np.concatenate([num_new, counts])

    @property
    def _num_free_seqs(self) -> int:
        """Sequences that may start: the others are kept for requests that branch."""
        num_kept = 0
        for request in self._branching:
            assert request.branching is not None
            num_kept += request.branching.max_seqs - len(request.seq_ids)
        return self.manager.num_free_seqs - num_kept

    def _room_beside(self, seq_ids: IntArray, num_new: IntArray) -> Room:
        """What is left beside running sequences that compute so many tokens in this step."""
        manager, running = self.manager, self._running
        blocks_later = manager.num_free_blocks
        if self._branching:
            running = running[~self._is_branch[running]]
        for request in self._branching:
            assert request.branching is not None
            held = np.unique(np.concatenate([manager.block_ids(n) for n in request.seq_ids]))
            blocks_later -= max(request.branching.max_blocks - len(held), 0)
        to_compute = manager.blocks_needed(seq_ids, num_new)
        to_catch_up = manager.blocks_needed(running, manager.num_computable(running))
        return Room(
            num_tokens=self.token_budget - int(num_new.sum()),
            num_seqs=self._num_free_seqs,
            blocks_now=manager.num_free_blocks - int(to_compute.sum()),
            blocks_later=blocks_later - int(to_catch_up.sum()) - self._watermark_blocks,
            is_empty=not len(self._running),
        )

    def _start(self, request: Request) -> None:
        """Start a request's sequence, with the blocks that it can share or had in host memory."""
        self.waiting.remove(request)
        if request.swapped is None:
            seq_id = self.manager.add_sequence(request.tokens)
        else:
            swapped_in = self.manager.swap_in(request.swapped)
            assert swapped_in is not None, "its need was checked"
            seq_id, block_ids = swapped_in
            self._swap_ins.append(
                BlockCopy(request.request_id, block_ids, request.swapped.host_block_ids)
            )
            request.swapped = None
        self._run_in(request, seq_id)

    def _run_in(self, request: Request, seq_id: int) -> None:
        """A sequence of this request runs."""
        priority, arrival = request.rank
        if request.branching is not None and not request.seq_ids:
            self._branching.append(request)
        request.seq_ids.append(seq_id)
        request.status = RequestStatus.RUNNING
        self._rank[seq_id] = (priority << ARRIVAL_BITS) + arrival
        # The scheduler does not end branches: whoever makes them does.
        self._max_tokens[seq_id] = UNLIMITED
        if request.max_tokens is not None and request.branching is None:
            self._max_tokens[seq_id] = request.num_prompt_tokens + request.max_tokens
        self._by_seq_id[seq_id] = request
        self._is_branch[seq_id] = request.branching is not None

    def _enter(self, seq_ids: IntArray) -> None:
        """Take seq_ids into the running ones, in the order of ranks."""
        running = np.concatenate([self._running, seq_ids])
        self._set_running(running[np.argsort(self._rank[running], kind="stable")])

    def _set_running(self, seq_ids: IntArray) -> None:
        self._running = seq_ids
        self._running.setflags(write=False)

    def update(
        self,
        step: ScheduledStep,
        sampled_token_ids: ArrayLike,
        forks: Sequence[Fork] = (),
        branches: Sequence[Branches] = (),
    ) -> list[Request]:
        """The step is done: commit its blocks and append the sampled tokens [M].

        Each of `forks` starts a new request from a sampled one, with a token of its own; it shares
        the parent's blocks, or waits where no sequence is free. A branching request gets its tokens
        by `branches` alone, in whatever step: what it sampled is not looked at. Returns the
        requests that have reached their `max_tokens`; the caller finishes them, and any other it
        wants to stop.
        """
        tokens = as_token_ids(sampled_token_ids)
        if tokens.shape != step.sampled_seq_ids.shape:
            raise InvalidStepError(
                f"{len(step.sampled_seq_ids)} sequences sample a token, got tokens of shape "
                f"{tokens.shape}"
            )
        self._require_step(step)
        self._check_forks(step, forks)
        self._check_branches(branches)
        self.manager.commit(step.plan)
        seq_ids = step.sampled_seq_ids
        if self._branching:
            is_ours = ~self._is_branch[seq_ids]
            seq_ids, tokens = seq_ids[is_ours], tokens[is_ours]
        started = [fork for fork in forks if self._fork(fork)]
        if started:
            forked_seq_ids = seq_ids_of([fork.child for fork in started])
            self._enter(forked_seq_ids)
            seq_ids = np.concatenate([seq_ids, forked_seq_ids])
            tokens = np.concatenate([tokens, as_token_ids([fork.token_id for fork in started])])
        self.manager.append_tokens(seq_ids, tokens)
        for branch in branches:
            self._branch(branch)
        at_limit = self.manager.num_tokens[seq_ids] >= self._max_tokens[seq_ids]
        requests: list[Request] = self._by_seq_id[seq_ids[at_limit]].tolist()
        requests += [fork.child for fork in forks if fork.child.waits_at_limit]
        self._end_step()
        return [request for request in requests if request.status is not RequestStatus.FINISHED]

    def _check_forks(self, step: ScheduledStep, forks: Sequence[Fork]) -> None:
        """Raise before anything has changed."""
        if not forks:
            return
        sampled = set(step.sampled_seq_ids.tolist())
        for parent, child, _ in forks:
            if parent.seq_id not in sampled:
                raise InvalidStepError(f"request {parent.request_id!r} does not sample now")
            self.check(child)
        if len({fork.child.request_id for fork in forks}) < len(forks):
            raise InvalidRequestError("two forks have the same request id")

    def _check_branches(self, branches: Sequence[Branches]) -> None:
        """Raise before anything has changed."""
        for branch in branches:
            branch.check(self.manager.max_model_len)
        if len({branch.request.request_id for branch in branches}) < len(branches):
            raise InvalidStepError("a request branches once in a step")

    def _fork(self, fork: Fork) -> bool:
        """Start a fork's child; False where it has to wait until a sequence ends."""
        parent, child = fork.parent, fork.child
        assert parent.seq_id is not None
        self._register(child)
        if self._num_free_seqs:
            self._run_in(child, self.manager.fork(parent.seq_id))
            return True
        chain = self.manager.chain_of(parent.seq_id)
        child.tokens = chain.with_tokens(np.append(chain.token_ids, np.int32(fork.token_id)))
        self.waiting.push(child)
        return False

    def _branch(self, branches: Branches) -> None:
        """Replace a request's sequences: those that go on several times are forked."""
        request, parents, token_ids = branches
        before, request.seq_ids = request.seq_ids, []
        for index, seq_id in enumerate(before):
            if index not in parents:
                self.manager.remove_sequence(seq_id)
                self._leave(seq_id)
        forked: list[int] = []
        for index, parent in enumerate(parents):
            if parent in parents[:index]:
                forked.append(self.manager.fork(before[parent]))
                self._run_in(request, forked[-1])
            else:
                request.seq_ids.append(before[parent])
        if forked:
            self._enter(np.array(forked))
        self.manager.append_tokens(
            request.seq_ids,
            [token_id for tokens in token_ids for token_id in tokens],
            [len(tokens) for tokens in token_ids],
        )

    def cancel(self, step: ScheduledStep) -> None:
        """The step failed: its tokens count as not computed. Admissions and preemptions stay."""
        self._require_step(step)
        self.manager.rollback(step.plan)
        self._end_step()

    def _require_step(self, step: ScheduledStep) -> None:
        if step is not self._step:
            raise InvalidStepError("this step is not the one that was scheduled last")

    def _end_step(self) -> None:
        self._step = None
        if self._ending:
            self._stop_running(self._ending)
            self._ending.clear()

    def check_integrity(self) -> None:
        """Assert every invariant; for tests and debugging."""
        self.manager.check_integrity()
        assert np.array_equal(np.sort(self._running), self.manager.living_seq_ids)
        known = [*self._requests.values(), *self._ending]
        num_running = sum(len(request.seq_ids) for request in known)
        assert len(self._running) == num_running
        assert len(self.waiting) == sum(not request.seq_ids for request in known)
        running = self._by_seq_id[self._running].tolist()
        ranks = [request.rank for request in running]
        assert ranks == sorted(ranks)
        for request, seq_id in zip(running, self._running.tolist(), strict=True):
            assert seq_id in request.seq_ids
            assert (request.status is RequestStatus.RUNNING) != (request in self._ending)
            is_branch = request.branching is not None
            assert self._is_branch[seq_id] == is_branch == (request in self._branching)


def seq_ids_of(requests: Sequence[Request]) -> IntArray:
    """The seq_ids of running requests."""
    return np.array([request.seq_id for request in requests], dtype=np.int64)
