"""Shared memory of some CTAs, and who may touch what when. Knows lanes, warps and barriers only.

A granule is 4 bytes, or 1 where a kernel has narrower accesses. Between two barriers, an access of
a warp to what another warp wrote, or a write to what another warp read, is a race. What is copied
asynchronously lands at the wait that covers it; until then the target must not be touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tests.support.ptx.errors import PtxError
from tests.support.ptx.number_types import UNSIGNED
from tests.support.ptx.settings import Settings

NEVER, SEVERAL = -1, -2
POISON: Final = 0xFF  # of what nobody has written yet, and of what is on its way


class Copies(NamedTuple):
    """What one instruction copies: for each lane, to which byte, what, and in which group."""

    lanes: NDArray
    at: NDArray
    data: NDArray  # [lanes, bytes]
    groups: NDArray

    def some(self, chosen: NDArray) -> Copies:
        return Copies(*(part[chosen] for part in self))


class SharedMemory:
    """Addresses are of a lane's CTA, places (`at`) are in all CTAs' memory, end to end."""

    def __init__(
        self, size: int, cta: NDArray, warp: NDArray, *, has_narrow: bool, settings: Settings
    ) -> None:
        self.size, self.cta, self.warp, self.settings = size, cta, warp, settings
        num_ctas = int(cta[-1]) + 1
        self.threads = len(cta) // num_ctas
        self.pitch = -(-max(size, 16) // 16) * 16  # from CTA to CTA
        self.bytes = np.full(self.pitch * num_ctas, POISON, np.uint8)
        self.views = {w: self.bytes.view(UNSIGNED[8 * w]) for w in (1, 2, 4, 8)}
        self.granule = 1 if has_narrow else 4
        num_granules = len(self.bytes) // self.granule
        self.epoch = np.zeros(num_ctas, np.int32)  # barriers so far
        self.write_warp = np.full(num_granules, NEVER, np.int16)
        self.write_epoch = np.full(num_granules, NEVER, np.int32)
        self.read_warp = np.full(num_granules, NEVER, np.int16)
        self.read_epoch = np.full(num_granules, NEVER, np.int32)
        self.is_pending = np.zeros(num_granules, bool)  # a copy is on its way there
        self.is_unfenced = np.zeros(num_granules, bool)  # written by threads, not shown to wgmma
        self.num_async_reads = np.zeros(num_granules, np.int16)  # by wgmmas that may still read
        self.copies: list[Copies] = []
        self.num_committed = np.zeros(len(cta), np.int64)  # groups of copies
        self.wgmma_open: list[list[NDArray]] = [[] for _ in range(num_ctas)]
        self.wgmma_groups: list[list[list[NDArray]]] = [[] for _ in range(num_ctas)]

    # places

    def place(self, address: NDArray, size: int, lanes: NDArray, what: str) -> NDArray:
        address = address.astype(np.int64)
        if (misaligned := address % size != 0).any():
            raise PtxError(f"misaligned shared {what}: {address[misaligned][0]:#x}, width {size}")
        if (address < 0).any() or (address + size > self.size).any():
            raise PtxError(
                f"shared {what} outside of {self.size} bytes: "
                f"{int(address.min()):#x}..{int(address.max()):#x}, width {size}"
            )
        return address + self.cta[lanes] * self.pitch

    def granules_of(self, at: NDArray, size: int, lanes: NDArray) -> tuple[NDArray, NDArray]:
        """Granules of accesses, and the lane of each."""
        count = max(size // self.granule, 1)
        granules = ((at // self.granule)[:, None] + np.arange(count)).ravel()
        return granules, np.repeat(lanes, count)

    def address_of(self, granules: NDArray, is_bad: NDArray) -> str:
        """The first bad one of some granules, as a CTA addresses it."""
        return f"{granules[np.flatnonzero(is_bad)[0]] * self.granule % self.pitch:#x}"

    # accesses of threads

    def load(self, address: NDArray, width: int, count: int, lanes: NDArray) -> NDArray:
        """[lanes, count] words of `width` bytes."""
        at = self.place(address, width * count, lanes, "load")
        self.check_read(at, width * count, lanes)
        return self.views[width][(at // width)[:, None] + np.arange(count)]

    def store(self, address: NDArray, words: NDArray, lanes: NDArray) -> None:
        """Write [lanes, count] words."""
        width, count = words.dtype.itemsize, words.shape[1]
        at = self.place(address, width * count, lanes, "store")
        index = (at // width)[:, None] + np.arange(count)
        view = self.views[width]
        changes = not np.array_equal(view[index], words)
        self.check_write(at, width * count, lanes, changes=changes)
        view[index] = words
        if not np.array_equal(view[index], words):
            raise PtxError("threads store different values to one shared address")

    def check_read(self, at: NDArray, size: int, lanes: NDArray) -> None:
        granules, lanes = self.granules_of(at, size, lanes)
        if (pending := self.is_pending[granules]).any():
            where = self.address_of(granules, pending)
            raise PtxError(f"shared memory is read while cp.async may still write it, at {where}")
        if not self.settings.check_races:
            return
        written = self.write_epoch[granules]
        if (unwritten := written == NEVER).any():
            where = self.address_of(granules, unwritten)
            raise PtxError(f"shared memory is read that nobody wrote, at {where}")
        epoch, warp = self.epoch[self.cta[lanes]], self.warp[lanes]
        if (race := (written == epoch) & (self.write_warp[granules] != warp)).any():
            raise PtxError(
                f"race: a warp reads shared {self.address_of(granules, race)} that another wrote "
                "without a barrier between"
            )
        before = self.read_warp[granules]
        mixed = (self.read_epoch[granules] == epoch) & (before != warp)
        self.read_warp[granules] = warp
        self.read_epoch[granules] = epoch
        mixed |= self.read_warp[granules] != warp
        self.read_warp[granules[mixed]] = SEVERAL

    def check_write(self, at: NDArray, size: int, lanes: NDArray, *, changes: bool = True) -> None:
        granules, lanes = self.granules_of(at, size, lanes)
        if self.num_async_reads[granules].any():
            raise PtxError("shared memory is written while a wgmma may still read it")
        if self.is_pending[granules].any():
            raise PtxError("shared memory is written while cp.async may still write it")
        if self.settings.check_races:
            epoch, warp = self.epoch[self.cta[lanes]], self.warp[lanes]
            race = (self.read_epoch[granules] == epoch) & (self.read_warp[granules] != warp)
            if race.any():
                raise PtxError(
                    f"race: a warp writes shared {self.address_of(granules, race)} that another "
                    "reads without a barrier between"
                )
            race = (self.write_epoch[granules] == epoch) & (self.write_warp[granules] != warp)
            if changes and race.any():
                raise PtxError("race: two warps write shared memory without a barrier between")
            self.write_warp[granules] = warp
            self.write_epoch[granules] = epoch
        self.is_unfenced[granules] = True

    # asynchronous copies

    def copy(self, at: NDArray, data: NDArray, lanes: NDArray) -> None:
        """Start to write bytes [lanes, size]."""
        size = data.shape[1]
        self.check_write(at, size, lanes)
        granules, _ = self.granules_of(at, size, lanes)
        if len(np.unique(granules)) < len(granules):
            raise PtxError("two threads copy to one shared address")
        self.is_pending[granules] = True
        self.bytes[at[:, None] + np.arange(size)] = POISON
        self.copies.append(Copies(lanes, at, data, self.num_committed[lanes]))

    def commit_copies(self, lanes: NDArray) -> None:
        self.num_committed[lanes] += 1

    def wait_for_copies(self, lanes: NDArray, num_left: int | None) -> None:
        """Copies land that are in all but the newest groups of these lanes; None: really all."""
        limit = np.zeros_like(self.num_committed)
        limit[lanes] = np.iinfo(np.int64).max
        if num_left is not None:
            limit[lanes] = self.num_committed[lanes] - num_left
        remaining = []
        for copies in self.copies:
            lands = copies.groups < limit[copies.lanes]
            if lands.any():
                self.land(copies.some(lands))
            if not lands.all():
                remaining.append(copies.some(~lands))
        self.copies = remaining

    def land(self, copies: Copies) -> None:
        size = copies.data.shape[1]
        self.bytes[copies.at[:, None] + np.arange(size)] = copies.data
        granules, owners = self.granules_of(copies.at, size, copies.lanes)
        self.is_pending[granules] = False
        self.write_warp[granules] = self.warp[owners]
        self.write_epoch[granules] = self.epoch[self.cta[owners]]
        # Neither Triton nor CUTLASS puts a fence between the wait for copies and wgmma.
        self.is_unfenced[granules] = self.settings.fence_copies

    # reads of warp groups

    def read_by_wgmma(self, address: NDArray, lanes: NDArray) -> NDArray:
        """Halves at addresses, which are read until the group that they are in has been awaited."""
        at = self.place(address, 2, lanes, "wgmma operand")
        touched = np.zeros(len(self.write_epoch), bool)
        touched[at // self.granule] = True
        granules = np.flatnonzero(touched)
        owner = granules * self.granule // self.pitch
        if self.is_pending[granules].any():
            raise PtxError("a wgmma reads what cp.async may still write")
        if self.settings.check_races:
            written, epoch = self.write_epoch[granules], self.epoch[owner]
            if (written == NEVER).any():
                raise PtxError("a wgmma reads shared memory that nobody wrote")
            if self.is_unfenced[granules].any():
                raise PtxError("a wgmma reads what no fence.proxy.async has shown to it")
            if (written == epoch).any():
                raise PtxError("a wgmma reads what other warps wrote without a barrier between")
            self.read_warp[granules] = SEVERAL
            self.read_epoch[granules] = epoch
        self.num_async_reads[granules] += 1
        for cta in np.unique(owner):
            self.wgmma_open[cta].append(granules[owner == cta])
        return self.views[2][at // 2]

    def fence(self, lanes: NDArray) -> None:
        """Each of these threads shows its own writes; a barrier must follow for those of others."""
        for cta in np.unique(self.cta[lanes]):
            part = slice(*(np.array([cta, cta + 1]) * self.pitch // self.granule))
            warps = np.unique(self.warp[lanes[self.cta[lanes] == cta]])
            self.is_unfenced[part] &= ~np.isin(self.write_warp[part], warps)

    def commit_wgmmas(self, ctas: Sequence[Any] | NDArray) -> None:
        for cta in ctas:
            self.wgmma_groups[cta].append(self.wgmma_open[cta])
            self.wgmma_open[cta] = []

    def wait_for_wgmmas(self, ctas: Sequence[Any] | NDArray, num_left: int) -> None:
        for cta in ctas:
            while len(self.wgmma_groups[cta]) > num_left:
                for granules in self.wgmma_groups[cta].pop(0):
                    self.num_async_reads[granules] -= 1
