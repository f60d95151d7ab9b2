"""Attention of new tokens over paged context by torch's operations, on whatever device torch knows.

Knows a step's tables and one layer's blocks, nothing of models. Sequences with a few new tokens go
through `flat_attention`. Those with many, equally many and with similar context, are padded
together and their blocks dequantized into scratch. The accelerated kernels are held to this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from ..block_views import LayerBlocks
from ..new_tokens import NewTokens
from ..rules import NOWHERE, ScoreRules
from ..step_inputs import StepInputs
from .flat_attention import FlatGroup, attend_flat, of_rows, plan_flat_group
from .quantize import dequantize_keys, dequantize_values

MAX_FLAT_TOKENS: Final = 8  # with more new tokens, dequantizing the context once pays
MAX_FLAT_SCORES: Final = 1 << 18  # scores of a query head that are held at once
MAX_GROUP_TOKENS: Final = 1 << 15  # context tokens that are dequantized at once


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
    num_sinks: Tensor | None  # [N, 1, 1] of windowed sequences, as in `StepInputs`
    windows: Tensor | None  # [N, 1, 1]


AnyGroup = ContextGroup | FlatGroup


class EagerPlan:
    """What the layers of a step share: its sequences in groups that are computed together."""

    def __init__(self, step: StepInputs) -> None:
        self.step = step
        self.groups: Final = plan_groups(step)


def plan_groups(step: StepInputs) -> list[AnyGroup]:
    """Group the sequences of a step, equal numbers of new tokens together.

    Context that is to be padded is within a factor of 2 in a group.
    """
    query_lens = step.query_lens.tolist()
    lengths = (step.query_lens + step.context_lens_host).tolist()
    order = sorted(range(len(lengths)), key=lambda row: (query_lens[row], lengths[row]))
    groups: list[list[int]] = []
    for row in order:
        if groups and fits_group(query_lens, lengths, groups[-1], row):
            groups[-1].append(row)
        else:
            groups.append([row])
    return [
        (plan_flat_group if is_flat(query_lens[rows[0]]) else gather_group)(
            step, torch.tensor(rows, device=step.device)
        )
        for rows in groups
    ]


def is_flat(num_new_tokens: int) -> bool:
    return num_new_tokens <= MAX_FLAT_TOKENS


def fits_group(
    query_lens: Sequence[int], lengths: Sequence[int], group: list[int], row: int
) -> bool:
    """Whether a step row, no shorter than those of the group, may join it."""
    num_new_tokens = query_lens[row]
    if query_lens[group[0]] != num_new_tokens:
        return False
    padded_tokens = lengths[row] * (len(group) + 1)  # at least as many as there are
    if is_flat(num_new_tokens):
        return padded_tokens * num_new_tokens <= MAX_FLAT_SCORES
    return lengths[row] <= 2 * lengths[group[0]] and padded_tokens <= MAX_GROUP_TOKENS


def gather_group(step: StepInputs, rows: Tensor) -> ContextGroup:
    """The index tensors of one group of step rows [N]."""
    context_lens = step.context_lens[rows, None]
    num_sealed = step.num_sealed[rows, None]
    length = int(step.query_lens[int(rows[0])])
    token_ids = step.query_start_loc[rows, None] + torch.arange(length, device=step.device)
    query_positions = step.cache_positions[token_ids]

    # Open blocks: the head's positions are their own, the tail's lie behind the sealed body.
    body_tokens = num_sealed * step.block_size
    num_open_blocks = -(-(context_lens - body_tokens) // step.open_block_size)
    columns = torch.arange(int(num_open_blocks.max()), device=step.device)
    open_ids = step.open_block_ids(rows[:, None], columns)
    entries = torch.arange(open_ids.shape[1] * step.open_block_size, device=step.device)
    open_positions = entries + torch.where(entries < step.num_head_tokens, 0, body_tokens)

    columns = torch.arange(int(num_sealed.max()), device=step.device)
    sealed_ids = step.sealed_block_ids(rows[:, None], columns)
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
        num_sinks=of_rows(step.num_sink_tokens, rows),
        windows=of_rows(step.window_sizes, rows),
    )


def attend(new: NewTokens, layer: LayerBlocks, plan: EagerPlan, rules: ScoreRules) -> Tensor:
    """As `naive.attend`, but that sums are float32 where the query is of less precision."""
    query = new.query
    output = query.new_empty(query.shape[0], query.shape[1], new.value.shape[-1])
    for group in plan.groups:
        if isinstance(group, FlatGroup):
            result = attend_flat(new, layer, group, rules)
        else:
            result = attend_dense(new, layer, group, rules)
        output[group.token_ids] = result.to(output.dtype)
    return output


def attend_dense(
    new: NewTokens, layer: LayerBlocks, group: ContextGroup, rules: ScoreRules
) -> Tensor:
    """Attention [N, L, Hq, value_dim] of a group's new tokens; arguments as of `attend`."""
    query, sink_query = new.query, new.sink_query
    compute_dtype = torch.promote_types(query.dtype, torch.float32)
    keys, values = gather_context(new, layer, group, compute_dtype)
    key_positions = group.key_positions[:, None, :]
    mask = rules.visible(
        group.query_positions[:, :, None], key_positions, group.num_sinks, group.windows
    )

    def by_head(rows: Tensor) -> Tensor:
        return rows[group.token_ids].to(compute_dtype).transpose(1, 2)

    sinks = None
    if sink_query is not None and group.num_sinks is not None:
        sinks = by_head(sink_query), key_positions < group.num_sinks
    return attend_padded(by_head(query), keys, values, mask, rules, sinks).transpose(1, 2)


def gather_context(
    new: NewTokens, layer: LayerBlocks, group: ContextGroup, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values [N, H, K, D] of a group in the order of its `key_positions`.

    Padding reads blocks that hold anything, NaN included: it is zeroed, not only masked.
    """
    ids = group.sealed_ids
    keys = [layer.open_keys[group.open_ids]]
    values = [layer.open_values[group.open_ids]]
    if ids.shape[1]:
        assert layer.sealed is not None
        sealed = layer.sealed.at(ids)
        keys.append(dequantize_keys(sealed, layer.key_bits, layer.wide_channels, dtype))
        values.append(dequantize_values(sealed, layer.value_bits, dtype))
    return join_tokens(keys, new.key, group, dtype), join_tokens(values, new.value, group, dtype)


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


def attend_padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    rules: ScoreRules,
    sinks: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention of query [N, Hq, L, D] over key and value [N, H, K, D] under mask [N, L, K].

    With `sinks`, another query [N, Hq, L, D] scores the keys that a second mask [N, 1, K] names.
    """
    if rules.softcap is None and rules.sink_logits is None and sinks is None:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask[:, None], scale=rules.scale, enable_gqa=True
        )
    query_group_size = query.shape[1] // key.shape[1]

    def score(query: Tensor) -> Tensor:  # [N, H, group, L, K]
        grouped = query.reshape(len(query), -1, query_group_size, *query.shape[2:])
        return grouped @ key.unsqueeze(2).transpose(-1, -2) * rules.scale

    scores = score(query)
    if sinks is not None:
        sink_query, is_sink = sinks
        scores = torch.where(is_sink[:, None, None], score(sink_query), scores)
    if rules.softcap is not None:
        scores = torch.tanh(scores / rules.softcap) * rules.softcap
    scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    if rules.sink_logits is not None:
        logits = rules.sink_logits.to(scores.dtype).view(-1, query_group_size, 1, 1)
        scores = torch.cat([scores, logits.expand(*scores.shape[:-1], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)
    if rules.sink_logits is not None:
        weights = weights[..., :-1]
    return (weights @ value.unsqueeze(2)).flatten(1, 2)
