"""One step as kernels read it: lengths and block tables. Knows blocks, not whose or why they are.

A block table has one form everywhere: with b = `open_block_size`, index i is the block of the
stored tokens [i * b, (i + 1) * b). A sealed block stands in the first of its tokens' places; the
others are not read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NO_WINDOW: Final = 1 << 30  # tokens
Longs = NDArray[np.int64]


@dataclass(frozen=True, eq=False, kw_only=True)
class StepInputs:
    """One step of N sequences and T new tokens; int64 tensors on the cache's device.

    The context of a sequence, everything stored before the step, is the first
    `min(context_len, num_head_tokens)` tokens in open blocks, then `num_sealed * block_size` tokens
    in sealed blocks, then the rest in open blocks again.
    """

    query_lens: Longs  # [N] new tokens of each sequence, on the host
    context_lens_host: Longs  # [N] the same as `context_lens`, on the host
    context_lens: Tensor  # [N]
    query_start_loc: Tensor  # [N + 1]
    cache_positions: Tensor  # [T] places among the tokens that the sequence stores
    block_table: Tensor  # [N, W], rows contiguous
    num_sealed: Tensor  # [N]
    stored_tokens: Tensor  # [W_s] new tokens that are written to open blocks, in order ...
    stored_slots: Tensor  # [W_s] ... and their slots: block_id * open_block_size + row
    seal_block_ids: Tensor  # [S]
    seal_sources: Tensor  # [S, block_size] open slot, or ~index of a new token
    block_size: int
    open_block_size: int
    num_head_tokens: int
    # A block is sealed where the first of its own sources is, not in a block of its own.
    seals_in_place: bool = False
    # Of windowed sequences, None where there is none: see `ScoreRules.visible`.
    num_sink_tokens: Tensor | None = None  # [N] 0 where a sequence sees everything
    window_sizes: Tensor | None = None  # [N] NO_WINDOW there

    def __post_init__(self) -> None:
        """Raise `ValueError` for what would lead kernels astray, as far as the host can see it."""
        shortest, num_new = self.query_lens.min(initial=0), self.query_lens.sum()
        if shortest < 0 or num_new != len(self.cache_positions):
            raise ValueError(
                f"query_lens must not be negative and add up to the {len(self.cache_positions)} "
                f"positions, got {tuple(self.query_lens.tolist())}"
            )
        capacity = self.block_table.shape[1] * self.open_block_size
        longest = self.context_lens_host.max(initial=0)
        if longest > capacity:
            raise ValueError(f"a context of {longest} tokens is beyond block tables for {capacity}")

    @property
    def device(self) -> torch.device:
        return self.cache_positions.device

    def sealed_block_ids(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Ids of body blocks, counted from 0, of step rows; 0 where there is none."""
        places = columns * (self.block_size // self.open_block_size)
        places = places + self.num_head_tokens // self.open_block_size
        return self._ids_at(rows, places, columns < self.num_sealed[rows])

    def open_block_ids(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Ids of open blocks, head and tail counted from 0, of step rows; 0 where there is none."""
        body_places = self.num_sealed[rows] * (self.block_size // self.open_block_size)
        is_tail = columns >= self.num_head_tokens // self.open_block_size
        places = columns + is_tail * body_places
        exists = places * self.open_block_size < self.context_lens[rows]
        return self._ids_at(rows, places, exists)

    def _ids_at(self, rows: Tensor, places: Tensor, exists: Tensor) -> Tensor:
        if not exists.any():  # the table may have no column
            return torch.zeros_like(exists, dtype=torch.int64)
        return self.block_table[rows, places * exists].where(exists, 0)


class KernelPlan(Protocol):
    """What a backend works out of a step once, for all layers; only that backend knows more."""

    @property
    def step(self) -> StepInputs: ...
