"""Continuous batching: which sequences compute how many tokens in the next step.

Knows token counts and block counts, never tensors or text. There are no prefill and decode phases:
each sequence's computed tokens catch up with its tokens, and a step hands out a token budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

import numpy as np

from paged_kv.block_manager import BlockManager, StepPlan
from paged_kv.blocks import IntArray
from paged_kv.errors import (
    ConfigError,
    InvalidRequestError,
    InvalidStepError,
    PromptTooLongError,
)

from .request import Request, RequestStatus
from .waiting_queue import WaitingQueue


@dataclass(frozen=True, kw_only=True)
class ScheduledStep:
    """What to compute: the plan's T tokens, and the M sequences that then sample a token."""

    plan: StepPlan
    token_ids: IntArray  # [T]
    sampled_requests: list[Request]  # [M]
    sampled_token_index: IntArray  # [M] place among the T of each one's last token
    preempted: list[Request]


class Scheduler:
    """Shares a `BlockManager`'s pool among requests, best rank first.

    A step computes at most `token_budget` tokens; long prompts are computed in chunks. When blocks
    run out, the running sequence of the worst rank is preempted: it loses its blocks and is
    recomputed later.
    """

    def __init__(self, manager: BlockManager, *, token_budget: int) -> None:
        if token_budget < 1:
            raise ConfigError(f"token_budget must be at least 1, got {token_budget}")
        self.manager = manager
        self.token_budget = token_budget
        self.waiting = WaitingQueue()
        self._requests: dict[str, Request] = {}
        self._running: list[Request] = []  # by rank
        self._step: ScheduledStep | None = None  # scheduled, neither updated nor cancelled
        self._ending: list[Request] = []  # finished while a step still computes them
        self._num_arrived = 0
        slots = manager.max_num_seqs
        self._token_ids = np.zeros((slots, manager.max_model_len), dtype=np.int64)
        self._num_tokens = np.zeros(slots, dtype=np.int64)

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    # -- requests -------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request; one that can never be served raises and is not queued."""
        self.check(request)
        request.arrival = self._num_arrived
        self._num_arrived += 1
        self._requests[request.request_id] = request
        self.waiting.push(request)

    def check(self, request: Request) -> None:
        """Raise `InvalidRequestError` if this request can never be served."""
        if request.request_id in self._requests:
            raise InvalidRequestError(f"request id {request.request_id!r} is already in use")
        if not request.token_ids:
            raise InvalidRequestError(f"request {request.request_id!r} has an empty prompt")
        if not isinstance(request.priority, Integral):
            raise InvalidRequestError(f"priority must be an integer, got {request.priority!r}")
        if request.max_tokens < 1:
            raise InvalidRequestError(f"max_tokens must be at least 1, got {request.max_tokens}")
        total = request.num_prompt_tokens + request.max_tokens
        if total > self.manager.max_model_len:
            raise PromptTooLongError(
                f"{request.num_prompt_tokens} prompt tokens and max_tokens={request.max_tokens} "
                f"exceed the model length of {self.manager.max_model_len}"
            )
        # The last sampled token is never stored.
        needed = self.manager.geometry.max_blocks(total - 1)
        if needed > self.manager.num_blocks:
            raise PromptTooLongError(
                f"{request.num_prompt_tokens} prompt tokens and max_tokens={request.max_tokens} "
                f"need {needed} blocks; the pool has {self.manager.num_blocks}"
            )

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
            self.waiting.remove(request.request_id)
        elif self._step is not None:
            self._ending.append(request)
        else:
            self._stop_running(request)
        request.status = RequestStatus.FINISHED

    def _stop_running(self, request: Request) -> None:
        self._running.remove(request)
        self._release(request)

    def _release(self, request: Request) -> None:
        assert request.slot is not None
        self.manager.remove_sequence(request.slot)
        request.slot = None

    def _preempt(self, request: Request) -> None:
        self._release(request)
        request.status = RequestStatus.PREEMPTED
        request.num_preemptions += 1
        self.waiting.push(request)

    # -- steps ----------------------------------------------------------------------------------

    def schedule(self) -> ScheduledStep | None:
        """Plan the next step and reserve its blocks; None when no request is left."""
        if self._step is not None:
            raise InvalidStepError("update or cancel the step before")
        slots, num_new, preempted = self._schedule_running()
        if not preempted:
            slots, num_new = self._admit(slots, num_new)
        if not len(slots):
            assert not self._requests, "unfinished requests, but none can be scheduled"
            return None
        plan = self.manager.reserve(slots, num_new)
        assert plan is not None, "the step was sized to fit"
        ends_now = plan.context_lens + num_new == self._num_tokens[slots]
        by_slot = {request.slot: request for request in self._running}
        rows = np.repeat(np.arange(len(slots)), num_new)
        self._step = ScheduledStep(
            plan=plan,
            token_ids=self._token_ids[slots[rows], plan.positions],
            sampled_requests=[by_slot[slot] for slot in slots[ends_now].tolist()],
            sampled_token_index=plan.query_start_loc[1:][ends_now] - 1,
            preempted=preempted,
        )
        return self._step

    def _schedule_running(self) -> tuple[IntArray, IntArray, list[Request]]:
        """Slots and new tokens of the running sequences, after preempting what does not fit."""
        preempted: list[Request] = []
        budget = self.token_budget
        while True:
            slots = self._running_slots()
            remaining = self._num_tokens[slots] - self._num_computed(slots)
            budget_left = budget - (np.cumsum(remaining) - remaining)
            num_new = np.minimum(remaining, budget_left)
            slots, num_new = slots[num_new > 0], num_new[num_new > 0]
            if self._blocks_needed(slots, num_new) <= self.manager.num_free_blocks:
                return slots, num_new, preempted
            if len(self._running) > 1:
                preempted.append(self._running.pop())
                self._preempt(preempted[-1])
            else:  # alone in the pool: a smaller chunk always fits
                assert num_new[0] > 1, "one token always fits; requests are checked on arrival"
                budget = int(num_new[0]) // 2

    def _admit(self, slots: IntArray, num_new: IntArray) -> tuple[IntArray, IntArray]:
        """Add waiting requests while slots, budget and blocks for their whole prompts last."""
        geometry = self.manager.geometry
        budget = self.token_budget - int(num_new.sum())
        free_now = self.manager.num_free_blocks - self._blocks_needed(slots, num_new)
        free_later = self.manager.num_free_blocks - self._blocks_to_catch_up()
        admitted_slots, admitted_new = slots.tolist(), num_new.tolist()
        while budget > 0 and self.waiting and self.manager.num_free_slots:
            request = self.waiting.peek()
            chunk = min(len(request.token_ids), budget)
            needed_later = geometry.blocks_held(len(request.token_ids))
            fits = geometry.blocks_held(chunk) <= free_now and needed_later <= free_later
            if self._running and not fits:
                break
            assert fits, "alone in the pool a request fits; requests are checked on arrival"
            self.waiting.pop()
            admitted_slots.append(self._start(request))
            admitted_new.append(chunk)
            budget -= chunk
            free_now -= geometry.blocks_held(chunk)
            free_later -= needed_later
        return np.array(admitted_slots, dtype=np.int64), np.array(admitted_new, dtype=np.int64)

    def _blocks_needed(self, slots: IntArray, num_new: IntArray) -> int:
        return int(self.manager.blocks_needed(slots, num_new).sum())

    def _blocks_to_catch_up(self) -> int:
        """Blocks that the running sequences still take until all their tokens are computed."""
        slots = self._running_slots()
        return self._blocks_needed(slots, self._num_tokens[slots] - self._num_computed(slots))

    def _running_slots(self) -> IntArray:
        return np.array([request.slot for request in self._running], dtype=np.int64)

    def _num_computed(self, slots: IntArray) -> IntArray:
        return self.manager.num_computed_tokens[slots]

    def _start(self, request: Request) -> int:
        slot = self.manager.add_sequence()
        request.slot = slot
        request.status = RequestStatus.RUNNING
        self._token_ids[slot, : len(request.token_ids)] = request.token_ids
        self._num_tokens[slot] = len(request.token_ids)
        self._running.append(request)
        self._running.sort(key=lambda running: running.rank)
        return slot

    def update(self, step: ScheduledStep, sampled_token_ids: IntArray) -> list[Request]:
        """The step is done: commit its blocks and append the sampled tokens [M].

        Returns the requests that have reached their `max_tokens`; the caller finishes them, and
        any other it wants to stop.
        """
        requests = step.sampled_requests
        if np.shape(sampled_token_ids) != (len(requests),):
            raise InvalidStepError(
                f"{len(requests)} sequences sample a token, got tokens of shape "
                f"{np.shape(sampled_token_ids)}"
            )
        sampled_token_ids = np.asarray(sampled_token_ids, dtype=np.int64)
        self._require_step(step)
        self.manager.commit(step.plan)
        slots = np.array([request.slot for request in requests], dtype=np.int64)
        self._token_ids[slots, self._num_tokens[slots]] = sampled_token_ids
        self._num_tokens[slots] += 1
        for request, token_id in zip(requests, sampled_token_ids.tolist(), strict=True):
            request.token_ids.append(token_id)
        self._end_step()
        return [
            request
            for request in requests
            if request.status is RequestStatus.RUNNING
            and request.num_output_tokens >= request.max_tokens
        ]

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
        for request in self._ending:
            self._stop_running(request)
        self._ending.clear()

    def check_integrity(self) -> None:
        """Assert every invariant; for tests and debugging."""
        self.manager.check_integrity()
        slots = sorted(request.slot for request in self._running if request.slot is not None)
        assert slots == self.manager.active_slots.tolist()
        num_known = len(self._requests) + len(self._ending)
        assert len(self._running) + len(self.waiting) == num_known
        ranks = [request.rank for request in self._running]
        assert ranks == sorted(ranks)
        for request in self._running:
            assert (request.status is RequestStatus.RUNNING) != (request in self._ending)
            assert self._num_tokens[request.slot] == len(request.token_ids)
