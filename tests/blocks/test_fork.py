"""Forks, drafts and swaps with real tensors: every sequence computes what it would compute alone.

Each sequence has a *twin* in a second cache where nothing is shared: it got the same tokens in the
same chunks. Outputs of both are compared step by step, and at the end the bytes of both. Blocks
without users hold NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from paged_kv.blocks.geometry import BlockGeometry
from paged_kv.blocks.host_blocks import SwappedSequence
from paged_kv.blocks.step_plan import StepPlan
from paged_kv.cache.attention import paged_attention
from paged_kv.cache.formats import INT2, INT4, INT8, NATIVE, KVFormat
from paged_kv.cache.kv_cache import PagedKVCache
from paged_kv.cache.layer_spec import LayerSpec
from paged_kv.errors import InvalidStepError
from tests.support.helpers import Fleet, Stream, ids, make_stream

FORMATS = (NATIVE, INT8, INT4, INT2)
QUANTIZED = (INT8, INT4, INT2)
MAX_LENGTH = 620
every_format = pytest.mark.parametrize("kv_format", FORMATS, ids=lambda f: f.name)
every_quantized = pytest.mark.parametrize("kv_format", QUANTIZED, ids=lambda f: f.name)


def layers_of(kv_format: KVFormat) -> list[LayerSpec]:
    return [
        LayerSpec(kv_format=kv_format, num_kv_heads=2, key_dim=16, value_dim=8),
        LayerSpec(kv_format=kv_format, num_kv_heads=1, key_dim=8, value_dim=16),
    ]


def branch(stream: Stream, length: int, seed: int, layers: list[LayerSpec]) -> Stream:
    """A stream that begins with the same `length` tokens and then goes its own way."""
    other = make_stream(layers, len(stream) - length, seed, stream.keys[0].dtype, gqa_group=2)
    return Stream(
        *(
            [
                torch.cat([old[:length], new])
                for old, new in zip(getattr(stream, name), getattr(other, name), strict=True)
            ]
            for name in ("queries", "keys", "values")
        )
    )


class SharingFleet(Fleet):
    """A fleet whose sequences fork, draft and swap. All blocks without users are poisoned."""

    def __init__(
        self, layers: list[LayerSpec], *, num_host_blocks: int = 0, **options: object
    ) -> None:
        super().__init__(layers, **options)
        self.cache = PagedKVCache(
            layers,
            num_blocks=self.cache.num_blocks,
            dtype=self.cache.dtype,
            num_host_blocks=num_host_blocks,
        )
        self.manager = self.cache.new_manager(
            max_num_seqs=self.manager.max_num_seqs, max_model_len=self.manager.max_model_len
        )
        self.poison_unused()

    @property
    def num_used(self) -> int:
        return self.manager.pool.num_allocated

    def poison_unused(self) -> None:
        unused = np.flatnonzero(self.manager.pool.ref_counts == 0)
        super().poison_blocks(unused.astype(np.int32))

    def poison_blocks(self, block_ids: np.ndarray) -> None:
        """Of blocks that were let go, those that nobody else uses."""
        super().poison_blocks(block_ids[self.manager.pool.ref_counts[block_ids] == 0])

    def fork(self, seq_id: int, stream: Stream) -> int:
        child = self.manager.fork(seq_id)
        self.streams[child] = stream
        return child

    def step_with_drafts(
        self, seq_id: int, count: int, drafts: Stream, num_drafts: int, num_kept: int
    ) -> StepPlan:
        """`count` tokens of the sequence's stream and drafts of another one, some of them kept."""
        plan = self.manager.reserve(ids(seq_id), ids(count + num_drafts), ids(num_drafts))
        assert plan is not None
        step = self.cache.begin(plan)
        start = int(plan.context_lens[0])
        for layer in range(len(self.cache.layers)):
            tensors = [
                getattr(drafts, name)[layer][start : start + count + num_drafts]
                for name in ("queries", "keys", "values")
            ]
            output = paged_attention(*tensors, self.cache, layer, step)
            assert output.isfinite().all()
        self.manager.commit(plan, ids(count + num_kept))
        self.manager.pool.check_integrity(
            np.concatenate([self.manager.block_ids(s) for s in self.streams])
        )
        self.poison_unused()
        return plan

    def swap_out(self, seq_id: int) -> tuple[SwappedSequence, Stream]:
        swapped = self.manager.swap_out(seq_id)
        assert swapped is not None
        self.cache.swap_out(swapped.device_block_ids, swapped.host_block_ids)
        self.poison_unused()
        return swapped, self.streams.pop(seq_id)

    def swap_in(self, swapped: SwappedSequence, stream: Stream) -> int:
        found = self.manager.swap_in(swapped)
        assert found is not None
        seq_id, block_ids = found
        self.cache.swap_in(block_ids, swapped.host_block_ids)
        self.streams[seq_id] = stream
        return seq_id

    def all_bytes(self, seq_id: int) -> list[Tensor]:
        """Every byte of every block of a sequence, in the order of its tokens, layer by layer."""
        block_ids = torch.as_tensor(self.manager.block_ids(seq_id), dtype=torch.int64)
        return [arena[block_ids].clone() for arena in self.cache.arenas]

    def stored(self, seq_id: int) -> list[Tensor]:
        """The sealed bytes of each layer, then keys and values of all tokens in open blocks."""
        geometry, length = self.manager.geometry, self.length(seq_id)
        num_open_tokens = length - int(self.manager.num_sealed[seq_id]) * geometry.block_size
        rows = torch.as_tensor(self.manager.head_and_tail_ids(seq_id), dtype=torch.int64)
        found = [self.sealed_bytes(seq_id, layer) for layer in range(len(self.cache.layers))]
        for records in self.cache.records:
            for view in (records.open_keys, records.open_values):
                tokens = view[rows].transpose(1, 2).flatten(0, 1)[:num_open_tokens]
                found.append(tokens.clone())
        return found


class Twins:
    """Sequences that share blocks, and beside each its twin that shares none."""

    def __init__(
        self,
        kv_format: KVFormat,
        *,
        num_blocks: int = 200,
        num_host_blocks: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.layers = layers_of(kv_format)
        options = {"num_blocks": num_blocks, "dtype": dtype, "max_model_len": MAX_LENGTH}
        self.shared = SharingFleet(self.layers, num_host_blocks=num_host_blocks, **options)
        self.alone = SharingFleet(self.layers, **{**options, "num_blocks": 400})
        self.twin: dict[int, int] = {}
        self.chunks: dict[int, list[int]] = {}

    @property
    def geometry(self) -> BlockGeometry:
        return self.shared.manager.geometry

    def start(self, length: int, seed: int = 0) -> int:
        stream = make_stream(self.layers, MAX_LENGTH, seed, self.shared.cache.dtype, gqa_group=2)
        seq_id = self.shared.add(stream)
        self.twin[seq_id] = self.alone.add(stream)
        self.chunks[seq_id] = []
        if length:
            self.step({seq_id: length})
        return seq_id

    def fork(self, seq_id: int, seed: int) -> int:
        stream = branch(self.shared.streams[seq_id], self.shared.length(seq_id), seed, self.layers)
        child = self.shared.fork(seq_id, stream)
        self.chunks[child] = list(self.chunks[seq_id])
        self.twin[child] = self.alone.add(stream)
        for count in self.chunks[child]:
            self.alone.step({self.twin[child]: count})
        return child

    def step(self, counts: dict[int, int]) -> StepPlan:
        """The same step with shared and with unshared blocks: the outputs are equal."""
        plan = self.shared.plan(counts)
        self.shared.manager.check_integrity()
        outputs = self.shared.run(plan)
        self.shared.manager.check_integrity()
        expected = self.alone.step({self.twin[seq_id]: count for seq_id, count in counts.items()})
        for seq_id, count in counts.items():
            self.chunks[seq_id].append(count)
            for output, twin_output in zip(
                outputs[seq_id], expected[self.twin[seq_id]], strict=True
            ):
                torch.testing.assert_close(output, twin_output, rtol=0, atol=1e-6)
        return plan

    def remove(self, seq_id: int) -> None:
        self.shared.remove(seq_id)
        self.alone.remove(self.twin.pop(seq_id))

    def check(self) -> None:
        """Whatever is stored of a sequence is what its twin stores, to the bit."""
        for seq_id, twin in self.twin.items():
            assert self.shared.length(seq_id) == self.alone.length(twin)
            pairs = zip(self.shared.stored(seq_id), self.alone.stored(twin), strict=True)
            assert all(torch.equal(one, other) for one, other in pairs)

    def drain(self) -> None:
        for seq_id in list(self.twin):
            self.remove(seq_id)
        self.shared.manager.check_integrity()
        assert self.shared.num_used == 0


@dataclass(frozen=True)
class Place:
    """Where in a sequence it forks, by the geometry."""

    name: str
    length: Callable[[BlockGeometry], int]


def seal_length(geometry: BlockGeometry) -> int:
    """Tokens at which the first block is sealed; in the native format some length."""
    return geometry.num_head_tokens + geometry.block_size + geometry.min_tail_tokens


PLACES = [
    Place("inside the first block", lambda g: g.open_block_size // 2),
    Place("behind the first block", lambda g: g.open_block_size),
    Place("inside the tail", lambda g: g.num_head_tokens + g.open_block_size + 3),
    Place("behind a tail block", lambda g: g.num_head_tokens + 2 * g.open_block_size),
    Place("one token before a seal", lambda g: seal_length(g) - 1),
    Place("just sealed", seal_length),
    Place("behind a sealed block", lambda g: seal_length(g) + 5),
]
every_place = pytest.mark.parametrize("place", PLACES, ids=lambda place: place.name)


# -- forks go on as if they were alone ----------------------------------------------------------


@every_format
@every_place
def test_after_a_fork_both_go_on_as_if_alone(kv_format, place):
    twins = Twins(kv_format)
    parent = twins.start(place.length(twins.geometry))
    child = twins.fork(parent, seed=1)
    for counts in (1, 1, 2, 1, twins.geometry.block_size + 3, 1):
        twins.step({parent: counts, child: counts})
    twins.check()
    twins.drain()


@every_format
@every_place
def test_after_a_fork_one_goes_on_alone_and_the_other_later(kv_format, place):
    twins = Twins(kv_format)
    parent = twins.start(place.length(twins.geometry))
    child = twins.fork(parent, seed=1)
    for counts in (1, 3, twins.geometry.block_size, 1):
        twins.step({child: counts})
    twins.check()
    for counts in (2, twins.geometry.block_size + 7, 1):
        twins.step({parent: counts})
    twins.check()
    twins.step({child: 1, parent: 1})
    twins.drain()


@every_format
def test_a_fork_outlives_its_parent(kv_format):
    twins = Twins(kv_format)
    parent = twins.start(PLACES[2].length(twins.geometry))
    child = twins.fork(parent, seed=1)
    twins.remove(parent)
    plan = twins.step({child: 1})
    assert not len(plan.copy_sources)  # nobody else uses the block any more
    twins.step({child: twins.geometry.block_size})
    twins.check()
    twins.drain()


@every_format
@pytest.mark.parametrize("place", PLACES[::2], ids=lambda place: place.name)
def test_forks_of_forks_go_on_as_if_alone(kv_format, place):
    twins = Twins(kv_format)
    family = [twins.start(place.length(twins.geometry))]
    for generation in range(2):
        for seq_id in list(family):
            family.append(twins.fork(seq_id, seed=10 * generation + seq_id + 1))
        twins.step(dict.fromkeys(family, generation + 1))
    twins.step({seq_id: number + 1 for number, seq_id in enumerate(family)})
    twins.step(dict.fromkeys(family, twins.geometry.block_size))
    twins.step(dict.fromkeys(family[::-1], 1))
    twins.check()
    twins.drain()


@pytest.mark.parametrize("kv_format", [NATIVE, INT2], ids=["native", "int2"])
def test_forks_in_half_precision_go_on_as_if_alone(kv_format):
    twins = Twins(kv_format, dtype=torch.bfloat16)
    parent = twins.start(seal_length(twins.geometry) + 5)
    child = twins.fork(parent, seed=1)
    for counts in (1, 130, 1):
        twins.step({child: counts, parent: counts})
    twins.check()


def test_a_fork_of_a_sequence_without_tokens_shares_nothing():
    twins = Twins(NATIVE)
    parent = twins.start(0)
    child = twins.fork(parent, seed=1)
    plan = twins.step({parent: 20, child: 20})
    assert not len(plan.copy_sources)
    assert twins.shared.num_used == 4
    twins.check()


# -- what is copied, and by whom ----------------------------------------------------------------


def last_block(twins: Twins, seq_id: int) -> int:
    return int(twins.shared.manager.head_and_tail_ids(seq_id)[-1])


PARTIAL = [place for place in PLACES if place.name in ("inside the first block", "inside the tail")]


@every_format
@pytest.mark.parametrize("place", PARTIAL, ids=lambda place: place.name)
def test_of_two_that_write_in_one_step_the_first_copies_and_the_last_keeps(kv_format, place):
    for first_in_step in (0, 1):
        twins = Twins(kv_format)
        parent = twins.start(place.length(twins.geometry))
        pair = [parent, twins.fork(parent, seed=1)]
        shared = last_block(twins, parent)
        first, last = pair[first_in_step], pair[1 - first_in_step]
        plan = twins.step({first: 1, last: 1})
        assert plan.copy_sources.tolist() == [shared]
        assert (
            plan.copy_targets.tolist() == plan.new_block_ids.tolist() == [last_block(twins, first)]
        )
        assert last_block(twins, last) == shared
        assert twins.shared.manager.pool.ref_counts[shared] == 1
        assert not len(twins.step({first: 1, last: 1}).copy_sources)
        twins.check()


@every_format
@pytest.mark.parametrize("writer", [0, 1], ids=["the parent writes", "the child writes"])
def test_the_one_that_writes_first_copies_and_the_other_never_does(kv_format, writer):
    twins = Twins(kv_format)
    parent = twins.start(PLACES[2].length(twins.geometry))
    pair = [parent, twins.fork(parent, seed=1)]
    shared = last_block(twins, parent)
    plan = twins.step({pair[writer]: 1})
    assert plan.copy_sources.tolist() == [shared]
    assert last_block(twins, pair[writer]) == plan.copy_targets[0] != shared
    assert last_block(twins, pair[1 - writer]) == shared
    assert not len(twins.step({pair[1 - writer]: 1}).copy_sources)
    assert last_block(twins, pair[1 - writer]) == shared
    twins.check()


@every_format
def test_the_copy_is_of_the_whole_block_in_every_layer(kv_format):
    twins = Twins(kv_format)
    fleet = twins.shared
    parent = twins.start(PLACES[2].length(twins.geometry))
    child = twins.fork(parent, seed=1)
    plan = fleet.plan({child: 1})
    (source,), (target,) = plan.copy_sources.tolist(), plan.copy_targets.tolist()
    before = [arena[source].clone() for arena in fleet.cache.arenas]
    fleet.cache.begin(plan)
    for arena, expected in zip(fleet.cache.arenas, before, strict=True):
        assert torch.equal(arena[target], expected)
        assert torch.equal(arena[source], expected)
    fleet.manager.rollback(plan)
    assert fleet.manager.pool.ref_counts[source] == 2
    fleet.manager.check_integrity()


@every_format
@pytest.mark.parametrize(
    "place",
    [p for p in PLACES if p.name in ("behind the first block", "behind a tail block")],
    ids=lambda place: place.name,
)
def test_nothing_is_copied_where_the_fork_is_at_the_end_of_a_block(kv_format, place):
    twins = Twins(kv_format)
    parent = twins.start(place.length(twins.geometry))
    child = twins.fork(parent, seed=1)
    used = twins.shared.num_used
    plan = twins.step({parent: 1, child: 1})
    assert not len(plan.copy_sources)
    assert len(plan.new_block_ids) == 2
    assert twins.shared.num_used == used + 2
    twins.check()


@every_format
def test_a_long_chunk_fills_the_copy_and_goes_on_behind_it(kv_format):
    twins = Twins(kv_format)
    parent = twins.start(PLACES[2].length(twins.geometry))
    child = twins.fork(parent, seed=1)
    count = 2 * twins.geometry.open_block_size
    plan = twins.step({child: count, parent: count})
    assert len(plan.copy_sources) == 1
    twins.check()


@every_format
def test_a_rolled_back_step_copies_for_nobody(kv_format):
    twins = Twins(kv_format)
    fleet = twins.shared
    parent = twins.start(PLACES[2].length(twins.geometry))
    child = twins.fork(parent, seed=1)
    before = fleet.num_used
    for _ in range(2):
        plan = fleet.plan({parent: 3, child: 2})
        fleet.cache.begin(plan)
        fleet.manager.rollback(plan)
        fleet.manager.check_integrity()
        assert fleet.num_used == before
        fleet.poison_unused()
    twins.step({parent: 3, child: 2})
    twins.check()


# -- seals of forks -----------------------------------------------------------------------------


@every_quantized
def test_forks_seal_the_tokens_they_share_into_blocks_of_their_own(kv_format):
    """The body holds the same tokens, so both blocks hold the same bytes."""
    twins = Twins(kv_format)
    parent = twins.start(seal_length(twins.geometry) - 1)
    child = twins.fork(parent, seed=1)
    plan = twins.step({parent: 1, child: 1})
    assert len(plan.seal_block_ids) == 2
    bodies = [twins.shared.manager.body_ids(seq_id).tolist() for seq_id in (parent, child)]
    assert bodies[0] != bodies[1]
    for layer in range(2):
        one, other = (twins.shared.sealed_bytes(seq_id, layer) for seq_id in (parent, child))
        # With a tail of 32 tokens behind it the body ends before the fork.
        assert torch.equal(one, other) == (twins.geometry.min_tail_tokens > 0)
    twins.check()


@every_quantized
@pytest.mark.parametrize("sealer", [0, 1], ids=["the parent seals", "the child seals"])
def test_one_seals_and_the_other_keeps_its_open_blocks(kv_format, sealer):
    twins = Twins(kv_format)
    parent = twins.start(seal_length(twins.geometry) - 1)
    pair = [parent, twins.fork(parent, seed=1)]
    one, other = pair[sealer], pair[1 - sealer]
    kept = twins.shared.manager.block_ids(other).tolist()
    plan = twins.step({one: 1})
    assert len(plan.seal_block_ids) == 1
    assert set(plan.freed_block_ids.tolist()) <= set(kept)
    assert twins.shared.manager.block_ids(other).tolist() == kept
    assert (twins.shared.manager.pool.ref_counts[plan.freed_block_ids] == 1).all()
    twins.check()
    twins.step({other: 1, one: 1})
    assert twins.shared.manager.num_sealed[pair].tolist() == [1, 1]
    twins.step({one: 150, other: 140})
    twins.check()
    twins.drain()


@every_quantized
def test_one_seals_while_the_other_writes_to_the_last_shared_block(kv_format):
    """The first takes a chunk that seals the shared partial block; the second adds one token."""
    for order in (1, -1):
        twins = Twins(kv_format)
        parent = twins.start(PLACES[2].length(twins.geometry))
        child = twins.fork(parent, seed=1)
        counts = {parent: 2 * twins.geometry.block_size, child: 1}
        twins.step(dict(list(counts.items())[::order]))
        twins.check()
        twins.step({parent: 1, child: 150})
        twins.check()
        twins.drain()


@every_quantized
def test_a_sealed_block_stays_shared_for_good(kv_format):
    twins = Twins(kv_format)
    parent = twins.start(seal_length(twins.geometry) + 5)
    children = [twins.fork(parent, seed=seed) for seed in (1, 2)]
    (body,) = twins.shared.manager.body_ids(parent).tolist()
    twins.step(dict.fromkeys([parent, *children], 200))
    for seq_id in (parent, *children):
        assert twins.shared.manager.body_ids(seq_id)[0] == body
    assert twins.shared.manager.pool.ref_counts[body] == 3
    twins.check()


# -- memory of forks ----------------------------------------------------------------------------


@every_format
@pytest.mark.parametrize("num_forks", [1, 3, 7])
def test_n_forks_take_one_partial_block_each_and_share_all_others(kv_format, num_forks):
    twins = Twins(kv_format)
    parent = twins.start(seal_length(twins.geometry) + 5)
    used = twins.shared.num_used
    assert used == twins.geometry.blocks_held(seal_length(twins.geometry) + 5)
    family = [parent] + [twins.fork(parent, seed) for seed in range(1, num_forks + 1)]
    assert twins.shared.num_used == used
    plan = twins.step(dict.fromkeys(family, 1))
    assert len(plan.copy_sources) == num_forks
    assert twins.shared.num_used == used + num_forks
    assert twins.shared.manager.pool.peak_allocated == used + num_forks
    for seq_id in family[1:]:
        twins.remove(seq_id)
    assert twins.shared.num_used == used
    twins.check()


@every_format
def test_blocks_needed_counts_the_copies(kv_format):
    twins = Twins(kv_format)
    manager = twins.shared.manager
    parent = twins.start(PLACES[2].length(twins.geometry))
    family = ids(parent, twins.fork(parent, 1), twins.fork(parent, 2))
    users = manager.pool.ref_counts.copy()
    assert manager.blocks_needed(family, ids(1, 1, 1)).tolist() == [1, 1, 0]
    assert manager.blocks_needed(family[:1], ids(1)).tolist() == [1]
    assert np.array_equal(manager.pool.ref_counts, users)


def test_a_fork_without_room_for_its_copy_fails_as_a_whole():
    twins = Twins(NATIVE, num_blocks=3)
    parent = twins.start(20)
    child = twins.fork(parent, seed=1)
    manager = twins.shared.manager
    manager.pool.allocate(1)
    users = manager.pool.ref_counts.copy()
    assert manager.reserve(ids(parent, child), ids(1, 1)) is None
    assert np.array_equal(manager.pool.ref_counts, users)


def test_a_fork_needs_a_seq_id_and_a_sequence_and_no_open_step():
    twins = Twins(NATIVE)
    parent = twins.start(20)
    manager = twins.shared.manager
    with pytest.raises(InvalidStepError, match="seq_id 5 holds no sequence"):
        manager.fork(5)
    plan = twins.shared.plan({parent: 1})
    with pytest.raises(InvalidStepError, match="commit or roll back"):
        manager.fork(parent)
    manager.rollback(plan)
    assert manager.num_free_seqs == manager.max_num_seqs - 1


# -- drafts -------------------------------------------------------------------------------------


def draft_starts(geometry: BlockGeometry) -> list[int]:
    """Lengths from which a few drafts cross the end of a block, and the place of a seal."""
    return [
        geometry.open_block_size - 3,
        seal_length(geometry) - 3,
        seal_length(geometry) - 1,
        seal_length(geometry) + 1,
    ]


def expected_blocks(geometry: BlockGeometry, length: int, num_sealed: int) -> int:
    open_end = -(-length // geometry.open_block_size)
    return open_end - num_sealed * (geometry.open_blocks_per_block - 1)


@every_format
@pytest.mark.parametrize(("num_drafts", "place"), [(4, 0), (4, 1), (4, 2), (4, 3), (1, 2)])
def test_dropped_drafts_leave_nothing_behind(kv_format, num_drafts, place):
    """For every number of kept drafts: what is stored in the end is what a plain decode stores."""
    for num_kept in range(num_drafts + 1):
        twins = Twins(kv_format)
        seq_id = twins.start(draft_starts(twins.geometry)[place])
        fleet, twin = twins.shared, twins.twin[seq_id]
        for turn in range(3):
            length = fleet.length(seq_id)
            right = fleet.streams[seq_id]
            drafts = branch(right, length + 1 + num_kept, 100 + turn, twins.layers)
            plan = fleet.step_with_drafts(seq_id, 1, drafts, num_drafts, num_kept)
            sealed = int(twins.geometry.num_sealed_blocks(ids(length + 1))[0])
            assert fleet.manager.num_sealed[seq_id] == sealed, "drafts are never sealed"
            assert len(plan.seal_block_ids) == sealed - int(plan.num_sealed[0])
            assert fleet.length(seq_id) == length + 1 + num_kept
            assert fleet.num_used == expected_blocks(twins.geometry, fleet.length(seq_id), sealed)
            for _ in range(1 + num_kept):
                twins.alone.step({twin: 1})
        twins.chunks[seq_id] = []
        outputs = fleet.step({seq_id: 1})
        expected = twins.alone.step({twin: 1})
        if kv_format.is_native:  # else the two may seal a step apart
            for output, twin_output in zip(outputs[seq_id], expected[twin], strict=True):
                torch.testing.assert_close(output, twin_output, rtol=0, atol=1e-6)
        twins.check()
        twins.step({seq_id: twins.geometry.block_size + 2})
        twins.check()
        twins.drain()


@every_format
@pytest.mark.parametrize("kept", [0, 1, 17, 100, 128])
def test_drafts_of_a_whole_block_may_be_kept_or_dropped(kv_format, kept):
    twins = Twins(kv_format)
    num_drafts = twins.geometry.block_size
    num_kept = min(kept, num_drafts)
    seq_id = twins.start(seal_length(twins.geometry) - 2)
    fleet = twins.shared
    for turn in range(2):
        length = fleet.length(seq_id)
        drafts = branch(fleet.streams[seq_id], length + 1 + num_kept, 50 + turn, twins.layers)
        fleet.step_with_drafts(seq_id, 1, drafts, num_drafts, num_kept)
        twins.alone.step({twins.twin[seq_id]: 1 + num_kept})
    fleet.step({seq_id: 1})
    twins.alone.step({twins.twin[seq_id]: 1})
    twins.check()
    assert fleet.num_used == twins.geometry.blocks_held(fleet.length(seq_id))


@every_format
def test_a_fork_drafts_on_a_shared_block(kv_format):
    twins = Twins(kv_format)
    parent = twins.start(PLACES[2].length(twins.geometry))
    child = twins.fork(parent, seed=1)
    fleet = twins.shared
    right = fleet.streams[child]
    drafts = branch(right, fleet.length(child) + 2, 9, twins.layers)
    used = fleet.num_used
    plan = fleet.step_with_drafts(child, 1, drafts, twins.geometry.open_block_size, 1)
    assert len(plan.copy_sources) == 1
    assert fleet.num_used == used + 1  # the copy; the block for more drafts came back
    twins.alone.step({twins.twin[child]: 2})
    twins.check()
    twins.step({parent: 3, child: 3})
    twins.check()
    twins.drain()


@every_format
def test_a_step_with_drafts_may_be_rolled_back(kv_format):
    twins = Twins(kv_format)
    seq_id = twins.start(seal_length(twins.geometry) - 1)
    manager = twins.shared.manager
    used = twins.shared.num_used
    manager.rollback(manager.reserve(ids(seq_id), ids(6), ids(5)))
    manager.check_integrity()
    assert twins.shared.num_used == used
    twins.step({seq_id: 1})
    twins.check()


@pytest.mark.parametrize(
    ("num_new", "num_drafts"),
    [([2], [2]), ([2], [-1]), ([1], [1]), ([20], [17]), ([2], [1, 1]), ([2], [0.5])],
    ids=["no certain token", "negative", "only drafts", "more than a block", "shape", "float"],
)
def test_drafts_that_make_no_sense_are_refused(num_new, num_drafts):
    twins = Twins(NATIVE)
    seq_id = twins.start(5)
    manager = twins.shared.manager
    with pytest.raises(InvalidStepError, match="num_draft_tokens"):
        manager.reserve(ids(seq_id), num_new, num_drafts)
    assert twins.shared.num_used == 1
    twins.step({seq_id: 1})


@pytest.mark.parametrize("num_kept", [[0], [1], [5], [2, 2], [True]])
def test_only_drafts_may_be_dropped(num_kept):
    twins = Twins(NATIVE)
    seq_id = twins.start(5)
    manager = twins.shared.manager
    plan = manager.reserve(ids(seq_id), ids(4), ids(2))
    with pytest.raises(InvalidStepError, match="num_kept_tokens"):
        manager.commit(plan, num_kept)
    manager.commit(plan, [2])
    assert manager.num_computed_tokens[seq_id] == 7


# -- swap ---------------------------------------------------------------------------------------


SWAP_LENGTHS = [3, 40, 313]


def fill_the_pool(twins: Twins) -> None:
    """Somebody else takes every free block and writes it, then leaves."""
    fleet = twins.shared
    block_ids = fleet.manager.pool.allocate(fleet.manager.num_free_blocks)
    for arena in fleet.cache.arenas:
        arena[torch.as_tensor(block_ids, dtype=torch.int64)] = 0x55
    fleet.manager.pool.release(block_ids[::-1])
    fleet.poison_unused()


@every_format
@pytest.mark.parametrize("length", SWAP_LENGTHS)
def test_a_swap_round_trip_gives_every_byte_back(kv_format, length):
    twins = Twins(kv_format, num_host_blocks=60, num_blocks=60)
    seq_id = twins.start(length)
    fleet = twins.shared
    before, used = fleet.all_bytes(seq_id), fleet.num_used
    swapped, stream = fleet.swap_out(seq_id)
    assert fleet.num_used == 0
    assert fleet.manager.host_pool.num_allocated == used
    fill_the_pool(twins)
    again = fleet.swap_in(swapped, stream)
    fleet.manager.check_integrity()
    assert fleet.manager.host_pool.num_allocated == 0
    after = fleet.all_bytes(again)
    assert len(before) == len(after) == 2
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert fleet.length(again) == length


@every_format
@pytest.mark.parametrize("length", SWAP_LENGTHS)
def test_a_swapped_sequence_goes_on_as_if_it_had_never_left(kv_format, length):
    twins = Twins(kv_format, num_host_blocks=60, num_blocks=60)
    seq_id = twins.start(length)
    for counts in (1, twins.geometry.block_size, 1):
        swapped, stream = twins.shared.swap_out(seq_id)
        fill_the_pool(twins)
        again = twins.shared.swap_in(swapped, stream)
        twins.twin[again] = twins.twin.pop(seq_id)
        twins.chunks[again] = twins.chunks.pop(seq_id)
        seq_id = again
        twins.step({seq_id: counts})
    twins.check()
    twins.drain()


@every_format
def test_sequences_swapped_together_do_not_mix(kv_format):
    twins = Twins(kv_format, num_host_blocks=100, num_blocks=120)
    seq_ids = [twins.start(length, seed) for seed, length in enumerate((170, 20, 313))]
    bytes_before = [twins.shared.all_bytes(seq_id) for seq_id in seq_ids]
    swapped = [twins.shared.swap_out(seq_id) for seq_id in seq_ids]
    host_ids = np.concatenate([entry.host_block_ids for entry, _ in swapped])
    assert len(np.unique(host_ids)) == len(host_ids)
    fill_the_pool(twins)
    for (entry, stream), before in list(zip(swapped, bytes_before, strict=True))[::-1]:
        again = twins.shared.swap_in(entry, stream)
        for one, other in zip(before, twins.shared.all_bytes(again), strict=True):
            assert torch.equal(one, other)
    twins.shared.manager.check_integrity()


@every_format
def test_a_fork_is_swapped_while_its_parent_goes_on(kv_format):
    twins = Twins(kv_format, num_host_blocks=60)
    parent = twins.start(seal_length(twins.geometry) + 5)
    child = twins.fork(parent, seed=1)
    used = twins.shared.num_used
    swapped, stream = twins.shared.swap_out(child)
    assert twins.shared.num_used == used  # all of it was shared
    twin, chunks = twins.twin.pop(child), twins.chunks.pop(child)
    plan = twins.step({parent: 1})
    assert not len(plan.copy_sources)
    twins.step({parent: 140})
    again = twins.shared.swap_in(swapped, stream)
    twins.twin[again], twins.chunks[again] = twin, chunks
    assert not set(twins.shared.manager.block_ids(again)) & set(
        twins.shared.manager.block_ids(parent)
    )
    twins.step({again: 1, parent: 1})
    twins.step({again: 150})
    twins.check()
    twins.drain()


def test_a_swapped_sequence_may_be_given_up():
    twins = Twins(INT4, num_host_blocks=20)
    swapped, _ = twins.shared.swap_out(twins.start(200))
    twins.shared.manager.discard_swapped(swapped)
    assert twins.shared.manager.host_pool.num_free == 20
    twins.shared.manager.check_integrity()
