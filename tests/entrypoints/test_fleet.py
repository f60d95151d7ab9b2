"""Which replica an order goes to: by what each has cached and has to do. No Ray, no model."""

from __future__ import annotations

import pickle
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from paged_kv import BlockRemoved, BlockStored, CacheCleared, ConfigError, SamplingParams
from paged_kv.integrations.ray_serve.block_log import BlockLog
from paged_kv.integrations.ray_serve.fleet import (
    ENDED_KEPT,
    FAILING_SECONDS,
    POLICIES,
    ROUND_ROBIN,
    TOKENS_PER_REQUEST,
    TOKENS_PER_SESSION,
    Fleet,
    home_of,
    shared_fleet,
)
from paged_kv.integrations.ray_serve.order import BlockChanges, Order, PromptBlocks

NAMES = ["a", "b", "c"]
SIZE = 100  # tokens of a block


def blocks(hashes: str, num_tokens: int | None = None) -> PromptBlocks:
    """A letter for each block."""
    ends = [SIZE * (i + 1) for i in range(len(hashes))]
    return PromptBlocks(
        num_tokens or SIZE * len(hashes) + 1, [each.encode() for each in hashes], ends
    )


def order(number: int, hashes: str = "", num_tokens: int | None = None, **fields: Any) -> Order:
    return Order(
        number=number,
        prompt_token_ids=[0],
        params=SamplingParams(),
        known={},
        blocks=blocks(hashes, num_tokens),
        **fields,
    )


def has(fleet: Fleet, name: str, hashes: str) -> None:
    fleet.learn(name, BlockChanges(0, 1, [each.encode() for each in hashes], ()))


def test_an_order_goes_where_most_of_it_is_cached() -> None:
    fleet = Fleet()
    has(fleet, "b", "xy")
    has(fleet, "c", "xyz")
    assert fleet.choose(order(1, "xyzw"), NAMES) == ["c", "b", "a"]


def test_a_block_without_those_before_it_counts_for_nothing() -> None:
    fleet = Fleet()
    has(fleet, "a", "z")
    has(fleet, "b", "x")
    assert fleet.choose(order(1, "xyz"), NAMES)[0] == "b"


def test_orders_that_begin_alike_follow_each_other_before_anything_is_cached() -> None:
    fleet = Fleet()
    first = fleet.choose(order(1, "xyz"), NAMES)[0]
    fleet.begin(1)
    assert fleet.choose(order(2, "xyw"), NAMES)[0] == first


def test_what_an_order_promised_is_forgotten_with_it() -> None:
    fleet = Fleet()
    first = fleet.choose(order(1, "xyz"), NAMES)[0]
    fleet.end(1)
    second = fleet.choose(order(2, "xyz"), NAMES)[0]
    assert second != first
    assert not fleet._replicas[first].promised


def test_too_much_work_outweighs_what_is_cached() -> None:
    fleet = Fleet()
    has(fleet, "a", "xyz")
    saved = 2 * 3 * SIZE
    for number in range(1, saved // TOKENS_PER_REQUEST + 2):  # answered by `a`
        fleet.place(order(number), "a")
        fleet.begin(number)
    assert fleet.choose(order(100, "xyz"), ["a", "b"])[0] == "b"
    fleet.end(1)
    fleet.end(100)
    assert fleet.choose(order(101, "xyz"), ["a", "b"])[0] == "a"


@pytest.mark.parametrize("policy", POLICIES)
def test_who_has_failed_comes_last(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    fleet = Fleet(policy)
    has(fleet, "a", "xyz")
    again = replace(order(1, "xyz"), failed_on=frozenset("a"))
    assert fleet.choose(again, NAMES)[-1] == "a"
    fleet.failed("b")
    assert fleet.choose(again, NAMES) == ["c", "b", "a"]
    assert fleet.choose(order(2, "uvw"), NAMES)[-1] == "b"
    fleet.place(order(3, num_tokens=10_000), "a")
    assert fleet.choose(order(4, num_tokens=10), ["a", "b"]) == ["a", "b"]
    fleet.end(4)
    now = FAILING_SECONDS
    assert fleet.choose(order(5, num_tokens=10), ["a", "b"]) == ["b", "a"]


def test_an_order_that_is_over_counts_no_more() -> None:
    """A router that waits for room asks again, and may do so when the client has left."""
    fleet = Fleet()
    fleet.choose(order(1, "xyz"), NAMES)
    fleet.end(1)
    fleet.choose(order(1, "xyz"), NAMES)
    fleet.place(order(1, "xyz"), "a")
    assert not fleet._placements
    assert not any(each.promised for each in fleet._replicas.values())
    for number in range(2, ENDED_KEPT + 10):
        fleet.end(number)
    assert len(fleet._ended) == ENDED_KEPT


def test_answers_count_more_where_steps_read_more() -> None:
    fleet = Fleet()
    for number, name, size in ((1, "a", 1600), (2, "b", 160)):
        fleet.place(order(number, num_tokens=size), name)
        fleet.begin(number)
    assert fleet.choose(order(3, num_tokens=10), ["a", "b"])[0] == "b"
    assert fleet._replicas["a"].num_answering_tokens == TOKENS_PER_REQUEST + 100
    fleet.end(1)
    assert fleet._replicas["a"].num_answering_tokens == 0


def test_prompts_that_wait_count_until_their_answers_begin() -> None:
    fleet = Fleet()
    fleet.place(order(1, num_tokens=1000), "a")
    assert fleet.choose(order(2, num_tokens=10), ["a", "b"])[0] == "b"
    fleet.begin(1)
    fleet.begin(1)  # again, as each reply does
    assert fleet._replicas["a"].num_waiting_tokens == 0
    fleet.end(2)
    for number in (3, 4):
        fleet.place(order(number), "b")
        fleet.begin(number)
    assert fleet.choose(order(5, num_tokens=10), ["a", "b"])[0] == "a"


def test_equal_replicas_take_turns() -> None:
    fleet = Fleet()
    chosen = []
    for number in range(6):
        chosen.append(fleet.choose(order(number, num_tokens=5), NAMES)[0])
        fleet.end(number)
    assert chosen == [*NAMES, *NAMES]


def test_round_robin_looks_at_nothing() -> None:
    fleet = Fleet(ROUND_ROBIN)
    has(fleet, "c", "xyz")
    assert [fleet.choose(order(n, "xyz"), NAMES)[0] for n in range(6)] == [*NAMES, *NAMES]


def test_a_session_stays_until_its_replica_goes() -> None:
    fleet, sessions = Fleet(), [f"session {i}" for i in range(30)]
    for number, session in enumerate(sessions * 2):
        home = home_of(session, NAMES)
        assert fleet.choose(order(number, num_tokens=7, session=session), NAMES)[0] == home
        fleet.end(number)
    assert {home_of(session, NAMES) for session in sessions} == set(NAMES)
    moved = [s for s in sessions if home_of(s, NAMES) != home_of(s, ["a", "b"])]
    assert moved == [s for s in sessions if home_of(s, NAMES) == "c"]


def test_a_prefix_outweighs_a_session_and_so_does_much_work() -> None:
    fleet = Fleet()
    away = next(name for name in NAMES if name != home_of("s", NAMES))
    has(fleet, away, "x")
    assert fleet.choose(order(1, "x", session="s"), NAMES)[0] == away
    fleet.end(1)
    fleet.place(order(2, num_tokens=TOKENS_PER_SESSION + 1), home_of("s", NAMES))
    assert fleet.choose(order(3, "y", session="s"), NAMES)[0] != home_of("s", NAMES)


def test_an_order_counts_where_it_went() -> None:
    fleet = Fleet()
    tried = order(1, num_tokens=500)
    best = fleet.choose(tried, NAMES)[0]
    fleet.choose(tried, NAMES)  # again: it counts once
    other = next(name for name in NAMES if name != best)
    fleet.place(tried, other)
    waiting = {name: fleet._replicas[name].num_waiting_tokens for name in NAMES}
    assert waiting == {name: 500 * (name == other) for name in NAMES}
    fleet.end(1)
    fleet.end(1)
    assert not any(each.num_waiting_tokens for each in fleet._replicas.values())


def test_a_replica_that_is_gone_is_nobody() -> None:
    fleet = Fleet()
    has(fleet, "a", "xyz")
    fleet.place(order(1, "xyz"), "a")
    fleet.place(order(2, "v"), "b")
    fleet.forget("a")
    fleet.begin(1)
    fleet.end(1)
    assert "a" not in fleet.known
    fleet.keep_only(["c"])
    fleet.end(2)
    assert set(fleet.known) <= {"c"}
    assert fleet.choose(order(3, "xyz"), []) == []


def test_changes_apply_to_what_is_known_and_nothing_else() -> None:
    fleet = Fleet()
    fleet.learn("a", BlockChanges(0, 5, [b"x", b"y"], ()))
    fleet.learn("a", BlockChanges(7, 9, [b"v"], ()))  # 6 and 7 were never told
    assert fleet._replicas["a"].cached == {b"x", b"y"}
    fleet.learn("a", BlockChanges(3, 8, [b"z"], [b"x"]))
    assert fleet._replicas["a"].cached == {b"y", b"z"}
    fleet.learn("a", BlockChanges(2, 6, [b"x"], [b"z"]))  # older than what is known
    fleet.learn("a", BlockChanges(0, 4, [b"x"], ()))
    assert fleet._replicas["a"].cached == {b"y", b"z"}
    fleet.learn("a", BlockChanges(0, 20, [b"q"], ()))
    assert (fleet._replicas["a"].cached, fleet.known["a"]) == ({b"q"}, 20)


def test_policies_are_named() -> None:
    with pytest.raises(ConfigError, match=r"policy must be one of .*, got 'best'"):
        Fleet("best")


def test_a_fleet_is_found_by_its_name() -> None:
    fleet = shared_fleet("app", ROUND_ROBIN)
    assert shared_fleet("app", ROUND_ROBIN) is fleet
    assert shared_fleet("other", ROUND_ROBIN) is not fleet
    assert shared_fleet("app", "prefix").policy == "prefix"


def test_an_order_travels_without_what_chooses_the_replica() -> None:
    sent = order(3, "xyz", session="s", given={0: [4]}, priority=2)
    arrived = pickle.loads(pickle.dumps(sent))
    assert (arrived.number, arrived.given, arrived.priority) == (3, {0: [4]}, 2)
    assert arrived.blocks is arrived.session is None
    assert sent.session == "s"


# -- what a replica tells -------------------------------------------------------------------------


def stored(name: str, **fields: Any) -> BlockStored:
    return BlockStored(
        block_hash=name.encode(),
        parent_hash=b"",
        token_ids=(),
        num_tokens_before=0,
        block_id=0,
        **fields,
    )


def removed(name: str, **fields: Any) -> BlockRemoved:
    return BlockRemoved(block_hash=name.encode(), block_id=0, **fields)


def told(changes: BlockChanges) -> tuple[int, int, Sequence[bytes], Sequence[bytes]]:
    return (changes.first, changes.last, sorted(changes.stored), sorted(changes.removed))


def test_a_log_tells_what_changed_since() -> None:
    log = BlockLog()
    log.note([stored("x"), stored("y"), stored("z")])
    assert told(log.since(0)) == (0, 3, [b"x", b"y", b"z"], [])
    log.note([removed("x"), stored("v"), removed("v")])
    assert told(log.since(3)) == (3, 6, [], [b"v", b"x"])
    assert told(log.since(6)) == (6, 6, [], [])
    assert told(log.since(7)) == (0, 6, [b"y", b"z"], [])  # of another life


def test_a_log_leaves_out_what_nobody_finds() -> None:
    log = BlockLog()
    log.note([stored("x", group=1), stored("y", extra_keys=("looked at 1",)), removed("y")])
    log.note([removed("x", group=1), stored("z", extra_keys=("salt",))])
    assert told(log.since(0)) == (0, 1, [b"z"], [])


def test_who_is_too_far_behind_is_told_everything() -> None:
    log = BlockLog(most_kept=2)
    log.note([stored("x"), stored("y"), stored("z")])
    assert told(log.since(1)) == (1, 3, [b"y", b"z"], [])
    log.note([stored("v")])
    assert told(log.since(1)) == (0, 4, [b"v", b"x", b"y", b"z"], [])


def test_who_knew_blocks_that_were_cleared_is_told_everything() -> None:
    log = BlockLog(most_kept=4)
    log.note([stored("x"), CacheCleared(), stored("y")])
    for number in (1, 2):
        assert told(log.since(number))[0::2] == (0, [b"y"])


def test_a_fleet_that_hears_in_any_order_knows_what_the_log_has() -> None:
    draw, names = random.Random(3), [chr(97 + i) for i in range(12)]
    log, fleet, waiting = BlockLog(most_kept=40), Fleet(), list[BlockChanges]()
    for _ in range(600):
        name = draw.choice(names)
        is_there = name.encode() in log._stored
        log.note(
            [CacheCleared()] if draw.random() < 0.01 else [(removed if is_there else stored)(name)]
        )
        if draw.random() < 0.4:
            waiting.append(log.since(fleet.known.get("a", 0)))
        if waiting and draw.random() < 0.4:
            fleet.learn("a", waiting.pop(draw.randrange(len(waiting))))
    fleet.learn("a", log.since(fleet.known["a"]))
    assert fleet._replicas["a"].cached == set(log._stored)
