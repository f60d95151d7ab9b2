"""Formats by layer: the least sum is found, and what was measured is what it is chosen by."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_kv.cache.formats import INT2, INT8, NATIVE
from paged_kv.cache.layer_formats import LayerFormats, formats_name
from paged_kv.cache.layer_groups import block_bytes
from paged_kv.cache.layer_spec import cache_geometry, usual_kv_dtype
from paged_kv.engine.evaluate import compare_formats
from paged_kv.engine.format_choice import (
    USUAL,
    Sensitivity,
    bytes_by_layer,
    least_sum,
    measure_layers,
)
from paged_kv.errors import ConfigError
from paged_kv.models.huggingface import PagedModel
from tests.support import zoo


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_least_sum_is_that_of_all_combinations(data):
    num_layers, num_formats = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    numbers = st.integers(0, 12)
    shape = num_layers * num_formats
    costs, sizes = (
        np.array(data.draw(st.lists(numbers, min_size=shape, max_size=shape)), dtype=float).reshape(
            num_layers, num_formats
        )
        for _ in range(2)
    )
    least = sizes.min(1).sum()
    budget = least + data.draw(st.integers(0, 20))
    layers = np.arange(num_layers)
    possible = [
        costs[layers, list(chosen)].sum()
        for chosen in product(range(num_formats), repeat=num_layers)
        if sizes[layers, list(chosen)].sum() <= budget
    ]
    chosen = least_sum(costs, sizes, budget)
    assert sizes[layers, chosen].sum() <= budget
    assert costs[layers, chosen].sum() == min(possible)


def test_many_layers_are_chosen_for_in_no_time():
    rng = np.random.default_rng(0)
    sizes = np.tile(np.array([3.0, 4.0, 4.125, 5.0, 8.0]), (80, 1)) * rng.integers(1, 3, (80, 1))
    costs = rng.exponential(1, (80, 1)) / sizes**2
    chosen = least_sum(costs, sizes, 1.2 * sizes[:, 1].sum())
    gained = costs[np.arange(80), chosen].sum() / costs[:, 1].sum()
    assert gained < 0.8


def test_a_budget_that_no_format_keeps_is_refused():
    found = Sensitivity((INT2, INT8), np.ones((3, 2)), np.array([[10.0, 20.0]] * 3))
    with pytest.raises(ConfigError, match="a budget of 29 bytes a token is less than 30"):
        found.choose(29)
    chosen, divergence = found.choose(30)
    assert formats_name(chosen.of(3)) == "int2"
    assert divergence == 3


def test_what_a_layer_does_is_measured_with_all_others_native():
    model = PagedModel(zoo.build("LlamaForCausalLM", initializer_range=0.05))
    windows = np.array(zoo.prompts((260,)))
    formats = (INT2, INT8)
    done: list[int] = []
    found = measure_layers(model, windows, kv_formats=formats, report=lambda: done.append(1))
    assert len(done) == len(model.layer_shapes) == 3
    assert found.divergences.shape == found.token_bytes.shape == (3, 2)
    assert (found.divergences[:, 0] > 3 * found.divergences[:, 1]).all()
    shared = found.kv_formats
    assert [each.block_size for each in shared] == [64, 64]
    mixture = LayerFormats(NATIVE, ((1, shared[0]),))
    alone = compare_formats(model, [NATIVE, mixture], windows, tokens_per_step=64)[1]
    assert alone.divergence == found.divergences[1, 0]
    # Of all layers together about the sum.
    both = compare_formats(model, [NATIVE, shared[0]], windows, tokens_per_step=64)[1]
    assert 0.4 < both.divergence / found.divergences[:, 0].sum() < 2.5
    # A mixture takes what is said of it.
    budget = float(found.token_bytes.sum(0).mean())
    chosen, _ = found.choose(budget)
    layers = model.layers(chosen)
    dtype = usual_kv_dtype(layers, model.dtype)
    taken = block_bytes(layers, dtype) / cache_geometry(layers, dtype).block_size
    assert taken <= budget
    assert {layer.kv_format.name for layer in layers} == {"int2", "int8"}
    model.close()


def test_all_candidates_share_a_table():
    model = PagedModel(zoo.model("llama"))
    sizes = bytes_by_layer(model)
    assert sizes.shape == (3, len(USUAL))
    assert (np.diff(sizes[0]) >= 0).all()
    model.close()
