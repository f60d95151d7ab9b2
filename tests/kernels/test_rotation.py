"""Rotation of values: orthogonal, its own inverse, and the same bits from every backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paged_kv.cache.backend import choose_backend
from paged_kv.kernels.eager.rotation import pieces_of, rotate
from tests.support.fleets import hadamard_product

DIMS = [8, 24, 40, 64, 80, 96, 128, 192, 256]


@pytest.mark.parametrize("dim", DIMS)
def test_it_is_an_orthogonal_matrix_and_its_own_inverse(dim):
    matrix = rotate(torch.eye(dim, dtype=torch.float64))
    assert torch.allclose(matrix @ matrix, torch.eye(dim, dtype=torch.float64), atol=1e-13)
    assert torch.equal(matrix, matrix.T)
    assert sum(size for _, size in pieces_of(dim)) == dim


@pytest.mark.parametrize("dim", DIMS)
def test_it_spreads_a_channel_that_stands_out(dim):
    row = torch.zeros(dim)
    row[3] = 100.0
    size = pieces_of(dim)[0][1]
    rotated = rotate(row)
    assert torch.allclose(rotated[:size].abs(), torch.tensor(100.0 / size**0.5))
    assert np.allclose(rotated.numpy(), hadamard_product(row.double().numpy()), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_every_backend_has_the_bits_of_the_reference(name, dim, dtype):
    rotated = choose_backend(torch.device("cpu"), name).rotate
    rows = torch.randn(2, 21, 3, dim, generator=torch.Generator().manual_seed(dim)).to(dtype)
    rows[0, 0, 0, 0] = 3e38 if dtype is not torch.float16 else 6e4
    for some in (rows, rows[:, ::3, 1:], rows[0, :1], rows[:0]):
        assert torch.equal(rotated(some), rotate(some))
        assert rotated(some).dtype is dtype


@pytest.mark.parametrize("name", ["torch", "cpu"])
def test_a_row_does_not_depend_on_its_company(name):
    rows = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    rotated = choose_backend(torch.device("cpu"), name).rotate
    together = rotated(rows)
    assert all(torch.equal(rotated(rows[i : i + 1])[0], together[i]) for i in range(300))
