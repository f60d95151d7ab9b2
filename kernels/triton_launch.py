"""How Triton's kernels are launched: tiles, warps and pipeline stages of each kind.

Chosen by instructions for each byte in compiled code for sm_90, among what spills no register on
sm_80 and sm_90 (`bench/NOTES.md`); not yet timed on a GPU.
"""

from __future__ import annotations

from typing import Final, NamedTuple

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


def tile_rows(columns: int) -> TileRows:
    """By channels of a key or a value, whichever has more."""
    return TileRows((8, 16), 64) if columns <= WIDE else TileRows((8,), 32)


# By bits of a code (0: open blocks) and query rows of a tile.
NARROW_LAUNCHES: Final = {
    (8, 8): Launch(128, 2, 3),
    (8, 16): Launch(128, 2, 3),
    (8, 64): Launch(32, 4, 2),
    (4, 8): Launch(64, 2, 3),
    (4, 16): Launch(32, 2, 3),
    (4, 64): Launch(32, 8, 2),
    (2, 8): Launch(32, 1, 3),
    (2, 16): Launch(32, 2, 3),
    (2, 64): Launch(32, 8, 2),
    (0, 8): Launch(64, 2, 3),
    (0, 16): Launch(64, 2, 3),
    (0, 64): Launch(32, 4, 2),
}
WIDE_LAUNCHES: Final = {
    (8, 8): Launch(64, 2, 3),
    (8, 32): Launch(32, 4, 2),
    (4, 8): Launch(64, 4, 3),
    (4, 32): Launch(16, 4, 2),
    (2, 8): Launch(32, 2, 3),
    (2, 32): Launch(16, 8, 2),
    (0, 8): Launch(32, 2, 3),
    (0, 32): Launch(32, 4, 2),
}


def attention_launch(bits: int, rows: int, columns: int, *, is_heavy: bool = False) -> Launch:
    """For codes of so many bits (0: open blocks and new tokens), `rows` and `columns` of a tile.

    Masks and several key groups in a block are heavy: they take registers that 2 bits do not have.
    """
    launch = (NARROW_LAUNCHES if columns <= WIDE else WIDE_LAUNCHES)[bits, rows]
    if bits == 2 and is_heavy:
        launch = launch._replace(num_warps=2 * launch.num_warps)
    return launch


def seal_launch(columns: int) -> Launch:
    """For sealing blocks, whose loads feed no product: there is nothing to pipeline."""
    return Launch(tile=16, num_warps=8 if columns <= WIDE else 16, num_stages=1)
