"""Attention of new tokens over paged context on a CPU: sets the worker's fields and starts it.

Same signatures as the torch reference in `attention`. The work of a step is cut into items once,
for all layers; a call sets a few addresses and starts the worker on torch's threads.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

import numpy as np
import torch
from torch import Tensor

from ..block_views import LayerBlocks, SealedViews, as_rows
from .microkernels import (
    MAX_ROWS,
    TILE_TOKENS,
    affine_kernel,
    fold_kernel,
    prefetch_kernel,
    score_kernel,
    softmax_kernel,
    start_kernel,
    value_kernel,
)
from .native_attention import NEW_TOKEN_ROWS, NUM_VARIANTS, Field, attention_worker
from .native_code import row_addresses
from .plan import FIRST_LAYER_FIELD, CpuPlan, Longs
from .quantize import copy_kernel
from .threads import run_worker
from .vectors import host_width

LOG2_E: Final = 1.4426950408889634
ROW_VARIANTS: Final = (1, 2, 4, MAX_ROWS)
FIRST_CALL_BYTE: Final = 8 * Field.QUERY
LAYER_BYTES: Final = slice(8 * FIRST_LAYER_FIELD, FIRST_CALL_BYTE)
NUMBERS_BYTE: Final = 8 * Field.COUNT
CALL: Final = Struct(f"={Field.COUNT - Field.QUERY}q3f")


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    records: LayerBlocks,
    plan: CpuPlan,
    *,
    scale: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    attention_chunk: int | None = None,
    sink_logits: Tensor | None = None,
    sink_query: Tensor | None = None,
    appends: bool = False,
) -> Tensor:
    """As `attention.attend`; sums are float32 whatever the dtype of the query.

    With `appends`, those new tokens that the step stores in open blocks are written there.
    """
    num_tokens, num_query_heads, _ = query.shape
    num_kv_heads, value_dim = value.shape[1:]
    output = torch.empty(num_tokens, num_query_heads, value_dim, dtype=torch.float32)
    if not num_tokens:
        return output.to(query.dtype)
    work = plan.items(num_kv_heads, num_query_heads // num_kv_heads)
    rows, keys, values = (as_rows(tensor, torch.float32) for tensor in (query, key, value))
    sink_rows = None if sink_query is None else as_rows(sink_query, torch.float32)
    channel_major = channel_major_keys(keys) if plan.has_chunks else keys
    # With a softcap, scores are bounded in units of the softcap and then turned into powers of 2.
    factor = scale * LOG2_E if softcap is None else scale / softcap
    sinks = None if sink_logits is None else sink_logits.float() * LOG2_E
    buffer = work.buffer
    buffer[LAYER_BYTES] = layer_fields(records, has_softcap=softcap is not None)
    CALL.pack_into(
        buffer,
        FIRST_CALL_BYTE,
        *row_addresses(rows),
        *((0, 0, 0) if sink_rows is None else row_addresses(sink_rows)),
        *row_addresses(keys),
        channel_major.data_ptr(),
        channel_major.shape[-1],
        *row_addresses(values),
        output.data_ptr(),
        num_query_heads,
        sliding_window or 0,
        attention_chunk or 0,
        0 if sinks is None else sinks.data_ptr(),
        int(appends),
        work.fields + NUMBERS_BYTE,
        plan.scratch.address,
        0.0,
        factor,
        (softcap or 0.0) * LOG2_E,
    )
    work.counters[:] = work.zeros
    run_worker(attention_worker(), work.fields, work.num_threads)
    return output if query.dtype is torch.float32 else output.to(query.dtype)


def channel_major_keys(keys: Tensor) -> Tensor:
    """New keys [T, H, key_dim] as [H, key_dim, T and some]: a kernel reads whole vectors."""
    num_tokens, num_heads, dim = keys.shape
    padded = torch.empty(num_heads, dim, num_tokens + NEW_TOKEN_ROWS)
    padded[:, :, :num_tokens] = keys.permute(1, 2, 0)
    return padded


def layer_fields(records: LayerBlocks, *, has_softcap: bool) -> bytes:
    """The worker's fields that describe a layer: sizes, addresses, microkernels."""
    key = "cpu attention", has_softcap
    if key not in records.derived:
        kernels = np.array(row_kernels(records), dtype=np.int64)
        fields = np.array(make_layer_fields(records, kernels, has_softcap), dtype=np.int64)
        records.derived[key] = fields.tobytes(), kernels
    fields_bytes: bytes = records.derived[key][0]
    return fields_bytes


def make_layer_fields(records: LayerBlocks, kernels: Longs, has_softcap: bool) -> list[int]:
    keys, values = records.open_keys, records.open_values
    assert keys.stride(2) == 1, "open keys are channel-major on a CPU"
    itemsize = keys.element_size()
    return [
        keys.shape[3],
        values.shape[3],
        keys.stride(0) * itemsize,
        keys.stride(1) * itemsize,
        keys.data_ptr(),
        values.data_ptr(),
        keys.stride(3) * itemsize,
        values.stride(2) * itemsize,
        open_piece(records),
        *sealed_fields(records.sealed),
        kernels.ctypes.data,
        fold_kernel().address,
        affine_kernel().address,
        prefetch_kernel().address,
        start_kernel(has_softcap).address,
        softmax_kernel("none", has_softcap, host_width()).address,
        softmax_kernel(scaling_of(records), has_softcap, host_width()).address,
        itemsize,
        copy_kernel("float32", str(keys.dtype).removeprefix("torch.")).address,
    ]


def scaling_of(records: LayerBlocks) -> str:
    """What the softmax over sealed blocks has to scale."""
    if records.sealed is None:
        return "none"
    return "symmetric" if records.sealed.key_zero is None else "asymmetric"


def open_piece(records: LayerBlocks) -> int:
    """Tokens of an open block whose scores are computed at once."""
    return min(records.open_keys.shape[2], TILE_TOKENS)


def row_kernels(records: LayerBlocks) -> list[list[int]]:
    """Addresses of the microkernels [Kernel.COUNT][NUM_VARIANTS]; 0 where there is no such."""
    sealed, value_dim = records.sealed, records.open_values.shape[3]
    dtype, code = str(records.open_keys.dtype).removeprefix("torch."), f"int{records.bits}"
    none = [0] * NUM_VARIANTS
    score_sealed, value_sealed = none, none
    if sealed is not None:
        is_grouped = sealed.num_key_groups > 1
        score_sealed = score_kernels(code, sealed.key_codes.shape[2], is_grouped=is_grouped)
        value_sealed = value_kernels(code, value_dim)
    return [
        score_kernels(dtype, open_piece(records), is_grouped=False),
        score_sealed,
        score_kernels("float32", NEW_TOKEN_ROWS, is_grouped=False),
        value_kernels(dtype, value_dim),
        value_sealed,
        value_kernels("float32", value_dim),
    ]


def sealed_fields(sealed: SealedViews | None) -> list[int]:
    """Where the sections of sealed blocks are."""
    if sealed is None:
        return [0] * (Field.KERNELS - Field.KEY_CODES)
    assert sealed.key_codes.stride(2) == 1, "key codes are channel-major on a CPU"
    key_zero, value_zero = sealed.key_zero, sealed.value_zero
    sections = [sealed.key_scale, key_zero, sealed.value_scale, value_zero]
    present = [section for section in sections if section is not None]
    start = min(section.data_ptr() for section in present)
    size = sum(section[0, 0].nbytes for section in present)
    return [
        sealed.key_codes.data_ptr(),
        sealed.value_codes.data_ptr(),
        sealed.key_codes.shape[2],
        *(0 if section is None else section.data_ptr() for section in sections),
        start,
        size,
        sealed.num_key_groups,
        (sealed.block_size // max(sealed.num_key_groups, 1)).bit_length() - 1,
    ]


def score_kernels(kind: str, num_token_rows: int, *, is_grouped: bool) -> list[int]:
    """Addresses by number of query rows."""
    return [
        score_kernel(kind, rows, num_token_rows, is_grouped, host_width()).address
        for rows in ROW_VARIANTS
    ]


def value_kernels(kind: str, value_dim: int) -> list[int]:
    return [value_kernel(kind, rows, value_dim, host_width()).address for rows in ROW_VARIANTS]
