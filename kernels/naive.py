"""What attention over paged context means, written down plainly: what all kernels are held to.

Knows a step's tables and one layer's blocks. One sequence at a time, in float64, no trick.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .block_views import LayerBlocks
from .eager.quantize import dequantize_keys, dequantize_values
from .new_tokens import NewTokens
from .rules import ScoreRules
from .step_inputs import StepInputs


@dataclass(frozen=True)
class NaivePlan:
    """Nothing is worked out beforehand."""

    step: StepInputs


def attend(new: NewTokens, layer: LayerBlocks, plan: NaivePlan, rules: ScoreRules) -> Tensor:
    """Causal attention of a step's new tokens over their context and each other.

    A token sees itself and earlier ones of its sequence, less what the rules take away. The context
    is read as it is stored: in full precision, or quantized. The new tokens themselves are taken as
    they are, wherever the step stores them. Windowed sequences score the sinks among their context
    by `new.sink_query`, where it is given. Returns [T, Hq, value_dim] in float64.
    """
    step = plan.step
    output = new.query.new_empty(*new.query.shape[:2], new.value.shape[2], dtype=torch.float64)
    starts = step.query_start_loc.tolist()
    for sequence, (start, end) in enumerate(pairwise(starts)):
        output[start:end] = attend_sequence(new, layer, step, sequence, rules)
    return output


def attend_sequence(
    new: NewTokens, layer: LayerBlocks, step: StepInputs, sequence: int, rules: ScoreRules
) -> Tensor:
    """`attend` of one of the step's sequences: [L, Hq, value_dim] of its L new tokens."""
    start, end = step.query_start_loc[sequence : sequence + 2].tolist()
    query, key, value = (rows[start:end].double() for rows in new[:3])
    sink_query = None if new.sink_query is None else new.sink_query[start:end].double()
    old_keys, old_values = read_context(layer, step, sequence)
    keys, values = torch.cat([old_keys, key]), torch.cat([old_values, value])
    scores = score(NewTokens(query, key, value, sink_query), keys, step, sequence, rules)
    return weigh(scores, values, rules)


def read_context(layer: LayerBlocks, step: StepInputs, sequence: int) -> tuple[Tensor, Tensor]:
    """Stored keys [C, H, key_dim] and values [C, H, value_dim] of a sequence, in order."""
    table, context_len = step.block_table[sequence].tolist(), int(step.context_lens[sequence])
    head_end = step.num_head_tokens
    body_end = head_end + int(step.num_sealed[sequence]) * step.block_size
    keys, values = [layer.open_keys[0, :, :0].double()], [layer.open_values[0, :, :0].double()]
    position = 0
    while position < context_len:
        block_id = table[position // step.open_block_size]
        if head_end <= position < body_end:
            block_keys, block_values = read_sealed(layer, block_id)
        else:
            block_keys = layer.open_keys[block_id].double()
            block_values = layer.open_values[block_id].double()
        num_tokens = min(block_keys.shape[1], context_len - position)
        keys.append(block_keys[:, :num_tokens])
        values.append(block_values[:, :num_tokens])
        position += num_tokens
    return torch.cat(keys, 1).transpose(0, 1), torch.cat(values, 1).transpose(0, 1)


def read_sealed(layer: LayerBlocks, block_id: int) -> tuple[Tensor, Tensor]:
    """Keys [H, block_size, key_dim] and values [H, block_size, value_dim] of a sealed block."""
    assert layer.sealed is not None
    sealed, dtype = layer.sealed.at(block_id), torch.float64
    return (
        dequantize_keys(sealed, layer.key_bits, layer.wide_channels, dtype),
        dequantize_values(sealed, layer.value_bits, dtype),
    )


def score(
    new: NewTokens, keys: Tensor, step: StepInputs, sequence: int, rules: ScoreRules
) -> Tensor:
    """Scores [Hq, L, K] of a sequence's L new tokens with all K tokens; -inf where unseen."""
    context_len = int(step.context_lens[sequence])
    key_positions = torch.arange(len(keys), device=step.device)
    query_positions = key_positions[context_len:, None]
    num_query_heads = new.query.shape[1]
    keys = keys.repeat_interleave(num_query_heads // keys.shape[1], dim=1)
    scores = torch.einsum("lhd,khd->hlk", new.query, keys)
    num_sinks = windows = None
    if step.num_sink_tokens is not None and step.window_sizes is not None:
        num_sinks, windows = step.num_sink_tokens[sequence], step.window_sizes[sequence]
    if new.sink_query is not None and num_sinks is not None:
        by_sink_query = torch.einsum("lhd,khd->hlk", new.sink_query, keys)
        is_sink = key_positions < num_sinks.clamp(max=context_len)
        scores = scores.where(~is_sink, by_sink_query)
    scores = scores * rules.scale
    if rules.softcap is not None:
        scores = rules.softcap * (scores / rules.softcap).tanh()
    mask = rules.visible(query_positions, key_positions, num_sinks, windows)
    return scores.masked_fill(~mask, -torch.inf)


def weigh(scores: Tensor, values: Tensor, rules: ScoreRules) -> Tensor:
    """[L, Hq, value_dim] from scores [Hq, L, K] and values [K, H, value_dim]."""
    num_query_heads, num_keys = scores.shape[0], scores.shape[2]
    if rules.sink_logits is not None:  # it takes weight, and has no value
        logits = rules.sink_logits.double()[:, None, None].expand(*scores.shape[:2], 1)
        scores = torch.cat([scores, logits], dim=2)
    weights = scores.softmax(-1)[:, :, :num_keys]
    values = values.repeat_interleave(num_query_heads // values.shape[1], dim=1)
    return torch.einsum("hlk,khd->lhd", weights, values)
