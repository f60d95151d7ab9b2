"""The block manager beside its reference: all operations at once, after each of them everything.

The seeded driver does the bulk of the steps; the state machine runs the same rules to shrink what
fails. What the rules are stands in `reference_manager.py`, what is compared in `manager_driver.py`.
"""

from __future__ import annotations

from typing import Literal

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

from paged_kv.blocks import (
    block_manager,
    block_pool,
    block_tables,
    growth,
    prefix_sharing,
    table_replica,
)
from tests.support.manager_driver import (
    EXTRA_KEYS,
    GEOMETRIES,
    ManagerPair,
    RandomDriver,
    Settings,
    Wanted,
    as_groups,
    rules_of,
)
from tests.support.manager_refusals import refuse
from tests.support.reference_manager import KEEPS_ALL, Shape, layout, num_sealable

ALL_GEOMETRIES = pytest.mark.parametrize("shape", GEOMETRIES.values(), ids=GEOMETRIES)
STEPS = {True: 1200, False: 600}  # with and without prefix caching, for each geometry
STEPS_WITH_GROUPS = {True: 900, False: 650}


@pytest.mark.parametrize("has_groups", [False, True], ids=["one group", "groups"])
@pytest.mark.parametrize("prefix_caching", [True, False], ids=["caching", "no caching"])
@ALL_GEOMETRIES
def test_random_operations_do_what_the_reference_says(shape, prefix_caching, has_groups):
    seed = len(shape) + sum(shape)
    driver = RandomDriver(shape, prefix_caching=prefix_caching, seed=seed, has_groups=has_groups)
    driver.run((STEPS_WITH_GROUPS if has_groups else STEPS)[prefix_caching])
    reached = ["failed reservations", "no seq_id", "forks", "swaps", "placed"]
    reached += ["kept drafts", "dropped drafts"]
    reached += ["hits", "evictions"] if prefix_caching else ["cuts"]
    reached += ["let go"] if has_groups else []
    reached += ["sealed blocks"] if shape.seals else []
    reached += ["copies"] if shape.open_block_size > 1 else []  # only blocks with room are copied
    assert min(driver.tally[name] for name in reached) > 0, driver.tally
    assert all(driver.operations[rule.__name__] for rule in driver.rules)


@ALL_GEOMETRIES
def test_plain_python_loops_do_what_the_compiled_ones_do(shape, monkeypatch):
    """Numba checks no bounds; the same loops over arrays do."""
    for module in (block_manager, block_pool, block_tables, growth, prefix_sharing, table_replica):
        for name, function in list(vars(module).items()):
            if hasattr(function, "py_func"):
                monkeypatch.setattr(module, name, function.py_func)
    RandomDriver(shape, prefix_caching=True, seed=1, has_groups=True).run(300)


def test_sequence_of_more_blocks_than_any_scratch_array_holds():
    length = 1100
    pair = ManagerPair(
        Settings(
            Shape(1, 1, 0, 0),
            num_blocks=2500,
            max_num_seqs=3,
            max_model_len=length,
            prefix_caching=True,
            num_host_blocks=1200,
        )
    )
    pair.add(length, turn=length - 10, branch=1, keys=0)
    assert pair.step([Wanted(0, length - 3)])
    pair.fork(0)
    assert pair.step([Wanted(1, 2), Wanted(0, 1)])
    pair.swap_out(0)
    pair.remove(0)
    pair.add(length, turn=length - 10, branch=2, keys=0)
    pair.swap_in(0)
    assert pair.step([Wanted(0, length), Wanted(1, length)])
    pair.check()
    pair.drain()


class ManagerMachine(RuleBasedStateMachine):
    """The driver's rules, chosen by hypothesis."""

    shape: Shape
    pair: ManagerPair

    @initialize(
        tenths=st.sampled_from([30, 15, 8]),
        max_num_seqs=st.integers(1, 5),
        prefix_caching=st.sampled_from([True, True, False]),
        num_host_blocks=st.sampled_from([20, 4, 0]),
        groups=st.lists(st.integers(0, 99), max_size=3),
    )
    def start(
        self,
        tenths: int,
        max_num_seqs: int,
        prefix_caching: bool,
        num_host_blocks: int,
        groups: list[int],
    ) -> None:
        max_len = 5 * self.shape.block_size + self.shape.num_head + 1
        choices = rules_of(self.shape)
        rules = as_groups([choices[number % len(choices)] for number in groups] or [KEEPS_ALL])
        enough = len(layout(self.shape, max_len, num_sealable(self.shape, max_len))) * len(rules)
        self.pair = ManagerPair(
            Settings(
                self.shape,
                num_blocks=tenths * enough // 10 + 1,
                max_num_seqs=max_num_seqs,
                max_model_len=max_len,
                prefix_caching=prefix_caching,
                num_host_blocks=num_host_blocks,
                rules=rules,
            )
        )

    which = st.integers(0, 4)
    branch = st.sampled_from([None, 0, 1, 2])
    wanted = st.builds(
        Wanted,
        which=which,
        num_new=st.integers(1, 20),
        num_drafts=st.integers(0, 16),
        num_kept=st.integers(0, 16),
        branch=branch,
    )

    @rule(
        length=st.integers(0, 60),
        turn=st.integers(0, 60),
        branch=st.integers(0, 2),
        keys=st.sampled_from([0, 0, 0, *range(len(EXTRA_KEYS))]),
    )
    def add(self, length: int, turn: int, branch: int, keys: int) -> None:
        self.pair.add(length, turn, branch, keys)

    @rule(
        rows=st.lists(wanted, min_size=1, max_size=4),
        commits=st.sampled_from([True, True, False]),
        seq_ids_as=st.integers(0, 2),
        with_drafts=st.booleans(),
        tells=st.sampled_from(["each", "all", "later"]),
        adds=st.sampled_from([None, None, 5, 40]),
    )
    def step(
        self,
        rows: list[Wanted],
        commits: bool,
        seq_ids_as: int,
        with_drafts: bool,
        tells: Literal["each", "all", "later"],
        adds: int | None,
    ) -> None:
        self.pair.step(
            rows,
            commits=commits,
            meanwhile=None if adds is None else lambda: self.pair.add(adds, adds, 0, 0),
            seq_ids_as=seq_ids_as,
            with_drafts=with_drafts,
            tells=tells,
        )

    @rule(which=which, reset=st.booleans())
    def clear(self, which: int, reset: bool) -> None:
        if which == 0:
            self.pair.remove_all(reset=reset)
        self.pair.take_events()

    @rule(chosen=st.integers(0, 31), branch=branch, count=st.integers(0, 5), at_once=st.booleans())
    def append(self, chosen: int, branch: int | None, count: int, at_once: bool) -> None:
        self.pair.append(chosen, branch, count, at_once=at_once)

    @rule(which=which)
    def add_parked(self, which: int) -> None:
        self.pair.add_parked(which)

    @rule(which=which)
    def fork(self, which: int) -> None:
        self.pair.fork(which)

    @rule(which=which)
    def remove(self, which: int) -> None:
        self.pair.remove(which)

    @rule(which=which)
    def preempt(self, which: int) -> None:
        self.pair.preempt(which)

    @rule(which=which)
    def swap_out(self, which: int) -> None:
        self.pair.swap_out(which)

    @rule(which=which)
    def swap_in(self, which: int) -> None:
        self.pair.swap_in(which)

    @rule(which=which, publishes=st.booleans())
    def place(self, which: int, publishes: bool) -> None:
        self.pair.place(which, publishes=publishes)

    @rule(which=which)
    def discard_swapped(self, which: int) -> None:
        self.pair.discard_swapped(which)

    @rule(which=which, num_tokens=st.integers(0, 100))
    def truncate(self, which: int, num_tokens: int) -> None:
        self.pair.truncate(which, num_tokens)

    @rule(which=which)
    def refuse(self, which: int) -> None:
        refuse(self.pair, which)

    @invariant()
    def is_what_the_reference_says(self) -> None:
        if hasattr(self, "pair"):
            self.pair.check()

    def teardown(self) -> None:
        if hasattr(self, "pair"):
            self.pair.drain()


@ALL_GEOMETRIES
def test_operations_that_hypothesis_chooses_do_what_the_reference_says(shape):
    machine = type("Machine", (ManagerMachine,), {"shape": shape})
    run_state_machine_as_test(
        machine,
        settings=settings(max_examples=20, stateful_step_count=25, deadline=None, derandomize=True),
    )


def test_the_driver_finds_a_missing_user_and_says_how_to_repeat_it(monkeypatch):
    monkeypatch.setattr(block_pool.BlockPool, "share", lambda pool, block_ids: None)
    driver = RandomDriver(GEOMETRIES["int8-like"], prefix_caching=False, seed=7)
    where = r"^Shape.* seed 7, .* operation \d+ \((fork|fan_out)\) on "
    with pytest.raises(AssertionError, match=where):
        driver.run(300)
