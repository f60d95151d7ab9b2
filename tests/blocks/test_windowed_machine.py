"""Windowed sequences beside ordinary sequences: all that a manager does, and after each step what
blocks hold.

A token is stored as a number that stands for everything it has seen, so a block that a windowed
sequence shares or is given where it must not be is found out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from numpy.typing import NDArray

from paged_kv.blocks import block_manager, growth
from paged_kv.blocks.block_manager import BlockManager
from paged_kv.blocks.geometry import BlockGeometry
from paged_kv.blocks.host_blocks import SwappedSequence
from paged_kv.blocks.sink_window import SinkWindow
from paged_kv.errors import InvalidStepError
from tests.support.arrays import ids
from tests.support.block_contents import BlockContents, prefix_values


def geometry_of(block_size: int, open_block_size: int, head: int, tail: int) -> BlockGeometry:
    return BlockGeometry(
        block_size=block_size,
        open_block_size=open_block_size,
        num_head_tokens=head,
        min_tail_tokens=tail,
    )


GEOMETRIES = {
    "native": geometry_of(4, 4, 0, 0),
    "native with a head": geometry_of(4, 4, 8, 0),
    "int8-like": geometry_of(8, 4, 4, 0),
    "int2-like": geometry_of(8, 2, 4, 5),
    "long tail": geometry_of(8, 2, 2, 21),
    "no head": geometry_of(8, 2, 0, 3),
}
ALL_GEOMETRIES = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
WINDOWS = (None, SinkWindow(0, 8), SinkWindow(3, 8), SinkWindow(4, 13), SinkWindow(1, 30))


@dataclass
class Sequence:
    """What a sequence is, by tokens alone."""

    window: SinkWindow | None  # fitted
    tokens: list[int]
    num_computed: int = 0
    seq_id: int | None = None
    swapped: SwappedSequence | None = field(default=None, repr=False)

    def values(self) -> NDArray[np.int64]:
        """A number for each token that stands for what it and those before it have seen."""
        values = prefix_values(self.tokens)
        if self.window is not None:  # from where tokens no longer see everything
            seen = self.window.num_visible_tokens
            salt = 7 * self.window.num_sink_tokens + 1000 * self.window.window_size
            values[seen:] = prefix_values(self.tokens, salt)[seen:]
        return values

    def num_evicted(self, geometry: BlockGeometry, num_sealed_ever: int) -> int:
        """Tokens of whole blocks behind the sinks that the next token does not see."""
        if self.window is None:
            return 0
        first_seen = self.num_computed + 1 - self.window.window_size
        if geometry.seals:
            first = geometry.num_head_tokens
            most = num_sealed_ever * geometry.block_size
        else:
            first = self.window.num_sink_tokens
            most = self.num_computed
        blocks = (first_seen - first) // geometry.block_size
        return min(max(blocks * geometry.block_size, 0), most)


class StreamMachine(RuleBasedStateMachine):
    """Every operation on a few sequences; the pool may be too small for them."""

    geometry: BlockGeometry
    manager: BlockManager

    @initialize(num_blocks=st.integers(40, 90), prefix_caching=st.booleans())
    def start(self, num_blocks: int, prefix_caching: bool) -> None:
        self.manager = BlockManager(
            self.geometry, num_blocks=num_blocks, max_num_seqs=4, max_model_len=48,
            prefix_caching=prefix_caching, num_host_blocks=60,
        )  # fmt: skip
        self.contents = BlockContents(self.manager)
        self.sequences: list[Sequence] = []

    def running(self) -> list[Sequence]:
        return [sequence for sequence in self.sequences if sequence.seq_id is not None]

    @rule(length=st.integers(0, 120), branch=st.integers(0, 1), which=st.integers(0, 4))
    def add(self, length: int, branch: int, which: int) -> None:
        if not self.manager.num_free_seqs:
            return
        wanted = WINDOWS[which]
        tokens = [(i // 11 * branch + i) % 5 for i in range(length if wanted else length % 48)]
        window = wanted
        if wanted is not None:
            if self.geometry.seals and wanted.num_sink_tokens > self.geometry.num_head_tokens:
                return
            window = self.manager.fitted_window(wanted)
        self.enter(Sequence(window, tokens))

    def enter(self, sequence: Sequence) -> None:
        chain = self.manager.chain_tokens(sequence.tokens, sink_window=sequence.window)
        sequence.seq_id = self.manager.add_sequence(chain)
        sequence.num_computed = int(self.manager.num_computed_tokens[sequence.seq_id])
        assert sequence.num_computed <= max(len(sequence.tokens) - 1, 0)
        if sequence.window is not None:
            assert sequence.num_computed <= sequence.window.num_visible_tokens
        self.sequences.append(sequence)

    def tell(self, sequence: Sequence, num_tokens: int) -> None:
        """Append tokens until there are so many, as far as the sequence may grow."""
        most = 1000 if sequence.window else self.manager.max_model_len
        missing = min(num_tokens, most) - len(sequence.tokens)
        if missing > 0:
            self.manager.append_tokens(ids(sequence.seq_id), [1] * missing, [missing])
            sequence.tokens += [1] * missing

    @rule(data=st.data(), with_drafts=st.booleans(), commits=st.sampled_from([True, True, False]))
    def step(self, data: Any, with_drafts: bool, commits: bool) -> None:
        chosen, counts, drafts, kept = [], [], [], []
        for sequence in self.running():
            if data.draw(st.booleans()):
                continue
            new = data.draw(st.sampled_from([1, 1, 1, 2, 3, 7, 12, 30]))
            self.tell(sequence, sequence.num_computed + new)
            most = int(self.manager.num_computable(ids(sequence.seq_id))[0])
            if not most:
                continue
            new = min(new, most)
            chosen.append(sequence)
            counts.append(new)
            drafts.append(
                data.draw(st.integers(0, min(new - 1, self.geometry.block_size)))
                if with_drafts
                else 0
            )
            kept.append(new - data.draw(st.integers(0, drafts[-1])))
        if not chosen:
            return
        seq_ids = ids(*(sequence.seq_id for sequence in chosen))
        plan = self.manager.reserve(seq_ids, counts, drafts if with_drafts else None)
        if plan is None:
            return
        starts = [sequence.num_computed for sequence in chosen]
        expected = [start + i for start, n in zip(starts, counts, strict=True) for i in range(n)]
        assert plan.positions.tolist() == expected
        values = [
            sequence.values()[start : start + count]
            for sequence, start, count in zip(chosen, starts, counts, strict=True)
        ]
        if not commits:
            self.manager.rollback(plan)
            return
        self.contents.apply(plan, np.concatenate(values))
        self.manager.commit(plan, kept if with_drafts else None)
        for sequence, count in zip(chosen, kept, strict=True):
            sequence.num_computed += count
        self.contents.poison_free()

    @rule(which=st.integers(0, 3))
    def fork(self, which: int) -> None:
        if which < len(self.running()) and self.manager.num_free_seqs:
            parent = self.running()[which]
            assert parent.seq_id is not None
            seq_id = self.manager.fork(parent.seq_id)
            self.sequences.append(
                Sequence(parent.window, [*parent.tokens], parent.num_computed, seq_id)
            )

    @rule(which=st.integers(0, 3), how=st.sampled_from(["remove", "recompute", "swap"]))
    def leave(self, which: int, how: str) -> None:
        if which >= len(self.running()):
            return
        sequence = self.running()[which]
        assert sequence.seq_id is not None
        if how == "swap":
            swapped = self.manager.swap_out(sequence.seq_id)
            if swapped is not None:
                self.contents.swap_out(swapped.device_block_ids, swapped.host_block_ids)
                sequence.seq_id, sequence.swapped = None, swapped
            return
        chain = self.manager.chain_of(sequence.seq_id)
        assert chain.token_ids.tolist() == sequence.tokens
        self.manager.remove_sequence(sequence.seq_id)
        self.sequences.remove(sequence)
        if how == "recompute":
            self.enter(Sequence(sequence.window, sequence.tokens))
        self.contents.poison_free()

    @rule()
    def return_from_host(self) -> None:
        for sequence in self.sequences:
            if sequence.swapped is not None:
                placed = self.manager.swap_in(sequence.swapped)
                if placed is not None:
                    sequence.seq_id, block_ids = placed
                    self.contents.swap_in(block_ids, sequence.swapped.host_block_ids)
                    sequence.swapped = None
                return

    @rule(which=st.integers(0, 3))
    def refuse_too_much(self, which: int) -> None:
        if which >= len(self.running()):
            return
        sequence = self.running()[which]
        most = int(self.manager.num_computable(ids(sequence.seq_id))[0])
        try:
            plan = self.manager.reserve(ids(sequence.seq_id), ids(most + 600))
        except InvalidStepError:
            return
        raise AssertionError(f"{plan} for {sequence}")

    @invariant()
    def blocks_hold_what_is_seen(self) -> None:
        if not hasattr(self, "manager"):
            return
        self.manager.check_integrity()
        for sequence in self.running():
            seq_id, values = sequence.seq_id, sequence.values()
            assert seq_id is not None
            evicted = int(self.manager.num_evicted_tokens[seq_id])
            assert int(self.manager.num_computed_tokens[seq_id]) + evicted == sequence.num_computed
            first = self.geometry.num_head_tokens
            if not self.geometry.seals:
                first = 0 if sequence.window is None else sequence.window.num_sink_tokens
            sealed_ever = int(self.manager.num_sealed[seq_id]) + evicted // self.geometry.block_size
            assert evicted == sequence.num_evicted(self.geometry, sealed_ever)
            kept = np.r_[0 : min(first, sequence.num_computed)]
            kept = np.r_[kept, first + evicted : max(sequence.num_computed, first + evicted)]
            kept = kept[kept < sequence.num_computed]
            np.testing.assert_array_equal(self.contents.stored(seq_id), values[kept])
            if sequence.window is not None:
                stored = int(self.manager.num_computed_tokens[seq_id])
                assert stored <= sequence.window.max_stored(self.geometry)

    def teardown(self) -> None:
        if hasattr(self, "manager"):
            for sequence in self.sequences:
                if sequence.swapped is not None:
                    self.manager.discard_swapped(sequence.swapped)
                else:
                    assert sequence.seq_id is not None
                    self.manager.remove_sequence(sequence.seq_id)
            assert self.manager.num_free_blocks == self.manager.num_blocks


def run_machine(geometry: BlockGeometry) -> None:
    machine = type("Machine", (StreamMachine,), {"geometry": geometry})
    run_state_machine_as_test(
        machine,
        settings=settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True),
    )


@ALL_GEOMETRIES
def test_windowed_ones_hold_what_they_see(geometry):
    run_machine(geometry)


def check_token_by_token(geometry: BlockGeometry) -> None:
    """After each token the blocks that are gone are those that the next one sees nothing of."""
    manager = BlockManager(geometry, num_blocks=60, max_num_seqs=1, max_model_len=8)
    num_sinks = 2 if geometry.num_head_tokens or not geometry.seals else 0
    window = manager.fitted_window(SinkWindow(num_sinks, 11))
    seq_id = ids(manager.add_sequence(manager.chain_tokens((), sink_window=window)))
    first = geometry.num_head_tokens if geometry.seals else window.num_sink_tokens
    for length in range(1, 200):
        plan = manager.reserve(seq_id, ids(1))
        assert plan is not None
        let_go = manager.commit(plan)
        evicted = int(manager.num_evicted_tokens[seq_id[0]])
        unseen = max(length + 1 - window.window_size - first, 0)  # by the next token
        num_sealed = int(geometry.num_sealed_blocks(ids(length))[0]) if geometry.seals else length
        expected = min(unseen // geometry.block_size, num_sealed) * geometry.block_size
        assert evicted == expected, length
        assert len(let_go) in (0, 1)
        assert manager.pool.num_allocated == len(manager.block_ids(int(seq_id[0])))
        assert manager.pool.num_allocated <= window.max_blocks(geometry)
        manager.check_integrity()


@ALL_GEOMETRIES
def test_blocks_go_as_soon_as_nobody_sees_them(geometry):
    check_token_by_token(geometry)


@ALL_GEOMETRIES
def test_a_window_off_by_one_is_seen(geometry, monkeypatch):
    """Windowed sequences that let go of blocks a token too early."""
    evict = growth.evict_blocks

    def eager(*arguments: Any) -> int:
        before, state, after = arguments[:4], arguments[4], arguments[5:]
        earlier = state.copy()
        earlier["window_size"] -= state["window_size"] > 0
        num_ids = evict(*before, earlier, *after)
        state["num_evicted_tokens"] = earlier["num_evicted_tokens"]
        return num_ids

    monkeypatch.setattr(block_manager, "evict_blocks", eager)
    if geometry.min_tail_tokens > 11:
        pytest.skip("the tail is longer than the window: sealing decides when blocks go")
    with pytest.raises(AssertionError):
        check_token_by_token(geometry)


def test_what_a_step_let_go_is_not_changed_by_later_steps():
    manager = BlockManager(GEOMETRIES["native"], num_blocks=60, max_num_seqs=1, max_model_len=8)
    tokens = manager.chain_tokens((), sink_window=SinkWindow(0, 8))
    seq_id = ids(manager.add_sequence(tokens))
    told = []
    for _ in range(40):
        plan = manager.reserve(seq_id, ids(1))
        assert plan is not None
        let_go = manager.commit(plan)
        told += [(let_go, let_go.tolist())] if len(let_go) else []
    assert len({block_ids[0] for _, block_ids in told}) > 1
    assert all(let_go.tolist() == block_ids for let_go, block_ids in told)


def test_once_its_sinks_are_stored_a_sequence_may_take_a_whole_chunk():
    geometry = GEOMETRIES["native"]
    manager = BlockManager(geometry, num_blocks=100, max_num_seqs=1, max_model_len=8)
    window = SinkWindow(4, 8)
    tokens = manager.chain_tokens(np.arange(100), sink_window=window)
    seq_id = ids(manager.add_sequence(tokens))
    assert manager.num_computable(seq_id).tolist() == [12]
    plan = manager.reserve(seq_id, ids(4))
    assert plan is not None
    manager.commit(plan)
    assert manager.num_computable(seq_id).tolist() == [96]
    assert window.max_storable(geometry, 4) >= 100


@pytest.mark.parametrize("steps", [(12, 30), (20, 5)], ids=["wide gap", "one block"])
def test_what_was_swapped_out_behind_a_gap_is_not_published_when_it_is_back(steps):
    manager = BlockManager(
        GEOMETRIES["native"],
        num_blocks=40,
        max_num_seqs=2,
        max_model_len=40,
        prefix_caching=True,
        num_host_blocks=40,
    )
    tokens = np.arange(60)
    window = SinkWindow(4, steps[0] - 4)
    seq_id = manager.add_sequence(manager.chain_tokens(tokens, sink_window=window))
    for count in steps:
        plan = manager.reserve(ids(seq_id), ids(count))
        assert plan is not None
        manager.commit(plan)
    assert manager.num_evicted_tokens[seq_id]
    swapped = manager.swap_out(seq_id)
    assert swapped is not None
    manager.reset_prefix_cache()  # what was published before its gap is gone too
    back = manager.swap_in(swapped)
    assert back is not None
    plan = manager.reserve(ids(back[0]), ids(6))
    assert plan is not None
    manager.commit(plan)
    assert manager.num_cached_blocks == 0
    manager.check_integrity()
