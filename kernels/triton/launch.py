"""How Triton's kernels are launched: tiles, warps and pipeline stages of each kind.

Knows bits, channels and rows, no tensors.
Chosen by instructions for each byte in compiled code for sm_90, among what spills no register on
sm_80 and sm_90 (`bench/NOTES.md`); not yet timed on a GPU.
"""

from __future__ import annotations

from functools import cache
from typing import Final, NamedTuple

import torch

WIDE: Final = 128  # channels, padded, beyond which registers are scarce


class Launch(NamedTuple):
    """`tile` is rows of codes, or tokens of open blocks, that a program takes at once."""

    tile: int
    num_warps: int
    num_stages: int


class TileRows(NamedTuple):
    """Query rows of a tile: where a sequence has few of them, and where it has many."""

    small: tuple[int, ...]
    large: int


# Few query rows, by the fewest bits that are packed together (0: open blocks; 1: the third bits of
# values) and query rows of a tile.
NARROW_LAUNCHES: Final = {
    (8, 8): Launch(128, 2, 3),
    (8, 16): Launch(128, 2, 3),
    (4, 8): Launch(32, 1, 3),
    (4, 16): Launch(32, 2, 2),
    (2, 8): Launch(16, 1, 3),
    (1, 8): Launch(16, 1, 3),
    (0, 8): Launch(64, 2, 3),
    (0, 16): Launch(64, 2, 3),
}
WIDE_LAUNCHES: Final = {
    (8, 8): Launch(64, 4, 3),
    (4, 8): Launch(64, 4, 3),
    (2, 8): Launch(16, 2, 2),
    (1, 8): Launch(16, 4, 2),
    (0, 8): Launch(32, 2, 3),
}
# Many, whose tiles are of tokens whatever the bits. Products of Hopper read numbers from shared
# memory; before it every warp makes them of codes, which takes registers.
HOPPER_PREFILLS: Final = {
    8: Launch(64, 4, 2),
    4: Launch(64, 4, 2),
    2: Launch(32, 4, 2),
    1: Launch(16, 4, 2),
    0: Launch(64, 4, 2),
}
HOPPER_WIDE_PREFILLS: Final = {
    8: Launch(32, 8, 2),
    4: Launch(32, 8, 2),
    2: Launch(16, 8, 2),
    1: Launch(16, 8, 2),
    0: Launch(32, 4, 2),
}
AMPERE_PREFILLS: Final = {
    8: Launch(32, 4, 2),
    4: Launch(32, 8, 1),
    2: Launch(32, 8, 1),
    1: Launch(16, 8, 1),
    0: Launch(32, 4, 2),
}
AMPERE_WIDE_PREFILLS: Final = {
    8: Launch(32, 8, 2),
    4: Launch(32, 8, 1),
    2: Launch(16, 8, 1),
    1: Launch(16, 8, 2),
    0: Launch(32, 4, 2),
}


def tile_rows(
    bits: int, columns: int, device: torch.device, *, has_groups: bool = False
) -> TileRows:
    """By the fewest bits, and channels of a key or a value, whichever has more.

    Several key groups in a block, or wide channels, take a set of scaled
    queries each: 16 rows of them do not fit.
    """
    if columns <= WIDE:
        return TileRows((8,) if has_groups or bits in (1, 2) else (8, 16), 64)
    return TileRows((8,), 64 if is_hopper(device) else 32)


def open_launch(rows: int, columns: int, *, has_windows: bool = False) -> Launch:
    """For few query rows, open blocks and new tokens."""
    if columns <= WIDE:
        return NARROW_LAUNCHES[0, rows]
    launch = WIDE_LAUNCHES[0, rows]
    return launch._replace(num_stages=2) if has_windows else launch


def sealed_launch(
    bits: int,
    rows: int,
    columns: int,
    device: torch.device,
    *,
    has_rules: bool = False,
    has_groups: bool = False,
) -> Launch:
    """For few query rows and codes of so many bits, at the least.

    Masks or a softcap, and several key groups in a block, take registers that few bits do not have.
    """
    is_wide = columns > WIDE
    if has_groups and (bits < 8 or (is_wide and has_rules)):
        if is_wide:
            return Launch(16, 4 if bits == 2 else 2, 2)
        return Launch(32, 2, 2 if bits == 2 else 3)
    if has_rules and bits == 8 and rows == 16 and not is_wide:
        return Launch(32, 2, 3)
    if has_rules and bits <= 2:
        return Launch(16, 4, 2) if is_wide else Launch(32, 2, 3)
    return (WIDE_LAUNCHES if is_wide else NARROW_LAUNCHES)[bits, rows]


def prefill_launch(
    bits: int, columns: int, device: torch.device, *, has_windows: bool = False
) -> Launch:
    """For many query rows."""
    if is_hopper(device):
        if bits == 0 and has_windows:  # a loop more, over sinks
            return Launch(32, 4, 2) if columns <= WIDE else Launch(16, 4, 1)
        return (HOPPER_PREFILLS if columns <= WIDE else HOPPER_WIDE_PREFILLS)[bits]
    return (AMPERE_PREFILLS if columns <= WIDE else AMPERE_WIDE_PREFILLS)[bits]


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether matrix products take operands from shared memory, or there is no GPU to ask."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def seal_launch(columns: int) -> Launch:
    """For sealing blocks, whose loads feed no product: there is nothing to pipeline."""
    return Launch(tile=16, num_warps=8 if columns <= WIDE else 16, num_stages=1)
