"""A decoder layer on a CPU in one launch: norms, linear layers and turns around its attention.

Knows matrices and records, nothing of models. For a step with one new token a sequence, where what
Python and torch do between operations would take as long as some of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..new_tokens import NewTokens
from . import token_rows
from .dense import DenseLayer
from .dense_kernels import SCRATCH_BYTES
from .dense_worker import CALL, CallFields, linear_worker
from .elements import ELEMENT_BYTES
from .native_attention import attention_worker
from .native_code import KINDS, address_of_array, address_or_0, kind_of, thread_scratch
from .plan import WorkItems
from .rotation import rotate_kernel
from .stages import Stage, Stages
from .token_rows import Norm, norm_kernel, row_worker, turn_kernel

MAX_STAGES: Final = 13
MAX_ROWS: Final = 64  # for more, what is around the products takes little of the time
COUNTER_LONGS: Final = 8  # a stage's counters have a cache line of their own


class LayerParts(NamedTuple):
    """What there is around the attention of a layer."""

    attention_norm: Norm
    projections: DenseLayer  # to queries, keys and values
    head_norms: Sequence[Norm | None]  # of queries and of keys
    attention_output: DenseLayer
    gate_norm: Norm
    gate: DenseLayer  # with its activation
    down: DenseLayer
    head_dim: int


class Shape(NamedTuple):
    """What the records of a layer depend on."""

    num_rows: int
    dtype: torch.dtype
    num_turned: int  # channels
    angle_dtype: torch.dtype
    rotates_values: bool  # for attention, and what it puts out back
    num_threads: int


class Rows(NamedTuple):
    """What the stages of a layer of T tokens hand on."""

    normed: Tensor  # [T, K]
    projected: Tensor  # queries, then keys, then values, in float32
    new: NewTokens  # the same
    attended: Tensor  # [T, Hq, value_dim]
    middle: Tensor  # [T, K] hidden states behind attention
    inner: Tensor  # [T, I]


class Sizes(NamedTuple):
    """Of the rows of a layer."""

    projected: tuple[int, ...]  # channels of queries, keys and values
    head_dim: int
    hidden: int
    inner: int
    dtype: torch.dtype


class Workspace:
    """Rows that layers of the same sizes use one after another, so that they stay in the cache."""

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        item = sizes.dtype.itemsize
        others = (sizes.hidden, sizes.projected[0], sizes.hidden, sizes.inner)
        self._widths = [4 * sum(sizes.projected), *(item * each for each in others)]
        self._memory = torch.empty(MAX_ROWS * sum(self._widths), dtype=torch.uint8)
        self._rows: dict[int, Rows] = {}

    def rows(self, count: int) -> Rows:
        """Those of `count` tokens; what others have is overwritten."""
        if count not in self._rows:
            self._rows[count] = self._cut(count)
        return self._rows[count]

    def _cut(self, count: int) -> Rows:
        sizes, parts = self._sizes, torch.split(self._memory, [MAX_ROWS * n for n in self._widths])
        floats, *rest = (p[: count * n] for p, n in zip(parts, self._widths, strict=True))
        projected = floats.view(torch.float32)
        normed, attended, middle, inner = (one.view(sizes.dtype).view(count, -1) for one in rest)
        heads = torch.split(projected, [count * each for each in sizes.projected])
        new = NewTokens(*(one.view(count, -1, sizes.head_dim) for one in heads))
        attended = attended.view(count, -1, sizes.head_dim)
        return Rows(normed, projected, new, attended, middle, inner)


_local = threading.local()


def workspace(sizes: Sizes) -> Workspace:
    """The running thread's."""
    kept: dict[Sizes, Workspace] = _local.__dict__.setdefault("workspaces", {})
    if sizes not in kept:
        kept[sizes] = Workspace(sizes)
    return kept[sizes]


class DecoderLayer:
    """h + attention(norm(h)), then h + down(gate(norm(h))); each thread that calls has its own.

    Hidden states are rounded where modules would round them; queries, keys and values stay float32.
    """

    def __init__(self, parts: LayerParts) -> None:
        self.parts = parts
        self._records: dict[Shape, LayerRecords] = {}

    def __call__(
        self,
        hidden: Tensor,
        angles: Sequence[Tensor],
        prepare_attention: Callable[[NewTokens, Tensor], WorkItems],
        *,
        rotates_values: bool = False,
    ) -> tuple[Tensor, NewTokens]:
        """Hidden states [T, K] behind the layer, and its new tokens, good until the next call.

        Angles are cosines and sines [T, R], contiguous. `prepare_attention` gets new tokens whose
        numbers are not known yet, and what attention writes to, [T, Hq, value_dim].
        """
        records = self.records(hidden, angles, rotates_values=rotates_values)
        rows, output = records.rows, torch.empty_like(hidden)
        work = prepare_attention(rows.new, rows.attended)
        records.run(hidden, angles, work.record_address, output)
        return output, rows.new

    def records(
        self, hidden: Tensor, angles: Sequence[Tensor], *, rotates_values: bool
    ) -> LayerRecords:
        """Those for hidden states and angles of these shapes, all that they need compiled."""
        shape = Shape(
            num_rows=len(hidden),
            dtype=hidden.dtype,
            num_turned=angles[0].shape[1],
            angle_dtype=angles[0].dtype,
            rotates_values=rotates_values,
            num_threads=torch.get_num_threads(),
        )
        if shape not in self._records:
            self._records[shape] = LayerRecords(self.parts, shape)
        return self._records[shape]


class LayerRecords:
    """The stages of a layer for one shape: their records, and the rows that they hand on."""

    def __init__(self, parts: LayerParts, shape: Shape) -> None:
        self.shape = shape
        self._counters = np.zeros((MAX_STAGES, COUNTER_LONGS), dtype=np.int64)
        self._zeros = bytes(self._counters.nbytes)
        self._scratch = thread_scratch("linear", shape.num_threads, SCRATCH_BYTES)
        self._kept: list[NDArray[np.int64]] = []
        self._list: list[Stage] = []
        sizes = Sizes(
            projected=tuple(parts.projections.columns),
            head_dim=parts.head_dim,
            hidden=parts.down.columns[0],
            inner=parts.gate.columns[0],
            dtype=shape.dtype,
        )
        self.rows: Final = workspace(sizes).rows(shape.num_rows)
        self._add_stages(parts)
        self._stages = Stages(self._list)

    def _add_stages(self, parts: LayerParts) -> None:
        """Before attention and behind it; what a call alone knows is filled in by `run`."""
        normed, projected, new, attended, middle, inner = self.rows
        self._first = self._add_norm(parts.attention_norm, middle, normed)
        self._add_linear(parts.projections, normed, projected)
        for norm, heads in zip(parts.head_norms, (new.query, new.key), strict=True):
            if norm is not None:
                rows = heads.view(-1, parts.head_dim)
                self._add_norm(norm, rows, rows)
        self._turn = self._add_turn(new.query, new.key)
        if self.shape.rotates_values:
            self._add_rotation(new.value)
        self._attention = len(self._list)
        self._list.append(Stage(attention_worker(), 0))
        if self.shape.rotates_values:
            self._add_rotation(attended)
        rows = attended.view(len(middle), -1)
        self._output = self._add_linear(parts.attention_output, rows, middle, middle)
        self._add_norm(parts.gate_norm, middle, normed)
        self._add_linear(parts.gate, normed, inner)
        self._last = self._add_linear(parts.down, inner, middle, middle)

    def run(self, hidden: Tensor, angles: Sequence[Tensor], attention: int, output: Tensor) -> None:
        """Run on these, with the record of a prepared attention."""
        self._first[token_rows.CALL.first] = hidden.data_ptr()
        self._output[CALL.residual] = hidden.data_ptr()
        self._turn[token_rows.CALL.third] = angles[0].data_ptr()
        self._turn[token_rows.CALL.fourth] = angles[1].data_ptr()
        self._last[CALL.outputs] = output.data_ptr()
        self._counters.data.cast("B")[:] = self._zeros
        self._stages.set_parameters(self._attention, attention)
        self._stages.run(self.shape.num_threads)

    # -- stages ---------------------------------------------------------------------------------

    def _add(self, worker: int, fields: Sequence[int]) -> memoryview:
        record = np.array(fields, dtype=np.int64)
        self._kept.append(record)
        self._list.append(Stage(worker, address_of_array(record)))
        return record.data

    def _next_counters(self) -> int:
        return address_of_array(self._counters[len(self._list)])

    def _add_norm(self, norm: Norm, source: Tensor, target: Tensor) -> memoryview:
        weight, stride = norm.weight, source.shape[1] * source.element_size()
        kernel = norm_kernel(
            source.shape[1], kind_of(source), kind_of(weight), norm.epsilon, norm.is_offset
        )
        matrices = (source.data_ptr(), stride, target.data_ptr(), stride, weight.data_ptr(), 0)
        call = (self._next_counters(), kernel.address, len(source), *matrices, 0, 0)
        return self._add(row_worker(), token_rows.CallFields(*call))

    def _add_turn(self, query: Tensor, key: Tensor) -> memoryview:
        num_turned, angle_kind = self.shape.num_turned, KINDS[self.shape.angle_dtype]
        heads = query.shape[1], key.shape[1]
        kernel = turn_kernel(heads, query.shape[2], num_turned, kind_of(query), angle_kind)
        angle_bytes = num_turned * ELEMENT_BYTES[angle_kind]
        matrices = (query.data_ptr(), 4 * query.stride(0), key.data_ptr(), 4 * key.stride(0))
        call = (self._next_counters(), kernel.address, len(query), *matrices)
        return self._add(row_worker(), token_rows.CallFields(*call, 0, angle_bytes, 0, angle_bytes))

    def _add_rotation(self, heads: Tensor) -> memoryview:
        num_channels = heads.shape[2]
        kernel = rotate_kernel(num_channels, kind_of(heads))
        place = heads.data_ptr(), num_channels * heads.element_size()
        call = (self._next_counters(), kernel.address, heads.shape[0] * heads.shape[1])
        return self._add(row_worker(), token_rows.CallFields(*call, *place, *place, 0, 0, 0, 0))

    def _add_linear(
        self, layer: DenseLayer, rows: Tensor, outputs: Tensor, residual: Tensor | None = None
    ) -> memoryview:
        has_residual = residual is not None
        fields = CallFields(
            counters=self._next_counters(),
            scratch=self._scratch.address,
            rows=rows.data_ptr(),
            row_stride=rows.stride(0) * rows.element_size(),
            num_rows=len(rows),
            outputs=outputs.data_ptr(),
            residual=address_or_0(residual),
            layer=layer.record(kind_of(rows), kind_of(outputs), has_residual=has_residual),
        )
        return self._add(linear_worker(), fields)
