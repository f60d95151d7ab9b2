"""Matrix products of a warp, and how their operands come from shared memory. Knows fragments.

Lane 4 g + t of a warp holds elements 2 t and 2 t + 1 of row g of an 8 x 8 matrix, h is which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tests.support.ptx.batch import WARP, Batch, Maker, Mask, Run
from tests.support.ptx.memory_instructions import addresses
from tests.support.ptx.program import Instr
from tests.support.ptx.rounding import bf16_to_f32, cut_to_f32

# Products that are added at a time and bits beyond float32's that these sums keep, as measured
# on these generations by others (at most one bit more pessimistic).
SUMS: Final = {"ampere": (8, 1), "hopper": (16, 2)}


def rows_of_lanes(warps: NDArray, count: int) -> NDArray:
    """Lanes whose addresses are those of the rows of `count` matrices."""
    return (warps[:, None] * WARP + np.arange(8 * count)).ravel()


def transposed_if(is_transposed: bool, words: NDArray, count: int) -> NDArray:
    """Matrices of 8 x 8 halves, each as 8 rows of 4 words."""
    halves = np.ascontiguousarray(words).view(np.uint16).reshape(-1, count, 8, 8)
    if is_transposed:
        halves = halves.transpose(0, 1, 3, 2)
    return np.ascontiguousarray(halves).view(np.uint32)


def load_matrices(batch: Batch, instr: Instr, qualifiers: list[str]) -> Run | None:
    if qualifiers[:3] != ["sync", "aligned", "m8n8"] or qualifiers[-1] != "b16":
        return None
    words, where = instr.args
    count, is_transposed = int(qualifiers[3][1:]), "trans" in qualifiers
    writes = [batch.writer(word, "b32") for word in words]

    def run(mask: Mask) -> None:
        warps = batch.warps_of(mask, "ldmatrix")
        lanes = rows_of_lanes(warps, count)
        rows = batch.shared.load(addresses(batch, where, lanes, is_shared=True), 4, 4, lanes)
        found = transposed_if(is_transposed, rows, count).reshape(len(warps), count, WARP)
        batch.write_warps(writes, found.transpose(1, 0, 2), warps, mask)

    return run


def store_matrices(batch: Batch, instr: Instr, qualifiers: list[str]) -> Run | None:
    if qualifiers[:3] != ["sync", "aligned", "m8n8"] or qualifiers[-1] != "b16":
        return None
    where, words = instr.args
    count, is_transposed = int(qualifiers[3][1:]), "trans" in qualifiers
    words = words if isinstance(words, list) else [words]
    sources = [batch.source(word, "b32") for word in words]

    def run(mask: Mask) -> None:
        warps = batch.warps_of(mask, "stmatrix")
        lanes = rows_of_lanes(warps, count)
        data = np.stack([batch.of_warps(source, warps) for source in sources], 1)
        rows = transposed_if(is_transposed, data, count).reshape(-1, 4)
        batch.shared.store(addresses(batch, where, lanes, is_shared=True), rows, lanes)

    return run


def half_decoder(kind: str) -> Callable[[NDArray], NDArray]:
    """From bits to float64."""
    if kind == "f16":
        return lambda bits: bits.view(np.float16).astype(np.float64)
    return lambda bits: bf16_to_f32(bits).astype(np.float64)


def fragments(batch: Batch, sources: Sequence[Any], warps: NDArray) -> NDArray:
    """[registers, warps, 32] of some sources."""
    return np.stack([batch.of_warps(source, warps) for source in sources])


def multiply_matrices(batch: Batch, instr: Instr, qualifiers: list[str]) -> Run | None:
    """mma.sync.m16n8k8 and k16 of halves, with sums of float32."""
    if qualifiers[:2] != ["sync", "aligned"] or qualifiers[3:5] != ["row", "col"]:
        return None
    shape, (total_kind, *kinds, sum_kind) = qualifiers[2], qualifiers[5:]
    if shape not in ("m16n8k16", "m16n8k8") or total_kind != "f32" or sum_kind != "f32":
        return None
    if kinds not in (["f16", "f16"], ["bf16", "bf16"]):
        return None
    depth, decode = int(shape[6:]), half_decoder(kinds[0])
    target, *operands = instr.args
    writes = [batch.writer(word, "f32") for word in target]
    a, b, c = (
        [batch.source(word, kind) for word in words]
        for words, kind in zip(operands, ("b32", "b32", "f32"), strict=True)
    )

    def run(mask: Mask) -> None:
        warps = batch.warps_of(mask, "mma")
        n = len(warps)
        # [k half, row half][g, t, h]: row = 8 row half + g, k = 8 k half + 2 t + h
        left = decode(fragments(batch, a, warps).view(np.uint16))
        left = left.reshape(depth // 8, 2, n, 8, 4, 2).transpose(2, 1, 3, 0, 4, 5)
        # [k half][g, t, h]: column g, k = 8 k half + 2 t + h
        right = decode(fragments(batch, b, warps).view(np.uint16))
        right = right.reshape(depth // 8, n, 8, 4, 2).transpose(1, 0, 3, 4, 2)
        total = fragments(batch, c, warps).reshape(2, 2, n, 8, 4).transpose(2, 0, 3, 4, 1)
        result = sum_of_products(
            left.reshape(n, 16, depth),
            right.reshape(n, depth, 8),
            total.reshape(n, 16, 8),
            batch.settings.sums,
        )
        result = result.reshape(n, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3)
        batch.write_warps(writes, result.reshape(4, n, WARP), warps, mask)

    return run


def sum_of_products(left: NDArray, right: NDArray, total: NDArray, sums: str) -> NDArray:
    """[n, m, k] @ [n, k, c] + [n, m, c] in float32, see `Settings.sums`."""
    if sums == "exact":
        return (left @ right + total).astype(np.float32)
    block, extra_bits = SUMS[sums]
    total = total.astype(np.float64)
    for start in range(0, left.shape[2], block):
        part = slice(start, start + block)
        products = left[:, :, None, part] * right[:, None, part].transpose(0, 1, 3, 2)
        terms = np.concatenate([products, total[..., None]], -1)
        # The hardware's greatest exponent is that of the operands' sum: one more at most.
        _, exponents = np.frexp(np.abs(terms).max(-1))
        unit = np.ldexp(1.0, np.maximum(exponents - 24 - extra_bits, -1000))
        total = cut_to_f32(np.trunc(terms / unit[..., None]).sum(-1) * unit)
    return total.astype(np.float32)


INSTRUCTIONS: Final[dict[str, Maker]] = {
    "ldmatrix": load_matrices,
    "stmatrix": store_matrices,
    "mma": multiply_matrices,
}
