"""Attention of new tokens over paged context on a CPU: fills the worker's record and starts it.

Knows tensors and addresses, never how a microkernel computes; same signature and meaning as
`naive.attend`. The work of a step is cut into items once, for all layers; a call sets a few
addresses and starts the worker on torch's threads.
"""

from __future__ import annotations

from functools import partial
from itertools import chain
from math import gcd
from operator import is_
from typing import Final

import torch
from torch import Tensor

from ..block_views import LayerBlocks, as_rows
from ..code_bits import WIDE_BITS, lower_bits, upper_bits
from ..eager.quantize import centre
from ..new_tokens import NewTokens
from ..rules import ScoreRules
from .dense_kernels import HAS_PAIRS
from .microkernels import (
    MAX_ROWS,
    SCORE_STRIDE,
    TILE_TOKENS,
    affine_kernel,
    fold_kernel,
    prefetch_kernel,
    score_kernel,
    softmax_kernel,
    start_kernel,
    value_kernel,
    widen_kernel,
)
from .native_attention import attention_worker
from .native_code import address_or_0, kind_of, row_addresses
from .pair_kernels import (
    LANES,
    QUERY_BYTES,
    WEIGHT_BYTES,
    float_keys_kernel,
    float_values_kernel,
    pair_keys_kernel,
    pair_rows_kernel,
    pair_scores_kernel,
    pair_sums_kernel,
    pair_values_kernel,
    wide_keys_kernel,
)
from .per_layer import PerLayer
from .plan import CpuPlan, WorkItems
from .quantize import copy_kernel
from .records import (
    LAYER_BYTES,
    LAYER_STRUCT,
    NEW_TOKEN_ROWS,
    NUM_VARIANTS,
    CallFields,
    LayerFields,
    PairFields,
)
from .threads import run_worker
from .vectors import host_width

LOG2_E: Final = 1.4426950408889634
ROW_VARIANTS: Final = (1, 2, 4, MAX_ROWS)
METADATA_NAMES: Final = ("key_scale", "key_zero", "value_scale", "value_zero")
SEALED_NAMES: Final = (
    *("key_codes", "value_codes", "num_key_rows", "num_value_rows", *METADATA_NAMES),
    *("wide_codes", "num_wide", "num_wide_rows", "wide_channels"),
    *("upper_value_codes", "num_upper_rows"),
    *("metadata", "metadata_bytes", "num_key_groups", "key_group_shift"),
)


def attend(
    new: NewTokens,
    layer: LayerBlocks,
    plan: CpuPlan,
    rules: ScoreRules,
    *,
    appends: bool = False,
) -> Tensor:
    """As `naive.attend`; sums are float32 whatever the dtype of the query.

    Many new tokens in bfloat16 are multiplied as such, where the processor can: keys, values and
    weights are rounded to it. With `appends`, those new tokens that the step stores in open blocks
    are written there.
    """
    output = new.query.new_empty(*new.query.shape[:2], new.value.shape[2])
    if len(new.query):
        work = prepare(new, layer, plan, rules, output, appends=appends)
        run_worker(attention_worker(), work.record_address, work.num_threads)
    return output


def prepare(
    new: NewTokens,
    layer: LayerBlocks,
    plan: CpuPlan,
    rules: ScoreRules,
    output: Tensor,
    *,
    appends: bool,
) -> WorkItems:
    """Items and record for a call of `attend` that writes to `output`, contiguous.

    A step's calls share them: one is run before the next is prepared.
    """
    num_kv_heads = new.key.shape[1]
    has_pairs = plan.has_prefills and is_paired(new, layer, plan)
    work = plan.items(num_kv_heads, new.query.shape[1] // num_kv_heads, has_pairs=has_pairs)
    sources = [*new, rules, output, appends]
    if not (work.sources and all(map(is_, work.sources, sources))):  # layers may share their rows
        kept = fill_call(work.call, new, rules, output, has_prefills=plan.has_prefills)
        work.call.appends = appends
        is_copied = not set(map(id, kept)) <= set(map(id, (*new, None)))
        work.kept[:], work.sources[:] = kept, [] if is_copied else sources
    work.record[LAYER_BYTES] = (plain_layer if rules.softcap is None else capped_layer)(layer)
    work.counters[:] = work.zeros
    return work


def is_paired(new: NewTokens, layer: LayerBlocks, plan: CpuPlan) -> bool:
    """Whether products may be of pairs of bfloat16: sinks have queries of their own in windows."""
    is_half = new.query.dtype is torch.bfloat16 and new.key.dtype is torch.bfloat16
    return is_half and has_pair_kernels(layer) and plan.step.window_sizes is None


def has_pair_kernels(layer: LayerBlocks) -> bool:
    dims = layer.open_keys.shape[3], layer.open_values.shape[3]
    return HAS_PAIRS and not any(dim % LANES for dim in dims)


def fill_call(
    call: CallFields, new: NewTokens, rules: ScoreRules, output: Tensor, *, has_prefills: bool
) -> list[Tensor | None]:
    """Fill in what does not depend on the layer; what is returned has to live as long."""
    query, key, value, sink_query = new
    rows, keys = as_rows(query, torch.float32), as_rows(key, torch.float32)
    values = as_rows(value, torch.float32)
    sink_rows = None if sink_query is None else as_rows(sink_query, torch.float32)
    channel_major = channel_major_keys(keys) if has_prefills else keys
    sinks = None if rules.sink_logits is None else rules.sink_logits.float() * LOG2_E
    call.query, call.query_token_stride, call.query_head_stride = row_addresses(rows)
    call.key, call.key_token_stride, call.key_head_stride = row_addresses(keys)
    call.value, call.value_token_stride, call.value_head_stride = row_addresses(values)
    call.sink_query = 0
    if sink_rows is not None:
        strides = row_addresses(sink_rows)
        call.sink_query, call.sink_query_token_stride, call.sink_query_head_stride = strides
    call.channel_major_keys = channel_major.data_ptr()
    call.padded_tokens = channel_major.shape[-1]
    call.output, call.output_bytes = output.data_ptr(), output.element_size()
    call.write = affine_kernel(kind_of(output)).address
    call.sliding_window = rules.sliding_window or 0
    call.attention_chunk = rules.attention_chunk or 0
    call.sink_logits = 0 if sinks is None else sinks.data_ptr()
    if rules.softcap is None:
        call.factor, call.softcap = rules.scale * LOG2_E, 0.0
    else:  # scores are bounded in units of the softcap and then turned into powers of 2
        call.factor, call.softcap = rules.scale / rules.softcap, rules.softcap * LOG2_E
    return [rows, keys, values, sink_rows, channel_major, sinks]


def channel_major_keys(keys: Tensor) -> Tensor:
    """New keys [T, H, key_dim] as [H, key_dim, T and some]: a kernel reads whole vectors."""
    num_tokens, num_heads, dim = keys.shape
    padded = torch.empty(num_heads, dim, num_tokens + NEW_TOKEN_ROWS)
    padded[:, :, :num_tokens] = keys.permute(1, 2, 0)
    return padded


def layer_bytes(layer: LayerBlocks, *, has_softcap: bool) -> bytes:
    """The part of the worker's record that describes a layer: sizes, addresses, microkernels."""
    keys, values = layer.open_keys, layer.open_values
    assert keys.stride(2) == 1, "open keys are channel-major on a CPU"
    itemsize = keys.element_size()
    fields = LayerFields(
        key_dim=keys.shape[3],
        value_dim=values.shape[3],
        block_stride=keys.stride(0) * itemsize,
        kv_head_stride=keys.stride(1) * itemsize,
        open_keys=keys.data_ptr(),
        open_values=values.data_ptr(),
        open_key_stride=keys.stride(3) * itemsize,
        open_value_stride=values.stride(2) * itemsize,
        open_piece=open_piece(layer),
        **sealed_places(layer),
        fold=fold_kernel().address,
        widen=0 if layer.wide_channels is None else widen_kernel(layer.key_bits).address,
        affine=affine_kernel().address,
        prefetch=prefetch_kernel().address,
        start=start_kernel(has_softcap).address,
        softmax=softmax_kernel("none", "none", 0.0, has_softcap, host_width()).address,
        softmax_sealed=softmax_kernel(*scaling_of(layer), has_softcap, host_width()).address,
        item_bytes=itemsize,
        round_to_open=copy_kernel("float32", kind_of(keys)).address,
    )
    return LAYER_STRUCT.pack(
        *fields, *chain.from_iterable(row_kernels(layer)), *pair_kernels(layer)
    )


plain_layer: Final = PerLayer(partial(layer_bytes, has_softcap=False))
capped_layer: Final = PerLayer(partial(layer_bytes, has_softcap=True))


def sealed_places(layer: LayerBlocks) -> dict[str, int]:
    """Those of `LayerFields` that say where the sections of sealed blocks are."""
    sealed, wide_channels = layer.sealed, layer.wide_channels
    if sealed is None:
        return dict.fromkeys(SEALED_NAMES, 0)
    assert sealed.key_codes.stride(2) == 1, "key codes are channel-major on a CPU"
    sections = {name: getattr(sealed, name) for name in METADATA_NAMES}
    upper_keys, upper_values = sealed.wide_codes, sealed.upper_value_codes
    present = [section for section in sections.values() if section is not None]
    group_tokens = sealed.block_size // max(sealed.num_key_groups, 1)
    return {
        "key_codes": sealed.key_codes.data_ptr(),
        "value_codes": sealed.value_codes.data_ptr(),
        "num_key_rows": sealed.key_codes.shape[2],
        "num_value_rows": sealed.value_codes.shape[2],
        "wide_codes": address_or_0(upper_keys),
        "num_wide": 0 if upper_keys is None else upper_keys.shape[3],
        "num_wide_rows": 0 if upper_keys is None else upper_keys.shape[2],
        "wide_channels": address_or_0(wide_channels),
        "upper_value_codes": address_or_0(upper_values),
        "num_upper_rows": 0 if upper_values is None else upper_values.shape[2],
        **{name: address_or_0(part) for name, part in sections.items()},
        "metadata": min(section.data_ptr() for section in present),
        "metadata_bytes": sum(section[0, 0].nbytes for section in present),
        "num_key_groups": sealed.num_key_groups,
        "key_group_shift": group_tokens.bit_length() - 1,
    }


def scaling_of(layer: LayerBlocks) -> tuple[str, str, float]:
    """What the softmax over sealed blocks has to scale: see `softmax_kernel`."""
    if layer.sealed is None:
        return "none", "none", 0.0
    key_scaling = "token" if layer.sealed.key_zero is None else "channel"
    if layer.sealed.value_zero is not None:
        return key_scaling, "zero", 0.0
    # Codes of 8 bits are read as numbers around 0.
    return key_scaling, "scale", 0.0 if layer.value_bits == 8 else centre(layer.value_bits)


def open_piece(layer: LayerBlocks) -> int:
    """Tokens of an open block whose scores are computed at once."""
    return min(layer.open_keys.shape[2], TILE_TOKENS)


def row_kernels(layer: LayerBlocks) -> list[list[int]]:
    """Addresses of the microkernels [Kernel.COUNT][NUM_VARIANTS]; 0 where there is no such."""
    sealed, value_dim = layer.sealed, layer.open_values.shape[3]
    dtype = kind_of(layer.open_keys)
    none = [0] * NUM_VARIANTS
    score_sealed, score_wide, value_sealed, value_upper = none, none, none, none
    if sealed is not None:
        is_grouped = sealed.num_key_groups > 1
        kind, rows = f"int{layer.key_bits}", sealed.key_codes.shape[2]
        score_sealed = score_kernels(kind, rows, is_grouped=is_grouped)
        if sealed.wide_codes is not None:
            rows = sealed.wide_codes.shape[2]
            kind = f"int{WIDE_BITS}"
            score_wide = score_kernels(kind, rows, is_grouped=is_grouped, adds=True)
        lower, upper = lower_bits(layer.value_bits), upper_bits(layer.value_bits)
        value_sealed = value_kernels(f"int{lower}", value_dim)
        if upper:
            value_upper = value_kernels(f"int{upper}", value_dim, shift=lower)
    return [
        score_kernels(dtype, open_piece(layer), is_grouped=False),
        score_sealed,
        score_wide,
        score_kernels("float32", NEW_TOKEN_ROWS, is_grouped=False),
        value_kernels(dtype, value_dim),
        value_sealed,
        value_upper,
        value_kernels("float32", value_dim),
    ]


def score_kernels(
    kind: str, num_token_rows: int, *, is_grouped: bool, adds: bool = False
) -> list[int]:
    """Addresses by number of query rows."""
    return [
        score_kernel(kind, rows, num_token_rows, is_grouped, adds, host_width()).address
        for rows in ROW_VARIANTS
    ]


def value_kernels(kind: str, value_dim: int, shift: int = 0) -> list[int]:
    return [
        value_kernel(kind, rows, value_dim, shift, host_width()).address for rows in ROW_VARIANTS
    ]


def pair_kernels(layer: LayerBlocks) -> PairFields:
    """Addresses of the microkernels for pairs; 0 where there is no such."""
    if not has_pair_kernels(layer):
        return PairFields(*(0 for _ in PairFields._fields))
    kind, value_dim = kind_of(layer.open_keys), layer.open_values.shape[3]
    fields = PairFields(
        open_keys=pair_keys_kernel(kind, gcd(LANES, open_piece(layer))).address,
        open_values=pair_values_kernel(kind, value_dim).address,
        new_keys=pair_keys_kernel("float32", LANES).address,
        new_values=pair_values_kernel("float32", value_dim).address,
        float_keys=0,
        wide_keys=0,
        float_values=0,
        upper_values=0,
        queries=pair_rows_kernel(0, QUERY_BYTES).address,
        scores=pair_scores_kernel().address,
        weights=pair_rows_kernel(4 * SCORE_STRIDE, WEIGHT_BYTES).address,
        sums=pair_sums_kernel(value_dim).address,
    )
    sealed = layer.sealed
    if sealed is None:
        return fields
    groups, kind, rows = sealed.num_key_groups, f"int{layer.key_bits}", sealed.key_codes.shape[2]
    _, scaling, centre = scaling_of(layer)
    lower, upper = lower_bits(layer.value_bits), upper_bits(layer.value_bits)
    fields = fields._replace(
        float_keys=float_keys_kernel(kind, rows, groups).address,
        float_values=float_values_kernel(f"int{lower}", value_dim, 0, scaling, centre).address,
    )
    if sealed.wide_codes is not None:
        wide = f"int{WIDE_BITS}", layer.key_bits, sealed.wide_codes.shape[2], groups
        fields = fields._replace(wide_keys=wide_keys_kernel(*wide).address)
    if upper:
        values = f"int{upper}", value_dim, lower, scaling, centre
        fields = fields._replace(upper_values=float_values_kernel(*values).address)
    return fields
