"""How many bits of a code are packed together. Knows numbers, never tensors."""

from __future__ import annotations

from typing import Final

WIDE_BITS: Final = 2  # that codes of wide key channels have more than those of others


def lower_bits(bits: int) -> int:
    """Of a code of so many bits, those that are packed together: bytes hold whole codes of them."""
    return 2 if bits == 3 else bits


def upper_bits(bits: int) -> int:
    """The bits above these, which are packed as codes of their own; 0 where there are none."""
    return bits - lower_bits(bits)
