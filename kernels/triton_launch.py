"""How Triton's kernels are launched: tile, warps and pipeline stages of each kind.

Chosen by instruction counts of compiled code (`bench/tune.py`); not yet timed on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple


class Launch(NamedTuple):
    """`tile` is rows of codes, or tokens of open blocks, that a program takes at once."""

    tile: int
    num_warps: int
    num_stages: int


def sealed_launch(bits: int, tile_rows: int) -> Launch:
    """For the sealed body, by bits of a code and query rows of a tile."""
    if tile_rows > 16:
        return Launch(tile=64, num_warps=4, num_stages=2)
    return {8: Launch(64, 2, 3), 4: Launch(64, 2, 3), 2: Launch(32, 1, 3)}[bits]


def open_launch(tile_rows: int) -> Launch:
    """For open blocks and new tokens, by query rows of a tile."""
    return Launch(tile=64, num_warps=4, num_stages=2 if tile_rows > 16 else 3)
