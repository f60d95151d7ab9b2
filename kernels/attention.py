"""Attention of new tokens over paged context: the torch reference and a usable CPU path.

Sequences with equally many new tokens and similar context are padded together, so that a decode
step is a few large operations. Blocks are dequantized into scratch here; the accelerated kernels
fold scales and zero points into the dot products instead and are held to this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from .quantize import dequantize_keys, dequantize_values
from .records import LayerRecords, StepIndices

MAX_GROUP_TOKENS: Final = 1 << 15  # context tokens that are dequantized at once
NOWHERE: Final = 1 << 62  # position of a padding entry: after every query, so never attended


@dataclass(frozen=True)
class ContextGroup:
    """N sequences of L new tokens each, with padded context: what every layer of a step shares."""

    token_ids: Tensor  # [N, L] index of each new token in the step
    query_positions: Tensor  # [N, L]
    open_ids: Tensor  # [N, C] head and tail blocks
    sealed_ids: Tensor  # [N, B]
    key_positions: Tensor  # [N, K] of open, sealed and new tokens; NOWHERE for padding
    padding_rows: Tensor  # [P] where `key_positions` is NOWHERE
    padding_columns: Tensor  # [P]


def plan_groups(step: StepIndices) -> list[ContextGroup]:
    """Group the sequences of a step: equal numbers of new tokens, context within a factor of 2."""
    order = sorted(
        range(len(step.query_lens)),
        key=lambda row: (step.query_lens[row], step.context_lens_host[row]),
    )
    groups: list[list[int]] = []
    for row in order:
        length = step.context_lens_host[row] + step.query_lens[row]
        if groups:
            first = groups[-1][0]
            fits = (
                step.query_lens[first] == step.query_lens[row]
                and length <= 2 * (step.context_lens_host[first] + step.query_lens[first])
                and length * (len(groups[-1]) + 1) <= MAX_GROUP_TOKENS
            )
            if fits:
                groups[-1].append(row)
                continue
        groups.append([row])
    return [gather_group(step, torch.tensor(rows, device=step.device)) for rows in groups]


def gather_group(step: StepIndices, rows: Tensor) -> ContextGroup:
    """The index tensors of one group of step rows [N]."""
    context_lens = step.context_lens[rows, None]
    num_sealed = step.num_sealed[rows, None]
    length = step.query_lens[int(rows[0])]
    token_ids = step.query_start_loc[rows, None] + torch.arange(length, device=step.device)
    query_positions = step.positions[token_ids]

    # Open blocks: the head's positions are their own, the tail's lie behind the sealed body.
    body_tokens = num_sealed * step.block_size
    num_open_blocks = -(-(context_lens - body_tokens) // step.open_block_size)
    open_ids = step.open_table[rows][:, : int(num_open_blocks.max())]
    entries = torch.arange(open_ids.shape[1] * step.open_block_size, device=step.device)
    open_positions = entries + torch.where(entries < step.num_head_tokens, 0, body_tokens)

    sealed_ids = step.sealed_table[rows][:, : int(num_sealed.max())]
    entries = torch.arange(sealed_ids.shape[1] * step.block_size, device=step.device)
    sealed_positions = step.num_head_tokens + entries.expand(len(rows), -1)
    key_positions = torch.cat(
        [
            open_positions.masked_fill(open_positions >= context_lens, NOWHERE),
            sealed_positions.masked_fill(entries >= body_tokens, NOWHERE),
            query_positions,
        ],
        dim=1,
    )
    padding_rows, padding_columns = (key_positions == NOWHERE).nonzero(as_tuple=True)
    return ContextGroup(
        token_ids=token_ids,
        query_positions=query_positions,
        open_ids=open_ids,
        sealed_ids=sealed_ids,
        key_positions=key_positions,
        padding_rows=padding_rows,
        padding_columns=padding_columns,
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    records: LayerRecords,
    groups: list[ContextGroup],
    *,
    scale: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    attention_chunk: int | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Causal attention of a step's new tokens over their context and each other.

    `query` [T, Hq, key_dim], `key` [T, H, key_dim] and `value` [T, H, value_dim] are the new
    tokens, Hq a multiple of H. A token sees itself and earlier ones; with `sliding_window` w only
    the last w including itself; with `attention_chunk` c only those with the same position // c.
    `softcap` bounds scores by tanh. `sink_logits` [Hq] join the softmax without a value. Returns
    [T, Hq, value_dim] in the dtype of `query`.
    """
    compute_dtype = torch.promote_types(query.dtype, torch.float32)
    output = query.new_empty(query.shape[0], query.shape[1], value.shape[-1])
    for group in groups:
        keys, values = gather_context(records, key, value, group, compute_dtype)
        mask = visible(
            group.query_positions[:, :, None],
            group.key_positions[:, None, :],
            sliding_window,
            attention_chunk,
        )
        queries = query[group.token_ids].to(compute_dtype).transpose(1, 2)
        output[group.token_ids] = (
            dense_attention(queries, keys, values, mask, scale, softcap, sink_logits)
            .transpose(1, 2)
            .to(output.dtype)
        )
    return output


def visible(
    query_positions: Tensor,
    key_positions: Tensor,
    sliding_window: int | None,
    attention_chunk: int | None,
) -> Tensor:
    """True where a query may attend to a key, by their positions alone."""
    mask = key_positions <= query_positions
    if sliding_window is not None:
        mask = mask & (key_positions > query_positions - sliding_window)
    if attention_chunk is not None:
        mask = mask & (key_positions // attention_chunk == query_positions // attention_chunk)
    return mask


def gather_context(
    records: LayerRecords, key: Tensor, value: Tensor, group: ContextGroup, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values [N, H, K, D] of a group in the order of its `key_positions`.

    Padding reads blocks that hold anything, NaN included: it is zeroed, not only masked.
    """
    ids, bits, sealed = group.sealed_ids, records.bits, records.sealed
    keys = [records.open_keys[group.open_ids]]
    values = [records.open_values[group.open_ids]]
    if ids.shape[1]:
        assert sealed is not None
        key_zero = None if sealed.key_zero is None else sealed.key_zero[ids]
        value_zero = None if sealed.value_zero is None else sealed.value_zero[ids]
        keys.append(
            dequantize_keys(sealed.key_codes[ids], sealed.key_scale[ids], key_zero, bits, dtype)
        )
        values.append(
            dequantize_values(
                sealed.value_codes[ids], sealed.value_scale[ids], value_zero, bits, dtype
            )
        )
    return join_tokens(keys, key, group, dtype), join_tokens(values, value, group, dtype)


def join_tokens(
    blocks: list[Tensor], new_tokens: Tensor, group: ContextGroup, dtype: torch.dtype
) -> Tensor:
    """Blocks [N, blocks, H, tokens, D] and the step's new tokens [T, H, D] as one [N, H, K, D]."""
    num_heads, dim = new_tokens.shape[1:]
    num_rows, num_keys = group.key_positions.shape
    joined = torch.empty(num_rows, num_heads, num_keys, dim, dtype=dtype, device=new_tokens.device)
    start = 0
    for part in blocks:
        size = part.shape[1] * part.shape[3]
        target = joined[:, :, start : start + size]
        target.view(num_rows, num_heads, part.shape[1], part.shape[3], dim).copy_(
            part.transpose(1, 2)
        )
        start += size
    joined[:, :, start:] = new_tokens[group.token_ids].transpose(1, 2)
    joined[group.padding_rows, :, group.padding_columns] = 0.0
    return joined


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """Attention of query [N, Hq, L, D] over key and value [N, H, K, D] under mask [N, L, K]."""
    group_size = query.shape[1] // key.shape[1]
    if softcap is None and sink_logits is None:
        if query.shape[2] == 1:  # the heads of a group become query rows of their kv head
            folded = query.reshape(len(query), key.shape[1], group_size, -1)
            result = functional.scaled_dot_product_attention(
                folded, key, value, attn_mask=mask[:, None], scale=scale
            )
            return result.flatten(1, 2).unsqueeze(2)
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask[:, None], scale=scale, enable_gqa=True
        )
    grouped = query.reshape(len(query), -1, group_size, *query.shape[2:])
    scores = grouped @ key.unsqueeze(2).transpose(-1, -2) * scale  # [N, H, group, L, K]
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    if sink_logits is not None:
        sinks = sink_logits.to(scores.dtype).view(-1, group_size, 1, 1)
        scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)
    if sink_logits is not None:
        weights = weights[..., :-1]
    return (weights @ value.unsqueeze(2)).flatten(1, 2)
