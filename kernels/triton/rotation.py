"""Triton: `eager.rotation`, sum by sum. Knows rows, never what they are."""

from __future__ import annotations

import math
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..eager.rotation import pieces_of
from .codes import rounded_to

ROWS: Final = 16  # of a program


@triton.jit
def sums_and_differences(numbers, HALF: tl.constexpr):
    """Of each two runs of HALF channels in rows [ROWS, channels]."""
    ROWS: tl.constexpr = numbers.shape[0]
    SIZE: tl.constexpr = numbers.shape[1]
    pairs = tl.reshape(numbers, [ROWS, SIZE // HALF // 2, 2, HALF])
    first, second = tl.split(tl.permute(pairs, [0, 1, 3, 2]))
    pairs = tl.permute(tl.join(first + second, first - second), [0, 1, 3, 2])
    return tl.reshape(pairs, [ROWS, SIZE])


@triton.jit
def rotate_rows(
    source, target, num_rows, factor, WIDTH: tl.constexpr, START: tl.constexpr,
    SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Channels [START, START + SIZE) of rows of WIDTH: sums and differences, then a product."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * WIDTH + START + tl.arange(0, SIZE)[None, :]
    exists = (row < num_rows)[:, None]
    numbers = tl.load(source + at, mask=exists, other=0).to(tl.float32)
    for step in tl.static_range(8):  # of 256 channels at most
        if SIZE >> (step + 1) > 0:
            numbers = sums_and_differences(numbers, SIZE >> (step + 1))
    rounded = rounded_to(numbers * factor, target.dtype.element_ty)
    tl.store(target + at, rounded, mask=exists)


def rotate(rows: Tensor) -> Tensor:
    """As `eager.rotation.rotate`, for rows of up to float32."""
    rows = rows.contiguous()
    target = torch.empty_like(rows)
    width = rows.shape[-1]
    num_rows = rows.numel() // width
    for start, size in pieces_of(width) if num_rows else ():
        rotate_rows[triton.cdiv(num_rows, ROWS),](
            rows, target, num_rows, 1 / math.sqrt(size),
            WIDTH=width, START=start, SIZE=size, ROWS=ROWS, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return target
