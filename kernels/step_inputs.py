"""One step's index tensors, as kernels read them. Knows sizes, nothing of sequences or requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

NO_WINDOW: Final = 1 << 30  # tokens


@dataclass(frozen=True)
class StepInputs:
    """One step of N sequences and T new tokens; int64 tensors on the cache's device.

    The context of a sequence, everything stored before the step, is the first
    `min(context_len, num_head_tokens)` tokens in its first open blocks, then
    `num_sealed * block_size` tokens in sealed blocks, then the rest in further open blocks.
    """

    query_lens: tuple[int, ...]  # [N] new tokens of each sequence, known on the host
    context_lens_host: tuple[int, ...]  # [N] the same as `context_lens`
    context_lens: Tensor  # [N]
    query_start_loc: Tensor  # [N + 1]
    positions: Tensor  # [T]
    open_table: Tensor  # [N, C]
    sealed_table: Tensor  # [N, B]
    num_sealed: Tensor  # [N]
    stored_tokens: Tensor  # [W] new tokens that are written to open blocks ...
    stored_slots: Tensor  # [W] ... and their slots: block_id * open_block_size + offset
    seal_block_ids: Tensor  # [S]
    seal_sources: Tensor  # [S, block_size] open slot, or ~index of a new token
    block_size: int
    open_block_size: int
    num_head_tokens: int
    # Of streams, None where there is none: see `ScoreRules.visible`.
    num_sink_tokens: Tensor | None = None  # [N] 0 where a sequence sees everything
    window_sizes: Tensor | None = None  # [N] NO_WINDOW there

    def __post_init__(self) -> None:
        """Raise `ValueError` for what would lead kernels astray, as far as the host can see it."""
        shortest, num_new = min(self.query_lens, default=0), sum(self.query_lens)
        if shortest < 0 or num_new != len(self.positions):
            raise ValueError(
                f"query_lens must not be negative and add up to the {len(self.positions)} "
                f"positions, got {self.query_lens}"
            )
        open_entries = self.open_table.shape[1] * self.open_block_size
        capacity = open_entries + self.sealed_table.shape[1] * self.block_size
        longest = max(self.context_lens_host, default=0)
        if longest > capacity:
            raise ValueError(f"a context of {longest} tokens is beyond block tables for {capacity}")

    @property
    def device(self) -> torch.device:
        return self.positions.device
