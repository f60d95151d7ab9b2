"""Random traffic over a scheduler, each step held to what must be true of it."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from paged_kv.blocks.geometry import BlockGeometry
from paged_kv.errors import PromptTooLongError
from paged_kv.scheduler.request import Request, RequestStatus
from paged_kv.scheduler.step import ScheduledStep
from tests.support.scheduler_steps import (
    NATIVE,
    NO_HEAD_NO_TAIL,
    QUANTIZED,
    TINY,
    assert_nothing_is_held,
    complete,
    counts_of,
    make_request,
    make_scheduler,
    running,
    token_of,
)


class Traffic(RuleBasedStateMachine):
    """Random requests, steps, failed steps, early stops and aborts over a tiny pool.

    `stored` says how many tokens of each running request a model would have seen: what the
    scheduler believes to be computed must be that, and start from zero after a preemption.
    """

    geometry = NATIVE

    @initialize(
        num_blocks=st.integers(1, 14),
        max_num_seqs=st.integers(1, 4),
        token_budget=st.sampled_from([1, 3, 16, 40, 300]),
        steps_ahead=st.sampled_from([0, 9]),
    )
    def start(
        self, num_blocks: int, max_num_seqs: int, token_budget: int, steps_ahead: int
    ) -> None:
        self.scheduler = make_scheduler(
            self.geometry,
            num_blocks=num_blocks,
            max_num_seqs=max_num_seqs,
            token_budget=token_budget,
            steps_ahead=steps_ahead,
        )
        self.requests: dict[str, Request] = {}
        self.stored: dict[str, int] = {}
        self.num_added = 0

    @property
    def num_boundary_tokens(self) -> int:
        """Tokens after which the first block is sealed, or the third native block is full."""
        geometry = self.geometry
        return geometry.num_head_tokens + 2 * geometry.block_size + geometry.min_tail_tokens

    @rule(length=st.integers(0, 12), share=st.floats(0, 1), priority=st.integers(0, 2))
    def add(self, length: int, share: float, priority: int) -> None:
        prompt = 1 + int(share * self.num_boundary_tokens)
        self.num_added += 1
        request = make_request(f"r{self.num_added}", prompt, 1 + length, priority)
        needed = self.geometry.max_blocks(prompt + length)
        queued = self.scheduler.num_waiting
        if needed > self.scheduler.manager.num_blocks:
            with pytest.raises(PromptTooLongError):
                self.scheduler.add(request)
            assert self.scheduler.num_waiting == queued
        else:
            self.scheduler.add(request)
            self.requests[request.request_id] = request

    def planned(self, num_drafts: int = 0) -> ScheduledStep:
        """Schedule, and check the step against everything a step promises."""
        scheduler = self.scheduler
        had_run = {request.request_id for request in running(scheduler)}
        step = scheduler.schedule({name: self.drafts(name, num_drafts) for name in had_run})
        assert step is not None, "unfinished requests, but no step"
        counts = counts_of(scheduler, step)
        assert 1 <= sum(counts.values()) <= scheduler.token_budget
        now = running(scheduler)
        admitted = [request for request in now if request.request_id not in had_run]
        assert not (step.preempted and admitted)
        left = [r for r in self.requests.values() if r.status is not RequestStatus.RUNNING]
        for request in admitted:
            assert all(r.rank > request.rank or r.times_passed for r in left)
            self.stored[request.request_id] = 0
        for request in step.preempted:
            assert request.rank > max(r.rank for r in now)
            del self.stored[request.request_id]
        starts = step.plan.query_start_loc.tolist()
        by_seq_id = {request.seq_id: request for request in now}
        complete_now = []
        for row, seq_id in enumerate(step.plan.seq_ids.tolist()):
            request, begin = by_seq_id[seq_id], self.stored[by_seq_id[seq_id].request_id]
            end = begin + starts[row + 1] - starts[row]
            tokens = slice(starts[row], starts[row + 1])
            assert step.plan.positions[tokens].tolist() == list(range(begin, end))
            known = request.token_ids
            drafts = [] if end < len(known) else self.drafts(request.request_id, num_drafts)
            assert step.token_ids[tokens].tolist() == (known + drafts)[begin:end]
            if end >= len(known):
                complete_now.append((request, starts[row] + len(known) - begin - 1))
                assert end < request.num_prompt_tokens + request.max_tokens
        sampled = zip(step.sampled_requests, step.sampled_token_index.tolist(), strict=True)
        assert list(sampled) == complete_now
        return step

    def drafts(self, name: str, count: int) -> list[int]:
        length = len(self.requests[name].token_ids)
        return [token_of(name, length + place) for place in range(count)]

    def finish(self, step: ScheduledStep) -> None:
        for name, count in counts_of(self.scheduler, step).items():
            self.stored[name] += count
        for request in complete(self.scheduler, step):
            assert request.num_output_tokens == request.max_tokens
            self.forget(request)

    def forget(self, request: Request) -> None:
        del self.requests[request.request_id]
        self.stored.pop(request.request_id, None)

    @precondition(lambda self: self.requests)
    @rule()
    def step(self) -> None:
        self.finish(self.planned())

    @precondition(lambda self: self.requests)
    @rule(num_drafts=st.integers(1, 6), share=st.floats(0, 1))
    def drafted_step(self, num_drafts: int, share: float) -> None:
        """Of the drafts that each request tries a part is right."""
        step = self.planned(num_drafts)
        accepted = (step.num_drafts * share).astype(int).tolist()
        for name, count in counts_of(self.scheduler, step).items():
            self.stored[name] += count
        tokens = []
        for request, tried, kept in zip(
            step.sampled_requests, step.num_drafts.tolist(), accepted, strict=True
        ):
            self.stored[request.request_id] -= tried - kept
            tokens.append(token_of(request.request_id, len(request.token_ids) + kept))
        for request in self.scheduler.update(step, tokens, num_accepted=accepted):
            self.scheduler.finish(request)
            self.forget(request)

    @precondition(lambda self: self.requests)
    @rule()
    def failed_step(self) -> None:
        self.scheduler.cancel(self.planned())

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.requests)))
        assert self.scheduler.abort(name) is self.requests[name]
        self.forget(self.requests[name])

    @invariant()
    def holds_together(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_integrity()
        assert self.scheduler.has_unfinished == bool(self.requests)
        for name, count in self.stored.items():
            seq_id = self.requests[name].seq_id
            assert self.scheduler.manager.num_computed_tokens[seq_id] == count

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        survivors = list(self.requests.values())
        while self.requests:
            self.finish(self.planned())
        for request in survivors:
            end = request.num_prompt_tokens + request.max_tokens
            assert request.token_ids == [token_of(request.request_id, p) for p in range(end)]
        assert_nothing_is_held(self.scheduler)


TRAFFIC_SETTINGS = settings(
    max_examples=140,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def traffic_over(name: str, geometry: BlockGeometry) -> type:
    machine = type(f"Traffic_{name}", (Traffic,), {"geometry": geometry})
    machine.TestCase.settings = TRAFFIC_SETTINGS
    return machine.TestCase


TestTrafficNative = traffic_over("native", NATIVE)

TestTrafficQuantized = traffic_over("quantized", QUANTIZED)

TestTrafficNoHeadNoTail = traffic_over("no_head_no_tail", NO_HEAD_NO_TAIL)

TestTrafficTiny = traffic_over("tiny", TINY)
