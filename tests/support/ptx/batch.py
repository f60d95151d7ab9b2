"""Some CTAs of a launch that are executed together: their registers, and who is who among threads.

Knows operands, never instructions. A register is an array of a number for every thread ("lane"); a
mask is the lanes that execute an instruction, or True for all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tests.support.ptx.errors import PtxError
from tests.support.ptx.global_memory import GlobalMemory
from tests.support.ptx.number_types import IMMEDIATE, SIGNED, UNSIGNED, dtype_of, parse_number
from tests.support.ptx.program import Instr, Program
from tests.support.ptx.settings import Settings
from tests.support.ptx.shared_memory import SharedMemory

WARP: Final = 32
UNWRITTEN: Final = 0xDEADBEEFDEADBEEF  # a pattern that shows
NARROW: Final = re.compile(r"(ld|st)\.(volatile\.)?shared.*\.[bus](8|16)")
Mask = Any  # True or an array of bool
Run = Callable[[Mask], None]
Write = Callable[[Any, Mask], None]


# Makes an instruction of a batch, its name in parts but for the first; None: not implemented.
Maker = Callable[["Batch", Instr, list[str]], Run | None]


class Launch(NamedTuple):
    program: Program
    grid: tuple[int, int, int]
    parameters: Sequence[int]  # their bits
    shared_bytes: int
    memory: GlobalMemory
    settings: Settings


class Batch:
    def __init__(self, launch: Launch, ctas: NDArray) -> None:
        self.program, self.grid, self.parameters = launch[:3]
        self.memory, self.settings = launch.memory, launch.settings
        self.threads = threads = self.program.threads
        self.num_lanes = len(ctas) * threads
        self.num_warps = self.num_lanes // WARP
        self.cta = np.repeat(np.arange(len(ctas)), threads)  # in the batch
        x, y, z = ctas.T
        numbers = (z * self.grid[1] + y) * self.grid[0] + x
        self.cta_number = np.repeat(numbers, threads).astype(np.int32)  # in the grid
        thread = np.tile(np.arange(threads), len(ctas))
        self.special = self.special_registers(ctas, thread)
        self.shared = SharedMemory(
            launch.shared_bytes,
            self.cta,
            (thread // WARP).astype(np.int16),
            has_narrow=any(NARROW.fullmatch(instr.op) for instr in self.program.instrs),
            settings=self.settings,
        )
        self.registers: dict[str, NDArray] = {}

    def special_registers(self, ctas: NDArray, thread: NDArray) -> dict[str, NDArray]:
        registers = {"%tid.x": thread, "%laneid": thread % WARP}
        registers["%ntid.x"] = np.full(self.num_lanes, self.threads)
        for axis, size, numbers in zip("xyz", self.grid, ctas.T, strict=True):
            registers[f"%ctaid.{axis}"] = np.repeat(numbers, self.threads)
            registers[f"%nctaid.{axis}"] = np.full(self.num_lanes, size)
        return {name: values.astype(np.uint32) for name, values in registers.items()}

    # operands

    def register(self, name: str) -> NDArray:
        if name not in self.registers:
            width = self.program.registers[name]
            if width == 1:
                array = np.zeros(self.num_lanes, bool)
            else:
                array = np.full(self.num_lanes, UNWRITTEN & ((1 << width) - 1), UNSIGNED[width])
            self.registers[name] = array
        return self.registers[name]

    def source(self, word: Any, kind: str) -> Any:
        """Lanes of an operand seen as a type: a live view of the register, or a scalar."""
        if not isinstance(word, str):
            raise PtxError(f"operand {word!r} is not understood")
        if word in self.program.registers:
            array = self.register(word)
            if kind == "pred":
                return array
            dtype = np.dtype(dtype_of(kind))
            if array.dtype.itemsize < dtype.itemsize:
                raise PtxError(f"{word} is too narrow for {kind}")
            return array.view(dtype)[:: array.dtype.itemsize // dtype.itemsize]
        if word in self.special:
            return self.special[word]
        if word in self.program.symbols:
            return dtype_of(kind)(self.program.symbols[word])
        if IMMEDIATE.fullmatch(word):
            return parse_number(word, kind)
        raise PtxError(f"operand {word!r} is not understood")

    def lanes_of_source(self, word: Any, kind: str) -> NDArray:
        """As `source`, an array in any case."""
        return np.broadcast_to(self.source(word, kind), self.num_lanes)

    def writer(self, word: Any, kind: str) -> Write:
        """A function that writes a register; narrower values are extended."""
        if word == "_":
            return lambda values, mask: None
        array = self.register(word)
        if kind == "pred":
            return lambda values, mask: np.copyto(array, values, where=mask)
        dtype = np.dtype(dtype_of(kind))
        if array.dtype.itemsize == dtype.itemsize:
            view = array.view(dtype)
            return lambda values, mask: np.copyto(view, values, where=mask, casting="unsafe")
        if array.dtype.itemsize < dtype.itemsize:
            raise PtxError(f"{word} is too narrow for {kind}")
        wide = array.view(SIGNED[array.dtype.itemsize * 8] if kind[0] == "s" else array.dtype)

        def write(values: Any, mask: Mask) -> None:
            np.copyto(wide, np.asarray(values).astype(dtype), where=mask, casting="unsafe")

        return write

    def elementwise(
        self,
        instr: Instr,
        kind: str,
        function: Callable[..., Any],
        target: str | None = None,
        kinds: Sequence[str] | None = None,
    ) -> Run:
        """Destination = function(sources), of one type or of the given ones."""
        destination, *words = instr.args
        kinds = kinds or [kind] * len(words)
        sources = [self.source(word, each) for word, each in zip(words, kinds, strict=True)]
        write = self.writer(destination, target or kind)
        return lambda mask: write(function(*sources), mask)

    def in_place(self, instr: Instr, kind: str, function: Any) -> Run:
        """As above, straight into the register by a ufunc of numpy."""
        destination, *words = instr.args
        sources = [self.source(word, kind) for word in words]
        array = self.register(destination)
        array = array if kind == "pred" else array.view(dtype_of(kind))
        if len(array) != self.num_lanes:
            raise PtxError(f"{destination} is not as wide as {kind}")
        if any(np.ndim(source) for source in sources):
            return lambda mask: function(*sources, out=array, where=mask, casting="unsafe")
        return lambda mask: np.copyto(array, function(*sources), where=mask)

    # lanes and warps

    def lanes_of(self, mask: Mask) -> NDArray:
        return np.arange(self.num_lanes) if mask is True else np.flatnonzero(mask)

    def warps_of(self, mask: Mask, what: str) -> NDArray:
        """Which warps run, all of whose threads must."""
        if mask is True:
            return np.arange(self.num_warps)
        by_warp = mask.reshape(-1, WARP)
        if (by_warp.any(1) != by_warp.all(1)).any():
            raise PtxError(f"{what} in a warp that has diverged")
        return np.flatnonzero(by_warp[:, 0])

    def of_warps(self, source: Any, warps: NDArray) -> NDArray:
        """[warps, 32] of a source."""
        return np.broadcast_to(source, self.num_lanes).reshape(-1, WARP)[warps]

    def write_lanes(
        self, writes: Sequence[Write], values: Sequence[NDArray], lanes: NDArray, mask: Mask
    ) -> None:
        """Write registers whose values are known for the lanes that run."""
        for write, some in zip(writes, values, strict=True):
            if mask is True:
                write(some, True)
            else:
                spread = np.zeros(self.num_lanes, some.dtype)
                spread[lanes] = some
                write(spread, mask)

    def write_warps(
        self, writes: Sequence[Write], values: NDArray, warps: NDArray, mask: Mask
    ) -> None:
        """As above, of values [registers, warps, 32]."""
        lanes = (warps[:, None] * WARP + np.arange(WARP)).ravel()
        self.write_lanes(writes, values.reshape(len(writes), -1), lanes, mask)
