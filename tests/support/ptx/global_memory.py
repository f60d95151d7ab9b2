"""Buffers of the host as global memory, and which CTAs of a launch touched what. Knows no threads.

Each buffer has an address of its own, aligned as CUDA's allocator would, with a gap behind it.
Within one launch a CTA must not read what another writes, nor two write different values: granules
of 2 bytes, as the least numbers that CTAs write side by side.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tests.support.ptx.errors import PtxError
from tests.support.ptx.number_types import UNSIGNED

ALIGNMENT: Final = 512
GAP: Final = 1 << 24
GRANULE: Final = 2
NOBODY, SEVERAL = -1, -2


class Buffer:
    """Bytes of the host under an address of the device; `views` are its words, by their width."""

    def __init__(self, pointer: int, size: int, base: int, name: str) -> None:
        self.base, self.size, self.name = base, size, name
        raw = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))
        self.views = {w: raw[: size // w * w].view(UNSIGNED[8 * w]) for w in (1, 2, 4, 8)}
        self.writer = np.full(-(-size // GRANULE), NOBODY, np.int32)  # the last CTA
        self.reader = np.full_like(self.writer, NOBODY)

    def note_read(self, at: NDArray, size: int, cta: NDArray) -> None:
        granules, ctas = spread(at, size, cta)
        written = self.writer[granules]
        if (race := (written >= 0) & (written != ctas)).any():
            j = np.flatnonzero(race)[0]
            raise PtxError(
                f"race: CTA {ctas[j]} reads {self.name}+{granules[j] * GRANULE}, which CTA "
                f"{written[j]} writes in the same launch"
            )
        before = self.reader[granules]
        self.reader[granules] = ctas
        mixed = ((before != NOBODY) & (before != ctas)) | (self.reader[granules] != ctas)
        self.reader[granules[mixed]] = SEVERAL

    def note_write(self, at: NDArray, size: int, cta: NDArray, *, changes: bool) -> None:
        granules, ctas = spread(at, size, cta)
        seen = self.reader[granules]
        if (race := (seen == SEVERAL) | ((seen >= 0) & (seen != ctas))).any():
            j = np.flatnonzero(race)[0]
            raise PtxError(
                f"race: CTA {ctas[j]} writes {self.name}+{granules[j] * GRANULE}, which another "
                "CTA reads in the same launch"
            )
        written = self.writer[granules]
        if changes and ((written >= 0) & (written != ctas)).any():
            raise PtxError(f"race: CTAs write different values to {self.name}")
        self.writer[granules] = ctas


def spread(at: NDArray, size: int, cta: NDArray) -> tuple[NDArray, NDArray]:
    """Granules of accesses, and the CTA of each."""
    count = max(size // GRANULE, 1)
    granules = ((at // GRANULE)[:, None] + np.arange(count)).ravel()
    return granules, np.repeat(cta, count)


class GlobalMemory:
    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.by_pointer: dict[tuple[int, int], Buffer] = {}
        self.next_base = 0x7F00_0000_0000

    def add(self, pointer: int, size: int, name: str) -> int:
        """The device address of a buffer of the host, which has to outlive this memory."""
        if size == 0:
            return 0
        if (pointer, size) not in self.by_pointer:
            buffer = Buffer(pointer, size, self.next_base, name)
            self.buffers.append(buffer)
            self.by_pointer[pointer, size] = buffer
            self.next_base += (size + GAP) // ALIGNMENT * ALIGNMENT
        return self.by_pointer[pointer, size].base

    def find(
        self, address: NDArray, size: int, what: str
    ) -> Iterator[tuple[Buffer, NDArray, NDArray]]:
        """Buffers that accesses lie in: which accesses, and where in the buffer."""
        if (misaligned := address % np.uint64(size) != 0).any():
            raise PtxError(f"misaligned {what}: {address[misaligned][0]:#x} of width {size}")
        bases = np.array([buffer.base for buffer in self.buffers], np.uint64)
        found = np.searchsorted(bases, address, side="right").astype(np.int64) - 1
        for i in found[:1] if (found == found[0]).all() else np.unique(found):
            lanes = np.flatnonzero(found == i)
            if i < 0:
                raise PtxError(f"{what} at {address[lanes[0]]:#x}: no buffer there")
            buffer = self.buffers[i]
            at = (address[lanes] - np.uint64(buffer.base)).astype(np.int64)
            if (last := int(at.max())) + size > buffer.size:
                raise PtxError(
                    f"{what} of {size} bytes at {buffer.name}+{last}, which has {buffer.size} bytes"
                )
            yield buffer, lanes, at

    def load(
        self, address: NDArray, width: int, count: int, cta: NDArray, *, checks: bool
    ) -> NDArray:
        """[lanes, count] words of `width` bytes."""
        words = np.empty((len(address), count), UNSIGNED[8 * width])
        for buffer, lanes, at in self.find(address, width * count, "load"):
            words[lanes] = buffer.views[width][(at // width)[:, None] + np.arange(count)]
            if checks:
                buffer.note_read(at, width * count, cta[lanes])
        return words

    def store(self, address: NDArray, words: NDArray, cta: NDArray, *, checks: bool) -> None:
        """Write [lanes, count] words."""
        width, count = words.dtype.itemsize, words.shape[1]
        for buffer, lanes, at in self.find(address, width * count, "store"):
            index = (at // width)[:, None] + np.arange(count)
            view, data = buffer.views[width], words[lanes]
            if checks:
                changes = not np.array_equal(view[index], data)
                buffer.note_write(at, width * count, cta[lanes], changes=changes)
            view[index] = data
            if not np.array_equal(view[index], data):
                raise PtxError("threads store different values to one address")
