"""Loads, stores, asynchronous copies and fences. Knows operands and addresses, never contents."""

from __future__ import annotations

import re
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tests.support.ptx.batch import Batch, Maker, Mask, Run
from tests.support.ptx.errors import PtxError
from tests.support.ptx.number_types import UNSIGNED, bits_of, dtype_of
from tests.support.ptx.program import Address, Instr

# What says nothing of values: hints to caches, and the scope of what is shared.
HINT: Final = re.compile(r"L1::.*|L2::.*|nc|wb|volatile|relaxed|gpu|v\d")


class Access:
    """How one load or store goes to memory, from its name and operands."""

    def __init__(self, batch: Batch, qualifiers: list[str], where: Address, words: Any) -> None:
        *hints, self.kind = qualifiers
        self.width = bits_of(self.kind) // 8
        spaces = [hint for hint in hints if hint.split("::")[0] in ("global", "shared")]
        self.is_shared = bool(spaces) and spaces[0].startswith("shared")
        self.words = words if isinstance(words, list) else [words]
        vectors = [hint for hint in hints if re.fullmatch(r"v\d", hint)]
        count = int(vectors[0][1:]) if vectors else 1
        unknown = [hint for hint in hints if hint not in spaces and not HINT.fullmatch(hint)]
        self.is_known = len(spaces) == 1 and not unknown and count == len(self.words)
        self.batch, self.where = batch, where

    def address(self, lanes: NDArray) -> NDArray:
        return addresses(self.batch, self.where, lanes, is_shared=self.is_shared)


def addresses(batch: Batch, where: Address, lanes: NDArray, *, is_shared: bool) -> NDArray:
    if is_shared:
        base = batch.lanes_of_source(where.base, "u32")[lanes]
        return base.astype(np.int64) + where.offset
    return batch.lanes_of_source(where.base, "u64")[lanes] + np.uint64(where.offset)


def load(batch: Batch, instr: Instr, qualifiers: list[str]) -> Run | None:
    words, where = instr.args
    if qualifiers[0] == "param":
        return load_parameter(batch, words, where.base, qualifiers[-1])
    access = Access(batch, qualifiers, where, words)
    if not access.is_known:
        return None
    kind, width, count = access.kind, access.width, len(access.words)
    writes = [batch.writer(word, kind) for word in access.words]

    def run(mask: Mask) -> None:
        lanes = batch.lanes_of(mask)
        address = access.address(lanes)
        if access.is_shared:
            found = batch.shared.load(address, width, count, lanes)
        else:
            cta, checks = batch.cta_number[lanes], batch.settings.check_races
            found = batch.memory.load(address, width, count, cta, checks=checks)
        batch.write_lanes(writes, found.T, lanes, mask)

    return run


def load_parameter(batch: Batch, word: str, name: str, kind: str) -> Run:
    bits = bits_of(kind)
    value = batch.parameters[batch.program.parameters.index(name)] & ((1 << bits) - 1)
    number = UNSIGNED[bits](value).view(dtype_of(kind))
    write = batch.writer(word, kind)
    return lambda mask: write(number, mask)


def store(batch: Batch, instr: Instr, qualifiers: list[str]) -> Run | None:
    where, words = instr.args
    access = Access(batch, qualifiers, where, words)
    if not access.is_known:
        return None
    sources = [batch.lanes_of_source(word, f"b{8 * access.width}") for word in access.words]

    def run(mask: Mask) -> None:
        lanes = batch.lanes_of(mask)
        address, data = access.address(lanes), np.stack([each[lanes] for each in sources], 1)
        if access.is_shared:
            batch.shared.store(address, data, lanes)
        else:
            cta, checks = batch.cta_number[lanes], batch.settings.check_races
            batch.memory.store(address, data, cta, checks=checks)

    return run


def copy(batch: Batch, instr: Instr, qualifiers: list[str]) -> Run | None:
    """cp.async, its groups and waits."""
    if qualifiers[0] != "async":
        return None
    match qualifiers[1:]:
        case ["commit_group"]:
            return lambda mask: batch.shared.commit_copies(batch.lanes_of(mask))
        case ["wait_group"]:
            count = int(instr.args[0], 0)
            return lambda mask: batch.shared.wait_for_copies(batch.lanes_of(mask), count)
        case ["wait_all"]:
            return lambda mask: batch.shared.wait_for_copies(batch.lanes_of(mask), None)
        case ["ca" | "cg", to, "global", *hints] if to.startswith("shared"):
            return (
                None
                if any(not HINT.fullmatch(hint) for hint in hints)
                else start_copy(batch, instr)
            )
    return None


def start_copy(batch: Batch, instr: Instr) -> Run:
    """What is copied is read at once. A size of the source of 0 is zeros."""
    to, source, size, *given_size = instr.args
    size = int(size, 0)
    given = batch.lanes_of_source(given_size[0] if given_size else str(size), "u32")

    def run(mask: Mask) -> None:
        lanes = batch.lanes_of(mask)
        target = addresses(batch, to, lanes, is_shared=True)
        at = batch.shared.place(target, size, lanes, "copy")
        is_read = given[lanes] == size
        if (given[lanes][~is_read] != 0).any():
            raise PtxError("cp.async of a part of its size is not implemented")
        data = np.zeros((len(lanes), size), np.uint8)
        if is_read.any():
            address = addresses(batch, source, lanes[is_read], is_shared=False)
            if (address % np.uint64(size)).any():
                raise PtxError("misaligned cp.async")
            cta, checks = batch.cta_number[lanes[is_read]], batch.settings.check_races
            words = batch.memory.load(address, 4, size // 4, cta, checks=checks)
            data[is_read] = words.view(np.uint8)
        batch.shared.copy(at, data, lanes)

    return run


def fence(batch: Batch, instr: Instr, qualifiers: list[str]) -> Run | None:
    if qualifiers[:2] != ["proxy", "async"]:
        return None
    return lambda mask: batch.shared.fence(batch.lanes_of(mask))


def nothing(batch: Batch, instr: Instr, qualifiers: list[str]) -> Run:
    return lambda mask: None


INSTRUCTIONS: Final[dict[str, Maker]] = {
    "ld": load,
    "st": store,
    "cp": copy,
    "fence": fence,
    "griddepcontrol": nothing,  # launches follow one another here
}
