"""Random hits, forks, drafts and swaps over real block contents."""

from __future__ import annotations

import random

import numpy as np
import pytest

from paged_kv.blocks.events import BlockRemoved, BlockStored
from paged_kv.blocks.geometry import BlockGeometry
from paged_kv.blocks.token_chain import link_hash
from tests.support.arrays import ids
from tests.support.block_contents import BlockContents, prefix_values
from tests.support.prefix_caching import every_geometry, frozen, manager_of


class Driver:
    """Sequences over one manager; their tokens go through blocks whose contents are followed."""

    def __init__(self, geometry: BlockGeometry, seed: int) -> None:
        self.rng = random.Random(seed)
        self.manager = manager_of(
            geometry,
            num_blocks=self.rng.choice([14, 20, 40]),
            max_num_seqs=4,
            num_host_blocks=30,
            record_events=True,
        )
        self.contents = BlockContents(self.manager)
        self.salts: dict[int, int] = {}
        self.swapped: list[tuple[object, int]] = []
        self.index: dict[bytes, int] = {}  # what the events say

    def add(self) -> None:
        if not self.manager.num_free_seqs:
            return
        # Few different tokens and few openings, so that prefixes meet.
        opening = self.rng.choice([[0] * 30, [0] * 9 + [1] * 20, [1, 0] * 12])
        length = self.rng.randint(1, len(opening))
        rest = [self.rng.randrange(2) for _ in range(self.rng.randint(0, 8))]
        salt = self.rng.choice([0, 0, 1])
        chain = self.manager.chain_tokens(opening[:length] + rest, (str(salt),))
        self.salts[self.manager.add_sequence(chain)] = salt

    def step(self) -> None:
        manager, rng = self.manager, self.rng
        counts, drafts, unknown = {}, {}, {}
        for seq_id in rng.sample(list(self.salts), rng.randint(1, len(self.salts))):
            if manager.num_computed_tokens[seq_id] > 60:
                continue
            remaining = int(manager.num_tokens[seq_id] - manager.num_computed_tokens[seq_id])
            if not remaining:
                manager.append_tokens([seq_id], [rng.randrange(2)])
                remaining = 1
            counts[seq_id] = rng.choice([1, remaining, rng.randint(1, remaining)])
            drafts[seq_id] = 0
            if counts[seq_id] == remaining:
                drafts[seq_id] = rng.choice([0, rng.randint(0, manager.geometry.block_size)])
            unknown[seq_id] = [rng.randrange(2) for _ in range(drafts[seq_id])]
        if not counts:
            return
        num_new = ids(*counts.values()) + ids(*drafts.values())
        before = frozen(manager)
        plan = manager.reserve(ids(*counts), num_new, ids(*drafts.values()))
        if plan is None:
            assert frozen(manager) == before
            self.remove()
            return
        values = []
        for seq_id, begin, count in zip(
            counts, plan.context_lens.tolist(), num_new.tolist(), strict=True
        ):
            known = (
                manager.token_ids[seq_id, : manager.num_tokens[seq_id]].tolist() + unknown[seq_id]
            )
            values.append(prefix_values(known, self.salts[seq_id])[begin : begin + count])
        self.contents.apply(plan, np.concatenate(values))
        if rng.random() < 0.2:
            manager.rollback(plan)
            return
        kept = {seq_id: rng.randint(0, drafts[seq_id]) for seq_id in counts}
        for seq_id in counts:
            manager.append_tokens([seq_id], unknown[seq_id][: kept[seq_id]], [kept[seq_id]])
        manager.commit(plan, ids(*counts.values()) + ids(*kept.values()))

    def remove(self) -> None:
        seq_id = self.rng.choice(list(self.salts))
        self.manager.remove_sequence(seq_id)
        del self.salts[seq_id]

    def fork(self) -> None:
        if self.manager.num_free_seqs:
            seq_id = self.rng.choice(list(self.salts))
            self.salts[self.manager.fork(seq_id)] = self.salts[seq_id]

    def swap(self) -> None:
        if self.swapped and self.rng.random() < 0.6:
            swapped, salt = self.swapped[-1]
            found = self.manager.swap_in(swapped)
            if found is not None:
                self.swapped.pop()
                self.contents.swap_in(found[1], swapped.host_block_ids)
                self.salts[found[0]] = salt
            return
        seq_id = self.rng.choice(list(self.salts))
        swapped = self.manager.swap_out(seq_id)
        if swapped is not None:
            self.contents.swap_out(swapped.device_block_ids, swapped.host_block_ids)
            self.swapped.append((swapped, self.salts.pop(seq_id)))

    def check(self) -> None:
        manager = self.manager
        manager.check_integrity()
        self.contents.poison_free()
        for seq_id, salt in self.salts.items():
            self.contents.check(seq_id, salt)
        for event in manager.take_events():
            if isinstance(event, BlockStored):
                assert event.block_hash not in self.index
                assert event.block_id not in self.index.values()
                data = np.array(event.token_ids, dtype=np.int32).tobytes()
                assert link_hash(event.parent_hash, data) == event.block_hash
                self.index[event.block_hash] = event.block_id
            elif isinstance(event, BlockRemoved):
                assert self.index.pop(event.block_hash) == event.block_id
            else:
                self.index.clear()
        assert self.index == manager.prefix_cache._block_of

    def run(self, num_actions: int) -> None:
        for _ in range(num_actions):
            action = self.rng.choice(
                [self.add, self.fork, self.swap, self.remove] + [self.step] * 6
            )
            if self.salts or action == self.add:
                action()
            self.check()
        for seq_id in list(self.salts):
            self.manager.remove_sequence(seq_id)
        for swapped, _ in self.swapped:
            self.manager.discard_swapped(swapped)
        self.salts.clear()
        self.check()
        self.manager.reset_prefix_cache()
        self.check()
        assert self.manager.num_free_blocks == self.manager.num_blocks
        assert self.manager.host_pool.num_free == 30
        assert not self.index
        assert not self.manager.prefix_cache._pending


@every_geometry
@pytest.mark.parametrize("seed", range(4))
def test_random_hits_forks_drafts_and_swaps_keep_every_token_where_it_belongs(geometry, seed):
    """And the events, replayed, give the index of cached blocks after every action."""
    Driver(geometry, seed).run(120)
