"""`eager.rotation` as machine code: a row stays in registers. Knows rows, never what they are."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import torch
from llvmlite import ir
from torch import Tensor

from ..eager.rotation import pieces_of
from .vectors import FLOAT, INT, Emitter, MachineCode

LANES: Final = 8  # channels come in multiples of it


@cache
def rotate_kernel(num_channels: int) -> MachineCode:
    """Arguments: source and target [rows][num_channels] (addresses), number of rows."""
    emitter = Emitter("rotate", 3)
    source, target, num_rows = emitter.arguments
    with emitter.loop(emitter.long(0), num_rows, 1) as row:
        at_row = emitter.times(row, num_channels * 4)
        for start, size in pieces_of(num_channels):
            places = [4 * channel for channel in range(start, start + size, LANES)]
            vectors = [
                emitter.load(emitter.offset(source, at_row, at), FLOAT, LANES) for at in places
            ]
            factor = emitter.constant(1 / math.sqrt(size), LANES)
            for at, vector in zip(places, rotated(emitter, vectors), strict=True):
                product = emitter.builder.fmul(vector, factor)
                emitter.store(product, emitter.offset(target, at_row, at))
    return MachineCode("rotate", emitter.finish())


def rotated(emitter: Emitter, vectors: list[Any]) -> list[Any]:
    """Sums and differences of halves, of quarters, ...: first of vectors, then within them."""
    builder, half = emitter.builder, len(vectors) // 2
    while half:
        for index in range(len(vectors)):
            if not index & half:
                first, second = vectors[index], vectors[index + half]
                vectors[index] = builder.fadd(first, second)
                vectors[index + half] = builder.fsub(first, second)
        half //= 2
    half = LANES // 2
    while half:
        order = [lane ^ half for lane in range(LANES)]
        signs = [-1.0 if lane & half else 1.0 for lane in range(LANES)]
        swap = ir.Constant(ir.VectorType(INT, LANES), order)
        sign = ir.Constant(ir.VectorType(FLOAT, LANES), signs)
        for index, vector in enumerate(vectors):
            swapped = builder.shuffle_vector(vector, vector, swap)
            vectors[index] = builder.fadd(swapped, builder.fmul(vector, sign))
        half //= 2
    return vectors


@cache
def rotate_function(num_channels: int) -> Callable[[int, int, int], None]:
    """The kernel, to be called from Python."""
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    function: Callable[[int, int, int], None] = kind(rotate_kernel(num_channels).address)
    return function


def rotate(rows: Tensor) -> Tensor:
    """As `eager.rotation.rotate`, for rows of up to float32."""
    source = rows.to(torch.float32).contiguous()
    target = torch.empty_like(source)
    num_channels = rows.shape[-1]
    num_rows = source.numel() // num_channels
    rotate_function(num_channels)(source.data_ptr(), target.data_ptr(), num_rows)
    return target if rows.dtype is torch.float32 else target.to(rows.dtype)
