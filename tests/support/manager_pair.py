"""Every operation of a block manager beside the reference. Needs no test framework."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from paged_kv.blocks.block_manager import BlockManager
from paged_kv.blocks.block_tables import StoredLengths
from paged_kv.blocks.geometry import BlockGeometry
from paged_kv.blocks.host_blocks import SwappedSequence
from paged_kv.blocks.retention import UNLIMITED, Retention
from paged_kv.blocks.step_arrays import StepArrays
from paged_kv.blocks.step_plan import StepPlan
from paged_kv.blocks.token_chain import TokenChain
from paged_kv.errors import InvalidStepError, OutOfBlocksError
from tests.support.manager_contents import Cell, Contents
from tests.support.manager_mirror import Mirror
from tests.support.plan_reader import PlanReader, open_ids, sealed_ids
from tests.support.reference_manager import (
    KEEPS_ALL,
    ExtraKeys,
    GroupStep,
    Lengths,
    NoSeqIdError,
    ReferenceManager,
    Rule,
    Sequence,
    Shape,
    Step,
    Swapped,
    Wish,
    layout,
)
from tests.support.refused import refused

# Alike in bytes or text, and all different.
EXTRA_KEYS: tuple[ExtraKeys, ...] = (
    (),
    ("1",),
    (1,),
    (b"1",),
    ("1", "2"),
    ("12",),
    ("1str:2",),
    ("1str:1:2",),
)


def next_token(tokens: list[int], branch: int | None = None) -> int:
    """The token that continues a branch, or turns to another one."""
    if branch is None:
        branch = tokens[-1] % 10 if tokens else 0
    return 10 * (len(tokens) % 7) + branch


def make_tokens(length: int, turn: int, branch: int) -> list[int]:
    """Tokens of branch 0 up to position `turn`, then of `branch`: prefixes meet all the time."""
    tokens: list[int] = []
    for position in range(length):
        tokens.append(next_token(tokens, 0 if position < turn else branch))
    return tokens


@cache
def holds_what_it_should(
    rule: Rule, shape: Shape, num_tokens: int, num_sealed: int, num_gone: int
) -> bool:
    """Whether a group has all that the next token sees, of which a later one sees no more, and
    little else: a sealed block of drafts, and one that is not full, are more."""
    sizes = {"open": shape.open_block_size, "sealed": shape.block_size}
    stored = {
        position
        for kind, start in layout(shape, num_tokens, num_sealed, num_gone)
        for position in range(start, min(start + sizes[kind], num_tokens))
    }
    seen = {position for position in range(num_tokens) if rule.sees(num_tokens, position)}
    most = max(rule.reach, shape.min_tail + 2 * shape.block_size)
    return seen <= stored and len(stored) <= shape.num_head + most + rule.step(shape)


@dataclass(frozen=True)
class Settings:
    """A manager to be."""

    shape: Shape
    num_blocks: int
    max_num_seqs: int
    max_model_len: int
    prefix_caching: bool
    num_host_blocks: int
    record_events: bool = True
    rules: tuple[Rule, ...] = (KEEPS_ALL,)  # of groups of layers


class Wanted(NamedTuple):
    """One sequence of a step: chosen among the living, bounds are applied later."""

    which: int
    num_new: int
    num_drafts: int = 0
    num_kept: int = 0
    branch: int | None = None  # of tokens that nobody knows yet


class Part(NamedTuple):
    """One sequence of a step: what it computes."""

    wish: Wish
    tokens: list[int]  # of the whole sequence, drafts included
    histories: list[int]  # of the new tokens
    num_kept_drafts: int


@dataclass
class Parked:
    """A chain that may be added again, as often as one likes."""

    chain: TokenChain
    tokens: list[int]
    root: ExtraKeys


class ManagerPair:
    """A manager and what it should be."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.shape = shape = settings.shape
        self.manager = BlockManager(
            BlockGeometry(
                block_size=shape.block_size,
                open_block_size=shape.open_block_size,
                num_head_tokens=shape.num_head,
                min_tail_tokens=shape.min_tail,
            ),
            num_blocks=settings.num_blocks,
            max_num_seqs=settings.max_num_seqs,
            max_model_len=settings.max_model_len,
            prefix_caching=settings.prefix_caching,
            record_events=settings.record_events,
            num_host_blocks=settings.num_host_blocks,
            retentions=[
                Retention(window_size=rule.window or UNLIMITED, chunk_size=rule.chunk or UNLIMITED)
                for rule in settings.rules
            ],
        )
        self.reference = ReferenceManager(
            shape,
            num_blocks=settings.num_blocks,
            max_num_seqs=settings.max_num_seqs,
            prefix_caching=settings.prefix_caching,
            num_host_blocks=settings.num_host_blocks,
            rules=settings.rules,
        )
        self.rules = settings.rules
        self.readers = [PlanReader(self.manager.geometry) for _ in settings.rules]
        self.contents = Contents(settings.num_blocks)
        self.host_contents = Contents(settings.num_host_blocks)
        self.mirror = Mirror()
        self.parked: deque[Parked] = deque(maxlen=4)
        self.swapped: list[tuple[SwappedSequence, Swapped]] = []
        self.tally: Counter[str] = Counter()
        self._kept_seq_ids: dict[tuple[int, ...], NDArray[np.int64]] = {}

    @property
    def living(self) -> list[int]:
        return sorted(self.reference.sequences)

    def pick(self, which: int) -> int | None:
        living = self.living
        return living[which % len(living)] if living else None

    # -- rules: sequences -----------------------------------------------------------------------

    def add(self, length: int, turn: int, branch: int, keys: int, *, as_list: bool = True) -> None:
        """A sequence with a prompt, which a manager without a cache need not be told."""
        length = min(length, self.settings.max_model_len)
        tokens = make_tokens(length, turn, branch)
        root = EXTRA_KEYS[keys % len(EXTRA_KEYS)]
        if not length and not root:
            self._add(None, [], root)
            return
        chain = self.manager.chain_tokens(tokens if as_list else np.array(tokens), root)
        self._add(chain, tokens, root)

    def add_parked(self, which: int) -> None:
        """A sequence with the tokens and hashes of an earlier one."""
        if self.parked:
            parked = self.parked[which % len(self.parked)]
            self._add(parked.chain, parked.tokens, parked.root)

    def _add(self, chain: TokenChain | None, tokens: list[int], root: ExtraKeys) -> None:
        if chain is not None:
            sequence = self.reference.new_sequence(root, tokens)
            found = self.manager.find_prefix(chain)
            if found.next_link is not None:
                found = found._replace(next_link=chain.hashes.index(found.next_link))
            expected = self.reference.find(sequence)
            assert found == expected
        try:
            seq_id = self.reference.add(tokens, root)
        except NoSeqIdError:
            with refused(OutOfBlocksError):
                self.manager.add_sequence(chain)
            self.tally["no seq_id"] += 1
            return
        assert self.manager.add_sequence(chain) == seq_id
        self.tally["hits"] += self.reference.sequences[seq_id].num_computed > 0

    def append(
        self, chosen: int, branch: int | None, count: int = 1, *, at_once: bool = False
    ) -> None:
        """More tokens for the living sequences whose bit is set."""
        tokens = {}
        for index, seq_id in enumerate(self.living):
            if chosen >> index & 1:
                after = self.reference.sequences[seq_id].copy()
                end = min(after.num_known + count, self.settings.max_model_len)
                while len(after.tokens) < end:
                    after.extend([next_token(after.tokens, branch)])
                tokens[seq_id] = after.tokens[after.num_known : end]
        self._append(tokens, at_once=at_once)

    def _append(self, tokens: dict[int, list[int]], *, at_once: bool) -> None:
        """Tell the manager these tokens in one call, or one token of each sequence a call."""
        if at_once:
            flat = [token for row in tokens.values() for token in row]
            self.manager.append_tokens(list(tokens), flat, [len(row) for row in tokens.values()])
            for seq_id, row in tokens.items():
                self.reference.append(seq_id, row)
            return
        for turn in range(max(map(len, tokens.values()), default=0)):
            told = {seq_id: row[turn] for seq_id, row in tokens.items() if turn < len(row)}
            self.manager.append_tokens(list(told), list(told.values()))
            for seq_id, token in told.items():
                self.reference.append(seq_id, [token])

    def fork(self, which: int) -> None:
        seq_id = self.pick(which)
        if seq_id is None:
            return
        try:
            child = self.reference.fork(seq_id)
        except NoSeqIdError:
            with refused(OutOfBlocksError):
                self.manager.fork(seq_id)
            self.tally["no seq_id"] += 1
            return
        assert self.manager.fork(seq_id) == child
        self.tally["forks"] += 1

    def truncate(self, which: int, num_tokens: int) -> None:
        """To so many of its tokens, where that can be."""
        seq_id = self.pick(which)
        if seq_id is None:
            return
        num_tokens %= self.reference.sequences[seq_id].num_computed + 1
        if not self.reference.can_truncate(seq_id, num_tokens):
            with refused(InvalidStepError):
                self.manager.truncate(seq_id, num_tokens)
            self.tally["refused cuts"] += 1
            return
        self.manager.truncate(seq_id, num_tokens)
        self.reference.truncate(seq_id, num_tokens)
        self.tally["cuts"] += 1

    def remove(self, which: int) -> None:
        seq_id = self.pick(which)
        if seq_id is not None:
            self.manager.remove_sequence(seq_id)
            self.reference.remove(seq_id)

    def preempt(self, which: int) -> None:
        """Remove a sequence, and keep what is needed to compute it again."""
        seq_id = self.pick(which)
        if seq_id is None:
            return
        chain = self.manager.chain_of(seq_id)
        self.manager.remove_sequence(seq_id)
        sequence = self.reference.remove(seq_id)
        tokens = sequence.tokens[: sequence.num_known]
        self.parked.append(Parked(chain, tokens, sequence.root))

    # -- rules: swap and the cache --------------------------------------------------------------

    def swap_out(self, which: int) -> None:
        seq_id = self.pick(which)
        if seq_id is None:
            return
        block_ids = self.reference.sequences[seq_id].block_ids
        swapped = self.manager.swap_out(seq_id)
        expected = self.reference.swap_out(seq_id)
        if swapped is None or expected is None:
            assert swapped is expected, "one has host blocks and the other has not"
            self.tally["refused swaps"] += 1
            return
        assert swapped.device_block_ids.tolist() == block_ids
        assert swapped.host_block_ids.tolist() == expected.host_ids
        assert swapped.lengths == self._lengths(expected.sequence)
        self.contents.move(block_ids, self.host_contents, expected.host_ids)
        self.swapped.append((swapped, expected))
        self.tally["swaps"] += 1

    def swap_in(self, which: int) -> None:
        if not self.swapped:
            return
        swapped, expected = self.swapped[which % len(self.swapped)]
        seq_id = self.reference.swap_in(expected)
        result = self.manager.swap_in(swapped)
        if result is None or seq_id is None:
            assert result is seq_id, "one has blocks and the other has not"
            self.tally["refused swaps"] += 1
            return
        block_ids = result[1].tolist()
        assert (result[0], block_ids) == (seq_id, self.reference.sequences[seq_id].block_ids)
        self.host_contents.move(expected.host_ids, self.contents, block_ids)
        self.swapped.remove((swapped, expected))
        self._refuse_again(swapped)

    def place(self, which: int, *, publishes: bool) -> None:
        """A sequence as if computed elsewhere: a living one once more, in blocks of its own."""
        source = self.pick(which)
        if source is None:
            return
        chain = self.manager.chain_of(source)
        sequence = self.reference.sequences[source].copy()
        source_ids = sequence.block_ids
        placed = (chain, [StoredLengths(*its) for its in self._lengths(sequence)])
        seq_id = self.reference.place(sequence)
        if seq_id is None:
            with refused(OutOfBlocksError):
                self.manager.place_sequence(*placed)
            return
        result = self.manager.place_sequence(*placed)
        assert (result[0], result[1].tolist()) == (seq_id, sequence.block_ids)
        self.contents.move(source_ids, self.contents, sequence.block_ids)
        if publishes:
            self.check()
            self.manager.publish_sequence(seq_id)
            self.reference.publish(sequence)
        self.tally["placed"] += 1

    def discard_swapped(self, which: int) -> None:
        if self.swapped:
            swapped, expected = self.swapped.pop(which % len(self.swapped))
            self.manager.discard_swapped(swapped)
            self.reference.discard(expected)
            self._refuse_again(swapped)

    def _refuse_again(self, swapped: SwappedSequence) -> None:
        """What was brought back or given up has no host blocks any more."""
        for again in (self.manager.swap_in, self.manager.discard_swapped):
            with refused(InvalidStepError):
                again(swapped)

    def reset_cache(self) -> None:
        if self.living and self.settings.prefix_caching:
            with refused(InvalidStepError):
                self.manager.reset_prefix_cache()
            return
        self.manager.reset_prefix_cache()
        if self.settings.prefix_caching:
            self.reference.reset_cache()

    def remove_all(self, *, reset: bool) -> None:
        for seq_id in self.living:
            self.manager.remove_sequence(seq_id)
            self.reference.remove(seq_id)
        if reset:
            self.reset_cache()

    def recover(self) -> None:
        """Everything is dropped, as after an exception that struck anywhere."""
        self.manager.recover()
        self.reference.recover()
        while self.swapped:
            self._refuse_again(self.swapped.pop()[0])

    def take_events(self) -> None:
        """The events are those of the reference, and what they tell is the cache."""
        taken = self.manager.take_events()
        expected, self.reference.events = self.reference.events, []
        self.tally["evictions"] += sum(event.kind == "removed" for event in expected)
        if not (self.settings.record_events and self.settings.prefix_caching):
            assert not taken
            return
        cache = self.manager.prefix_cache
        assert cache is not None
        self.mirror.follow(taken, expected, self.shape)
        self.mirror.check(cache)

    # -- rules: steps ---------------------------------------------------------------------------

    def step(
        self,
        wanted: list[Wanted],
        *,
        commits: bool = True,
        meanwhile: Callable[[], None] | None = None,
        seq_ids_as: int = 0,
        with_drafts: bool = True,
        tells: Literal["each", "all", "later"] = "each",
    ) -> bool:
        """A step of some sequences; `meanwhile` happens while it is under way. False: no blocks."""
        parts = self._parts(wanted, with_drafts)
        wishes = [part.wish for part in parts]
        seq_ids = self._seq_ids(tuple(wish.seq_id for wish in wishes), seq_ids_as)
        num_new = [wish.num_new for wish in wishes]
        num_drafts = [wish.num_drafts for wish in wishes] if with_drafts else None
        undrafted = self.reference.plan_rows([Wish(wish.seq_id, wish.num_new) for wish in wishes])
        rows = zip(*(group.rows for group in undrafted.parts), strict=True)
        needed = self.manager.blocks_needed(
            np.array(seq_ids, dtype=np.int64), np.array(num_new, dtype=np.int64)
        )
        assert needed.tolist() == [sum(row.num_new_blocks for row in each) for each in rows]
        step = self.reference.reserve(wishes)
        plan = self.manager.reserve(seq_ids, num_new, num_drafts)
        if plan is None or step is None:
            assert plan is step, "one has blocks and the other has not"
            self.tally["failed reservations"] += 1
            return False
        histories = [history for part in parts for history in part.histories]
        for group, (its, expected) in enumerate(zip(plan.parts, step.parts, strict=True)):
            arrays = self.readers[group].read(its)
            self._check_plan(its, step.wishes)
            self._check_blocks(its, arrays, expected)
            cells = [Cell(group, history) for history in histories]
            self.contents.apply(its, arrays, cells, self.shape.open_block_size)
            self._check_seen(its, arrays, group)
        self.check()
        if meanwhile is not None:
            meanwhile()
            self.check()
        if commits:
            self._commit(plan, step, parts, tells)
        else:
            self.reference.rollback(step)
            self.manager.rollback(plan)
        for end in (self.manager.commit, self.manager.rollback):
            with refused(InvalidStepError):
                end(plan)
        for part in step.parts:
            self.tally["copies"] += len(part.copies)
            self.tally["sealed blocks"] += len(part.seal_ids)
        return True

    def _parts(self, wanted: list[Wanted], with_drafts: bool) -> list[Part]:
        """What of it fits the lengths of the sequences.

        A manager with a cache is told what is certain; it gets a token where it knows no new one.
        """
        chosen: dict[int, Wanted] = {}
        for want in wanted:
            seq_id = self.pick(want.which)
            if seq_id is not None:
                chosen.setdefault(seq_id, want)
        sequences = self.reference.sequences
        max_len, is_told = self.settings.max_model_len, self.settings.prefix_caching
        chosen = {s: want for s, want in chosen.items() if sequences[s].num_computed < max_len}
        if is_told:
            unknown = {}
            for seq_id, want in chosen.items():
                sequence = sequences[seq_id]
                if sequence.num_known <= sequence.num_computed:
                    kept_drafts = sequence.tokens[sequence.num_known :]
                    unknown[seq_id] = [*kept_drafts, next_token(sequence.tokens, want.branch)]
            self._append(unknown, at_once=max(map(len, unknown.values()), default=0) > 1)
        parts = []
        for seq_id, want in chosen.items():
            after = sequences[seq_id].copy()
            start = after.num_computed
            room = (after.num_known if is_told else max_len) - start
            num_certain = min(max(want.num_new, 1), room)
            room = max_len - start - num_certain
            num_drafts = min(want.num_drafts, self.shape.block_size, room) if with_drafts else 0
            end = start + num_certain + num_drafts
            while len(after.tokens) < end:
                after.extend([next_token(after.tokens, want.branch)])
            parts.append(
                Part(
                    wish=Wish(seq_id, num_certain + num_drafts, num_drafts),
                    tokens=after.tokens[:end],
                    histories=after.histories[start:end],
                    num_kept_drafts=min(want.num_kept, num_drafts),
                )
            )
        return parts

    def _seq_ids(self, seq_ids: tuple[int, ...], seq_ids_as: int) -> list[int] | NDArray[np.int64]:
        """A list, an array, or a read-only array that is the same for the same seq_ids."""
        if seq_ids_as == 0:
            return list(seq_ids)
        array = np.array(seq_ids, dtype=np.int64)
        if seq_ids_as == 1:
            return array
        array.flags.writeable = False
        return self._kept_seq_ids.setdefault(seq_ids, array)

    def _commit(
        self, plan: StepPlan, step: Step, parts: list[Part], tells: Literal["each", "all", "later"]
    ) -> None:
        """The manager is told the drafts that are kept before it commits them, or later."""
        num_kept = []
        unknown: dict[int, list[int]] = {}
        for part in parts:
            sequence = self.reference.sequences[part.wish.seq_id]
            num_dropped = part.wish.num_drafts - part.num_kept_drafts
            num_kept.append(part.wish.num_new - num_dropped)
            end = sequence.num_computed + num_kept[-1]
            sequence.extend(part.tokens[len(sequence.tokens) : end])
            unknown[part.wish.seq_id] = sequence.tokens[sequence.num_known : end]
            self.tally["kept drafts"] += part.num_kept_drafts
            self.tally["dropped drafts"] += num_dropped
        if self.settings.prefix_caching and tells != "later":
            self._append(unknown, at_once=tells == "all")
        wishes = [part.wish for part in parts]
        for wrong in (
            [wish.num_new + 1 for wish in wishes],
            [wish.num_new - wish.num_drafts - 1 for wish in wishes],
        ):
            if wrong:
                with refused(InvalidStepError):
                    self.manager.commit(plan, wrong)
        let_go = self.reference.commit(step, num_kept)
        keeps_all = num_kept == plan.num_scheduled_tokens.tolist()
        evicted_ids = self.manager.commit(plan, None if keeps_all else num_kept)
        assert evicted_ids.tolist() == let_go
        self.tally["let go"] += len(let_go)

    def _check_plan(self, plan: StepPlan, wishes: list[Wish]) -> None:
        """What is the same for every group: whose tokens are computed."""
        num_new = [wish.num_new for wish in wishes]
        starts = [self.reference.sequences[wish.seq_id].num_computed for wish in wishes]
        assert plan.seq_ids.tolist() == [wish.seq_id for wish in wishes]
        assert plan.num_tokens == sum(num_new)
        assert plan.positions.tolist() == [
            start + index for start, count in zip(starts, num_new, strict=True)
            for index in range(count)
        ]  # fmt: skip
        assert plan.token_rows.tolist() == [
            row for row, count in enumerate(num_new) for _ in range(count)
        ]
        assert plan.query_start_loc.tolist() == [
            sum(num_new[:row]) for row in range(len(num_new) + 1)
        ]

    def _check_blocks(self, plan: StepPlan, arrays: StepArrays, expected: GroupStep) -> None:
        assert plan.new_block_ids.tolist() == expected.new_ids
        assert plan.seal_block_ids.tolist() == expected.seal_ids
        assert plan.copy_sources.tolist() == [source for source, _ in expected.copies]
        assert plan.copy_targets.tolist() == [target for _, target in expected.copies]
        assert plan.freed_block_ids.tolist() == expected.left_ids
        geometry = self.manager.geometry
        copies = dict(zip(plan.copy_targets.tolist(), plan.copy_sources.tolist(), strict=True))
        for index, row in enumerate(expected.rows):
            in_place = open_ids(geometry, arrays, index)  # of its source, a copy
            assert [copies.get(block_id, block_id) for block_id in in_place] == (
                row.held.ids_of("open")
            )
            assert sealed_ids(geometry, arrays, index) == row.held.ids_of("sealed")

    def _check_seen(self, plan: StepPlan, arrays: StepArrays, group: int) -> None:
        """Each new token finds all that it sees of the context, through the plan alone."""
        rule = self.rules[group]
        gone = plan.num_evicted_tokens
        for row, seq_id in enumerate(plan.seq_ids.tolist()):
            sequence = self.reference.sequences[seq_id]
            num_gone = 0 if gone is None else int(gone[row])
            found = self.contents.context(arrays, row, self.shape, num_gone)
            position = sequence.num_computed  # of the first new token; others see less of it
            for earlier in range(position):
                if rule.sees(position, earlier):
                    assert found[earlier] == Cell(group, sequence.histories[earlier])

    # -- invariants -----------------------------------------------------------------------------

    def check(self) -> None:
        """All that can be observed is what the reference says."""
        manager, reference = self.manager, self.reference
        manager.check_integrity()
        assert manager.num_free_blocks == reference.num_free
        assert manager.pool.ref_counts.tolist() == reference.ref_counts
        assert manager.pool.peak_allocated == reference.peak
        assert manager.num_cached_blocks == len(reference.cached)
        assert manager.num_free_seqs == len(reference.free_seq_ids)
        assert manager.living_seq_ids.tolist() == self.living
        if manager.prefix_cache is not None:
            assert manager.prefix_cache.num_idle == len(reference.idle)
            assert np.flatnonzero(manager.prefix_cache.is_cached).tolist() == sorted(
                reference.content_of
            )
        if manager.host_pool is not None:
            assert manager.host_pool.num_free == len(reference.host_free)
        statistics = manager.prefix_statistics
        assert statistics.num_queries == reference.num_queries
        assert statistics.num_query_tokens == reference.num_query_tokens
        assert statistics.num_hit_tokens == reference.num_hit_tokens
        self._check_first_group()
        for seq_id, sequence in reference.sequences.items():
            self._check_sequence(seq_id, sequence)

    def _lengths(self, sequence: Sequence) -> tuple[Lengths, ...]:
        """What each group stores."""
        return tuple(
            Lengths(
                sequence.num_computed - held.num_gone, len(held.ids_of("sealed")), held.num_gone
            )
            for held in sequence.groups
        )

    def _check_sequence(self, seq_id: int, sequence: Sequence) -> None:
        manager = self.manager
        assert manager.num_tokens[seq_id] == sequence.num_known
        known = sequence.tokens[: sequence.num_known]
        assert manager.token_ids[seq_id, : sequence.num_known].tolist() == known
        assert manager.last_token_ids[seq_id : seq_id + len(known[-1:])].tolist() == known[-1:]
        assert manager.all_block_ids(seq_id).tolist() == sequence.block_ids
        assert manager.stored_lengths(seq_id) == self._lengths(sequence)
        for tables, held in zip(manager.groups, sequence.groups, strict=True):
            assert tables.head_and_tail_ids(seq_id).tolist() == held.ids_of("open")
            assert tables.body_ids(seq_id).tolist() == held.ids_of("sealed")
        for group, (rule, held) in enumerate(zip(self.rules, sequence.groups, strict=True)):
            self.contents.check(sequence, group)
            lengths = sequence.num_computed, held.num_sealed, held.num_gone
            assert tuple(held.blocks) == layout(self.shape, *lengths)
            assert holds_what_it_should(rule, self.shape, *lengths)

    def _check_first_group(self) -> None:
        """What the manager says where no group is named."""
        manager, sequences = self.manager, list(self.reference.sequences.items())
        if not sequences:
            return
        seq_ids = np.array([seq_id for seq_id, _ in sequences])
        first = [self._lengths(sequence)[0] for _, sequence in sequences]
        assert manager.num_computed_tokens[seq_ids].tolist() == [its.num_stored for its in first]
        assert manager.num_sealed[seq_ids].tolist() == [its.num_sealed for its in first]
        assert manager.num_evicted_tokens[seq_ids].tolist() == [its.num_evicted for its in first]
        assert manager.num_held(seq_ids)[0].tolist() == [
            len(sequence.block_ids) for _, sequence in sequences
        ]
        assert manager.num_computable(seq_ids).tolist() == [
            sequence.num_known - sequence.num_computed for _, sequence in sequences
        ]
        seq_id, sequence = sequences[-1]
        assert manager.block_ids(seq_id).tolist() == sequence.groups[0].block_ids

    def drain(self) -> None:
        """Without sequences nothing is in use."""
        self.remove_all(reset=False)
        while self.swapped:
            self.discard_swapped(0)
        self.take_events()
        self.check()
        assert self.manager.num_free_blocks == self.manager.num_blocks
        if self.manager.prefix_cache is not None:
            assert not self.manager.prefix_cache._pending  # nobody is there to store anything
            self.reset_cache()
            self.take_events()
            self.check()
