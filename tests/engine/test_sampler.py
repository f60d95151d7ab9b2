"""Sampling: what is kept, with what probability, and that a token depends on nothing else.

The reference for what is kept is transformers' own logits warpers, in their order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from paged_kv.cache.step_staging import to_device
from paged_kv.engine import sampler
from paged_kv.engine.sampler import (
    Draw,
    Sampling,
    Shortlist,
    find_unusable_rows,
    sampling_arrays,
    uniform_numbers,
)
from paged_kv.engine.sampling_params import SamplingParams
from paged_kv.engine.token_rules import RowRules, processed
from paged_kv.errors import ConfigError, PagedKVError
from tests.support.transfers import TransferCounter

VOCAB_SIZE = 60
NAN, INF = math.nan, math.inf


def random_logits(num_rows: int, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((num_rows, vocab_size), generator=generator) * 3


def sample(
    logits: Tensor, params: Sequence[SamplingParams], uniforms: np.ndarray, device: str = "cpu"
) -> np.ndarray:
    """Tokens [M] for logits [M, V], one uniform number of each row."""
    draws = [
        Draw(row=row, params=p, uniform=uniform)
        for row, (p, uniform) in enumerate(zip(params, uniforms.tolist(), strict=True))
    ]
    inputs = to_device(sampling_arrays(draws), torch.device(device))
    Sampling(logits.clone(), inputs, draws).settle()
    assert not any(draw.error for draw in draws)
    return np.array([draw.token_id for draw in draws])


def uniform_number(seed: int, sample_index: int, position: int) -> float:
    return float(uniform_numbers([seed], [sample_index], [position])[0])


def grid(count: int) -> np.ndarray:
    """Uniform numbers spread evenly over [0, 1)."""
    return (np.arange(count) + 0.5) / count


def draw_many(logits: Tensor, params: SamplingParams, uniforms: np.ndarray) -> np.ndarray:
    """Tokens of one row of logits [V] for many uniform numbers."""
    rows = logits[None].repeat(len(uniforms), 1)
    return sample(rows, [params] * len(uniforms), uniforms)


def warped(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities [V] after transformers' warpers, in transformers' order."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    top_k, top_p, min_p = params.limits
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p > 0:
        warpers.append(MinPLogitsWarper(min_p))
    ids = torch.zeros((1, 1), dtype=torch.int64)
    return warpers(ids, logits[None].double())[0].softmax(-1)


# -- greedy -------------------------------------------------------------------------------------


def test_greedy_is_argmax_whatever_the_uniform_number():
    logits = random_logits(50)
    for uniform in (0.0, 0.5, 1 - 2**-53):
        tokens = sample(logits, [SamplingParams()] * 50, np.full(50, uniform))
        assert tokens.tolist() == logits.argmax(-1).tolist()


def test_greedy_ignores_top_k_top_p_and_min_p():
    logits = random_logits(20)
    params = SamplingParams(temperature=0.0, top_k=5, top_p=0.5, min_p=0.1)
    assert sample(logits, [params] * 20, grid(20)).tolist() == logits.argmax(-1).tolist()


def test_of_equal_logits_greedy_takes_the_first():
    logits = torch.tensor([[1.0, 7.0, 7.0, 7.0]])
    assert sample(logits, [SamplingParams()], np.array([0.9])).tolist() == [1]


@pytest.mark.parametrize(
    "options",
    [
        *({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}),
        *({"temperature": 1e-3}, {"temperature": 1e-300}, {"temperature": 5e-324}),
    ],
    ids=str,
)
def test_the_narrowest_setting_of_each_kind_is_greedy(options):
    logits = torch.tensor([3.0, 5.0, 9.0, 4.0])
    params = SamplingParams(**{"temperature": 1.0, **options})
    assert set(draw_many(logits, params, grid(20)).tolist()) == {2}


# -- what is kept, and with what probability ----------------------------------------------------

COMBINATIONS = [
    {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    for temperature, top_k, top_p, min_p in itertools.product(
        (0.3, 1.0, 2.5), (None, 1, 7, VOCAB_SIZE, 500), (1.0, 0.95, 0.4), (0.0, 0.02, 0.3)
    )
]


def describe(options: dict[str, float]) -> str:
    return "-".join(f"{name}={value}" for name, value in options.items())


@pytest.mark.parametrize("options", COMBINATIONS, ids=describe)
def test_tokens_come_with_the_probabilities_of_the_transformers_warpers(options):
    """A grid of N uniform numbers gives each token's probability to within 1/N.

    So what transformers keeps and is likelier than 1/N must come, and nothing else may.
    """
    params = SamplingParams(**options)
    count = 4000
    for seed in range(2):
        logits = random_logits(1, seed)[0]
        expected = warped(logits, params).numpy()
        tokens = draw_many(logits, params, grid(count))
        frequencies = np.bincount(tokens, minlength=VOCAB_SIZE) / count
        assert np.abs(frequencies - expected).max() <= 1 / count + 1e-9
        assert not frequencies[expected == 0].any()
        assert frequencies[expected > 1 / count].all()


@pytest.mark.parametrize("options", COMBINATIONS[::7], ids=describe)
def test_the_kept_set_is_that_of_the_transformers_warpers(options):
    """Flat logits, so that no kept token is too unlikely to be seen on the grid."""
    params = SamplingParams(**options)
    logits = random_logits(1, seed=3)[0] * 0.3 * params.temperature
    kept = set(warped(logits, params).nonzero()[:, 0].tolist())
    assert set(draw_many(logits, params, grid(20_000)).tolist()) == kept


def test_every_row_of_a_batch_follows_its_own_settings():
    settings = [SamplingParams(), *(SamplingParams(**options) for options in COMBINATIONS)]
    logits = random_logits(len(settings), seed=5)
    uniforms = np.random.default_rng(0).random(len(settings))
    together = sample(logits, settings, uniforms)
    alone = [
        int(sample(logits[row : row + 1], [settings[row]], uniforms[row : row + 1])[0])
        for row in range(len(settings))
    ]
    assert together.tolist() == alone


def test_top_p_keeps_the_token_that_reaches_it():
    """The smallest set of *at least* that probability: 0.5 alone is not 0.6."""
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    kept = {
        top_p: set(
            draw_many(logits, SamplingParams(temperature=1.0, top_p=top_p), grid(100)).tolist()
        )
        for top_p in (0.4, 0.6, 0.85)
    }
    assert kept == {0.4: {0}, 0.6: {0, 1}, 0.85: {0, 1, 2}}


def test_top_k_keeps_exactly_k_of_equal_logits():
    params = SamplingParams(temperature=1.0, top_k=3)
    assert set(draw_many(torch.zeros(10), params, grid(300)).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("decimals", [0, 1, 6])  # with few there are many equal logits
@pytest.mark.parametrize("candidates", [1, 8, 64])
def test_ordering_only_candidates_gives_the_tokens_of_ordering_all(
    monkeypatch, candidates, decimals
):
    count, vocab_size = 200, 1000
    rng = np.random.default_rng(candidates)
    logits = random_logits(count, vocab_size=vocab_size).round(decimals=decimals)
    params = [
        SamplingParams(
            temperature=float(rng.choice([0.2, 1.0, 5.0])),
            top_k=rng.choice([None, 1, 5, 50, 999, 5000]),
            top_p=float(rng.choice([0.1, 0.9, 0.999, 1.0])),
            min_p=float(rng.choice([0.0, 0.001, 0.3])),
        )
        for _ in range(count)
    ]
    uniforms = rng.random(count)
    all_ordered = [
        int(sample(logits[row : row + 1], [params[row]], uniforms[row : row + 1])[0])
        for row in range(count)
    ]
    monkeypatch.setattr("paged_kv.engine.sampler.NUM_CANDIDATES", candidates)
    assert sample(logits, params, uniforms).tolist() == all_ordered
    monkeypatch.setattr("paged_kv.engine.sampler.NUM_CANDIDATES", vocab_size)
    assert sample(logits, params, uniforms).tolist() == all_ordered


def test_a_uniform_number_next_to_one_gives_a_token_that_can_be():
    logits = random_logits(300, vocab_size=700)
    logits[:, -5:] = -INF
    for options in ({}, {"top_k": 40}, {"top_p": 0.7}):
        params = [SamplingParams(temperature=0.9, **options)] * 300
        tokens = sample(logits, params, np.full(300, 1 - 2**-53))
        assert (tokens < 695).all()


def test_a_token_owns_its_interval_from_its_start_to_before_its_end():
    params = SamplingParams(temperature=1.0)
    uniforms = np.array([0.0, 0.25 - 2**-54, 0.25, 0.5 - 2**-53, 0.5, 0.75, 1 - 2**-53])
    assert draw_many(torch.zeros(4), params, uniforms).tolist() == [0, 0, 1, 1, 2, 3, 3]


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("options", COMBINATIONS[::5], ids=describe)
def test_the_extreme_uniform_numbers_give_kept_tokens(options, uniform):
    params = SamplingParams(**options)
    logits = random_logits(1, seed=7)[0]
    (token,) = draw_many(logits, params, np.array([uniform]))
    assert warped(logits, params)[token] > 0


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e6])
def test_a_masked_token_is_never_drawn(temperature):
    logits = random_logits(1)[0]
    logits[::2] = -INF
    tokens = draw_many(logits, SamplingParams(temperature=temperature), grid(500))
    assert (tokens % 2 == 1).all()


def test_independent_uniform_numbers_give_the_distribution():
    """Chi-square of 20 000 draws by `uniform_number`, within 5 deviations of its mean."""
    logits = random_logits(1, seed=11, vocab_size=12)[0] / 3
    params = SamplingParams(temperature=0.8)
    count = 20_000
    uniforms = np.array([uniform_number(3, 0, position) for position in range(count)])
    observed = np.bincount(draw_many(logits, params, uniforms), minlength=12)
    expected = warped(logits, params).numpy() * count
    chi_square = float((np.square(observed - expected) / expected).sum())
    degrees = 11
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees)


# -- seeds --------------------------------------------------------------------------------------


def test_uniform_numbers_lie_in_the_unit_interval_and_spread_over_it():
    numbers = np.array([uniform_number(0, 0, position) for position in range(2000)])
    assert ((numbers >= 0) & (numbers < 1)).all()
    counts, _ = np.histogram(numbers, bins=10, range=(0, 1))
    assert (np.abs(counts - 200) < 5 * math.sqrt(200)).all()


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
def test_the_same_seed_sample_and_position_give_the_same_number(seed):
    assert uniform_number(seed, 3, 17) == uniform_number(seed, 3, 17)


def test_every_seed_sample_and_position_has_a_number_of_its_own():
    places = list(itertools.product((0, 1, 2, 2**64 - 1), range(4), range(50)))
    numbers = {uniform_number(*place) for place in places}
    assert len(numbers) == len(places)


def test_many_numbers_at_once_are_those_of_each_alone():
    places = list(itertools.product([0, 1, 2**64 - 1], [0, 1, 7], [0, 5, 100_000]))
    together = uniform_numbers(*zip(*places, strict=True))
    assert together.tolist() == [uniform_number(*place) for place in places]


def test_a_seeded_row_draws_the_same_tokens_in_any_batch():
    logits = random_logits(1, seed=2)[0]
    params = SamplingParams(temperature=1.3, seed=42)

    def tokens_in_batch(num_before: int, num_after: int) -> list[int]:
        chosen = []
        for position in range(30):
            others = random_logits(num_before + num_after, seed=position)
            rows = torch.cat([others[:num_before], logits[None], others[num_before:]])
            settings = [SamplingParams(temperature=0.7)] * len(rows)
            settings[num_before] = params
            uniforms = np.random.default_rng(position).random(len(rows))
            uniforms[num_before] = uniform_number(42, 0, position)
            chosen.append(int(sample(rows, settings, uniforms)[num_before]))
        return chosen

    alone = tokens_in_batch(0, 0)
    assert len(set(alone)) > 3
    assert tokens_in_batch(0, 6) == tokens_in_batch(5, 0) == tokens_in_batch(3, 9) == alone


# -- unusable logits ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "is_unusable"),
    [
        ([1.0, 2.0, 3.0], False),
        ([-INF, 2.0, -INF], False),
        ([0.0, 0.0, 0.0], False),
        ([3e38, -3e38, 0.0], False),
        ([1.0, NAN, 3.0], True),
        ([NAN, NAN, NAN], True),
        ([NAN, -INF, -INF], True),
        ([1.0, INF, 3.0], True),
        ([INF, -INF, NAN], True),
        ([-INF, -INF, -INF], True),
    ],
    ids=str,
)
def test_rows_that_cannot_be_sampled_are_found_beside_rows_that_can(row, is_unusable):
    logits = torch.tensor([[1.0, 0.0, 0.0], row, [0.0, 1.0, -INF]])
    assert find_unusable_rows(logits).tolist() == [False, is_unusable, False]


def test_no_rows_are_no_unusable_rows():
    assert find_unusable_rows(torch.zeros(0, 5)).tolist() == []


def test_a_row_that_cannot_be_sampled_fails_alone():
    """Whether it is greedy, drawn from all tokens or from a few; the others get their tokens."""
    logits = random_logits(9)
    logits[1], logits[4, 7], logits[7] = -INF, NAN, INF
    kinds = [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9, "top_k": 7}]
    params = [SamplingParams(best_of=2, **kinds[row // 3]) for row in range(9)]
    draws = [Draw(row=row, params=p, uniform=0.4) for row, p in enumerate(params)]
    looks = [Shortlist(row=row, count=4) for row in (0, 4, 8)]
    inputs = to_device(sampling_arrays(draws, looks), torch.device("cpu"))
    Sampling(logits.clone(), inputs, draws, looks).settle()
    for row, draw in enumerate(draws):
        assert (str(draw.error) == sampler.NOT_FINITE) == (row in (1, 4, 7))
        if draw.error is None:
            assert [draw.token_id] == sample(logits[row : row + 1], [params[row]], np.array([0.4]))
            log_probabilities = logits[row].double().log_softmax(-1)
            assert draw.log_probability == pytest.approx(float(log_probabilities[draw.token_id]))
    assert [look.error is None for look in looks] == [True, False, True]
    expected = logits[8].log_softmax(-1).topk(4)
    assert looks[2].token_ids == expected.indices.tolist()
    assert looks[2].log_probabilities == pytest.approx(expected.values.tolist())


# -- transfers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [60, 1000])
def test_one_transfer_brings_everything_back(vocab_size):
    """Of greedy, drawn, limited and scored rows, shared ones, forbidden tokens and shortlists."""
    kinds = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.5, "top_k": 5, "best_of": 3},
        {"top_p": 0.5, "min_p": 0.1, "temperature": 2.0},
    ]
    params = [SamplingParams(**kind) for kind in kinds]
    draws = [
        Draw(row=row, params=p, rules=RowRules(forbidden_ids=[3, row]))
        for row, p in enumerate(params)
    ]
    draws += [Draw(row=2, params=params[2], uniform=0.9)]
    looks = [Shortlist(row=row, count=row) for row in (4, 5)]
    with TransferCounter() as counter:
        inputs = to_device(sampling_arrays(draws, looks), torch.device("meta"))
        Sampling(torch.empty(6, vocab_size, device="meta"), inputs, draws, looks).settle()
    assert len(counter.to_device) == 1
    assert len(counter.to_host) == 1


def test_greedy_rows_need_nothing_on_the_device():
    draws = [Draw(row=row, params=SamplingParams()) for row in range(5)]
    assert sampling_arrays(draws) == {}


# -- the request's own processors ---------------------------------------------------------------


def test_a_transformers_processor_sees_all_tokens_so_far():
    logits = random_logits(1)[0]
    token_ids = [3, 7, 7, 20]
    processor = RepetitionPenaltyLogitsProcessor(penalty=1.7)
    expected = processor(torch.tensor([token_ids]), logits[None].clone())[0]
    found = processed(logits.clone(), token_ids, [processor])
    assert torch.equal(found, expected)
    changed = (found != logits).nonzero()[:, 0].tolist()
    assert changed == [3, 7, 20]


def test_processors_are_called_in_order():
    calls = []

    def add_one(ids: Tensor, scores: Tensor) -> Tensor:
        calls.append((tuple(ids.shape), tuple(scores.shape), ids.dtype))
        return scores + 1

    def double(ids: Tensor, scores: Tensor) -> Tensor:
        return scores * 2

    found = processed(torch.tensor([1.0, 4.0]), [5, 6, 7], [add_one, double])
    assert found.tolist() == [4.0, 10.0]
    assert calls == [((1, 3), (1, 2), torch.int64)]


def test_a_suppressed_token_gets_minus_infinity():
    processor = SuppressTokensLogitsProcessor([1, 2], device="cpu")
    assert processed(torch.zeros(4), [0], [processor]).tolist() == [0.0, -INF, -INF, 0.0]


def test_without_processors_logits_are_as_they_were():
    logits = random_logits(1)[0]
    assert torch.equal(processed(logits.clone(), [1], []), logits)


# -- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", NAN),
        ("temperature", INF),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_h", 0.0),
        ("typical_p", 0.0),
        ("epsilon_cutoff", -0.1),
        ("eta_cutoff", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", "1.2"),
        ("frequency_penalty", NAN),
        ("presence_penalty", INF),
        ("no_repeat_ngram_size", -1),
        ("bad_words_ids", [5]),
        ("bad_words_ids", [[]]),
        ("suppress_tokens", 5),
        ("begin_suppress_tokens", ["a"]),
        ("forced_bos_token_id", -1),
        ("forced_eos_token_id", "end"),
        ("exponential_decay_length_penalty", (1,)),
        ("exponential_decay_length_penalty", (1, 0.0)),
        ("exponential_decay_length_penalty", (-1, 2.0)),
        ("logit_bias", {5: NAN}),
        ("logit_bias", {"5": 1.0}),
        ("logit_bias", [(5, 1.0)]),
        ("logprobs", -1),
        ("logprobs", 1 << 20),
        ("logprobs", True),
        ("top_p", 0.0),
        ("top_p", -0.5),
        ("top_p", 1.01),
        ("top_p", NAN),
        ("min_p", -0.01),
        ("min_p", 1.5),
        ("min_p", NAN),
        ("seed", -1),
        ("seed", 1 << 64),
        ("max_tokens", 0),
        ("max_tokens", -7),
        ("min_tokens", -1),
        ("n", 0),
        ("n", -2),
        ("stop", ""),
        ("stop", ["end", ""]),
    ],
)
def test_a_bad_setting_is_refused_by_name_and_value(name, value):
    with pytest.raises(ConfigError) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} must be ")
    assert message.endswith(f", got {value!r}")
    assert isinstance(caught.value, PagedKVError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"top_k": 0},
        {"top_k": 1},
        {"top_h": 1.0},
        {"typical_p": 1.0},
        {"repetition_penalty": 0.01},
        {"frequency_penalty": -2.0},
        {"logit_bias": {}},
        {"logprobs": 0},
        {"top_p": 1e-9},
        {"top_p": 1.0},
        {"min_p": 0.0},
        {"min_p": 1.0},
        {"seed": 0},
        {"seed": (1 << 64) - 1},
        {"max_tokens": 1},
        {"max_tokens": None},
        {"min_tokens": 0},
        {"n": 1},
        {"stop": ()},
        {"suppress_tokens": ()},
        {"bad_words_ids": ()},
    ],
    ids=str,
)
def test_the_edge_of_every_range_is_allowed(options):
    (name,) = options
    assert getattr(SamplingParams(**options), name) == options[name]


def test_one_stop_string_is_not_a_list_of_letters():
    assert SamplingParams(stop="end").stop_strings == ("end",)
    assert SamplingParams(stop=["end", "fin"]).stop_strings == ("end", "fin")


def test_settings_are_frozen():
    with pytest.raises(AttributeError):
        SamplingParams().temperature = 1.0
