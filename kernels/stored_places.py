"""Where the stored tokens of sequences lie, and where they are wanted. Knows no tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class StoredPlaces:
    """Of N sequences, the same for every layer: int64, contiguous."""

    open_rows: Tensor  # [O] index among the N, of tokens in open blocks
    open_tokens: Tensor  # [O] their places in their sequences
    open_slots: Tensor  # [O] block_id * open_block_size + row
    sealed_rows: Tensor  # [S] index among the N, of sealed blocks
    sealed_tokens: Tensor  # [S, block_size] places of their tokens
    sealed_ids: Tensor  # [S]


class DenseTokens(NamedTuple):
    """Tensors that stored tokens are written to, in their precision."""

    keys: Tensor  # [N, H, L, key_dim], contiguous
    values: Tensor  # [N, H, L, value_dim], contiguous
    columns: Tensor  # [N, at least the longest]: token j of sequence i belongs at columns[i, j]
