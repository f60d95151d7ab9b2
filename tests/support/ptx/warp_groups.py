"""Matrix products of four warps, operands in shared memory (sm_90). Knows descriptors.

Results are written at once; that registers of a product in flight must not be touched is not
checked. What it reads of shared memory is held until the wait that covers it.
"""

from __future__ import annotations

import re
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tests.support.ptx.batch import WARP, Batch, Maker, Mask, Run
from tests.support.ptx.errors import PtxError
from tests.support.ptx.program import Instr
from tests.support.ptx.tensor_cores import fragments, half_decoder, sum_of_products

SWIZZLES: Final = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes by their code in a descriptor
CHUNKS_XORED: Final = {16: 0, 32: 1, 64: 3, 128: 7}
DEPTH: Final = 16
ROWS: Final = 64


def warp_group(batch: Batch, instr: Instr, qualifiers: list[str]) -> Run | None:
    def ctas(mask: Mask) -> NDArray:
        return np.unique(batch.cta[batch.lanes_of(mask)])

    if qualifiers[0] == "fence":
        return lambda mask: None
    if qualifiers[0] == "commit_group":
        return lambda mask: batch.shared.commit_wgmmas(ctas(mask))
    if qualifiers[0] == "wait_group":
        count = int(instr.args[0], 0)
        return lambda mask: batch.shared.wait_for_wgmmas(ctas(mask), count)
    return multiply_matrices(batch, instr, qualifiers) if qualifiers[0] == "mma_async" else None


def multiply_matrices(batch: Batch, instr: Instr, qualifiers: list[str]) -> Run | None:
    """m64nNk16 of halves, with sums of float32; the left operand may be in registers."""
    shape, kinds = re.fullmatch(r"m64n(\d+)k16", qualifiers[3]), qualifiers[4:]
    accumulators, a, b, scale_word, *words = instr.args
    signs, transposes = words[:2], [int(word, 0) for word in words[2:]]
    if not shape or signs != ["1", "1"]:
        return None
    if kinds not in (["f32", "f16", "f16"], ["f32", "bf16", "bf16"]):
        return None
    columns, decode = int(shape[1]), half_decoder(kinds[1])
    writes = [batch.writer(word, "f32") for word in accumulators]
    sums = [batch.source(word, "f32") for word in accumulators]
    in_registers = isinstance(a, list)
    left_source: Any = [batch.source(word, "b32") for word in a] if in_registers else None
    descriptors = None if in_registers else batch.source(a, "b64"), batch.source(b, "b64")
    is_register = scale_word in batch.program.registers
    scale: Any = batch.register(scale_word) if is_register else bool(int(scale_word, 0))

    def run(mask: Mask) -> None:
        warps = batch.warps_of(mask, "wgmma")
        if len(warps) % 4 or (warps[::4] % 4).any():
            raise PtxError("wgmma by a part of a warp group")
        n = len(warps) // 4
        if in_registers:
            left = decode(fragments(batch, left_source, warps).view(np.uint16))
            left = left.reshape(2, 2, n, 4, 8, 4, 2).transpose(2, 3, 1, 4, 0, 5, 6)
            left = left.reshape(n, ROWS, DEPTH)
        else:
            left = decode(read_matrix(batch, descriptors[0], warps[::4], ROWS, transposes[0]))
        right = decode(read_matrix(batch, descriptors[1], warps[::4], columns, transposes[-1]))
        total = fragments(batch, sums, warps)  # [n8, row half, h, n, warp, g, t]
        total = total.reshape(columns // 8, 2, 2, n, 4, 8, 4).transpose(3, 4, 1, 5, 0, 6, 2)
        is_kept = batch.of_warps(scale, warps)[::4, :1, None]
        total = np.where(is_kept, total.reshape(n, ROWS, columns), np.float32(0))
        how = batch.settings.sums
        result = sum_of_products(left, right.transpose(0, 2, 1), total, how)
        result = result.reshape(n, 4, 2, 8, columns // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5)
        batch.write_warps(writes, result.reshape(len(writes), -1, WARP), warps, mask)

    return run


def read_matrix(
    batch: Batch, descriptors: NDArray, leaders: NDArray, rows: int, is_transposed: int
) -> NDArray:
    """[groups, rows, k] halves that descriptors of the groups' first warps point at."""
    words = batch.of_warps(descriptors, leaders)
    if (words != words[:, :1]).any():
        raise PtxError("a descriptor differs between threads")
    address = operand_addresses(words[:, 0].astype(np.int64), rows, bool(is_transposed))
    lanes = np.repeat(leaders * WARP, rows * DEPTH)
    return batch.shared.read_by_wgmma(address.ravel(), lanes).reshape(address.shape)


def operand_addresses(descriptors: NDArray, rows: int, is_transposed: bool) -> NDArray:
    """[groups, rows, k] of elements.

    Not transposed, bytes run along k. With a swizzle of some bytes, 8 rows of so many make an atom;
    chunks of 16 bytes are exchanged by bits of their address.
    """
    one = (len(descriptors), 1, 1)
    start, leading, stride = (
        ((descriptors >> shift & 0x3FFF) << 4).reshape(one) for shift in (0, 16, 32)
    )
    swizzles = descriptors >> 62 & 3
    if (swizzles != swizzles[0]).any() or (descriptors >> 49 & 7).any():
        raise PtxError("descriptors of different kinds")
    span = SWIZZLES[int(swizzles[0])]
    r, k = np.arange(rows)[:, None], np.arange(DEPTH)[None, :]
    if is_transposed and span == 16:
        raise PtxError("wgmma of a transposed matrix without swizzle is not implemented")
    # Along what is contiguous, spans are `leading` bytes apart; the other way, 8 are `stride`.
    inner, outer = (r, k) if is_transposed else (k, r)
    offset = outer // 8 * stride + outer % 8 * span
    offset = offset + inner * 2 // span * leading + inner * 2 % span
    address = start + offset
    return address ^ ((address >> 7 & CHUNKS_XORED[span]) << 4)


INSTRUCTIONS: Final[dict[str, Maker]] = {"wgmma": warp_group}
