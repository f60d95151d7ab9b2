"""What the kernels read and write: one layer's blocks, under typed views. Knows no sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class SealedViews(NamedTuple):
    """Quantized views over a layer's arena. NB blocks, H kv heads, G key groups, B tokens a block.

    A code row is one byte row: with 2 bits, row t of R holds tokens t, t + R, t + 2R and t + 3R of
    a block at bits 0, 2, 4 and 6. The views are logical; their strides follow the device. Where
    codes have more bits than fit with others in a byte, the upper bits are packed apart, as codes
    of their own: those of wide channels, which have 2 bits more than others, as if they were W more
    channels, and the third of values.
    """

    key_codes: Tensor  # uint8 [NB, H, B * key_bits / 8, key_dim]
    wide_codes: Tensor | None  # uint8 [NB, H, B * 2 / 8, W]
    value_codes: Tensor  # uint8 [NB, H, B * lower_bits(value_bits) / 8, value_dim]
    upper_value_codes: Tensor | None  # uint8 [NB, H, B / 8, value_dim]
    key_scale: Tensor  # fp16 [NB, H, G, key_dim]; or [NB, H, B], for each key one
    key_zero: Tensor | None  # fp16 [NB, H, G, key_dim], where the scale is
    value_scale: Tensor  # fp16 [NB, H, B]
    value_zero: Tensor | None  # fp16 [NB, H, B]; None where codes lie around 0

    @property
    def block_size(self) -> int:
        return self.value_scale.shape[2]

    @property
    def num_key_groups(self) -> int:
        """G; 0 where a key has one scale, for itself."""
        return 0 if self.key_zero is None else self.key_zero.shape[2]

    def at(self, ids: Tensor | int) -> SealedViews:
        """The sections of these blocks, gathered: dimensions of `ids` instead of the first."""
        return SealedViews(*(None if section is None else section[ids] for section in self))  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class LayerBlocks:
    """One layer's arena under both readings of a record, and how to quantize into it."""

    open_keys: Tensor  # [NB, H, open_block_size, key_dim], full precision, strides as above
    open_values: Tensor  # [NB, H, open_block_size, value_dim]
    sealed: SealedViews | None  # None in the native format
    key_bits: int = 0
    value_bits: int = 0
    key_clip: float = 1.0
    wide_key_clip: float = 1.0
    value_clip: float = 1.0
    wide_channels: Tensor | None = None  # int64 [H, W], ascending
    # float32 [H, key_dim, key_dim]: what an error in one channel adds to, row by row, to those
    # behind it, where sealing makes up for errors.
    feedback: Tensor | None = None


def as_rows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In this precision, with contiguous rows; the tensor itself where it is so already."""
    if tensor.dtype is not dtype:
        tensor = tensor.to(dtype)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
