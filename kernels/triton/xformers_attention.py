"""Attention of new tokens to each other by xformers' kernels, an option of a GPU's backend.

Knows one step's new tokens, no context.
Where prompts are long and contexts are short, most of a prefill's work is with itself. xformers is
imported when it is first needed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from xformers.ops.fmha import memory_efficient_attention_partial
from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

DTYPES: Final = (torch.float16, torch.bfloat16)


def attend_to_new(
    query: Tensor, key: Tensor, value: Tensor, query_lens: NDArray[np.int64], scale: float
) -> tuple[Tensor, Tensor] | None:
    """Causal attention within each sequence's `query_lens` new tokens, T in all.

    `query` [T, Hq, D], `key` and `value` [T, H, D], all of one 16-bit dtype. Returns contiguous
    outputs [T, Hq, D] in it and natural log-sum-exps of scores [Hq, T] in float32; None where
    xformers has no kernel that gives both: in float32, or with values of another width.
    """
    num_tokens, num_heads, head_dim = key.shape
    if query.dtype not in DTYPES or value.shape != key.shape:
        return None
    grouped = (1, num_tokens, num_heads, query.shape[1] // num_heads, head_dim)
    output, log_sums = memory_efficient_attention_partial(
        query.reshape(grouped),
        key[None, :, :, None].expand(grouped),
        value[None, :, :, None].expand(grouped),
        causal_mask(tuple(query_lens.tolist()), query.device),
        scale=scale,
    )
    log_sums = log_sums.reshape(query.shape[1], num_tokens)
    return output.reshape(query.shape).contiguous(), log_sums.contiguous()


@lru_cache(maxsize=8)
def causal_mask(query_lens: tuple[int, ...], device: torch.device) -> BlockDiagonalCausalMask:
    """Copied to the device once for all layers of a step."""
    return BlockDiagonalCausalMask.from_seqlens(
        [count for count in query_lens if count], device=device
    )
