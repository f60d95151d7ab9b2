"""Inputs of a step without blocks."""

from __future__ import annotations

import numpy as np
import torch

from paged_kv.kernels.step_inputs import StepInputs


def step_of(
    query_lens: list[int],
    context_lens: list[int],
    num_sealed: list[int],
    *,
    num_head_tokens: int,
    block_size: int = 128,
) -> StepInputs:
    """A step without blocks, for what reads only its lengths."""
    none = torch.zeros(len(query_lens), 1, dtype=torch.int64)
    table_width = -(-max(context_lens, default=0) // 16)
    starts = np.concatenate([[0], np.cumsum(query_lens)])
    return StepInputs(
        query_lens=np.array(query_lens, dtype=np.int64),
        context_lens_host=np.array(context_lens, dtype=np.int64),
        context_lens=torch.tensor(context_lens),
        query_start_loc=torch.from_numpy(starts),
        cache_positions=torch.zeros(sum(query_lens), dtype=torch.int64),
        block_table=torch.zeros(len(query_lens), table_width, dtype=torch.int64),
        num_sealed=torch.tensor(num_sealed),
        stored_tokens=none[0],
        stored_slots=none[0],
        seal_block_ids=none[0],
        seal_sources=none,
        block_size=block_size,
        open_block_size=16,
        num_head_tokens=num_head_tokens,
    )
