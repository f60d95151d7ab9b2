"""The orthogonal matrix that values are stored multiplied by. Knows channels, never tokens.

A Hadamard matrix spreads each channel over all: what stands out in one then costs a little in every
one, instead of much in its own. Attention is linear in values, so that multiplying its output by
the same matrix, which is its own inverse, undoes it.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor


@cache
def rotation(num_channels: int, device: torch.device) -> Tensor:
    """float32 [D, D], symmetric and orthogonal; blocks of the powers of two that make up D."""
    matrix, start = torch.zeros(num_channels, num_channels), 0
    while start < num_channels:
        size = 1 << (num_channels - start).bit_length() - 1
        matrix[start : start + size, start : start + size] = hadamard(size)
        start += size
    return matrix.to(device)


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix of a power of two, orthogonal."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix.mul_(1 / math.sqrt(size))


def rotate(rows: Tensor) -> Tensor:
    """Rows [..., D] turned there, or, turned already, back; sums are float32, or better."""
    matrix = rotation(rows.shape[-1], rows.device)
    if rows.dtype is torch.float32:
        return rows @ matrix
    wide = torch.promote_types(rows.dtype, torch.float32)
    return (rows.to(wide) @ matrix.to(wide)).to(rows.dtype)
