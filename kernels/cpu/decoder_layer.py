"""A decoder layer on a CPU in one launch: norms, linear layers and turns around its attention.

Knows matrices and records, nothing of models. For a step with one new token a sequence, where what
Python and torch do between operations would take as long as some of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..new_tokens import NewTokens
from . import dense, token_rows
from .attention import Prepared
from .dense import DenseLayer, linear_worker
from .dense_kernels import SCRATCH_BYTES
from .elements import ELEMENT_BYTES
from .native_attention import attention_worker
from .native_code import KINDS, address_of_array, address_or_0, kind_of, thread_scratch
from .rotation import rotate_kernel
from .stages import Stage, Stages
from .token_rows import Norm, norm_kernel, row_worker, turn_kernel

MAX_STAGES: Final = 13
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


class DecoderLayer:
    """h + attention(norm(h)), then h + down(gate(norm(h))); each thread that calls has its own.

    Hidden states are rounded where modules would round them; queries, keys and values stay float32.
    """

    def __init__(self, parts: LayerParts) -> None:
        self.parts = parts
        self._records: LayerRecords | None = None

    def __call__(
        self,
        hidden: Tensor,
        angles: Sequence[Tensor],
        prepare_attention: Callable[[NewTokens, Tensor], Prepared],
        *,
        rotates_values: bool = False,
    ) -> tuple[Tensor, NewTokens]:
        """Hidden states [T, K] behind the layer, and its new tokens, good until the next call.

        Angles are cosines and sines [T, R], contiguous. `prepare_attention` gets new tokens whose
        numbers are not known yet, and what attention writes to, [T, Hq, value_dim].
        """
        records = self.records(hidden, angles, rotates_values=rotates_values)
        output = torch.empty_like(hidden)
        prepared = prepare_attention(records.new, records.attended)
        records.run(hidden, angles, prepared.work.record_address, output)
        return output, records.new

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
        records = self._records
        if records is None or records.shape != shape:
            records = self._records = LayerRecords(self.parts, shape)
        return records


class LayerRecords:
    """The stages of a layer for one shape: their records, and the rows that they hand on."""

    def __init__(self, parts: LayerParts, shape: Shape) -> None:
        self.shape = shape
        self._counters = np.zeros((MAX_STAGES, COUNTER_LONGS), dtype=np.int64)
        self._zeros = bytes(self._counters.nbytes)
        self._scratch = thread_scratch("linear", shape.num_threads, SCRATCH_BYTES)
        self._kept: list[NDArray[np.int64]] = []
        self._list: list[Stage] = []
        count, dtype, columns = shape.num_rows, shape.dtype, parts.projections.columns
        self._normed = torch.empty(count, parts.down.columns[0], dtype=dtype)
        self._middle = torch.empty_like(self._normed)
        self._inner = torch.empty(count, parts.gate.columns[0], dtype=dtype)
        self._projected = torch.empty(count * sum(columns))
        tokens = torch.split(self._projected, [count * each for each in columns])
        self.new = NewTokens(*(one.view(count, -1, parts.head_dim) for one in tokens))
        self.attended = torch.empty(self.new.query.shape, dtype=dtype)
        self._add_stages(parts)
        self._stages = Stages(self._list)

    def _add_stages(self, parts: LayerParts) -> None:
        """Before attention and behind it; what a call alone knows is filled in by `run`."""
        normed, middle, inner = self._normed, self._middle, self._inner
        self._first = self._add_norm(parts.attention_norm, middle, normed)
        self._add_linear(parts.projections, normed, self._projected)
        for norm, heads in zip(parts.head_norms, (self.new.query, self.new.key), strict=True):
            if norm is not None:
                rows = heads.view(-1, parts.head_dim)
                self._add_norm(norm, rows, rows)
        self._turn = self._add_turn()
        if self.shape.rotates_values:
            self._add_rotation(self.new.value)
        self._attention = len(self._list)
        self._list.append(Stage(attention_worker(), 0))
        if self.shape.rotates_values:
            self._add_rotation(self.attended)
        attended = self.attended.view(len(middle), -1)
        self._output = self._add_linear(parts.attention_output, attended, middle, middle)
        self._add_norm(parts.gate_norm, middle, normed)
        self._add_linear(parts.gate, normed, inner)
        self._last = self._add_linear(parts.down, inner, middle, middle)

    def run(self, hidden: Tensor, angles: Sequence[Tensor], attention: int, output: Tensor) -> None:
        """Run on these, with the record of a prepared attention."""
        self._first[token_rows.CALL.first] = hidden.data_ptr()
        self._output[dense.CALL.residual] = hidden.data_ptr()
        self._turn[token_rows.CALL.third] = angles[0].data_ptr()
        self._turn[token_rows.CALL.fourth] = angles[1].data_ptr()
        self._last[dense.CALL.outputs] = output.data_ptr()
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

    def _add_turn(self) -> memoryview:
        query, key = self.new.query, self.new.key
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
        fields = dense.CallFields(
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
