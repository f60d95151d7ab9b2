"""Arguments of Triton's kernels in named groups: what a launch fills in and a kernel reads by name.

Knows names and what they mean, no kernel. Groups of lower-case names are tensors and numbers, those
of upper-case names constants that a kernel is compiled for. No name is `values` or `type`: Triton's
own tuples have these.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """[T, heads, D] with contiguous rows."""

    rows: Tensor
    token_stride: int
    head_stride: int


class NewRows(NamedTuple):
    query: Rows
    sink_query: Rows  # the query's own where there is no other
    key: Rows
    value: Rows


class NewKeysAndValues(NamedTuple):
    key: Rows
    value: Rows


class Sections(NamedTuple):
    """Those of sealed blocks, see `SealedViews`, and the channels that `wide_codes` are of."""

    key_codes: Tensor
    wide_codes: Tensor | None
    value_codes: Tensor
    upper_value_codes: Tensor | None
    key_scale: Tensor
    key_zero: Tensor | None
    value_scale: Tensor
    value_zero: Tensor | None
    wide_channels: Tensor | None  # [H, NUM_WIDE]


class OpenTokens(NamedTuple):
    """Keys or values of open blocks."""

    tokens: Tensor
    row_stride: int
    channel_stride: int
    block_stride: int
    kv_head_stride: int


class OpenBlocks(NamedTuple):
    key: OpenTokens
    value: OpenTokens
    slots: Tensor  # [T] where new tokens are appended; -1: nowhere


class Seals(NamedTuple):
    """See `StepInputs`."""

    block_ids: Tensor  # -1: there is none
    sources: Tensor


class DecodeRows(NamedTuple):
    """[B] each: sequences of a decode step, those of its rows that are empty -1, and lengths."""

    seq_ids: Tensor
    token_ids: Tensor
    sources: Tensor  # where among those drawn last the token is; -1: in `token_ids`
    context_lens: Tensor
    num_sealed: Tensor
    seal_block_ids: Tensor | None  # -1: the row's sequence seals none


class DecodeInputs(NamedTuple):
    """What a decode step's tables and lengths mean, see `StepInputs`."""

    token_ids: Tensor  # [B]
    block_table: Tensor
    slots: Tensor  # [B] where new tokens are appended; -1: nowhere
    seal_sources: Tensor | None


class Coding(NamedTuple):
    """What ranges are shrunk by, and what errors add to channels; see `LayerBlocks`."""

    key_clip: float
    wide_key_clip: float
    value_clip: float
    feedback: Tensor | None


class StepTensors(NamedTuple):
    """Of a step, and the tiles of a group of its sequences; see `StepInputs` and `RowGroup`."""

    tiles: Tensor
    query_start_loc: Tensor
    context_lens: Tensor
    num_sealed: Tensor
    block_table: Tensor
    table_width: int
    num_sink_tokens: Tensor | None
    window_sizes: Tensor | None


class Parts(NamedTuple):
    """Partial results, not divided yet."""

    outputs: Tensor  # [parts, ROWS, VALUE_DIM]
    sums: Tensor  # [parts, 2, ROWS] exponents that outputs are relative to, sums of weights


class OtherParts(NamedTuple):
    """What else belongs to a softmax; see `NewPart`."""

    sink_logits: Tensor | None
    new_output: Tensor | None
    new_log_sums: Tensor | None
    num_new: int


class RuleNumbers(NamedTuple):
    """0 where a rule is off; with a softcap, the scale is in units of it."""

    scale: float
    softcap: float
    sliding_window: int
    attention_chunk: int


class Shape(NamedTuple):
    """Of heads; columns are channels, padded to a power of 2."""

    NUM_KV_HEADS: int
    QUERY_GROUP_SIZE: int  # query heads of a kv head
    KEY_DIM: int
    VALUE_DIM: int
    KEY_COLUMNS: int
    VALUE_COLUMNS: int


class Layout(NamedTuple):
    """How blocks lie in a layer's arena."""

    BLOCK_SIZE: int
    OPEN_BLOCK_SIZE: int
    NUM_HEAD_TOKENS: int
    HAS_BODY: bool  # whether blocks are ever sealed
    RECORD_SIZE: int  # of one kv head's block, in bytes; open blocks: in their elements
    KEY_STRIDES: tuple[int, ...]  # of a row and of a channel; of codes, or of open keys
    VALUE_STRIDES: tuple[int, ...]
    # Of sealed blocks only:
    KEY_BITS: int = 0  # of a code
    VALUE_BITS: int = 0
    LOWER_VALUE_BITS: int = 0  # of these, those that are packed together
    LEAST_BITS: int = 0  # that are packed together, of keys, their upper bits, or values
    NUM_KEY_GROUPS: int = 0
    NUM_WIDE: int = 0  # channels of a key
    WIDE_BITS: int = 0  # that their codes have more than those of others
    WIDE_COLUMNS: int = 0  # the same, padded
    WIDE_STRIDES: tuple[int, ...] = ()
    UPPER_VALUE_STRIDES: tuple[int, ...] = ()  # where values have bits that are packed apart
    TILE: int = 0  # rows of codes that sealing makes at once


class Tables(NamedTuple):
    """Sizes of blocks, and of the rows of block tables."""

    WIDTH: int
    BLOCK_SIZE: int
    OPEN_BLOCK_SIZE: int
    NUM_HEAD_TOKENS: int
    TILE: int = 128  # places of a table, or tokens of a block, that are taken at once


class Split(NamedTuple):
    """How the work is cut, and by which rules."""

    ROWS: int  # query rows of a tile
    TILE: int  # tokens, or rows of codes, that are taken at once
    NUM_PARTS: int  # of a tile, all kernels' together
    NUM_SPLITS: int  # of a context, by one kernel
    MIN_SPLIT: int  # blocks, or tiles
    HAS_SOFTCAP: bool
    HIDES_CONTEXT: bool
    HAS_WINDOWS: bool
    ATTENDS_NEW: bool = False
    TRANSPOSED: int = 0  # see `codes`


class Merge(NamedTuple):
    ROWS: int
    NUM_PARTS: int
    PARTS_COLUMNS: int
    OPEN_BLOCK_SIZE: int
    HAS_SINKS: bool
    HAS_NEW_PART: bool
    APPENDS: bool
