"""Linear layers and rows on a CPU, beside torch's own operations in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

pytest.importorskip("numba")

from paged_kv.kernels.cpu import dense
from paged_kv.kernels.cpu.dense import DenseLayer, Weight, gated_linear, is_served, linear
from paged_kv.kernels.cpu.dense_kernels import ACTIVATIONS, TILE_WEIGHTS
from paged_kv.kernels.cpu.matrix_tiles import has_tiles
from paged_kv.kernels.cpu.token_rows import Norm, rms_norm, turn
from paged_kv.kernels.cpu.vectors import host_width

CHANNELS = 96
PRECISIONS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.int8),
    (torch.bfloat16, torch.int8),
]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
NUM_ROWS = (1, 2, 5, 6, 7, 16, 33, 64, 65, 200)
NUM_COLUMNS = (4, 5, 15, 31, 32, 33, 35, 64, 101)


def error_of(given: Tensor, exact: Tensor) -> float:
    return float((given.double() - exact).norm() / exact.norm())


def weight(columns: int, dtype: torch.dtype, *, has_bias: bool) -> Weight:
    if dtype is torch.int8:
        columns -= columns % TILE_WEIGHTS
        bias = torch.randn(columns).to(torch.bfloat16) if has_bias else None
        return codes(columns, CHANNELS)._replace(bias=bias)
    bias = torch.randn(columns).to(dtype) if has_bias else None
    return Weight(torch.randn(columns, CHANNELS).to(dtype), bias)


def codes(columns: int, channels: int) -> Weight:
    matrix = torch.randint(-128, 128, (columns, channels)).to(torch.int8)
    return Weight(matrix, scale=torch.rand(columns) / 64)


def exact_linear(rows: Tensor, weight: Weight) -> Tensor:
    bias = None if weight.bias is None else weight.bias.double()
    matrix = weight.matrix.double()
    if weight.scale is not None:
        matrix *= weight.scale.double()[:, None]
    return functional.linear(rows.double(), matrix, bias)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["pairs", "tiles"])
def _products(request, monkeypatch):
    """Products of bfloat16 with and without the processor's tile registers."""
    if request.param == "pairs":
        monkeypatch.setattr(dense, "has_tiles", lambda: False)
    elif not has_tiles():
        pytest.skip("no AMX here")


@pytest.mark.usefixtures("_products")
@pytest.mark.parametrize(("precision", "stored"), PRECISIONS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_layers_are_torchs(precision, stored, has_bias):
    for num_rows in NUM_ROWS:
        for columns in NUM_COLUMNS:
            rows = torch.randn(num_rows, CHANNELS).to(precision)
            weights = [weight(n, stored, has_bias=has_bias) for n in (columns, 64, columns)]
            for given, each in zip(linear(rows, weights), weights, strict=True):
                assert given.dtype is precision
                exact = exact_linear(rows, each)
                assert error_of(given, exact) < TOLERANCE[precision], (num_rows, columns)


@pytest.mark.parametrize(("precision", "stored"), PRECISIONS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_linear_layers_are_torchs(precision, stored, has_bias, activation):
    activate = {
        "silu": functional.silu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    }[activation]
    for num_rows in NUM_ROWS:
        for columns in NUM_COLUMNS:
            rows = torch.randn(num_rows, CHANNELS).to(precision)
            gate, up = (weight(columns, stored, has_bias=has_bias) for _ in range(2))
            given = gated_linear(rows, gate, up, activation)
            exact = activate(exact_linear(rows, gate)) * exact_linear(rows, up)
            assert error_of(given, exact) < 2 * TOLERANCE[precision], (num_rows, columns)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_neither_overflow_nor_hide_what_is_no_number(activation):
    sizes = [0.0, 1e-30, 1e-3, 1.0, 30.0, 100.0, 1e4]
    wanted = torch.tensor([sign * size for size in sizes for sign in (1, -1)] + [torch.nan] * 2)
    rows = torch.zeros(len(wanted), CHANNELS)
    rows[:, 0], rows[:, 1] = wanted, 1.0
    gate, up = torch.zeros(4, CHANNELS), torch.zeros(4, CHANNELS)
    gate[:, 0], up[:, 1] = 1.0, 1.0
    given = gated_linear(rows, Weight(gate), Weight(up), activation)[:, 0]
    activate = {
        "silu": functional.silu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    }[activation]
    exact = activate(wanted.double()).float()
    torch.testing.assert_close(given, exact, rtol=2e-5, atol=1e-30, equal_nan=True)


@pytest.mark.usefixtures("_products")
@pytest.mark.parametrize(("precision", "stored"), PRECISIONS)
@pytest.mark.parametrize("columns", [33, 64])
@pytest.mark.parametrize("num_rows", [7, 33])
def test_many_channels_are_added_up_in_parts(precision, stored, columns, num_rows):
    """Also where the last tile of a weight shares columns with the one before it."""
    for channels in (1024, 2048 + 32, 5024):
        rows = torch.randn(num_rows, channels).to(precision)
        matrix = torch.randn(columns, channels)
        weight = Weight(matrix.to(stored))
        if stored is torch.int8:
            weight = codes(columns - columns % TILE_WEIGHTS, channels)
        assert error_of(linear(rows, [weight])[0], exact_linear(rows, weight)) < 4e-3
        if precision is torch.float32:
            assert error_of(linear(rows, [weight])[0], exact_linear(rows, weight)) < 1e-6


@pytest.mark.skipif(not has_tiles(), reason="no AMX here")
def test_rows_in_tile_registers_end_where_they_end():
    """What lies behind the last row is not read, and no row is written behind the last one."""
    memory = torch.full((40, CHANNELS), torch.nan, dtype=torch.bfloat16)
    matrix = Weight(torch.randn(35, CHANNELS).to(torch.bfloat16))
    for num_rows in (7, 16, 17, 31, 33):
        memory[:num_rows] = torch.randn(num_rows, CHANNELS)
        layer, outputs = DenseLayer([matrix]), memory.new_full((40, 35), 7.0)
        layer._multiply(memory[:num_rows], outputs.view(-1)[: num_rows * 35])
        exact = exact_linear(memory[:num_rows], matrix)
        assert error_of(outputs[:num_rows], exact) < TOLERANCE[torch.bfloat16]
        assert (outputs[num_rows:] == 7).all()


def test_rows_need_not_lie_close():
    rows = torch.randn(9, 3 * CHANNELS)[:, CHANNELS : 2 * CHANNELS]
    matrix = torch.randn(40, CHANNELS)
    given = linear(rows, [Weight(matrix)])[0]
    assert error_of(given, exact_linear(rows, Weight(matrix))) < 1e-6
    apart, halves = rows.to(torch.bfloat16), Weight(matrix.to(torch.bfloat16))
    wide = torch.zeros(9, 3 * CHANNELS, dtype=torch.bfloat16)[:, CHANNELS : 2 * CHANNELS]
    given = linear(wide.copy_(apart), [halves])[0]
    assert error_of(given, exact_linear(apart, halves)) < 4e-3
    given = linear(torch.randn(CHANNELS, 9).t(), [Weight(matrix)])[0]
    assert given.shape == (9, 40)
    assert linear(rows[:0], [Weight(matrix)])[0].shape == (0, 40)


def test_a_weight_is_served_only_where_its_rows_are_whole_vectors():
    assert is_served(torch.zeros(4, 2 * host_width()))
    assert not is_served(torch.zeros(3, 2 * host_width()))
    assert not is_served(torch.zeros(4, 2 * host_width() + 1))
    assert not is_served(torch.zeros(64, 64).t().contiguous().t())
    assert not is_served(torch.zeros(64, 128)[:, :64])
    assert not is_served(torch.zeros(64, 64, dtype=torch.float64))
    assert not is_served(torch.zeros(64, 64, dtype=torch.float32, device="meta"))
    assert is_served(torch.zeros(32, 64, dtype=torch.int8))
    assert not is_served(torch.zeros(33, 64, dtype=torch.int8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_channels", [8, 32, 96, 576])
@pytest.mark.parametrize("is_offset", [False, True])
def test_rms_norms_are_their_formula(dtype, num_channels, is_offset):
    for num_rows in (1, 5, 17, 400):
        rows, scale = torch.randn(num_rows, num_channels).to(dtype), torch.randn(num_channels)
        scale = scale.to(dtype)
        exact = rows.double() * torch.rsqrt(rows.double().square().mean(-1, keepdim=True) + 1e-5)
        exact *= scale.double() + is_offset
        given = rms_norm(rows, Norm(scale, 1e-5, is_offset))
        assert error_of(given, exact) < 1.5 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "num_turned"), [(64, 64), (128, 64), (80, 80), (256, 32)])
def test_turns_are_llamas(dtype, head_dim, num_turned):
    def turned(rows: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        rows, half = rows.double(), num_turned // 2
        near, far, rest = rows.tensor_split([half, num_turned], dim=-1)
        across = torch.cat([-far, near], dim=-1) * sines.double()[:, None]
        straight = torch.cat([near, far], dim=-1) * cosines.double()[:, None]
        return torch.cat([straight + across, rest], dim=-1)

    for num_tokens in (1, 17, 400):
        queries, keys = (torch.randn(num_tokens, n, head_dim).to(dtype) for n in (6, 2))
        cosines, sines = (torch.randn(num_tokens, num_turned).to(dtype) for _ in range(2))
        exact = [turned(rows, cosines, sines) for rows in (queries, keys)]
        turn(queries, keys, cosines, sines)
        assert error_of(queries, exact[0]) < 1.5 * TOLERANCE[dtype]
        assert error_of(keys, exact[1]) < 1.5 * TOLERANCE[dtype]
