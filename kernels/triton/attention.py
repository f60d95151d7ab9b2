"""Attention of new tokens over paged context on a GPU: launches Triton's kernels.

Knows tensors and how a step is cut, never what happens inside a kernel; same signature and meaning
as `naive.attend`. Three launches: the sealed body, open blocks with the new tokens, and the merge
of all parts, which appends the new tokens on the way. A prefill's attention to its own tokens can
be left to other kernels (`Attender`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..block_views import LayerBlocks, SealedViews, as_rows
from ..new_tokens import NewTokens
from ..rules import ScoreRules
from ..step_inputs import StepInputs
from .groups import (
    Merge,
    NewRows,
    OpenBlocks,
    OtherParts,
    Parts,
    RuleNumbers,
    Sections,
    Shape,
    Split,
    StepTensors,
)
from .launch import Launch, open_launch, prefill_launch, sealed_launch, tile_rows
from .open import attend_open
from .plan import RowGroup, TritonPlan
from .prefill import attend_prefill
from .rows import merge_parts
from .sealed import attend_sealed
from .store import (
    least_bits,
    open_layout,
    open_tokens,
    power_of_2,
    rows_of,
    rows_of_plane,
    sealed_layout,
    shape_of,
)

MIN_SPLIT_TOKENS: Final = 512  # of context; a smaller part is not worth merging


class NewPart(NamedTuple):
    """Attention of new tokens to each other, to be merged with that to their contexts."""

    output: Tensor  # [T, Hq, value_dim], contiguous
    log_sums: Tensor  # [Hq, T] natural log-sum-exps of scores, float32, contiguous


# Query, key, value, new tokens of each sequence and scale make the new part; or None, where its
# kernels cannot: the query's and the value's shape and dtype are not theirs.
Attender = Callable[
    [Tensor, Tensor, Tensor, NDArray[np.int64], float], tuple[Tensor, Tensor] | None
]


@dataclass(frozen=True, eq=False)
class Call:
    """One call of `attend`: what its launches share."""

    new: NewTokens  # with contiguous rows
    sink_query: Tensor  # [T, Hq, key_dim]; the query where there is no other
    layer: LayerBlocks
    plan: TritonPlan
    rules: ScoreRules
    attend_to_new: Attender | None

    @cached_property
    def new_part(self) -> NewPart | None:
        """Where other kernels attend to new tokens, and know these rules."""
        if self.attend_to_new is None or self.has_rules:
            return None
        query_lens = self.plan.step.query_lens
        part = self.attend_to_new(*self.new[:3], query_lens, self.rules.scale)
        return None if part is None else NewPart(*part)

    @cached_property
    def shape(self) -> Shape:
        return shape_of(self.new.key, self.new.value, self.new.query.shape[1])

    @cached_property
    def new_rows(self) -> NewRows:
        query, key, value, _ = self.new
        return NewRows(*(rows_of(each) for each in (query, self.sink_query, key, value)))

    @property
    def columns(self) -> int:
        """Channels of a key or a value, whichever has more, as kernels hold them."""
        return max(self.shape.KEY_COLUMNS, self.shape.VALUE_COLUMNS)

    @property
    def has_groups(self) -> bool:
        """Whether a sealed block's keys are scaled in several groups."""
        return self.layer.sealed is not None and self.layer.sealed.num_key_groups > 1

    @property
    def bits(self) -> int:
        """The fewest that are packed together, see `least_bits`; 0 without codes."""
        return 0 if self.layer.sealed is None else least_bits(self.layer)

    @cached_property
    def rule_numbers(self) -> RuleNumbers:
        scale, softcap, sliding_window, attention_chunk, _ = self.rules
        return RuleNumbers(
            scale=scale if softcap is None else scale / softcap,
            softcap=softcap or 0.0,
            sliding_window=sliding_window or 0,
            attention_chunk=attention_chunk or 0,
        )

    @property
    def has_windows(self) -> bool:
        return self.plan.step.window_sizes is not None

    @property
    def hides_context(self) -> bool:
        return self.has_windows or self.rules.hides_context

    @property
    def has_rules(self) -> bool:
        return self.hides_context or self.rules.softcap is not None

    def split(self, group: RowGroup, tile: int, num_splits: int, min_split: int) -> Split:
        """How a group's work is cut for one kernel, which splits contexts in so many."""
        return Split(
            ROWS=group.tile_rows,
            TILE=tile,
            NUM_PARTS=self.num_parts(group),
            NUM_SPLITS=num_splits,
            MIN_SPLIT=min_split,
            HAS_SOFTCAP=self.rules.softcap is not None,
            HIDES_CONTEXT=self.hides_context,
            HAS_WINDOWS=self.has_windows,
        )

    def num_splits(self, group: RowGroup) -> tuple[int, int]:
        """Of contexts, by the kernels of open and of sealed blocks."""
        return (group.num_splits, 0) if self.layer.sealed is None else (1, group.num_splits)

    def num_parts(self, group: RowGroup) -> int:
        return sum(self.num_splits(group))


def attend(
    new: NewTokens,
    layer: LayerBlocks,
    plan: TritonPlan,
    rules: ScoreRules,
    *,
    appends: bool = False,
    attend_to_new: Attender | None = None,
) -> Tensor:
    """As `naive.attend`; sums are float32 whatever the dtype of the query.

    With `appends`, those new tokens that the step stores in open blocks are written there. With
    `attend_to_new`, sequences of many new tokens attend to these by it, where it can.
    """
    query, key, value = (as_rows(tensor, tensor.dtype) for tensor in new[:3])
    sink_query = query
    if new.sink_query is not None:
        sink_query = as_rows(new.sink_query, new.sink_query.dtype)
    call = Call(NewTokens(query, key, value), sink_query, layer, plan, rules, attend_to_new)
    output = query.new_empty(*query.shape[:2], value.shape[2])
    rows = tile_rows(call.bits, call.columns, query.device, has_groups=call.has_groups)
    for group in plan.groups(key.shape[1], query.shape[1] // key.shape[1], rows):
        attend_group(call, group, output, appends)
    return output


def attend_group(call: Call, group: RowGroup, output: Tensor, appends: bool) -> None:
    """All parts of a group's tiles, then their merge."""
    _, num_kv_heads, value_dim = call.new.value.shape
    num_partials = len(group.tiles) * num_kv_heads * call.num_parts(group)
    parts = Parts(*call.plan.partials(num_partials, group.tile_rows, value_dim))
    new_part = call.new_part if group.is_prefill else None
    run_open(call, group, parts, attends_new=new_part is None)
    if call.layer.sealed is not None:
        run_sealed(call, call.layer.sealed, group, parts)
    run_merge(call, group, parts, new_part, output, appends)


def launch_for(call: Call, group: RowGroup, bits: int) -> Launch:
    """The one place where a group's rows choose between the tables."""
    has_windows, device = call.has_windows, call.new.query.device
    if group.is_prefill:
        return prefill_launch(bits, call.columns, device, has_windows=has_windows)
    if bits == 0:
        return open_launch(group.tile_rows, call.columns, has_windows=has_windows)
    return sealed_launch(
        bits,
        group.tile_rows,
        call.columns,
        device,
        has_rules=call.has_rules,
        has_groups=call.has_groups,
    )


def run_sealed(call: Call, sealed: SealedViews, group: RowGroup, parts: Parts) -> None:
    step, num_key_groups = call.plan.step, sealed.num_key_groups
    _, num_splits = call.num_splits(group)
    group_tokens = step.block_size // max(num_key_groups, 1)
    launch = launch_for(call, group, call.bits)
    tile = min(launch.tile, rows_of_plane(call.layer, sealed), group_tokens)
    kernel = attend_prefill if group.is_prefill else attend_sealed
    kernel[len(group.tiles), call.new.key.shape[1], num_splits](
        call.new_rows.query,
        Sections(*sealed, call.layer.wide_channels),
        step_tensors(step, group),
        parts,
        call.rule_numbers,
        SHAPE=call.shape,
        LAYOUT=sealed_layout(step, sealed, call.layer),
        SPLIT=call.split(group, tile, num_splits, -(-MIN_SPLIT_TOKENS // step.block_size)),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )


def run_open(call: Call, group: RowGroup, parts: Parts, *, attends_new: bool) -> None:
    step, layer = call.plan.step, call.layer
    num_splits, _ = call.num_splits(group)
    launch = launch_for(call, group, 0)
    split = call.split(group, launch.tile, num_splits, -(-MIN_SPLIT_TOKENS // launch.tile))
    attend_open[len(group.tiles), call.new.key.shape[1], num_splits](
        call.new_rows,
        layer.open_keys,
        step_tensors(step, group),
        parts,
        call.rule_numbers,
        SHAPE=call.shape,
        LAYOUT=open_layout(step, layer),
        SPLIT=split._replace(ATTENDS_NEW=attends_new, TRANSPOSED=int(group.is_prefill)),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )


def run_merge(
    call: Call,
    group: RowGroup,
    parts: Parts,
    new_part: NewPart | None,
    output: Tensor,
    appends: bool,
) -> None:
    sink_logits, num_parts = call.rules.sink_logits, call.num_parts(group)
    new_output, new_log_sums = (None, None) if new_part is None else new_part
    merge_parts[len(group.places), call.new.query.shape[1]](
        parts,
        OtherParts(sink_logits, new_output, new_log_sums, num_new=len(call.new.query)),
        group.places,
        call.new_rows,
        OpenBlocks(*open_tokens(call.layer), slots=call.plan.slots),
        rows_of(output),
        SHAPE=call.shape,
        MERGE=Merge(
            ROWS=group.tile_rows,
            NUM_PARTS=num_parts,
            PARTS_COLUMNS=power_of_2(num_parts),
            OPEN_BLOCK_SIZE=call.plan.step.open_block_size,
            HAS_SINKS=sink_logits is not None,
            HAS_NEW_PART=new_part is not None,
            APPENDS=appends,
        ),
        num_warps=1,
    )


def step_tensors(step: StepInputs, group: RowGroup) -> StepTensors:
    return StepTensors(
        tiles=group.tiles,
        query_start_loc=step.query_start_loc,
        context_lens=step.context_lens,
        num_sealed=step.num_sealed,
        block_table=step.block_table,
        table_width=step.block_table.stride(0),
        num_sink_tokens=step.num_sink_tokens,
        window_sizes=step.window_sizes,
    )
