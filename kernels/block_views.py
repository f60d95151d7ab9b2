"""What the kernels read and write: one layer's blocks, under typed views. Knows no sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class SealedViews(NamedTuple):
    """Quantized views over a layer's arena. NB blocks, H kv heads, R code rows, G key groups.

    A code row is one byte row: with 2 bits, row t holds tokens t, t + R, t + 2R and t + 3R of a
    block at bits 0, 2, 4 and 6. The views are logical; their strides follow the device.
    """

    key_codes: Tensor  # uint8 [NB, H, R, key_dim]
    value_codes: Tensor  # uint8 [NB, H, R, value_dim]
    key_scale: Tensor  # fp16 [NB, H, block_size], or [NB, H, G, key_dim] below 8 bits
    key_zero: Tensor | None  # fp16 [NB, H, G, key_dim], below 8 bits
    value_scale: Tensor  # fp16 [NB, H, block_size]
    value_zero: Tensor | None  # fp16 [NB, H, block_size], below 8 bits

    @property
    def block_size(self) -> int:
        return self.value_scale.shape[2]

    @property
    def num_key_groups(self) -> int:
        """G; 0 where a key has one scale, for itself."""
        return 0 if self.key_zero is None else self.key_zero.shape[2]


@dataclass(frozen=True, eq=False)
class LayerBlocks:
    """One layer's arena under both readings of a record, and how to quantize into it."""

    open_keys: Tensor  # [NB, H, open_block_size, key_dim], full precision, strides as above
    open_values: Tensor  # [NB, H, open_block_size, value_dim]
    sealed: SealedViews | None  # None in the native format
    bits: int = 0
    key_clip: float = 1.0
    value_clip: float = 1.0


def as_rows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In this precision, with contiguous rows; the tensor itself where it is so already."""
    if tensor.dtype is not dtype:
        tensor = tensor.to(dtype)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
