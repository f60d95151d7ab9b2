"""Steps that begin before the tokens of the last one are read, and what happens to them there."""

from __future__ import annotations

import pytest

from paged_kv.blocks.block_manager import BlockManager
from paged_kv.blocks.geometry import BlockGeometry
from paged_kv.engine.block_tier import NoBlockTier
from paged_kv.engine.engine import Engine
from paged_kv.engine.live_request import LiveRequest, SequenceUpdate
from paged_kv.engine.sampling_params import SamplingParams
from paged_kv.scheduler.scheduler import Scheduler
from tests.support.simulated_model import SimulatedRunner, expected_tokens

GEOMETRY = BlockGeometry(block_size=4, open_block_size=4, num_head_tokens=0, min_tail_tokens=0)


def engine_of(*, max_num_seqs: int = 4, num_blocks: int = 100) -> Engine:
    manager = BlockManager(
        GEOMETRY,
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_model_len=64,
        prefix_caching=True,
    )
    scheduler = Scheduler(manager, token_budget=64, watermark=0.0, steps_ahead=0)
    return Engine(SimulatedRunner(scheduler, runs_ahead=True), scheduler, [])  # type: ignore[arg-type]


def params_of(max_tokens: int, **options: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=3, **options)  # type: ignore[arg-type]


def alone(live: LiveRequest, prompt: list[int]) -> list[int]:
    return expected_tokens(
        prompt,
        live.params,
        max_tokens=live.request.max_tokens,
        sample_index=live.sample_index,
        end_token_ids=live.end_token_ids,
        window=None,
        count=64,
    )


def drain(engine: Engine) -> dict[str, list[int]]:
    """Every token that steps tell of, by request; nothing is held in the end."""
    told: dict[str, list[int]] = {}
    while engine.has_unfinished:
        for update in engine.step():
            assert isinstance(update, SequenceUpdate)
            assert update.token_id is not None
            told.setdefault(update.request_id, []).append(update.token_id)
        engine.scheduler.check_integrity()
    assert engine.manager.num_free_blocks == engine.manager.num_blocks
    assert engine.manager.num_free_seqs == engine.manager.max_num_seqs
    return told


def test_a_leader_that_is_aborted_on_the_way_leaves_its_samples_to_another() -> None:
    """What the step under way draws for them is nothing: another one computes the prompt."""
    engine, prompt = engine_of(), [5, 6, 7, 8, 9]
    (long,) = engine.add_request("long", [1, 2, 3], params_of(12))
    engine.step()
    samples = engine.add_request(["s0", "s1", "s2"], prompt, params_of(4, n=3, temperature=1.0))
    first = engine.step()
    assert engine._flight is not None
    assert len(engine._flight.draws) == 4
    engine.abort("s0")
    told = drain(engine)
    assert told["s1"] == alone(samples[1], prompt)
    assert told["s2"] == alone(samples[2], prompt)
    assert long.token_ids.tolist() == alone(long, [1, 2, 3])
    assert len(first) == 1


def test_a_sequence_that_begins_where_one_has_ended_takes_none_of_its_tokens() -> None:
    """It has the id of a sequence whose last token is still on the device."""
    engine = engine_of(max_num_seqs=2)
    lives = {
        name: (engine.add_request(name, prompt, params_of(count))[0], prompt)
        for name, prompt, count in [
            ("short", [1, 2], 3),
            ("long", [3, 4, 5], 9),
            ("one token", [7], 4),  # a decode step from the first on
            ("later", [7, 8, 9, 1, 2, 3], 3),
        ]
    }
    told = drain(engine)
    for name, (live, prompt) in lives.items():
        assert told[name] == live.token_ids.tolist() == alone(live, prompt)


@pytest.mark.parametrize("when", range(1, 6))
def test_a_request_may_be_paused_and_go_on_while_its_step_is_under_way(when: int) -> None:
    engine = engine_of()
    lives = {
        name: (engine.add_request(name, prompt, params_of(8))[0], prompt)
        for name, prompt in [("a", [1, 2]), ("b", [3, 4, 5])]
    }
    for _ in range(when):
        engine.step()
    engine.pause("a")
    for _ in range(3):
        engine.step()
    assert len(lives["a"][0].token_ids) <= when + 1
    engine.resume("a")
    drain(engine)
    for live, prompt in lives.values():
        assert live.token_ids.tolist() == alone(live, prompt)


def test_a_paused_request_makes_room_with_all_its_tokens() -> None:
    """Another one takes its only sequence while its last token is on the way."""
    engine = engine_of(max_num_seqs=1)
    (first,) = engine.add_request("first", [1, 2], params_of(8))
    engine.step()
    assert engine._flight is not None
    engine.pause("first")
    (second,) = engine.add_request("second", [3, 4, 5], params_of(3))
    while second.is_unfinished:
        engine.step()
    engine.resume("first")
    drain(engine)
    assert engine.scheduler.statistics().num_preemptions == 1
    assert first.token_ids.tolist() == alone(first, [1, 2])


def test_nothing_begins_early_where_a_sequence_might_have_to_make_room() -> None:
    """Its last token would not be known when its tokens are put away."""
    engine = engine_of(num_blocks=14)
    lives = {
        str(number): (engine.add_request(str(number), prompt, params_of(20))[0], prompt)
        for number, prompt in enumerate([[1, 2, 3], [4, 5], [6, 7, 8, 9]])
    }
    ahead = []
    while engine.has_unfinished:
        engine.step()
        ahead.append(engine._flight is not None)
    assert engine.scheduler.statistics().num_preemptions > 0
    assert any(ahead)
    for live, prompt in lives.values():
        assert live.token_ids.tolist() == alone(live, prompt)


def test_what_is_not_finite_ends_one_request_and_the_others_start_again() -> None:
    engine = engine_of()
    lives = {
        name: (engine.add_request(name, prompt, params_of(9))[0], prompt)
        for name, prompt in [("a", [1, 2]), ("b", [3, 4, 5])]
    }
    runner, num_runs = engine.runner, iter(range(100))
    runner.on_run = lambda requests: 0 if next(num_runs) == 4 else None  # type: ignore[attr-defined]
    while engine.has_unfinished:
        engine.step()
    spoilt, other = lives["a"], lives["b"]
    assert spoilt[0].finish_reason == "error"
    assert "not finite" in str(spoilt[0].error)
    assert spoilt[0].token_ids.tolist() == alone(*spoilt)[:4]
    assert other[0].token_ids.tolist() == alone(*other)
    assert engine.manager.num_free_blocks == engine.manager.num_blocks


class Spy(NoBlockTier):
    """Notes what is published and what is said to be right, in their order."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.copied: list[bytes] = []
        self.written: list[bytes] = []
        self.num_ahead = 0
        engine.manager.pool.prefix_cache.take_news()

    def copy(self) -> None:
        assert self.engine.scheduler.step is None, "blocks may be taken for the next step"
        self.copied += [
            n.block_hash for n in self.engine.manager.prefix_cache.take_news().published
        ]

    def write(self) -> None:
        self.num_ahead += self.engine._flight is not None
        self.written, self.copied = self.written + self.copied, []

    def bring_in(self) -> None:
        assert self.engine.scheduler.step is None

    def reset(self) -> None:
        self.copied = []


def test_what_is_published_is_copied_before_the_next_step_takes_blocks() -> None:
    engine = engine_of()
    spy = engine.tier = Spy(engine)
    (live,) = engine.add_request("a", [1, 2, 3, 4, 5], params_of(14))
    drain(engine)
    assert spy.num_ahead > 5
    tokens = [1, 2, 3, 4, 5, *live.token_ids.tolist()]
    chain = engine.manager.chain_tokens(tokens)
    chain.hash_links(GEOMETRY, GEOMETRY.num_links(len(tokens) - 1))
    assert spy.written == chain.hashes
