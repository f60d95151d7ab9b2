"""Attention of a few new tokens over their whole context, without padding it.

Knows a step's tables and one layer's blocks, nothing of models. The context of all sequences is one
flat list of *runs*: one sealed block each, or several open blocks. Runs are read a few at a time
into scratch that stays in the cache of a CPU. Codes become floats there and nothing else: scales
and zero points are folded into queries, scores and weights
(keys: `q . (c s + z) = (q s) . c + q . z`; values: `sum p (c s + z) = sum (p s) c + sum p z`).

Sizes: N sequences of L new tokens each, P runs of R tokens, H kv heads. A kv head has
M = Hq / H * L query rows: the L new tokens of its first query head, then those of the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from ..block_views import LayerBlocks, SealedViews
from ..code_bits import WIDE_BITS, lower_bits, upper_bits
from ..new_tokens import NewTokens
from ..rules import NOWHERE, ScoreRules
from ..step_inputs import StepInputs
from .quantize import INT8_OFFSET, centre, code_offset

CPU_SCRATCH_BYTES: Final = 1 << 22  # floats of the blocks that are read at once
GPU_SCRATCH_BYTES: Final = 1 << 28
OPEN_RUN_TOKENS: Final = 128  # fewer make the matrix products too small


@dataclass(frozen=True)
class BlockRuns:
    """P runs of U blocks and R tokens; each belongs to one of the N sequences of a group."""

    rows: Tensor  # [P] the sequence
    block_ids: Tensor  # [P, U]
    positions: Tensor  # [P, R]; NOWHERE for padding, which holds anything, NaN included
    num_full: int  # the first runs, which lie before every new token and have no padding

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class FlatGroup:
    """N sequences of L new tokens each: what every layer of a step shares."""

    token_ids: Tensor  # [N, L] index of each new token in the step
    query_positions: Tensor  # [N, L]
    new: BlockRuns  # the new tokens, a run of L for each sequence; their ids are `token_ids`
    open: BlockRuns
    sealed: BlockRuns
    num_sinks: Tensor | None  # [N, 1, 1] of windowed sequences, as in `StepInputs`
    windows: Tensor | None  # [N, 1, 1]


def plan_flat_group(step: StepInputs, rows: Tensor) -> FlatGroup:
    """The index tensors of step rows [N] with equally many new tokens."""
    length = int(step.query_lens[int(rows[0])])
    token_ids = step.query_start_loc[rows, None] + torch.arange(length, device=step.device)
    positions = step.cache_positions[token_ids]
    sequences = torch.arange(len(rows), device=step.device)
    return FlatGroup(
        token_ids=token_ids,
        query_positions=positions,
        new=BlockRuns(rows=sequences, block_ids=token_ids, positions=positions, num_full=0),
        open=open_runs(step, rows),
        sealed=sealed_runs(step, rows),
        num_sinks=of_rows(step.num_sink_tokens, rows),
        windows=of_rows(step.window_sizes, rows),
    )


def of_rows(numbers: Tensor | None, rows: Tensor) -> Tensor | None:
    """Numbers [sequences] of step rows [N] as [N, 1, 1], to compare positions with."""
    return None if numbers is None else numbers[rows, None, None]


def sealed_runs(step: StepInputs, rows: Tensor) -> BlockRuns:
    """Every sealed block of step rows [N] as a run of its own."""
    num_sealed = step.num_sealed[rows]
    columns = torch.arange(int(num_sealed.max()), device=step.device)
    run_rows, run_columns = (columns < num_sealed[:, None]).nonzero(as_tuple=True)
    first = step.num_head_tokens + run_columns * step.block_size
    return BlockRuns(
        rows=run_rows,
        block_ids=step.sealed_block_ids(rows[run_rows], run_columns)[:, None],
        positions=first[:, None] + torch.arange(step.block_size, device=step.device),
        num_full=len(run_rows),
    )


def open_runs(step: StepInputs, rows: Tensor) -> BlockRuns:
    """Open blocks of step rows [N], several a run, full runs before those with padding."""
    blocks_per_run = max(1, OPEN_RUN_TOKENS // step.open_block_size)
    run_tokens = blocks_per_run * step.open_block_size
    body_tokens = step.num_sealed[rows] * step.block_size
    open_tokens = step.context_lens[rows] - body_tokens
    num_runs = -(-int(open_tokens.max()) // run_tokens)
    run_starts = torch.arange(num_runs, device=step.device) * run_tokens
    left = open_tokens[:, None] - run_starts
    full = (left >= run_tokens).nonzero()
    padded = ((left > 0) & (left < run_tokens)).nonzero()
    run_rows, run_columns = torch.cat([full, padded]).unbind(1)

    columns = run_columns[:, None] * blocks_per_run + torch.arange(
        blocks_per_run, device=step.device
    )
    entries = run_columns[:, None] * run_tokens + torch.arange(run_tokens, device=step.device)
    # The head's positions are their own, the tail's lie behind the sealed body.
    positions = entries + (entries >= step.num_head_tokens) * body_tokens[run_rows, None]
    padding = entries >= open_tokens[run_rows, None]
    return BlockRuns(
        rows=run_rows,
        block_ids=step.open_block_ids(rows[run_rows, None], columns),
        positions=positions.masked_fill(padding, NOWHERE),
        num_full=len(full),
    )


def attend_flat(new: NewTokens, layer: LayerBlocks, group: FlatGroup, rules: ScoreRules) -> Tensor:
    """Attention [N, L, Hq, value_dim] of a group's new tokens; arguments as of `attend`."""
    query, key, value, sink_query = new
    dtype = torch.promote_types(query.dtype, torch.float32)
    score_scale = rules.scale if rules.softcap is None else rules.scale / rules.softcap

    def by_kv_head(rows: Tensor) -> Tensor:
        return fold_heads(rows[group.token_ids].to(dtype) * score_scale, key.shape[1])

    queries = by_kv_head(query)
    new_keys = key[group.token_ids].to(dtype).transpose(1, 2)  # [N, H, L, key_dim]
    new_values = value[group.token_ids].to(dtype).transpose(1, 2)
    open_scores = score_open(queries, layer.open_keys, group.open)
    if sink_query is not None and group.num_sinks is not None:
        sink_scores = score_open(by_kv_head(sink_query), layer.open_keys, group.open)
        is_sink = group.open.positions[:, None, None] < group.num_sinks[group.open.rows, None]
        open_scores = torch.where(is_sink, sink_scores, open_scores)
    parts = [(group.new, queries @ new_keys.transpose(-1, -2)), (group.open, open_scores)]
    if layer.sealed is not None and len(group.sealed):
        parts.append((group.sealed, score_sealed(queries, layer, layer.sealed, group.sealed)))
    for runs, scores in parts:
        apply_rules_(scores, runs, group, rules)
    total = exponentiate_(parts, rules.sink_logits)
    new_weights, open_weights, *sealed_weights = (weights for _, weights in parts)
    output = new_weights @ new_values
    add_open_values(output, open_weights, layer.open_values, group.open)
    for weights in sealed_weights:
        assert layer.sealed is not None
        add_sealed_values(output, weights, layer, layer.sealed, group.sealed)
    return unfold_heads(output.div_(total), group.token_ids.shape[1])


def fold_heads(query: Tensor, num_kv_heads: int) -> Tensor:
    """Queries [N, L, Hq, D] as rows of their kv heads: [N, H, M, D], M = Hq / H * L."""
    return torch.unflatten(query, 2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def unfold_heads(output: Tensor, length: int) -> Tensor:
    """The inverse of `fold_heads`: [N, H, M, D] to [N, L, Hq, D]."""
    return torch.unflatten(output, 2, (-1, length)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def apply_rules_(scores: Tensor, runs: BlockRuns, group: FlatGroup, rules: ScoreRules) -> None:
    """Softcap and mask scores [P, H, M, R] of runs in place."""
    if rules.softcap is not None:
        scores.tanh_().mul_(rules.softcap)
    has_windows = group.windows is not None
    first = 0 if rules.hides_context or has_windows else runs.num_full
    if first == len(runs):
        return
    rows = runs.rows[first:]
    mask = rules.visible(
        group.query_positions[rows, :, None],
        runs.positions[first:, None, :],
        None if group.num_sinks is None else group.num_sinks[rows],
        None if group.windows is None else group.windows[rows],
    )  # [P', L, R]
    by_token = torch.unflatten(scores[first:], 2, (-1, mask.shape[1]))
    by_token.masked_fill_(~mask[:, None, None], -torch.inf)


def exponentiate_(parts: list[tuple[BlockRuns, Tensor]], sink_logits: Tensor | None) -> Tensor:
    """Turn scores [P, H, M, R] into exp(score - maximum of the query) in place.

    Returns the sums [N, H, M, 1]; the first part has one run for each sequence.
    """
    top = parts[0][1].amax(-1, keepdim=True)
    for runs, scores in parts[1:]:
        run_tops = scores.amax(-1, keepdim=True)
        top.scatter_reduce_(0, spread(runs.rows, run_tops), run_tops, "amax")
    if sink_logits is not None:
        sinks = sink_logits.to(top.dtype).view(top.shape[1], -1, 1)  # [H, Hq / H, 1]
        sinks = sinks.repeat_interleave(top.shape[2] // sinks.shape[1], dim=1)
        top = torch.maximum(top, sinks)
    total = torch.zeros_like(top) if sink_logits is None else (sinks - top).exp_()
    for runs, scores in parts:
        scores.sub_(top.index_select(0, runs.rows)).exp_()
        total.index_add_(0, runs.rows, scores.sum(-1, keepdim=True))
    return total


def spread(rows: Tensor, like: Tensor) -> Tensor:
    """Row indices [P] as a scatter index of the shape of `like` [P, ...]."""
    return rows.view(-1, *[1] * (like.ndim - 1)).expand_as(like)


# -- runs of open blocks ------------------------------------------------------------------------


def score_open(queries: Tensor, open_keys: Tensor, runs: BlockRuns) -> Tensor:
    """Scores [P, H, M, R] of queries [N, H, M, D]; anything where a run has padding."""
    reader = BlockReader(open_keys, runs, queries.dtype)
    scores = reader.new_scores(queries)
    for portion, keys in reader:
        score_(scores[portion], queries.index_select(0, runs.rows[portion]).unsqueeze(2), keys)
    return scores


def add_open_values(output: Tensor, weights: Tensor, open_values: Tensor, runs: BlockRuns) -> None:
    """Add the weighted values of runs to the output [N, H, M, D] of their sequences."""
    padding = runs.positions == NOWHERE
    for portion, pieces in BlockReader(open_values, runs, output.dtype):
        values = pieces.flatten(2, 3)
        padded = slice(max(runs.num_full, portion.start), portion.stop)
        if padded.start < padded.stop:  # a weight of 0 would not silence NaN
            hidden = padding[padded, None, :, None]
            values[padded.start - portion.start :].masked_fill_(hidden, 0.0)
        output.index_add_(0, runs.rows[portion], batched(weights[portion], values))


# -- runs of sealed blocks ----------------------------------------------------------------------


def score_sealed(
    queries: Tensor, layer: LayerBlocks, sealed: SealedViews, runs: BlockRuns
) -> Tensor:
    """Scores [P, H, M, R] of queries [N, H, M, D] with keys `(code - offset) * scale + zero`."""
    reader = BlockReader(sealed.key_codes, runs, queries.dtype, layer.key_bits)
    scores = reader.new_scores(queries)
    scale = gather_metadata(sealed.key_scale, runs, queries.dtype)
    if sealed.key_zero is None:  # one scale a key, [P, H, R]
        for portion, codes in reader:
            score_(scores[portion], queries.index_select(0, runs.rows[portion]).unsqueeze(2), codes)
        offset = queries.sum(-1, keepdim=True).mul_(INT8_OFFSET)
        return scores.sub_(offset.index_select(0, runs.rows)).mul_(scale.unsqueeze(2))
    zero = gather_metadata(sealed.key_zero, runs, queries.dtype)  # [P, H, G, D], as the scales
    zero.sub_(scale, alpha=code_offset(layer.key_bits))
    for portion, codes in reader:
        portion_queries = queries.index_select(0, runs.rows[portion])
        scaled_queries = portion_queries.unsqueeze(2) * scale[portion].unsqueeze(3)
        score_(scores[portion], scaled_queries, codes, layer.key_bits)
        by_group = torch.unflatten(scores[portion], 3, (zero.shape[2], -1))  # [n, H, M, G, R / G]
        by_group.add_(batched(portion_queries, zero[portion].transpose(-1, -2)).unsqueeze(-1))
    if sealed.wide_codes is not None:
        assert layer.wide_channels is not None
        add_upper_codes(scores, queries, scale, layer, sealed.wide_codes, runs)
    return scores


def add_upper_codes(
    scores: Tensor,
    queries: Tensor,
    scale: Tensor,
    layer: LayerBlocks,
    wide_codes: Tensor,
    runs: BlockRuns,
) -> None:
    """Add to scores what the upper bits of wide channels are worth: 2**key_bits times as codes."""
    wide_channels = layer.wide_channels
    assert wide_channels is not None

    def of_wide(rows: Tensor) -> Tensor:  # [..., H, n, D] to [..., H, n, W]
        index = wide_channels.unsqueeze(-2).expand(*rows.shape[:-1], -1)
        return rows.gather(-1, index)

    queries, scale = of_wide(queries), of_wide(scale) * (1 << layer.key_bits)
    for portion, codes in BlockReader(wide_codes, runs, queries.dtype, WIDE_BITS):
        scaled = queries.index_select(0, runs.rows[portion]).unsqueeze(2)
        scaled = scaled * scale[portion].unsqueeze(3)
        part = torch.empty_like(scores[portion])
        score_(part, scaled, codes, WIDE_BITS)
        scores[portion].add_(part)


def add_sealed_values(
    output: Tensor, weights: Tensor, layer: LayerBlocks, sealed: SealedViews, runs: BlockRuns
) -> None:
    """Add the weighted values `code * scale + zero` of runs to the output [N, H, M, D]."""
    scale = gather_metadata(sealed.value_scale, runs, output.dtype)  # [P, H, R]
    if sealed.value_zero is None:
        zero = scale * -centre(layer.value_bits)
    else:
        zero = gather_metadata(sealed.value_zero, runs, output.dtype)
    zero_part = batched(weights, zero.unsqueeze(-1))  # [P, H, M, 1]
    output.index_add_(0, runs.rows, zero_part.expand(*zero_part.shape[:3], output.shape[3]))
    bits = lower_bits(layer.value_bits)
    add_codes(output, weights, scale, sealed.value_codes, bits, runs)
    if sealed.upper_value_codes is not None:
        worth = scale * (1 << bits)
        upper = upper_bits(layer.value_bits)
        add_codes(output, weights, worth, sealed.upper_value_codes, upper, runs)


def add_codes(
    output: Tensor, weights: Tensor, scale: Tensor, codes: Tensor, bits: int, runs: BlockRuns
) -> None:
    """Add codes [NB, H, rows, D] of runs, weighted and scaled, to the output [N, H, M, D]."""
    scale = scale.clone()
    for plane, plane_scale in enumerate(scale.chunk(8 // bits, 2)):
        plane_scale.mul_(0.5 ** (plane * bits))
    for portion, planes in BlockReader(codes, runs, output.dtype, bits):
        scaled = weights[portion] * scale[portion].unsqueeze(2)
        part = batched(scaled, planes.flatten(2, 3))
        output.index_add_(0, runs.rows[portion], part)


def gather_metadata(metadata: Tensor, runs: BlockRuns, dtype: torch.dtype) -> Tensor:
    """Scales or zero points [NB, H, ...] of runs of one block each: [P, H, ...]."""
    ids = record_ids(runs, metadata.shape[1])
    gathered = metadata.flatten(0, 1).index_select(0, ids.flatten()).to(dtype)
    return torch.unflatten(gathered, 0, (len(runs), -1))


def record_ids(runs: BlockRuns, num_heads: int) -> Tensor:
    """Where the blocks of runs lie when blocks and heads are one dimension: [P, H, U]."""
    heads = torch.arange(num_heads, device=runs.block_ids.device)
    return runs.block_ids[:, None] * num_heads + heads[:, None]


# -- blocks in scratch --------------------------------------------------------------------------


class BlockReader:
    """Reads runs of `blocks` [NB, H, tokens, D] portion by portion, as floats in scratch.

    Iterates over (portion of the P runs, floats [n, H, pieces, tokens, D]). The pieces of a run are
    its blocks or, with `bits` below 8, the planes of its one block; the codes of plane j are not
    shifted down and so 2**(j * bits) times too large. The floats lie in memory as the blocks do,
    and only until the next portion.
    """

    def __init__(self, blocks: Tensor, runs: BlockRuns, dtype: torch.dtype, bits: int = 8) -> None:
        self.is_channel_major: bool = blocks.stride(-1) != 1
        stored = blocks.transpose(-1, -2) if self.is_channel_major else blocks
        self.records: Tensor = stored.flatten(0, 1)  # a view: heads lie side by side in the arena
        self.record_ids: Final = record_ids(runs, blocks.shape[1])
        self.num_tokens: int = runs.positions.shape[1]
        self.dtype = dtype
        self.bits = bits
        self.num_planes: int = 8 // bits
        run_bytes = blocks.shape[1] * self.num_tokens * blocks.shape[3] * dtype.itemsize
        scratch_bytes = CPU_SCRATCH_BYTES if blocks.device.type == "cpu" else GPU_SCRATCH_BYTES
        self.portion_size: int = max(1, scratch_bytes // run_bytes)

    def new_scores(self, queries: Tensor) -> Tensor:
        """Room for scores [P, H, M, R] of queries [N, H, M, D]."""
        return queries.new_empty(len(self.record_ids), *queries.shape[1:3], self.num_tokens)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        num_records = self.record_ids[: self.portion_size].numel()
        gathered = self.records.new_empty(num_records, *self.records.shape[1:])
        planes, floats = gathered.unsqueeze(1), gathered.unsqueeze(1)
        if self.num_planes > 1:
            planes = gathered.new_empty(num_records, self.num_planes, *gathered.shape[1:])
        if planes.dtype != self.dtype:
            floats = torch.empty_like(planes, dtype=self.dtype)
        for start in range(0, len(self.record_ids), self.portion_size):
            ids = self.record_ids[start : start + self.portion_size]
            count = ids.numel()
            torch.index_select(self.records, 0, ids.flatten(), out=gathered[:count])
            if self.num_planes > 1:
                self.separate(gathered[:count], planes[:count])
            if planes.dtype != self.dtype:
                floats[:count].copy_(planes[:count])
            # One of blocks and planes is 1.
            pieces = floats[:count].view(len(ids), ids.shape[1], -1, *self.records.shape[1:])
            yield slice(start, start + len(ids)), (pieces.mT if self.is_channel_major else pieces)

    def separate(self, packed: Tensor, planes: Tensor) -> None:
        """Bytes [n, ...] to the codes of each plane [n, planes, ...], still at their bits."""
        for plane in range(self.num_planes):
            mask = (1 << self.bits) - 1 << (plane * self.bits)
            torch.bitwise_and(packed, mask, out=planes[:, plane])


def score_(scores: Tensor, queries: Tensor, pieces: Tensor, plane_bits: int = 0) -> None:
    """Dot products of queries [n, H, G, M, D] with keys [n, H, pieces, tokens, D], into scores.

    Scores are [n, H, M, R]; each group of R / G tokens has queries of its own. Keys of piece j
    count 2**(-j * plane_bits) times.
    """
    num_tokens = scores.shape[-1]
    piece_tokens = pieces.shape[3]
    group_tokens = num_tokens // queries.shape[2]
    step = min(piece_tokens, group_tokens)
    out, queries, pieces = (x.flatten(0, 1) for x in (scores, queries, pieces))
    # Products are only fast into contiguous memory, so not into columns of the scores.
    is_split = step < num_tokens
    parts = out.new_empty(num_tokens // step, *out.shape[:2], step) if is_split else out[None]
    for part, token in zip(parts, range(0, num_tokens, step), strict=True):
        piece, offset = divmod(token, piece_tokens)
        keys = pieces[:, piece, offset : offset + step].mT
        alpha = 0.5 ** (piece * plane_bits)
        torch.baddbmm(part, queries[:, token // group_tokens], keys, beta=0, alpha=alpha, out=part)
    if is_split:
        torch.unflatten(out, 2, (-1, step)).copy_(parts.movedim(0, 2))


def batched(left: Tensor, right: Tensor) -> Tensor:
    """The matrix product over two batch dimensions, without the copies of `@`."""
    product = torch.bmm(left.flatten(0, 1), right.flatten(0, 1))
    return torch.unflatten(product, 0, left.shape[:2])
