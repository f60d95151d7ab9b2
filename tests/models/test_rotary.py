"""Turning tokens by positions: against the formula in float64, and found in real models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from paged_kv.blocks.sink_window import SinkWindow
from paged_kv.cache.formats import NATIVE
from paged_kv.errors import UnsupportedModelError
from paged_kv.models.huggingface import PagedModel
from paged_kv.models.rotary import MODEL_PERIOD, Rotation, StepTurns, find_rotation
from tests.support import zoo
from tests.support.attention_oracle import layer_of, relative_error
from tests.support.fleets import Fleet
from tests.support.token_streams import Stream, make_stream
from tests.support.windowed_oracle import BASE, rotated, softmax_output

FREQUENCIES = torch.from_numpy(BASE ** (-np.arange(16) / 16))
LAYOUTS = {  # first channel, interleaved; of 40 channels 32 turn
    "halves": (0, False),
    "pairs": (0, True),
    "halves behind others": (8, False),
    "pairs behind others": (8, True),
}


def turned_by_formula(
    tokens: Tensor, positions: NDArray[np.int64], first: int, is_interleaved: bool
) -> Tensor:
    """Pair by pair, as complex numbers of numpy."""
    numbers = tokens.double().numpy().copy()
    for index, frequency in enumerate(FREQUENCIES.numpy()):
        a, b = (2 * index, 2 * index + 1) if is_interleaved else (index, index + 16)
        pair = numbers[..., first + a] + 1j * numbers[..., first + b]
        pair *= np.exp(1j * positions * frequency)[:, None]
        numbers[..., first + a], numbers[..., first + b] = pair.real, pair.imag
    return torch.from_numpy(numbers)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_turning_is_exact_however_far(layout):
    first, is_interleaved = LAYOUTS[layout]
    tokens = torch.randn(6, 3, 40, generator=torch.Generator().manual_seed(0))
    positions = np.array([0, 1, -5, 70_000, 4_000_000, 1_000_000_000])
    rotation = Rotation(FREQUENCIES, first, is_interleaved)
    turned = rotation.turn(tokens, rotation.phases(torch.from_numpy(positions)))
    expected = turned_by_formula(tokens, positions, first, is_interleaved)
    assert (turned.double() - expected).norm() <= 1e-6 * expected.norm()
    half = rotation.turn(tokens.bfloat16(), rotation.phases(torch.from_numpy(positions)))
    assert half.dtype == torch.bfloat16
    assert (half.double() - expected).norm() <= 6e-3 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rotation_is_found_among_wrong_ones(layout, dtype):
    first, is_interleaved = LAYOUTS[layout]
    token = torch.randn(1, 3, 40, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 2, 5, 17, 100])
    tokens = turned_by_formula(token.expand(6, 3, 40), positions.numpy(), first, is_interleaved)
    wrong = [FREQUENCIES * 0.5, FREQUENCIES[:8], FREQUENCIES.flip(0)]
    found = find_rotation(tokens.to(dtype), positions, [*wrong, FREQUENCIES])
    assert found is not None
    assert torch.equal(found.frequencies, FREQUENCIES)
    assert (found.first_channel, found.is_interleaved) == (first, is_interleaved)
    assert find_rotation(tokens.to(dtype), positions, wrong) is None


def test_tokens_that_know_no_position_turn_nothing():
    token = torch.randn(1, 3, 40).expand(6, 3, 40)
    found = find_rotation(token, torch.arange(6), [FREQUENCIES])
    assert found is not None
    assert len(found.frequencies) == 0
    assert found.turn(token, found.phases(torch.arange(6))) is token


STREAMING = {
    "llama": (0, 8, False),  # first channel, pairs, interleaved
    "llama-rope-linear": (0, 8, False),
    "llama-rope-llama3": (0, 8, False),
    "llama-rope-yarn": (0, 8, False),
    "qwen3": (0, 8, False),
    "gemma3": (0, 8, False),
    "gpt-neox": (0, 2, False),
    "phi3": (0, 8, False),
    "stablelm": (0, 2, False),
    "nemotron": (0, 4, False),
    "deepseek-v3": (16, 4, False),
    "gpt-oss": (0, 8, False),
    "mixtral": (0, 8, False),
}


@pytest.mark.parametrize("name", STREAMING)
def test_rotations_of_models_are_found(name):
    model = PagedModel(zoo.model(name))
    try:
        for rotation in model.rotations.values():
            found = rotation.first_channel, len(rotation.frequencies), rotation.is_interleaved
            assert found == STREAMING[name]
    finally:
        model.close()


def test_layers_that_turn_alike_share_their_phases():
    """Made once a step, not once a layer."""
    model = PagedModel(zoo.model("llama"))
    try:
        rotations = model.rotations
    finally:
        model.close()
    assert len(rotations) > 1
    positions = torch.tensor([3000])
    turns = StepTurns(positions, torch.tensor([True]), positions, rotations, {})
    for layer in rotations:
        turns.apply(layer, torch.randn(1, 4, 16), torch.randn(1, 2, 16))
    assert len(turns.known_phases) == 2  # of the model's positions, and of sinks


def test_layers_without_positions_are_found():
    """Cohere2: only layers with a window know positions, in neighbouring channels."""
    model = PagedModel(zoo.model("cohere2"))
    try:
        found = [(len(r.frequencies), r.is_interleaved) for r in model.rotations.values()]
    finally:
        model.close()
    assert found == [(8, True), (0, False)] * 2


@pytest.mark.parametrize(
    ("name", "reason"),
    [("gpt2", "does not embed positions by turning"), ("opt", "does not embed positions by"),
     ("llama4", "attends in chunks")],
)  # fmt: skip
def test_models_that_cannot_windowed_one_are_refused(name, reason):
    model = PagedModel(zoo.model(name))
    try:
        with pytest.raises(UnsupportedModelError, match=reason):
            _ = model.rotations
    finally:
        model.close()


# -- the algebra, millions of positions on ------------------------------------------------------


def as_a_model_gives(raw: Tensor, positions: Tensor) -> Tensor:
    """RoPE as transformers computes it: angles in float32."""
    angles = positions.float()[:, None] * FREQUENCIES.float()
    cos, sin = (torch.cat([f(angles)] * 2, -1)[:, None] for f in (torch.cos, torch.sin))
    first, second = raw.chunk(2, -1)
    return raw * cos + torch.cat([-second, first], -1) * sin


@pytest.mark.parametrize("offset", [0, 1 << 10, 1 << 16, 1_000_000, 4_000_000])
def test_windowed_ones_equal_rerotated_keys_at_any_position(offset):
    """Behind its sinks the stream is `offset` tokens further; float32, native: 1e-5."""
    layer = layer_of(NATIVE)
    sinks = SinkWindow(16, 64)
    raw = make_stream([layer], 260, 3, torch.float32, gqa_group=2)
    positions = torch.arange(260) + offset * (torch.arange(260) >= 16)
    shifts = (positions + 1 - sinks.num_visible_tokens).clamp(min=0)
    turns = StepTurns(
        positions,
        torch.ones(260, dtype=torch.bool),
        shifts,
        {0: Rotation(FREQUENCIES, 0, False)},
        {},
    )
    assert int(turns.model_positions.max()) < MODEL_PERIOD
    query, key, sink_query = turns.apply(
        0,
        as_a_model_gives(raw.queries[0], turns.model_positions),
        as_a_model_gives(raw.keys[0], turns.model_positions),
    )
    assert sink_query is not None
    fleet = Fleet([layer], max_model_len=512)
    seq_id = fleet.add(Stream([query], [key], raw.values, [sink_query]), sinks)
    fleet.step({seq_id: 16})
    fleet.manager.num_evicted_tokens[seq_id] += offset
    fleet.offsets[seq_id] = offset
    fleet.step({seq_id: 64})
    for end in (100, 101, 180, 260):
        count = end - fleet.length(seq_id) + offset
        (output,) = fleet.step({seq_id: count})[seq_id]
        near = torch.arange(end - 64, end)
        seen = torch.cat([torch.arange(16), near])
        keys = rotated(raw.keys[0][seen], np.arange(80))
        last = rotated(raw.queries[0][[end - 1]], np.array([79]))[0]
        expected = softmax_output(last, keys, raw.values[0][seen].double())
        assert relative_error(output[-1], expected) <= 1e-5


def test_what_is_no_windowed_one_is_left_alone():
    """To the bit, wherever it is and whatever windowed sequences are beside it."""
    raw = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([5000, 70_000, 3])
    is_windowed = torch.tensor([False, True, False])
    shifts = torch.tensor([0, 69_000, 0])
    turns = StepTurns(positions, is_windowed, shifts, {0: Rotation(FREQUENCIES, 0, False)}, {})
    assert turns.model_positions.tolist() == [5000, 70_000 % MODEL_PERIOD, 3]
    for turned in turns.apply(0, raw, raw):
        assert turned is not None
        assert torch.equal(turned[[0, 2]], raw[[0, 2]])
        assert not torch.equal(turned[1], raw[1])


def test_angles_in_float32_would_be_seen():
    """What the model itself would do with such positions."""
    raw = torch.randn(2, 2, 32, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([4_000_000, 4_000_037])
    naive, exact = as_a_model_gives(raw, positions), rotated(raw, positions.numpy())
    assert (naive.double() - exact).norm() > 1e-2 * exact.norm()
