"""Serving workloads: when tokens came by a clock of its own, and what was held at a budget."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from paged_kv import LLM
from paged_kv.benchmarks.held import BOUND, HELD, PEAK, held_rows
from paged_kv.benchmarks.serving import (
    HELD as HELD_FIGURES,
)
from paged_kv.benchmarks.serving import (
    TIMES,
    Limits,
    Occupancy,
    Served,
    goodput,
    rows_of,
    serve,
    take_turns,
)
from paged_kv.benchmarks.workloads import Lengths, Shape, WorkItem, make_workload
from paged_kv.cache.layer_groups import sequence_bytes

VOCAB = 64
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


class Clock:
    """Each look takes a second; to sleep takes as long as was asked for."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def open_llm(model: LlamaForCausalLM, kv_format: str, **options: object) -> LLM:
    settings = {"max_num_seqs": 64, "prefix_caching": False, **options}
    return LLM(model, kv_format=kv_format, **settings)


def test_requests_come_when_they_arrive(model):
    clock = Clock()
    workload = [WorkItem(0.0, [1, 2, 3], 2), WorkItem(100.0, [4, 5], 3)]
    with open_llm(model, "native") as llm:
        served = serve(llm.engine, workload, clock=clock, sleep=clock.sleep)
        assert not llm.engine.has_unfinished
    assert [len(times) for times in served.times] == [2, 3]
    assert served.times[0][1] < 100 < served.times[1][0]
    assert served.held.most == 1
    assert served.first_token[1] == served.times[1][0] - 100
    assert len(served.gaps) == 3
    assert served.seconds == served.times[1][-1]
    assert 0 < served.held.mean < 1  # nobody runs most of the time
    assert served.crowded.mean == served.crowded.most == 0  # nobody waits


def test_what_fails_leaves_nothing_behind(model):
    class Broken(Exception):
        pass

    def advance() -> None:
        raise Broken

    workload = [WorkItem(0.0, [1, 2, 3], n) for n in (1, 9)]
    with open_llm(model, "native") as llm:
        with pytest.raises(Broken):
            serve(llm.engine, workload, advance)
        assert not llm.engine.has_unfinished
        assert llm.memory_stats().allocated == 0
        assert serve(llm.engine, workload).peak_bytes > 0


@pytest.mark.parametrize("kv_format", ["native", "int8", "int4", "int2"])
def test_at_a_budget_as_many_run_at_once_as_the_arithmetic_says(model, kv_format):
    """Prompts of one length, all in one step, whose outputs take no further block and seal none."""
    num_inputs, num_native = 610, 3
    workload = make_workload(Shape(Lengths(num_inputs, 0.0, 610), Lengths(2, 0.0, 2)), 40, VOCAB)
    with open_llm(model, "native", num_blocks=1) as llm:
        cache = llm.engine.cache
        budget = num_native * sequence_bytes(cache.layers, cache.dtype, num_inputs)
    budget += budget // 50  # of which the scheduler keeps some free
    options = {"kv_memory": budget, "token_budget": 40 * num_inputs, "calibration": None}
    with open_llm(model, kv_format, **options) as llm:
        cache, manager = llm.engine.cache, llm.engine.manager
        held = sequence_bytes(cache.layers, cache.dtype, num_inputs)
        kept_free = llm.engine.scheduler._watermark_blocks * cache.block_bytes
        expected = (manager.num_blocks * cache.block_bytes - kept_free) // held
        served = serve(llm.engine, workload)
        assert served.peak_bytes == expected * held <= budget
    assert served.held.most == served.crowded.most == expected
    assert served.held.mean <= served.crowded.mean <= expected
    assert (expected == num_native) == (kv_format == "native")
    assert served.num_preemptions == 0
    assert [len(times) for times in served.times] == [2] * 40


def test_formats_take_turns_and_rows_tell_of_medians(model):
    workload = [WorkItem(0.0, [1, 2, 3], 4)] * 3
    order = []
    with open_llm(model, "native") as native, open_llm(model, "int8") as int8:
        engines = {"native": native.engine, "int8": int8.engine}
        runs = take_turns(engines, workload, 2, lambda: order.append(0))
    assert {name: len(some) for name, some in runs.items()} == {"native": 2, "int8": 2}
    assert len(order) == 2 * 2 * 3
    rows = {(row.case, row.metric): row for row in rows_of("case", runs, HELD_FIGURES)}
    most = rows["case, int8", "sequences at once, most"]
    assert (most.value, most.baseline, most.baseline_value, most.ratio) == (3, "native", 3, 1)
    held = rows["case, int8", "peak KV"]
    assert held.ratio == pytest.approx(held.baseline_value / held.value)
    assert rows["case, int8", "preemptions"].ratio is None
    assert rows["case, native", "peak KV"].baseline is None


@pytest.mark.parametrize("kv_format", ["native", "int8", "int2"])
def test_held_bytes_are_those_of_the_arithmetic(model, kv_format):
    lengths = [1, 63, 64, 65, 200, 700]
    with open_llm(model, kv_format, calibration=None) as llm:
        rows = held_rows({kv_format: llm.engine}, lengths)
        assert not llm.engine.has_unfinished
    found = {(row.case, row.metric): row.value for row in rows}
    for length in lengths:
        case = f"{length} tokens, {kv_format}"
        assert found[case, HELD] == found[case, BOUND]
        assert found[case, PEAK] >= found[case, HELD] > 0


# -- figures --------------------------------------------------------------------------------------


def served_at(times: list[list[float]], arrivals: list[float]) -> Served:
    return Served(
        workload=[WorkItem(at, [1], len(some)) for at, some in zip(arrivals, times, strict=True)],
        times=times,
        seconds=max(map(max, times)),
        peak_bytes=0,
        held=Occupancy(),
        crowded=Occupancy(),
        num_preemptions=0,
    )


gaps = st.lists(st.floats(0.001, 5), min_size=1, max_size=6)


@unhurried
@given(st.lists(st.tuples(st.floats(0, 10), gaps), min_size=1, max_size=8))
def test_percentiles_are_numpys(requests):
    arrivals = [arrival for arrival, _ in requests]
    times = [(arrival + np.cumsum(some)).tolist() for arrival, some in requests]
    served = served_at(times, arrivals)
    first = [some[0] for _, some in requests]
    between = np.concatenate([some[1:] for _, some in requests])
    figures = {figure.metric: figure.of(served) for figure in TIMES}
    for percent in (50, 90, 99):
        expected = 1000 * np.percentile(first, percent)
        found = figures[f"time to first token, p{percent}"]
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)
        expected = 1000 * np.percentile(between, percent) if len(between) else 0
        found = figures[f"between tokens, p{percent}"]
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert served.tokens_per_second == pytest.approx(sum(map(len, times)) / served.seconds)


@unhurried
@given(
    st.lists(st.tuples(st.floats(0, 10), gaps), min_size=1, max_size=8),
    st.floats(0.01, 5),
    st.floats(0.01, 5),
)
def test_goodput_counts_who_keeps_both_limits(requests, first, between):
    times = [(arrival + np.cumsum(some)).tolist() for arrival, some in requests]
    served = served_at(times, [arrival for arrival, _ in requests])
    expected = sum(
        t[0] - a <= first and (len(t) < 2 or np.mean(np.diff(t)) <= between)
        for t, (a, _) in zip(times, requests, strict=True)
    )
    assert served.num_good(Limits(first, between)) == expected
    assert served.num_good(Limits()) == len(requests)
    rate, share = goodput(Limits(first, between))
    assert rate.of(served) == pytest.approx(expected / served.seconds)
    assert share.of(served) == pytest.approx(100 * expected / len(requests))
    assert goodput(Limits()) == ()
