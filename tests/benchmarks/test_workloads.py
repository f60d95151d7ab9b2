"""Workloads: the same settings are the same requests, within their limits, as asked for."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paged_kv.benchmarks.trace import HASHED_TOKENS, read_trace
from paged_kv.benchmarks.workloads import (
    SHAPES,
    Lengths,
    Shape,
    WorkItem,
    all_at_once,
    check_lengths,
    fitted,
    make_workload,
    mean_tokens,
    poisson_arrivals,
    with_limits,
)
from paged_kv.errors import ConfigError, InvalidRequestError

VOCAB = 101
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
lengths = st.builds(
    Lengths, st.floats(1, 300), st.one_of(st.just(0.0), st.floats(0, 2)), st.integers(1, 500)
)
shapes = st.builds(Shape, lengths, lengths, st.integers(0, 40))
seeds = st.integers(0, 1 << 40)


@unhurried
@given(shapes, st.integers(1, 20), seeds)
def test_requests_keep_their_limits_and_a_seed_repeats_them(shape, count, seed):
    workload = make_workload(shape, count, VOCAB, seed)
    assert workload == make_workload(shape, count, VOCAB, seed)
    assert len(workload) == count
    openings = {tuple(item.prompt[: shape.shared]) for item in workload}
    assert len(openings) == 1
    for item in workload:
        assert item.arrival == 0
        assert 1 <= len(item.prompt) - shape.shared <= shape.inputs.most
        assert 1 <= item.num_outputs <= shape.outputs.most
        assert all(0 <= token < VOCAB for token in item.prompt)
    check_lengths(workload, shape.longest)
    total = sum(len(item.prompt) + item.num_outputs - 1 for item in workload)
    assert mean_tokens(workload) == pytest.approx(total / count)


def test_another_seed_gives_others():
    assert make_workload(SHAPES["shared"], 3, VOCAB, 0) != make_workload(
        SHAPES["shared"], 3, VOCAB, 1
    )


def test_lengths_without_a_spread_are_all_the_median():
    drawn = Lengths(17.4, 0.0, 100).draw(50, np.random.default_rng(0))
    assert set(drawn.tolist()) == {17}


@unhurried
@given(st.floats(5, 500), st.floats(0.1, 1.2), seeds)
def test_lengths_are_lognormal(median, sigma, seed):
    drawn = Lengths(median, sigma, 1 << 40).draw(4000, np.random.default_rng(seed))
    logs = np.log(drawn)
    assert np.median(drawn) == pytest.approx(median, rel=0.15, abs=1)
    if median > 50:  # or rounding to whole tokens is most of it
        assert logs.std() == pytest.approx(sigma, rel=0.1)


def test_the_lognormal_workload_is_as_long_as_it_says():
    items = make_workload(SHAPES["lognormal"], 4000, VOCAB)
    inputs = np.array([len(item.prompt) for item in items])
    outputs = np.array([item.num_outputs for item in items])
    assert np.median(inputs) == pytest.approx(1020, rel=0.05)
    assert np.median(outputs) == pytest.approx(129, rel=0.08)
    assert 1100 < inputs.mean() < 1200
    assert 160 < outputs.mean() < 220
    assert outputs.max() == 512


@unhurried
@given(shapes, st.integers(3, 600))
def test_a_fitted_shape_is_no_longer_than_the_model(shape, longest):
    found = fitted(shape, longest)
    assert found.longest <= max(longest, 2)
    assert found == shape or shape.longest > longest
    assert bool(found.shared) <= bool(shape.shared)


def test_what_is_given_replaces_what_a_shape_has():
    usual = Lengths(100, 0.5, 300)
    assert with_limits(usual, None, None, None) == usual
    assert with_limits(usual, 50, 0.0, None) == Lengths(50, 0.0, 300)
    assert with_limits(usual, 200, None, None) == Lengths(200, 0.5, 800)
    assert with_limits(usual, 200, None, 10) == Lengths(200, 0.5, 10)


@unhurried
@given(st.floats(0.1, 1000), seeds)
def test_arrivals_are_a_poisson_process(rate, seed):
    items = [WorkItem(0.0, [1], 1)] * 3000
    arrivals = np.array([item.arrival for item in poisson_arrivals(items, rate, seed)])
    gaps = np.diff(arrivals, prepend=0)
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(1 / rate, rel=0.12)
    assert gaps.std() == pytest.approx(1 / rate, rel=0.2)
    assert all_at_once(poisson_arrivals(items, rate, seed)) == items


def test_the_rate_changes_no_request():
    items = make_workload(SHAPES["shared"], 3, VOCAB)
    assert [item[1:] for item in poisson_arrivals(items, 5)] == [item[1:] for item in items]


@pytest.mark.parametrize("rate", [0, -1, math.inf, math.nan])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(ConfigError, match="the rate must be above 0"):
        poisson_arrivals([WorkItem(0.0, [1], 1)], rate)


def test_requests_too_long_for_a_model_are_named():
    items = [WorkItem(0.0, [1] * 3, 2), WorkItem(0.0, [1] * 9, 2)]
    check_lengths(items, 11)
    with pytest.raises(ConfigError, match="request 2 of the workload has 9 \\+ 2 tokens"):
        check_lengths(items, 10)
    with pytest.raises(ConfigError, match="at least one request"):
        check_lengths([], 10)


# -- traces ---------------------------------------------------------------------------------------


def trace(*records: object, **options: object):
    return read_trace((json.dumps(record) for record in records), VOCAB, **options)


def hashed(length: int, ids: list[int]) -> str:
    return json.dumps({"input_length": length, "output_length": 1, "hash_ids": ids})


def test_blocks_of_the_same_id_hold_the_same_tokens():
    first, second, third = trace(
        {"timestamp": 500, "input_length": 1100, "output_length": 3, "hash_ids": [7, 8, 9]},
        {"timestamp": 2500, "input_length": 1030, "output_length": 4, "hash_ids": [7, 8, 10]},
        {"timestamp": 1500, "input_length": 20, "output_length": 5},
    )
    assert [item.arrival for item in (first, second, third)] == [0, 1, 2]
    assert [item.num_outputs for item in (first, second, third)] == [3, 5, 4]
    assert [len(item.prompt) for item in (first, second, third)] == [1100, 20, 1030]
    shared = 2 * HASHED_TOKENS
    assert first.prompt[:shared] == third.prompt[:shared]
    assert first.prompt[shared:][:6] != third.prompt[shared:]


def test_prompts_without_ids_differ_and_a_seed_repeats_them():
    record = {"input_length": 30, "output_length": 1}
    one, two = trace(record, record)
    assert one.prompt != two.prompt
    assert trace(record, record) == [one, two]
    assert trace(record, record, seed=1) != [one, two]


def test_prompts_of_its_own_are_taken():
    ids, text = trace(
        {"prompt": [5, 6], "output_length": 2},
        {"prompt": "ab", "output_length": 2, "anything": None},
        encode=lambda text: [ord(letter) for letter in text],
    )
    assert (ids.prompt, text.prompt) == ([5, 6], [97, 98])


def test_only_the_first_lines_are_read():
    lines = ['{"input_length": 1, "output_length": 1}\n', "\n", "nothing\n"]
    assert len(read_trace(lines, VOCAB, most=2)) == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "Expecting"),
        ("[1]", "must be an object"),
        ('{"input_length": 3}', '"output_length" must be a number of tokens, at least 1, got None'),
        ('{"input_length": 0, "output_length": 1}', '"input_length" must be'),
        ('{"input_length": true, "output_length": 1}', '"input_length" must be'),
        ('{"output_length": 1}', '"input_length" must be'),
        ('{"timestamp": -1, "input_length": 3, "output_length": 1}', '"timestamp" must be'),
        ('{"timestamp": NaN, "input_length": 3, "output_length": 1}', '"timestamp" must be'),
        ('{"input_length": 3, "output_length": 1, "hash_ids": [0.5]}', '"hash_ids" must be'),
        (hashed(513, [1]), '"hash_ids" must be 2, one for every 512 of 513 tokens, got 1'),
        (hashed(512, [1, 2]), '"hash_ids" must be 1, one for every 512 of 512 tokens, got 2'),
        (hashed(1, []), '"hash_ids" must be 1, one for every 512 of 1 tokens, got 0'),
        ('{"prompt": [101], "output_length": 1}', "token ids below 101"),
        ('{"prompt": "", "output_length": 1}', "must be text, or token ids"),
        ('{"prompt": "text", "output_length": 1}', "needs a model with a tokenizer"),
    ],
)
def test_a_wrong_line_is_refused_by_its_number(line, reason):
    with pytest.raises(InvalidRequestError, match="line 3 of the trace: ") as refused:
        read_trace(['{"input_length": 1, "output_length": 1}', "", line], VOCAB)
    assert reason in str(refused.value)


def test_an_empty_trace_is_refused():
    with pytest.raises(InvalidRequestError, match="the trace has no requests"):
        read_trace(["", "\n"], VOCAB)
