"""Attention of new tokens over paged context on a GPU: launches Triton's kernels.

Same signatures as the torch reference in `attention`. Three launches: the sealed body, open blocks
with the new tokens, and the merge of all parts, which appends the new tokens on the way. A chunk's
attention to its own tokens can be left to other kernels (`Attender`).
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
from .launch import Launch, open_launch, prefill_launch, sealed_launch, tile_rows
from .open import attend_open
from .plan import RowGroup, TritonPlan
from .prefill import attend_prefill
from .rows import merge_parts
from .sealed import attend_sealed
from .store import open_strides, power_of_2

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
    def shape(self) -> dict[str, int]:
        """What all kernels are compiled for."""
        _, num_heads, key_dim = self.new.key.shape
        value_dim = self.new.value.shape[2]
        return {
            "NUM_HEADS": num_heads,
            "GROUP_SIZE": self.new.query.shape[1] // num_heads,
            "KEY_DIM": key_dim,
            "VALUE_DIM": value_dim,
            "KEY_COLUMNS": power_of_2(key_dim),
            "VALUE_COLUMNS": power_of_2(value_dim),
        }

    @property
    def columns(self) -> int:
        """Channels of a key or a value, whichever has more, as kernels hold them."""
        return max(self.shape["KEY_COLUMNS"], self.shape["VALUE_COLUMNS"])

    @property
    def has_groups(self) -> bool:
        """Whether a sealed block's keys are scaled in several groups."""
        return self.layer.sealed is not None and self.layer.sealed.num_key_groups > 1

    @property
    def rule_numbers(self) -> tuple[float, float, int, int]:
        """Scale, softcap, sliding window and attention chunk; 0 where a rule is off.

        With a softcap, scores are in units of it.
        """
        scale, softcap, sliding_window, attention_chunk, _ = self.rules
        scale = scale if softcap is None else scale / softcap
        return scale, softcap or 0.0, sliding_window or 0, attention_chunk or 0

    @cached_property
    def rule_kinds(self) -> dict[str, bool]:
        has_windows = self.plan.step.window_sizes is not None
        return {
            "HAS_SOFTCAP": self.rules.softcap is not None,
            "HIDES_CONTEXT": has_windows or self.rules.hides_context,
            "HAS_WINDOWS": has_windows,
        }

    @property
    def has_rules(self) -> bool:
        return any(self.rule_kinds.values())


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
    rows = tile_rows(call.columns, query.device, has_groups=call.has_groups)
    for group in plan.groups(key.shape[1], query.shape[1] // key.shape[1], rows):
        attend_group(call, group, output, appends)
    return output


def attend_group(call: Call, group: RowGroup, output: Tensor, appends: bool) -> None:
    """All parts of a group's tiles, then their merge."""
    sealed = call.layer.sealed
    open_splits, sealed_splits = (group.num_splits, 0) if sealed is None else (1, group.num_splits)
    num_parts = open_splits + sealed_splits
    num_programs = len(group.tiles) * call.new.key.shape[1]
    partials = call.plan.partials(
        num_programs * num_parts, group.tile_rows, call.new.value.shape[2]
    )
    new_part = call.new_part if group.is_prefill else None
    run_open(call, group, partials, num_parts, open_splits, attends_new=new_part is None)
    if sealed is not None:
        run_sealed(call, sealed, group, partials, num_parts, sealed_splits)
    run_merge(call, group, partials, num_parts, new_part, output, appends)


def launch_for(call: Call, group: RowGroup, bits: int) -> Launch:
    """The one place where a group's rows choose between the tables."""
    has_windows = call.rule_kinds["HAS_WINDOWS"]
    if group.is_prefill:
        return prefill_launch(bits, call.columns, call.new.query.device, has_windows=has_windows)
    if bits == 0:
        return open_launch(group.tile_rows, call.columns, has_windows=has_windows)
    return sealed_launch(
        bits,
        group.tile_rows,
        call.columns,
        has_rules=call.has_rules,
        has_groups=call.has_groups,
    )


def run_sealed(
    call: Call,
    sealed: SealedViews,
    group: RowGroup,
    partials: tuple[Tensor, Tensor],
    num_parts: int,
    num_splits: int,
) -> None:
    step, bits = call.plan.step, call.layer.bits
    num_key_groups = sealed.num_key_groups
    group_tokens = step.block_size // max(num_key_groups, 1)
    launch = launch_for(call, group, bits)
    kernel = attend_prefill if group.is_prefill else attend_sealed
    kernel[len(group.tiles), call.new.key.shape[1], num_splits](
        call.new.query,
        *call.new.query.stride()[:2],
        sealed.key_codes,
        sealed.value_codes,
        sealed.key_scale,
        sealed.key_zero,
        sealed.value_scale,
        sealed.value_zero,
        group.tiles,
        step.query_start_loc,
        step.context_lens,
        step.num_sealed,
        step.block_table,
        step.block_table.stride(0),
        step.window_sizes,
        *partials,
        *call.rule_numbers,
        KEY_STRIDES=sealed.key_codes.stride()[2:],
        VALUE_STRIDES=sealed.value_codes.stride()[2:],
        BITS=bits,
        BLOCK_SIZE=step.block_size,
        NUM_KEY_GROUPS=num_key_groups,
        OPEN_BLOCK_SIZE=step.open_block_size,
        NUM_HEAD_TOKENS=step.num_head_tokens,
        RECORD_BYTES=sealed.key_codes.stride(1),
        ROWS=group.tile_rows,
        TILE=min(launch.tile, sealed.key_codes.shape[2], group_tokens),
        NUM_PARTS=num_parts,
        NUM_SPLITS=num_splits,
        MIN_SPLIT_BLOCKS=-(-MIN_SPLIT_TOKENS // step.block_size),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **call.shape,
        **call.rule_kinds,
    )


def run_open(
    call: Call,
    group: RowGroup,
    partials: tuple[Tensor, Tensor],
    num_parts: int,
    num_splits: int,
    *,
    attends_new: bool,
) -> None:
    step, layer = call.plan.step, call.layer
    launch = launch_for(call, group, 0)
    attend_open[len(group.tiles), call.new.key.shape[1], num_splits](
        call.new.query,
        *call.new.query.stride()[:2],
        call.sink_query,
        *call.sink_query.stride()[:2],
        call.new.key,
        *call.new.key.stride()[:2],
        call.new.value,
        *call.new.value.stride()[:2],
        layer.open_keys,
        group.tiles,
        step.query_start_loc,
        step.context_lens,
        step.num_sealed,
        step.block_table,
        step.block_table.stride(0),
        step.num_sink_tokens,
        step.window_sizes,
        *partials,
        *call.rule_numbers,
        KEY_STRIDES=layer.open_keys.stride()[2:],
        RECORD_SIZE=layer.open_keys.stride(1),
        BLOCK_SIZE=step.block_size,
        OPEN_BLOCK_SIZE=step.open_block_size,
        NUM_HEAD_TOKENS=step.num_head_tokens,
        HAS_BODY=layer.sealed is not None,
        ROWS=group.tile_rows,
        ATTENDS_NEW=attends_new,
        TRANSPOSED=int(group.is_prefill),
        TILE=launch.tile,
        NUM_PARTS=num_parts,
        NUM_SPLITS=num_splits,
        MIN_SPLIT_TILES=-(-MIN_SPLIT_TOKENS // launch.tile),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **call.shape,
        **call.rule_kinds,
    )


def run_merge(
    call: Call,
    group: RowGroup,
    partials: tuple[Tensor, Tensor],
    num_parts: int,
    new_part: NewPart | None,
    output: Tensor,
    appends: bool,
) -> None:
    new_output, new_log_sums = (None, None) if new_part is None else new_part
    merge_parts[len(group.places), call.new.query.shape[1]](
        *partials,
        group.places,
        call.rules.sink_logits,
        new_output,
        new_log_sums,
        len(call.new.query),
        output,
        output.stride(0),
        call.new.key,
        *call.new.key.stride()[:2],
        call.new.value,
        *call.new.value.stride()[:2],
        call.plan.slots,
        *open_strides(call.layer),
        OPEN_BLOCK_SIZE=call.plan.step.open_block_size,
        ROWS=group.tile_rows,
        NUM_PARTS=num_parts,
        PARTS_COLUMNS=power_of_2(num_parts),
        HAS_SINKS=call.rules.sink_logits is not None,
        HAS_NEW_PART=new_part is not None,
        APPENDS=appends,
        num_warps=1,
        **call.shape,
    )
