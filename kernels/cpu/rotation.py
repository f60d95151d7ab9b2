"""`eager.rotation` as machine code: a row stays in registers. Knows rows, never what they are."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, Final

import torch
from llvmlite import ir
from torch import Tensor

from ..eager.rotation import pieces_of
from .elements import ELEMENT_BYTES, decode, encode, load_raw
from .native_code import kind_of
from .token_rows import run_on_rows
from .vectors import FLOAT, INT, Emitter, MachineCode

LANES: Final = 8  # channels come in multiples of it


@cache
def rotate_kernel(num_channels: int, kind: str = "float32") -> MachineCode:
    """Arguments: source and target, rows of `kind` (addresses), two of no meaning, number of rows.

    Source and target may be the same.
    """
    emitter, item = Emitter("rotate", 5), ELEMENT_BYTES[kind]
    source, target, _, _, num_rows = emitter.arguments
    with emitter.loop(emitter.long(0), num_rows, 1) as row:
        at_row = emitter.times(row, num_channels * item)
        for start, size in pieces_of(num_channels):
            places = [item * channel for channel in range(start, start + size, LANES)]
            raw = [
                load_raw(emitter, emitter.offset(source, at_row, at), kind, LANES) for at in places
            ]
            vectors = [decode(emitter, each, kind)[0] for each in raw]
            factor = emitter.constant(1 / math.sqrt(size), LANES)
            for at, vector in zip(places, rotated(emitter, vectors), strict=True):
                product = encode(emitter, emitter.builder.fmul(vector, factor), kind)
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


def rotate(rows: Tensor) -> Tensor:
    """As `eager.rotation.rotate`."""
    source = rows.contiguous()
    target, num_channels = torch.empty_like(source), rows.shape[-1]
    row_bytes = num_channels * source.element_size()
    matrices = (source.data_ptr(), row_bytes, target.data_ptr(), row_bytes, 0, 0, 0, 0)
    kernel = rotate_kernel(num_channels, kind_of(source))
    run_on_rows(kernel.address, matrices, row_bytes, source.numel() // num_channels)
    return target
