"""Random traffic with forks, swaps and aborts over real block contents."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from paged_kv.blocks.geometry import BlockGeometry
from paged_kv.errors import PromptTooLongError
from paged_kv.scheduler.request import Request
from paged_kv.scheduler.step import Fork
from tests.support.block_contents import BlockContents
from tests.support.scheduler_policies import (
    GEOMETRIES,
    LONG_TAIL,
    add,
    assert_nothing_is_held,
    check_contents,
    child_of,
    follow,
    make_scheduler,
)


class Traffic:
    """Random requests, forks, aborts and steps that fail, over a tiny pool with host blocks."""

    def __init__(self, geometry: BlockGeometry, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.geometry = geometry
        self.scheduler = make_scheduler(
            geometry,
            num_blocks=geometry.max_blocks(46) + rng.choice([0, 2, 8]),
            max_num_seqs=rng.choice([2, 4, 6]),
            max_model_len=80,
            num_host_blocks=rng.choice([0, 12, 40]),
            prefix_caching=rng.random() < 0.8,
            token_budget=rng.choice([5, 16, 60]),
            watermark=rng.choice([0.0, 0.1]),
            swap_cost=rng.choice([0.0, 0.5]),
            steps_ahead=rng.choice([0, 8]),
        )
        self.contents = BlockContents(self.scheduler.manager)
        self.expected: dict[Request, list[int]] = {}
        self.num_made = 0
        self.num_forks = 0

    def new_id(self) -> str:
        self.num_made += 1
        return f"r{self.num_made}"

    def add(self) -> None:
        rng = self.rng
        opening = rng.choice([[0] * 24, [1] * 6 + [0] * 10, [0, 1] * 9])
        prompt = opening[: rng.randint(1, len(opening))]
        prompt = prompt + [rng.randrange(2) for _ in range(rng.randint(0, 3))]
        request_id, salt = self.new_id(), rng.choice([0, 0, 1])
        try:
            request = add(
                self.scheduler, request_id, prompt, rng.randint(1, 24), rng.randint(0, 2), (salt,)
            )
        except PromptTooLongError:
            return
        self.expected[request] = list(prompt)

    def abort(self) -> None:
        if self.expected:
            request = self.rng.choice(list(self.expected))
            assert self.scheduler.abort(request.request_id) is request
            del self.expected[request]

    def step(self) -> None:
        rng, scheduler = self.rng, self.scheduler
        was_running = {
            seq_id: scheduler._running.by_seq_id[seq_id]
            for seq_id in scheduler._running.seq_ids.tolist()
        }
        step = scheduler.schedule()
        if step is None:
            assert not self.expected
            return
        admitted = [
            request
            for request in scheduler._running.by_seq_id[scheduler._running.seq_ids].tolist()
            if request not in was_running.values()
        ]
        assert not (admitted and step.preempted)
        assert not (step.swap_ins and step.swap_outs)
        follow(scheduler, self.contents, step)
        if rng.random() < 0.04:
            self.abort()
        if rng.random() < 0.1:
            scheduler.cancel(step)
            return
        sampled = [rng.randrange(2) for _ in step.sampled_requests]
        forks = []
        for request in step.sampled_requests:
            if rng.random() < 0.08 and request in self.expected:
                child = child_of(request, self.new_id(), rng.randint(1, 12), rng.randint(0, 2))
                try:
                    scheduler.check(child)
                except PromptTooLongError:
                    continue
                forks.append(Fork(request, child, rng.randrange(2)))
        for request, token_id in zip(step.sampled_requests, sampled, strict=True):
            if request in self.expected:
                self.expected[request].append(token_id)
        for fork in forks:
            self.num_forks += 1
            self.expected[fork.child] = [*fork.child.tokens.token_ids.tolist(), fork.token_id]
        for request in scheduler.update(step, sampled, forks):
            assert request.num_output_tokens == request.max_tokens
            scheduler.finish(request)
            assert request.token_ids == self.expected.pop(request)

    def check(self) -> None:
        scheduler = self.scheduler
        scheduler.check_integrity()
        check_contents(scheduler, self.contents)
        assert set(self.expected) == set(scheduler._requests.values())
        for request, token_ids in self.expected.items():
            assert request.token_ids == token_ids
        host_pool = scheduler.manager.host_pool
        if host_pool is not None:
            swapped = [r.swapped for r in scheduler.waiting if r.swapped is not None]
            host_ids = [entry.host_block_ids for entry in swapped]
            host_pool.check_integrity(np.concatenate([np.empty(0, dtype=np.int32), *host_ids]))

    def run(self, num_actions: int) -> None:
        for _ in range(num_actions):
            may_add = self.scheduler.num_waiting < 8
            others: list[Callable[[], None]] = [self.add] * 8 * may_add + [self.abort]
            self.rng.choice([*others, *[self.step] * 24])()
            self.check()
        for _ in range(5000):
            if not self.expected:
                break
            self.step()
            self.check()
        assert_nothing_is_held(self.scheduler)


@pytest.mark.parametrize(
    "geometry", [*GEOMETRIES.values(), LONG_TAIL], ids=[*GEOMETRIES, "long tail"]
)
@pytest.mark.parametrize("seed", range(5))
def test_random_traffic_with_forks_and_swaps_keeps_every_token_and_leaks_nothing(geometry, seed):
    traffic = Traffic(geometry, seed)
    traffic.run(150)
    assert traffic.scheduler.statistics().num_steps > 90
