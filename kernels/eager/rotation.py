"""Multiply rows by a Hadamard matrix, which values are stored multiplied by. Knows channels alone.

It spreads each channel over all: what stands out in one then costs a little in every one, instead
of much in its own. Attention is linear in values, so that multiplying its output by the same
matrix, which is its own inverse, undoes it. A row's sums have one order, whatever rows it comes
with: a token's bytes do not depend on its company. Every backend has this order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pieces_of(num_channels: int) -> list[tuple[int, int]]:
    """Where the powers of two that make up so many channels start, largest first, and these."""
    pieces, start = [], 0
    while start < num_channels:
        size = 1 << (num_channels - start).bit_length() - 1
        pieces.append((start, size))
        start += size
    return pieces


def rotate(rows: Tensor) -> Tensor:
    """Rows [..., D] times Hadamard matrices of its pieces; twice is not at all. In their dtype.

    Sums are float32, or better where the rows are: sums and differences of halves, of quarters, and
    so on, then one product with size ** -0.5.
    """
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    parts = []
    for start, size in pieces_of(rows.shape[-1]):
        part, half = wide[..., start : start + size], size // 2
        while half:
            first, second = torch.unflatten(part, -1, (-1, 2, half)).unbind(-2)
            part = torch.stack([first + second, first - second], -2).flatten(-3)
            half //= 2
        parts.append(part * (1 / math.sqrt(size)))
    return torch.cat(parts, -1).to(rows.dtype)
