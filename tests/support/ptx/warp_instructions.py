"""What the threads of a warp do together: shuffles and reductions. Knows whole warps only."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tests.support.ptx.batch import WARP, Batch, Maker, Mask, Run
from tests.support.ptx.errors import PtxError
from tests.support.ptx.program import Instr

REDUCTIONS: Final[dict[str, Any]] = {
    "min": np.min,
    "max": np.max,
    "add": np.sum,
    "or": np.bitwise_or.reduce,
    "and": np.bitwise_and.reduce,
}


def check_members(batch: Batch, members: Any, mask: Mask, what: str) -> None:
    """All threads of those warps that run take part."""
    warps = batch.warps_of(mask, what)
    if (batch.of_warps(members, warps) != np.uint32(0xFFFFFFFF)).any():
        raise PtxError(f"{what} of a part of a warp is not implemented")


def lanes_shuffled_from(way: str, step: NDArray, bound: int) -> NDArray:
    """[warps, 32] the lane whose value each lane gets; its own where there is none."""
    lane, segment = np.arange(WARP), (bound >> 8) & 31
    first = lane & segment
    last = first | (bound & 31 & ~segment)
    found = {
        "bfly": lane ^ step,
        "idx": first | (step & ~segment),
        "down": lane + step,
        "up": lane - step,
    }[way]
    return np.where(found >= last if way == "up" else found <= last, found, lane)


def shuffle(batch: Batch, instr: Instr, qualifiers: list[str]) -> Run | None:
    destination, source, by, bound, members = instr.args
    if qualifiers[0] != "sync" or qualifiers[-1] != "b32" or not isinstance(destination, str):
        return None
    members, bound = batch.source(members, "u32"), int(bound, 0)
    value, steps = (batch.lanes_of_source(word, "b32").reshape(-1, WARP) for word in (source, by))
    write = batch.writer(destination, "b32")

    def run(mask: Mask) -> None:
        check_members(batch, members, mask, "shfl.sync")
        step = steps.astype(np.int64) & 31
        lanes = lanes_shuffled_from(qualifiers[1], step, bound)
        write(np.take_along_axis(value, lanes, 1).ravel(), mask)

    return run


def reduce(batch: Batch, instr: Instr, qualifiers: list[str]) -> Run | None:
    what, kind = qualifiers[-2:]
    destination, source, members = instr.args
    members = batch.source(members, "u32")
    value = batch.lanes_of_source(source, kind)
    write = batch.writer(destination, kind)

    def run(mask: Mask) -> None:
        check_members(batch, members, mask, "redux.sync")
        found = REDUCTIONS[what](value.reshape(-1, WARP), axis=1).astype(value.dtype)
        write(np.repeat(found, WARP), mask)

    return run


def barrier_of_a_warp(batch: Batch, instr: Instr, qualifiers: list[str]) -> Run | None:
    """Nothing: a warp's threads are executed in step."""
    return (lambda mask: None) if qualifiers[0] == "warp" else None


INSTRUCTIONS: Final[dict[str, Maker]] = {
    "shfl": shuffle,
    "redux": reduce,
    "bar": barrier_of_a_warp,
}
