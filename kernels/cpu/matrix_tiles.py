"""Products of matrices of bfloat16 in a processor's tile registers: Intel's AMX.

Knows addresses and tiles, no layers. A tile is 16 rows of 64 bytes. Rows are multiplied as they
lie in memory; of weights, pairs of channels stand below each other, as the instruction wants them.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18 (AMX),
and the Linux kernel's documentation of `arch_prctl` for features that a process has to ask for.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache
from typing import Any, Final

from llvmlite import ir

from .vectors import BYTE, INT, LONG, SHORT, Emitter, MachineCode, host_features

TILE_ROWS: Final = 16
TILE_BYTES: Final = 64  # of a row
TILE_CHANNELS: Final = TILE_BYTES // 2
BLOCK_ROWS: Final = 2 * TILE_ROWS  # that one call multiplies ...
BLOCK_WEIGHTS: Final = 2 * TILE_ROWS  # ... with so many rows of a weight
SUMS, ROWS, WEIGHTS = (0, 1, 2, 3), (4, 5), (6, 7)  # numbers of tile registers
SYSTEM_CALL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18  # arch_prctl's, on x86-64


@cache
def has_tiles() -> bool:
    """Whether this processor has such tiles, and the system lets this process use them."""
    features = host_features()
    if not {"+amx-tile", "+amx-bf16", "+avx512bf16"} <= set(features):
        return False
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    # For all threads, from now on; refused where a thread's stack for signals is too small.
    return not ctypes.CDLL(None).syscall(SYSTEM_CALL, REQUEST_PERMISSION, TILE_DATA)


@cache
def block_kernel(num_row_tiles: int, adds: bool) -> MachineCode:
    """Sums of products of rows with `BLOCK_WEIGHTS` rows of a weight, which are packed.

    Arguments: rows (address), their stride in bytes, how many: those of `num_row_tiles` tiles, the
    last of which may have fewer; packed weights (address), number of channels, target (address)
    [rows][BLOCK_WEIGHTS] in float32, to which the sums are added if it `adds`.
    """
    emitter = Emitter("block", 6)
    rows, row_stride, num_rows, weights, num_channels, target = emitter.arguments
    counts = [emitter.long(TILE_ROWS)] * num_row_tiles
    counts[-1] = emitter.builder.sub(num_rows, emitter.long(TILE_ROWS * (num_row_tiles - 1)))
    configure(emitter, counts)
    stride = emitter.long(BLOCK_WEIGHTS * 4)
    places = [
        (SUMS[2 * row + column], emitter.offset(target, row * TILE_ROWS * BLOCK_WEIGHTS * 4, at))
        for row in range(num_row_tiles)
        for column, at in enumerate((0, TILE_BYTES))
    ]
    for tile, place in places:
        if adds:
            tile_call(emitter, "tileloadd64", tile, place, stride)
        else:
            tile_call(emitter, "tilezero", tile)
    next_tile_row = emitter.times(row_stride, TILE_ROWS)
    with emitter.loop(emitter.long(0), num_channels, TILE_CHANNELS) as channel:
        at = emitter.offset(weights, emitter.times(channel, 2 * BLOCK_WEIGHTS))
        for column, tile in enumerate(WEIGHTS):
            place = emitter.offset(at, column * TILE_ROWS * TILE_BYTES)
            tile_call(emitter, "tileloadd64", tile, place, emitter.long(TILE_BYTES))
        place = emitter.offset(rows, emitter.times(channel, 2))
        for row in range(num_row_tiles):
            tile_call(emitter, "tileloadd64", ROWS[row], place, row_stride)
            place = emitter.offset(place, next_tile_row)
            for column, tile in enumerate(WEIGHTS):
                tile_call(emitter, "tdpbf16ps", SUMS[2 * row + column], ROWS[row], tile)
    for tile, place in places:
        tile_call(emitter, "tilestored64", tile, place, stride)
    tile_call(emitter, "tilerelease")
    return MachineCode("block", emitter.finish())


def configure(emitter: Emitter, counts: list[Any]) -> None:
    """Give every tile its rows: those of rows and of sums as many as `counts` says."""
    full = emitter.long(TILE_ROWS)
    num_rows = dict.fromkeys(WEIGHTS, full)
    for row, count in enumerate(counts):
        num_rows |= dict.fromkeys((ROWS[row], SUMS[2 * row], SUMS[2 * row + 1]), count)
    builder = emitter.builder
    address = builder.ptrtoint(emitter.variable(emitter.integers(0, INT, 16)), LONG)
    emitter.store(ir.Constant(BYTE, 1), address)  # the one palette that there is
    for tile, count in num_rows.items():
        emitter.store(ir.Constant(SHORT, TILE_BYTES), emitter.offset(address, 16 + 2 * tile))
        emitter.store(builder.trunc(count, BYTE), emitter.offset(address, 48 + tile))
    tile_call(emitter, "ldtilecfg", address)


def tile_call(emitter: Emitter, name: str, *arguments: Any) -> None:
    """An instruction on tiles: those it is given by number, then an address, then a stride."""
    values = [ir.Constant(BYTE, each) if isinstance(each, int) else each for each in arguments]
    kinds = [value.type for value in values]
    if LONG in kinds:
        at = kinds.index(LONG)
        values[at] = emitter.builder.inttoptr(values[at], BYTE.as_pointer())
    emitter.call(f"llvm.x86.{name}", ir.VoidType(), *values)


def transposed(emitter: Emitter, vectors: list[Any]) -> list[Any]:
    """Vectors of as many lanes as there are of them, lanes in the place of vectors."""
    count = len(vectors)
    distance = 1
    while distance < count:
        swapped = list(vectors)
        for first in range(count):
            if first & distance:
                continue
            pair = vectors[first], vectors[first + distance]
            lanes = range(count)
            upper = [lane + count - distance if lane & distance else lane for lane in lanes]
            lower = [lane + count if lane & distance else lane + distance for lane in lanes]
            for place, mask in ((first, upper), (first + distance, lower)):
                kind = ir.VectorType(INT, count)
                swapped[place] = emitter.builder.shuffle_vector(*pair, ir.Constant(kind, mask))
        vectors, distance = swapped, 2 * distance
    return vectors
