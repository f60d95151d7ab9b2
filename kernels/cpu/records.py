"""What the attention worker of the CPU reads, by name: its record, work items and scratch.

Knows places and sizes, nothing of what is done with them. A record is three groups of 64-bit
integers and a few floats. Each group is one class: its instances hold values, and `STEP`, `LAYER`
and `CALL` the places by the same names, so that what packs and what reads share a definition.
"""

from __future__ import annotations

from collections import namedtuple
from ctypes import Structure, c_float, c_int64, sizeof
from enum import IntEnum, auto
from struct import Struct
from typing import Final, NamedTuple, cast

from .microkernels import (
    MAX_DIM,
    MAX_KEY_GROUPS,
    MAX_ROWS,
    ROW_STRIDE,
    SCORE_STRIDE,
    STATE_LANES,
    TILE_TOKENS,
)
from .pair_kernels import KEY_PAIR_BYTES, QUERY_BYTES, WEIGHT_BYTES

ITEM_ROWS: Final = 32  # query rows of one work item ...
PAIR_ITEM_ROWS: Final = 96  # ... and where they are multiplied as pairs of bfloat16
NEW_TOKEN_ROWS: Final = 32  # new tokens whose scores are computed at once
NUM_VARIANTS: Final = 4  # microkernels for 1, 2, 4 and 8 query rows


class StepFields(NamedTuple):
    """Of a step, for one number of heads. Names of arrays are their addresses."""

    num_items: int
    items: int  # [num_items, Item.COUNT]
    context_lens: int
    num_sealed: int
    query_start_loc: int
    block_table: int  # [N, table_width]
    table_width: int
    block_size: int
    open_block_size: int
    num_head_tokens: int
    query_group_size: int  # query heads of a kv head
    num_sink_tokens: int  # [N] of windowed sequences; 0 in a step without any
    window_sizes: int
    counters: int  # next item, next thread, then one for each split row
    partials: int
    stored_starts: int  # [N + 1] where a sequence's stored tokens begin among all of them
    stored_tokens: int
    stored_slots: int


class LayerFields(NamedTuple):
    """Of a layer; names of views and of microkernels are their addresses, strides are in bytes."""

    key_dim: int
    value_dim: int
    block_stride: int
    kv_head_stride: int
    open_keys: int
    open_values: int
    open_key_stride: int  # from channel to channel
    open_value_stride: int  # from token to token
    open_piece: int  # tokens of an open block whose scores are computed at once
    key_codes: int
    value_codes: int
    num_key_rows: int  # of codes: byte rows
    num_value_rows: int
    wide_codes: int  # the upper bits of wide channels
    num_wide: int
    num_wide_rows: int
    wide_channels: int  # [kv heads, num_wide]
    upper_value_codes: int  # 0 where there are none
    num_upper_rows: int
    key_scale: int
    key_zero: int
    value_scale: int
    value_zero: int
    metadata: int  # the first of these four ...
    metadata_bytes: int  # ... and the bytes of all
    num_key_groups: int  # 0 where keys have one scale for each token
    key_group_shift: int  # log2 of a key group's tokens
    fold: int
    widen: int
    affine: int
    prefetch: int
    start: int
    softmax: int
    softmax_sealed: int
    item_bytes: int  # of an element in open blocks
    round_to_open: int  # from float32 to elements of open blocks


class PairFields(NamedTuple):
    """Of a layer: microkernels for pairs of bfloat16; 0 where the processor has no such."""

    open_keys: int
    open_values: int
    new_keys: int  # also of sealed blocks, once they are floats
    new_values: int
    float_keys: int
    wide_keys: int
    float_values: int
    upper_values: int
    queries: int
    scores: int
    weights: int
    sums: int


class CallFields(Structure):
    """Of a call, set one by one in the record: float32 rows and their strides in bytes."""

    query: int
    query_token_stride: int
    query_head_stride: int
    sink_query: int  # 0: sinks are scored as other tokens; strides follow as those of queries do
    sink_query_token_stride: int
    sink_query_head_stride: int
    key: int
    key_token_stride: int
    key_head_stride: int
    value: int
    value_token_stride: int
    value_head_stride: int
    channel_major_keys: int  # [H, key_dim, padded_tokens], where a sequence has several new tokens
    padded_tokens: int
    output: int
    output_bytes: int  # of an element
    write: int  # the microkernel for a row of the output
    num_query_heads: int
    sliding_window: int  # 0: none
    attention_chunk: int  # 0: none
    sink_logits: int  # 0: none
    appends: int  # whether new tokens are written to open blocks
    scratch: int
    pair_scratch: int  # 0: products are of floats
    # `affine` reads the first two of these floats, softmax the last.
    shift: float  # of queries: 0
    factor: float
    softcap: float


CALL_INTEGERS: Final = [name for name, kind in CallFields.__annotations__.items() if kind == "int"]
CALL_FLOATS: Final = [name for name, kind in CallFields.__annotations__.items() if kind == "float"]
CallFields._fields_ = [
    *((name, c_int64) for name in CALL_INTEGERS),
    *((name, c_float) for name in CALL_FLOATS),
]


class Kernel(IntEnum):
    """Microkernels that come in variants by query rows."""

    SCORE_OPEN = 0
    SCORE_SEALED = auto()
    SCORE_WIDE = auto()
    SCORE_NEW = auto()
    VALUE_OPEN = auto()
    VALUE_SEALED = auto()
    VALUE_UPPER = auto()
    VALUE_NEW = auto()
    COUNT = auto()


NUM_STEP, NUM_LAYER = len(StepFields._fields), len(LayerFields._fields)
NUM_KERNELS: Final = Kernel.COUNT * NUM_VARIANTS
# Places in 64-bit integers from the start of the record.
STEP: Final = StepFields(*range(NUM_STEP))
LAYER: Final = LayerFields(*range(NUM_STEP, NUM_STEP + NUM_LAYER))
KERNELS: Final = NUM_STEP + NUM_LAYER  # [Kernel.COUNT, NUM_VARIANTS] addresses, of the layer too
FIRST_PAIR: Final = KERNELS + NUM_KERNELS
NUM_PAIR: Final = len(PairFields._fields)
PAIR: Final = PairFields(*range(FIRST_PAIR, FIRST_PAIR + NUM_PAIR))
FIRST_CALL: Final = FIRST_PAIR + NUM_PAIR
CALL: Final = cast(
    CallFields,
    namedtuple("CallPlaces", CALL_INTEGERS)(*range(FIRST_CALL, FIRST_CALL + len(CALL_INTEGERS))),
)
CALL_NUMBERS: Final = FIRST_CALL + len(CALL_INTEGERS)
STEP_STRUCT: Final = Struct(f"={NUM_STEP}q")
LAYER_STRUCT: Final = Struct(f"={NUM_LAYER + NUM_KERNELS + NUM_PAIR}q")
CALL_BYTE: Final = 8 * FIRST_CALL
LAYER_BYTES: Final = slice(8 * NUM_STEP, CALL_BYTE)
RECORD_BYTES: Final = CALL_BYTE + sizeof(CallFields)


class Item(IntEnum):
    """Places in a work item: some query rows of one kv head over a part of its context."""

    SEQUENCE = 0
    KV_HEAD = auto()
    FIRST_ROW = auto()
    NUM_ROWS = auto()
    START = auto()  # context tokens [start, end); the new ones follow where end is the last
    END = auto()
    PARTIAL = auto()  # index of its partial result, where there are several parts
    NUM_PARTS = auto()
    COUNTER = auto()
    FIRST_PARTIAL = auto()  # of all parts of the row
    COST = auto()  # about how long it takes
    COUNT = auto()


# A thread's scratch, in floats from its start; sums and states are kept by tiles of MAX_ROWS rows.
NUM_TILES: Final = PAIR_ITEM_ROWS // MAX_ROWS
QUERIES: Final = 0
OUTPUTS: Final = QUERIES + PAIR_ITEM_ROWS * ROW_STRIDE
FOLDED: Final = OUTPUTS + PAIR_ITEM_ROWS * ROW_STRIDE
ZERO_DOTS: Final = FOLDED + MAX_KEY_GROUPS * MAX_ROWS * ROW_STRIDE
SCORES: Final = ZERO_DOTS + MAX_KEY_GROUPS * MAX_ROWS
SUMS: Final = SCORES + MAX_ROWS * SCORE_STRIDE
MAXIMA: Final = SUMS + NUM_TILES * 2 * MAX_ROWS * STATE_LANES
NUMBERS: Final = MAXIMA + PAIR_ITEM_ROWS
RANGES: Final = NUMBERS + 4  # [2][MAX_ROWS] 64-bit: first visible token and one past the last
NEXT_ITEM: Final = RANGES + 4 * MAX_ROWS  # 64-bit address
PAIR_PLACE: Final = NEXT_ITEM + 2  # 64-bit address of the thread's scratch for pairs
# Key scale, key zero point, value scale, value zero point, as in `LayerFields`: halves [4][tile].
NUM_TOKEN_SECTIONS: Final = 4
TOKEN_SCALES: Final = PAIR_PLACE + 2
SCRATCH_FLOATS: Final = -(-(TOKEN_SCALES + 2 * TILE_TOKENS) // 1024) * 1024
PARTIAL_FLOATS: Final = ROW_STRIDE  # output, then maximum and sum behind it
PARTIAL_MAXIMUM: Final = ROW_STRIDE - 2
PARTIAL_SUM: Final = ROW_STRIDE - 1

# A thread's scratch for pairs, in bytes from its start.
PAIR_QUERIES: Final = 0
PAIR_WEIGHTS: Final = PAIR_QUERIES + PAIR_ITEM_ROWS * QUERY_BYTES
PAIR_KEYS: Final = PAIR_WEIGHTS + MAX_ROWS * WEIGHT_BYTES
PAIR_VALUES: Final = PAIR_KEYS + MAX_DIM // 2 * KEY_PAIR_BYTES
PAIR_FLOATS: Final = PAIR_VALUES + TILE_TOKENS // 2 * MAX_DIM * 4
PAIR_BYTES: Final = PAIR_FLOATS + MAX_DIM * TILE_TOKENS * 4
