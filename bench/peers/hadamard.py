"""Rows turned by a Hadamard matrix, which spreads what stands out; turned again, they are back.

Knows channels only. Emulations of our formats and of peers' share it; our kernels have their own.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def matrix(num_channels: int) -> Tensor:
    """Float32 [D, D], symmetric and orthogonal; Sylvester's blocks of the powers of two in D."""
    parts, left = [], num_channels
    while left:
        block = torch.ones(1, 1)
        while 2 * len(block) <= left:
            block = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), block) / 2**0.5
        parts.append(block)
        left -= len(block)
    return torch.block_diag(*parts)


def rotate(rows: Tensor) -> Tensor:
    """Rows [..., D] of float32."""
    return rows @ matrix(rows.shape[-1])
