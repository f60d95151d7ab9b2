"""Fleets on paper: beside closed forms, an `LLM` that serves the same, and by their seeds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import bench_fleet
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from paged_kv import LLM, ConfigError, SamplingParams
from paged_kv.benchmarks.fleet import checks
from paged_kv.benchmarks.fleet.figures import estimate, figures_of, hit_rate
from paged_kv.benchmarks.fleet.machines import (
    ASSUMED,
    H100,
    L4,
    Machine,
    StepTime,
    Work,
    machine_of,
)
from paged_kv.benchmarks.fleet.replica import Job, Replica
from paged_kv.benchmarks.fleet.routing import (
    AFFINITY_TOKENS,
    ANSWER_TOKENS,
    CONTEXT_PER_TOKEN,
    MOST_LOAD,
    POLICIES,
    BlockAware,
    HashRing,
    RoundRobin,
    TwoChoices,
    conversation_key,
)
from paged_kv.benchmarks.fleet.simulation import Fleet, FleetSettings
from paged_kv.benchmarks.fleet.traffic import Traffic, continued, following
from paged_kv.benchmarks.serving import Limits
from paged_kv.benchmarks.workloads import Lengths
from paged_kv.blocks.events import BlockRemoved, BlockStored, CacheEvent
from paged_kv.blocks.token_chain import TokenChain
from paged_kv.engine.live_request import SequenceUpdate
from paged_kv.integrations.ray_serve import fleet as ray_serve
from paged_kv.integrations.ray_serve.order import BlockChanges, Order, PromptBlocks
from paged_kv.scheduler.request import Request

RESULTS = Path(__file__).parents[2] / "bench" / "results"
VOCAB = 64
BUSY = Traffic(rate=1.5, seconds=10.0, num_prefixes=8, mean_turns=2.0, mean_pause=1.0)


def exactly(count: int) -> Lengths:
    return Lengths(count, 0.0, count)


def small(kv_format: str = "native", **changes: object) -> Machine:
    machine = replace(machine_of(L4, kv_format), max_num_seqs=32, step_time=StepTime(0.05, 1e-4))
    return replace(machine, **changes)  # type: ignore[arg-type]


def fleet_of(machine: Machine, traffic: Traffic, **options: object) -> Fleet:
    settings = {"num_replicas": 2, "policy": "round robin", "warm_up": 0.0, **options}
    return Fleet(FleetSettings(machine=machine, **settings), traffic, 0)  # type: ignore[arg-type]


# -- beside closed forms --------------------------------------------------------------------------


def test_one_at_a_time_waits_as_lindley_says() -> None:
    traffic = Traffic(
        rate=0.8,
        seconds=250.0,
        num_prefixes=1,
        prefix=exactly(16),
        question=exactly(16),
        answer=exactly(1),
        mean_turns=1.0,
    )
    machine = small(max_num_seqs=1, step_time=StepTime(1.0))
    outcome = fleet_of(machine, traffic, num_replicas=1, patience=1e9).run()
    waited, arrived, last = [], 0.0, -1.0
    for job in outcome.jobs:
        last = max(last + 1.0 - (job.arrival - arrived), 0.0)
        arrived = job.arrival
        waited.append(last)
    found = [job.first - job.arrival - 1.0 for job in outcome.jobs if job.first is not None]
    assert len(found) > 150
    assert max(found) > 2
    assert np.allclose(found, waited)


def test_the_mean_wait_comes_near_to_that_of_an_endless_queue() -> None:
    waited, expected = checks.waits(0.5, 1500)
    assert expected == 0.5
    assert waited == pytest.approx(expected, rel=0.15)


def test_a_cache_without_end_misses_each_prefix_once() -> None:
    traffic = Traffic(
        rate=0.2,  # nobody meets another
        seconds=300.0,
        num_prefixes=6,
        prefix=exactly(160),
        question=exactly(16),
        answer=exactly(2),
        mean_turns=1.0,
    )
    jobs = fleet_of(small(), traffic, num_replicas=1).run().jobs
    num_distinct = len({job.conversation.prefix.tobytes() for job in jobs})
    assert 1 < num_distinct < len(jobs)
    shared = 160 * (len(jobs) - num_distinct)
    assert hit_rate(jobs) == shared / (176 * len(jobs))


@pytest.mark.parametrize("mean_life", [None, 6.0])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_token_is_given_once_and_is_the_one_that_follows(
    policy: str, mean_life: float | None
) -> None:
    fleet = fleet_of(
        small("int2", num_blocks=600), BUSY, num_replicas=3, policy=policy, mean_life=mean_life,
        down_seconds=3.0, patience=1e9,
    )  # fmt: skip
    outcome = fleet.run()
    assert all(job.is_over for job in outcome.jobs)
    for job in outcome.jobs:
        answer = continued(int(job.prompt[-1]), job.num_outputs)
        assert np.array_equal(job.known_tokens, np.concatenate([job.prompt, answer]))
    given = sum(replica.counts.num_sampled for replica in fleet.replicas)
    wanted = sum(job.num_outputs for job in outcome.jobs)
    if mean_life is None:
        assert given == wanted
        assert outcome.num_deaths == 0
    else:
        assert given >= wanted  # a step that a death cut off gave nothing to anybody
        assert outcome.num_deaths > 0
        assert any(job.num_placed > 1 for job in outcome.jobs)
    for replica in fleet.replicas:
        replica.scheduler.check_integrity()


def test_who_finds_nobody_alive_is_served_when_somebody_is() -> None:
    fleet = fleet_of(small(), BUSY, num_replicas=1, mean_life=2.0, down_seconds=5.0, patience=1e9)
    outcome = fleet.run()
    assert all(job.is_over for job in outcome.jobs)
    waits = [job.first - job.arrival for job in outcome.jobs if job.first is not None]
    assert max(waits) > 4.0


# -- beside what was measured, and beside an engine -----------------------------------------------


@pytest.mark.parametrize("kv_format", ["int8", "int2"])
def test_a_measured_run_had_the_same_preemptions(kv_format: str) -> None:
    report = json.loads((RESULTS / "budget.json").read_text())
    measured = {(row["case"], row["metric"]): row["value"] for row in report["rows"]}
    workload = checks.measured_workload()
    machine = checks.measured_machine(kv_format, workload)
    case = checks.CASE.format(kv_format)
    assert machine.kv_bytes / 2**20 == pytest.approx(measured[case, "peak KV"], rel=0.01)
    assert checks.replay(machine, workload).num_preemptions == measured[case, "preemptions"]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1024,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def staged(seed: int) -> list[tuple[int, list[int], int]]:
    """Steps before which requests come, prompts that begin alike, and tokens wanted."""
    rng = np.random.default_rng(seed)
    prefixes = [rng.integers(VOCAB, size=size).tolist() for size in (150, 280, 90)]
    found = []
    for number in range(24):
        own = rng.integers(VOCAB, size=int(rng.integers(1, 120))).tolist()
        prompt = [*prefixes[int(rng.integers(3))], *own]
        found.append((int(rng.integers(0, 3)) * number, prompt, int(rng.integers(1, 250))))
    return sorted(found)


@pytest.mark.parametrize(("kv_format", "num_blocks"), [("native", 70), ("int8", 30), ("int2", 60)])
def test_an_engine_takes_the_same_steps_hits_and_preemptions(
    model: LlamaForCausalLM, kv_format: str, num_blocks: int
) -> None:
    requests = staged(1)
    with LLM(model, kv_format=kv_format, num_blocks=num_blocks, max_num_seqs=12, token_budget=200,
             calibration=None) as llm:  # fmt: skip
        engine = llm.engine
        manager = engine.manager
        lives, waiting = [], list(enumerate(requests))
        finished: list[str] = []
        while waiting or engine.has_unfinished:
            while waiting and (waiting[0][1][0] <= engine.num_steps or not engine.has_unfinished):
                number, (_, prompt, wanted) = waiting.pop(0)
                params = SamplingParams(temperature=0.0, max_tokens=wanted, ignore_eos=True)
                lives += engine.add_request(f"{number}.0", prompt, params)
            finished += [
                update.request_id
                for update in engine.step()
                if isinstance(update, SequenceUpdate) and update.finish_reason
            ]
        statistics, num_steps = engine.scheduler.statistics(), engine.num_steps
        hits = {live.request_id: live.request.num_hit_tokens for live in lives}
    machine = Machine(
        name="the same",
        geometry=manager.geometry,
        num_blocks=manager.num_blocks,
        block_bytes=1,
        step_time=StepTime(1.0),
        token_budget=200,
        max_num_seqs=12,
        max_model_len=manager.max_model_len,
    )
    replica = Replica(0, machine)
    over: list[Job] = []
    left = list(enumerate(requests))
    while left or replica.load:
        num_done = replica.counts.num_steps
        while left and (left[0][1][0] <= num_done or not replica.load):
            number, (_, prompt, wanted) = left.pop(0)
            replica.add(checks.job_of(number, prompt, wanted))
        replica.begin_step()
        over += replica.end_step(0.0)
    assert statistics.num_preemptions > 0
    assert statistics.num_hit_tokens > 0
    assert replica.scheduler.statistics() == statistics
    assert replica.counts.num_steps == num_steps
    assert [job.name for job in over] == finished
    assert {job.name: job.num_hit_tokens for job in over} == hits


# -- machines and traffic -------------------------------------------------------------------------


def test_machines_are_what_their_data_sheets_say() -> None:
    native, int2 = (machine_of(L4, name) for name in ("native", "int2"))
    budget = 24e9 * 0.9 - 8.03e9 * 2 - 1e9
    assert budget - native.block_bytes < native.kv_bytes <= budget
    assert native.block_bytes == 16 * 2 * 32 * 8 * 128 * 2
    assert native.step_time.seconds(Work(0, 0, 0)) == pytest.approx(2e-3 + 16.06e9 / 240e9)
    assert native.step_time.token == pytest.approx(2 * 8.03e9 / 60.5e12)
    of_h100 = machine_of(H100, "native").step_time
    assert of_h100.seconds(Work(1, 1000, 10**9)) < native.step_time.seconds(Work(1, 1000, 10**9))
    alike = int2.reading_like(native)
    tokens = native.geometry.block_size * int2.geometry.block_size
    times = [
        m.step_time.byte * m.block_bytes * tokens / m.geometry.block_size for m in (native, alike)
    ]
    assert times[0] == pytest.approx(times[1])
    assert alike.num_blocks == int2.num_blocks


def test_a_step_takes_what_it_computes_and_reads() -> None:
    replica = Replica(0, small(token_budget=48))
    replica.add(checks.job_of(0, range(64), 2))
    replica.begin_step()
    assert replica.work == Work(48, 48 * 49 // 2, 0)
    replica.end_step(1.0)
    replica.begin_step()
    block_bytes = replica.machine.block_bytes
    assert replica.work == Work(16, 48 * 16 + 16 * 17 // 2, 3 * block_bytes)
    replica.end_step(2.0)
    seconds = replica.begin_step()
    assert replica.work == Work(1, 65, 4 * block_bytes)
    assert seconds == replica.machine.step_time.seconds(replica.work)
    (job,) = replica.end_step(3.0)
    assert (job.first, job.last) == (2.0, 3.0)


def test_hits_are_those_of_the_first_start() -> None:
    one, other = replicas(2)
    moved, alike = (checks.job_of(number, range(64), 4) for number in range(2))
    other.add(alike)
    while other.begin_step() is not None:
        other.end_step(0.0)
    one.add(moved)
    one.begin_step()
    one.end_step(0.0)
    assert one.die() == [moved]
    other.add(moved)
    while other.begin_step() is not None:
        other.end_step(0.0)
    assert moved.request is not None
    assert moved.request.num_hit_tokens > 0
    assert moved.num_hit_tokens == 0


def test_conversations_hang_on_their_seed_alone() -> None:
    traffic = Traffic(rate=20.0, seconds=60.0, num_prefixes=50, exponent=1.2)
    one, again, other = (list(traffic.conversations(seed)) for seed in (0, 0, 1))
    assert [c.arrival for c in one] == [c.arrival for c in again]
    assert all(np.array_equal(a.prefix, b.prefix) for a, b in zip(one, again, strict=True))
    assert [c.arrival for c in one] != [c.arrival for c in other]
    assert len(one) == pytest.approx(1200, rel=0.1)
    longer = list(replace(traffic, seconds=90.0).conversations(0))
    assert [c.answers for c in longer[: len(one)]] == [c.answers for c in one]
    counts = [count for _, count in Counter(c.prefix.tobytes() for c in one).most_common()]
    assert counts[0] / counts[3] == pytest.approx(4**1.2, rel=0.4)
    gaps = np.diff([c.arrival for c in one])
    bursts = np.diff([c.arrival for c in replace(traffic, burstiness=9.0).conversations(0)])
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(1.0, rel=0.15)
    assert np.std(bursts) / np.mean(bursts) == pytest.approx(3.0, rel=0.3)


def test_tokens_that_follow_are_the_same_one_by_one_and_together() -> None:
    tokens = continued(12345, 50)
    assert np.array_equal(following(tokens[:-1]), tokens[1:])
    assert len(np.unique(tokens)) == 50


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_replicas": 0}, "num_replicas must be at least 1, got 0"),
        ({"policy": "best"}, "policy must be one of round robin, .*, got 'best'"),
        ({"warm_up": -1.0}, r"warm_up must be at least 0, got -1\.0"),
    ],
)
def test_settings_that_cannot_be_are_named(options: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        fleet_of(small(), BUSY, **options)


def test_traffic_that_cannot_be_is_named() -> None:
    with pytest.raises(ConfigError, match="rate must be above 0, got 0"):
        Traffic(rate=0)
    with pytest.raises(ConfigError, match=r"at least 1, got 0\.5 and 8"):
        Traffic(rate=1, mean_turns=0.5)


# -- routing --------------------------------------------------------------------------------------


def replicas(count: int) -> list[Replica]:
    return [Replica(number, small(), record_events=True) for number in range(count)]


def jobs(count: int, size: int = 40) -> list[Job]:
    rng = np.random.default_rng(3)
    return [checks.job_of(n, rng.integers(1000, size=size), 4) for n in range(count)]


def test_round_robin_takes_turns() -> None:
    some, policy = replicas(3), RoundRobin(0)
    assert [policy.choose(job, some).number for job in jobs(5)] == [0, 1, 2, 0, 1]


def test_two_choices_never_take_the_most_loaded_of_three() -> None:
    some, policy = replicas(2), TwoChoices(0)
    some[0].add(jobs(1)[0])
    chosen = [policy.choose(job, some).number for job in jobs(60)]
    assert 0.1 < chosen.count(0) / 60 < 0.4  # only where both are the same one


def test_on_a_ring_only_those_move_whose_replica_went() -> None:
    some, policy = replicas(5), HashRing(conversation_key)
    before = [policy.choose(job, some).number for job in jobs(80)]
    without = [each for each in some if each.number != 2]
    after = [policy.choose(job, without).number for job in jobs(80)]
    assert set(before) == set(range(5))
    for was, now in zip(before, after, strict=True):
        assert now == was if was != 2 else now != 2


def test_a_ring_passes_a_replica_that_has_too_much() -> None:
    some, policy = replicas(4), HashRing(lambda job: b"all alike")
    loads = Counter[int]()
    for job in jobs(40):
        replica = policy.choose(job, some)
        replica.add(job)
        loads[replica.number] += 1
    assert max(loads.values()) <= 13  # 1.25 times the mean, rounded up
    assert loads[policy.choose(jobs(1)[0], some).number] < 13


def test_the_least_work_is_where_blocks_are_unless_others_wait() -> None:
    some, policy = replicas(2), BlockAware(0)
    first, again, third, *others = jobs(8, size=200)
    again.prompt = third.prompt = first.prompt
    home = policy.choose(first, some)
    home.add(first)
    assert policy.choose(again, some) is home  # it will have them
    policy.ended(home, again)
    while home.begin_step() is not None:
        for job in home.end_step(0.0):
            policy.ended(home, job)
        policy.follow(home, home.take_events())
    assert not policy._promised
    assert policy.choose(again, some) is home  # it has them
    begun = others[0]
    begun.first = 0.0
    policy._placed[home.number] = {
        begun: policy._placed[home.number][again]._replace(num_tokens=1000)
    }
    assert policy.choose(third, some) is home
    assert ANSWER_TOKENS + 200 // CONTEXT_PER_TOKEN < 2 * 192
    begun.first = None  # a thousand tokens are to be computed before
    policy.ended(home, third)
    assert policy.choose(third, some) is not home


def test_events_say_what_every_cache_has() -> None:
    short = Lengths(300, 0.5, 600)
    traffic = replace(BUSY, rate=4.0, num_prefixes=30, prefix=short, question=exactly(40))
    fleet = fleet_of(
        small(num_blocks=150), traffic, num_replicas=3, policy="KV-aware", mean_life=12.0,
        down_seconds=1.0, patience=1e9,
    )  # fmt: skip
    removed: list[CacheEvent] = []
    follow = fleet._policy.follow

    def noted(replica: Replica, events: Sequence[CacheEvent]) -> None:
        removed.extend(event for event in events if isinstance(event, BlockRemoved))
        follow(replica, events)

    fleet._policy.follow = noted  # type: ignore[method-assign]
    outcome = fleet.run()
    assert len(removed) > 100
    policy = fleet._policy
    assert isinstance(policy, BlockAware)
    assert outcome.num_deaths > 0
    for replica in fleet.replicas:
        if replica.is_alive:
            has = {key for key, who in policy._who.items() if who >> replica.number & 1}
            cache = replica.manager.prefix_cache
            assert cache is not None
            assert has == set(cache._block_of)
            assert len(has) < replica.manager.num_blocks
    assert not policy._promised
    assert not any(policy._placed.values())


def test_what_one_replica_evicts_another_still_has() -> None:
    one, other = replicas(2)
    policy = BlockAware(0)
    stored = BlockStored(
        block_hash=b"x", parent_hash=b"", token_ids=(1, 2), num_tokens_before=0, block_id=0
    )
    for replica in (one, other):
        policy.follow(replica, [stored])
    assert policy._who == {b"x": 0b11}
    policy.follow(one, [BlockRemoved(block_hash=b"x", block_id=0)])
    assert policy._who == {b"x": 0b10}
    policy.follow(other, [BlockRemoved(block_hash=b"x", block_id=0)])
    assert not policy._who


class BesideRayServe(BlockAware):
    """Asks what Ray Serve asks, too, and holds both to the same answers."""

    def __init__(self) -> None:
        super().__init__(0)
        self.theirs = ray_serve.Fleet()
        self.placed: dict[int, Job] = {}  # by the number of its latest attempt
        self.numbers = count()

    def choose(self, job: Job, alive: Sequence[Replica]) -> Replica:
        for number, other in self.placed.items():
            if other.first is not None:
                self.theirs.begin(number)
        chain = fresh_chain(job, alive[0])
        ends = [alive[0].machine.geometry.link_end(n + 1) for n in range(len(chain.hashes))]
        number = next(self.numbers)
        order = Order(
            number=number, prompt_token_ids=[], params=SamplingParams(), known={},
            blocks=PromptBlocks(len(chain.token_ids), chain.hashes, ends),
        )  # fmt: skip
        self.placed[number] = job
        mine = super().choose(job, alive)
        assert self.theirs.choose(order, [str(each.number) for each in alive])[0] == str(
            mine.number
        )
        return mine

    def ended(self, replica: Replica, job: Job) -> None:
        super().ended(replica, job)
        (number,) = (number for number, other in self.placed.items() if other is job)
        self.theirs.end(number)
        del self.placed[number]

    def follow(self, replica: Replica, events: Sequence[CacheEvent]) -> None:
        super().follow(replica, events)
        name = str(replica.number)
        for event in events:
            come = [event.block_hash] if isinstance(event, BlockStored) else []
            gone = [event.block_hash] if isinstance(event, BlockRemoved) else []
            known = self.theirs.known.get(name, 0)
            self.theirs.learn(name, BlockChanges(known, known + 1, come, gone))

    def forget(self, replica: Replica) -> None:
        super().forget(replica)
        self.theirs.forget(str(replica.number))


def fresh_chain(job: Job, replica: Replica) -> TokenChain:
    return replica.manager.chain_tokens(job.known_tokens)


@pytest.mark.parametrize("mean_life", [None, 4.0])
def test_ray_serve_would_choose_the_same(mean_life: float | None) -> None:
    fleet = fleet_of(
        small(num_blocks=700), replace(BUSY, rate=4.0), num_replicas=3, policy="KV-aware",
        mean_life=mean_life,
        down_seconds=1.0, patience=1e9,
    )  # fmt: skip
    fleet._policy = BesideRayServe()
    assert len(fleet.run().jobs) > 20


# -- figures and the benchmark --------------------------------------------------------------------


def test_figures_count_who_kept_the_limits() -> None:
    machine = small()
    outcome = fleet_of(machine, BUSY, warm_up=2.0).run()
    some = outcome.counted
    assert 0 < len(some) < len(outcome.jobs)
    found = figures_of(outcome, Limits())
    assert found[bench_fleet.BY_KEPT] == 100.0
    assert found["goodput"] == len(some) / 8.0
    waits = sorted(job.first - job.arrival for job in some if job.first is not None)
    half = figures_of(outcome, Limits(first_token=waits[len(waits) // 2]))
    assert half[bench_fleet.BY_KEPT] == 100 * (len(waits) // 2 + 1) / len(waits)
    assert figures_of(outcome, Limits(between=0.01))[bench_fleet.BY_KEPT] < 100.0
    assert 0 < found["memory in use"] <= 100


def test_an_estimate_has_the_interval_of_student() -> None:
    assert estimate([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / 3**0.5))
    assert estimate([5.0]) == (5.0, 0.0)


@pytest.mark.parametrize("enough", [1, 2, 5, 7, 8])
def test_the_search_finds_the_fewest(enough: int) -> None:
    tried = []

    def figures(replicas: int) -> dict[str, float]:
        tried.append(replicas)
        return {bench_fleet.BY_KEPT: 96.0 if replicas >= enough else 94.0, "steps": 10.0}

    task = SimpleNamespace(replicas=8, figures=figures)
    assert bench_fleet.fewest(task) == ({"machines": enough}, sum(tried), 10.0 * len(tried))


def test_the_same_seeds_are_the_same_report() -> None:
    sizes = bench_fleet.QUICK._replace(
        seconds=3.0, loads=(1.0,), searches=(bench_fleet.Search("L4", 1.0, 1.0, 2, 1),)
    )
    todo = [task for task in bench_fleet.tasks(sizes) if task.kv_format in ("native", "int2")]
    assert {task.case.partition(",")[0] for task in todo} == {
        *("policies", "deaths", "machines", "load 1"),
    }
    found = [[bench_fleet.perform(task) for task in order] for order in (todo, todo[::-1])]
    rows = [[*map(bench_fleet.rows_of, (some,)), bench_fleet.machine_rows(some)] for some in found]
    assert rows[0] == rows[1]
    assert sum(done.num_traces for done in found[0]) >= 2 * len(POLICIES) * 2 * 2


def test_a_dead_replica_is_not_asked_for_what_it_was() -> None:
    replica = Replica(0, small())
    (job,) = jobs(1)
    replica.add(job)
    replica.begin_step()
    assert isinstance(job.request, Request)
    assert replica.die() == [job]
    assert (replica.load, replica.is_computing, replica.is_alive) == (0, False, False)
    replica.revive()
    replica.add(job)
    replica.begin_step()
    replica.end_step(1.0)
    assert job.first == 1.0
    assert job.num_placed == 2


def test_the_page_says_what_is_assumed() -> None:
    told = " ".join((RESULTS.parents[1] / "docs" / "fleet.md").read_text().split())
    traffic, sizes = Traffic(rate=1), bench_fleet.Sizes()
    assumed, settings = ASSUMED, FleetSettings(machine=small(), num_replicas=1, policy="random")
    l4, h100 = (bench_fleet.machine(name, "native") for name in ("L4", "H100"))
    limits = bench_fleet.LIMITS
    by_card = {search.card: search for search in sizes.searches}
    for said in (
        f"L4 {L4.memory_bytes / 1e9:.0f} GB, {L4.bytes_per_second / 1e9:.0f} GB/s, "
        f"{L4.operations_per_second / 1e12:.0f} TFLOPS",
        f"H100 SXM {H100.memory_bytes / 1e9:.0f} GB, {H100.bytes_per_second / 1e12:.2f} TB/s, "
        f"{H100.operations_per_second / 1e12:.1f} TFLOPS",
        f"{assumed.reached_bandwidth} of the bandwidth and {assumed.reached_operations} of the",
        f"{assumed.usable_memory} of the memory is usable, {assumed.work_bytes / 1e9:.0f} GB of it",
        f"the host takes {1000 * assumed.host_seconds:.0f} ms a step",
        f"at most {l4.token_budget} tokens on an L4, {h100.token_budget} on an H100, for at most "
        f"{l4.max_num_seqs} sequences",
        f"one of {traffic.num_prefixes} prefixes",
        f"of {traffic.prefix.median} tokens in the median (sigma {traffic.prefix.sigma}, at most "
        f"{traffic.prefix.most})",
        f"questions of {traffic.question.median} ({traffic.question.sigma}, "
        f"{traffic.question.most}) and answers of {traffic.answer.median} "
        f"({traffic.answer.sigma}, {traffic.answer.most}), {traffic.mean_turns:.0f} turns on "
        f"average and at most {traffic.most_turns}, with {traffic.mean_pause:.0f} seconds",
        f"within {limits['L4'].first_token:.0f} s and the others every "
        f"{1000 * (limits['L4'].between or 0):.0f} ms on average (H100: "
        f"{limits['H100'].first_token:.0f} s and {1000 * (limits['H100'].between or 0):.0f} ms)",
        f"the first {AFFINITY_TOKENS} tokens, with bounded loads of {MOST_LOAD} times",
        f"those that others wait for there, and {ANSWER_TOKENS} and a sixteenth of its prompt "
        "for each answer",
        f"{sizes.replicas} L4 cards, {sizes.rate * sizes.replicas:.0f} conversations a second",
        f"{sizes.load_replicas} L4 cards, KV-aware",
        f"{bench_fleet.GOAL:.0f} % of requests keep the limits, found by bisection for each seed: "
        f"{by_card['L4'].rate:.0f} conversations a second on L4 cards, "
        f"{by_card['H100'].rate:.0f} on H100",
    ):
        assert said in told, said
    assert (traffic.exponent, traffic.burstiness, settings.patience) == (1.0, 1.0, 60.0)
    assert (sizes.mean_life, bench_fleet.DOWN_SECONDS) == (120.0, 15.0)
