"""Linear layers on a CPU, for any number of rows, on weights as they lie in memory.

Knows matrices, nothing of models. Rows and weights are both read along their channels, and sums lie
in the lanes, to be added up at the end of a tile: so weights need no second copy, and
those of half precision are widened in registers. Where the processor multiplies pairs of bfloat16,
rows of bfloat16 stay such; where it has tile registers, the weights of a unit of work are packed
for them as it comes (`matrix_tiles.py`). Weights of 8 bits are widened for each unit of work, or in
registers for few rows, and their sums scaled.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter, functional

from .dense_kernels import (
    HAS_PAIRS,
    ROW_BYTES_AT_ONCE,
    SCRATCH_BYTES,
    TILE_ROWS,
    TILE_WEIGHTS,
    finish_kernel,
    pack_kernel,
    tile_kernel,
    widen_kernel,
)
from .dense_worker import (
    CALL_STRUCT,
    CallFields,
    LayerFields,
    OutputFields,
    linear_worker,
)
from .elements import ELEMENT_BYTES
from .matrix_tiles import block_kernel, has_tiles
from .microkernels import prefetch_kernel
from .native_code import (
    KINDS,
    address_or_0,
    kind_of,
    thread_scratch,
)
from .threads import run_worker
from .vectors import host_width

PAIRED_KINDS: Final = ("bfloat16", "int8")  # of weights that bfloat16 holds
WEIGHT_KINDS: Final = {**KINDS, torch.int8: "int8"}
MAX_PAIRED_ROWS: Final = 64  # of more rows of bfloat16 torch's products are faster


class Weight(NamedTuple):
    """Of a linear layer: [N, K] with K contiguous, what is added, [N], and factors of its rows.

    A matrix of int8 has factors, [N] contiguous in float32, and no other has.
    """

    matrix: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None


def is_served(weight: Tensor) -> bool:
    """Whether a weight [N, K] can be multiplied here; a tensor of another class lies elsewhere."""
    return (
        type(weight) in (Tensor, Parameter)
        and weight.dtype in WEIGHT_KINDS
        and weight.device.type == "cpu"
        and weight.ndim == 2
        and weight.is_contiguous()
        and weight.shape[0] >= TILE_WEIGHTS
        and weight.shape[1] % (2 * host_width()) == 0
        and not (weight.dtype is torch.int8 and weight.shape[0] % TILE_WEIGHTS)
    )


def linear(rows: Tensor, weights: Sequence[Weight]) -> list[Tensor]:
    """`functional.linear` of rows [M, K] with each of several weights, [M, N] in their precision.

    All weights have one dtype. Sums are float32.
    """
    return DenseLayer(weights)(rows)


def gated_linear(rows: Tensor, gate: Weight, up: Weight, activation: str) -> Tensor:
    """activation(linear(rows, gate)) * linear(rows, up); the activation is one of `ACTIVATIONS`.

    Both have a bias or none has.
    """
    return DenseLayer([gate, up], activation)(rows)[0]


def linear_by_torch(rows: Tensor, weight: Weight) -> Tensor:
    matrix, bias, scale = weight
    if scale is None:
        return functional.linear(rows, matrix, bias)
    output = functional.linear(rows, matrix.to(rows.dtype)).mul_(scale)
    return output if bias is None else output.add_(bias)


@cache
def tile_addresses(kind: str, is_paired: bool) -> tuple[int, ctypes.Array[Any]]:
    count = TILE_ROWS[host_width()]
    addresses = [
        tile_kernel(kind, rows + 1, is_paired, adds).address
        for adds in (False, True)
        for rows in range(count)
    ]
    array = (ctypes.c_int64 * len(addresses))(*addresses)
    return ctypes.addressof(array), array


@cache
def block_addresses() -> tuple[int, ctypes.Array[Any]]:
    addresses = [block_kernel(count, adds).address for adds in (False, True) for count in (1, 2)]
    array = (ctypes.c_int64 * len(addresses))(*addresses)
    return ctypes.addressof(array), array


class DenseLayer:
    """Weights [N, K] that multiply the same rows, all of one dtype: an output [M, N] for each.

    With an `activation` there are two, and the one output is that of the first, activated, times
    that of the second. Each has to be served (`is_served`). A call raises `ValueError` for rows of
    other channels.
    """

    def __init__(self, weights: Sequence[Weight], activation: str | None = None) -> None:
        assert activation is None or len({weight.bias is None for weight in weights}) == 1
        self.weights: Final = list(weights)
        self.activation: Final = activation
        self._places = [place_of(weight) for weight in self.weights]
        self._num_channels = self.weights[0].matrix.shape[1]
        self._kind = WEIGHT_KINDS[self.weights[0].matrix.dtype]
        step = 1 if activation is None else 2
        # Of each output.
        self.columns: Final = [len(weight.matrix) for weight in self.weights[::step]]
        self._records: dict[tuple[str, str, bool], ctypes.Array[Any]] = {}

    def is_of(self, weights: Sequence[Weight]) -> bool:
        """Whether it was made of these weights, and they are where they were."""
        return [place_of(weight) for weight in weights] == self._places

    def row_kind(self, dtype: torch.dtype) -> str:
        """What rows of a precision are multiplied as: pairs of bfloat16, or float32."""
        is_paired = dtype is torch.bfloat16 and self._kind in PAIRED_KINDS and HAS_PAIRS
        return "bfloat16" if is_paired else "float32"

    def __call__(self, rows: Tensor) -> list[Tensor]:
        precision = rows.dtype
        if rows.shape[1] != self._num_channels:
            raise ValueError(f"rows of {rows.shape[1]} channels, weights of {self._num_channels}")
        kind = self.row_kind(precision)
        if kind == "bfloat16" and rows.shape[0] > MAX_PAIRED_ROWS:
            return self._by_torch(rows)
        if kind == "float32":
            rows = rows.to(torch.float32)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        num_rows, columns = rows.shape[0], self.columns
        output = rows.new_empty(num_rows * sum(columns))
        self._multiply(rows, output)
        output = output.to(precision)
        if len(columns) == 1:
            return [output.view(num_rows, columns[0])]
        parts = torch.split(output, [num_rows * count for count in columns])
        return [part.view(num_rows, n) for part, n in zip(parts, columns, strict=True)]

    def _by_torch(self, rows: Tensor) -> list[Tensor]:
        outputs = [linear_by_torch(rows, weight) for weight in self.weights]
        if self.activation is None:
            return outputs
        first, second = outputs
        if self.activation == "silu":
            return [functional.silu(first).mul_(second)]
        return [functional.gelu(first, approximate="tanh").mul_(second)]

    def _multiply(self, rows: Tensor, output: Tensor) -> None:
        num_threads = torch.get_num_threads()
        counters = ctypes.create_string_buffer(2 * 8)
        fields = CallFields(
            ctypes.addressof(counters),
            thread_scratch("linear", num_threads, SCRATCH_BYTES).address,
            rows.data_ptr(),
            rows.stride(0) * rows.element_size(),
            rows.shape[0],
            output.data_ptr(),
            0,
            self.record(*(kind_of(each) for each in (rows, output))),
        )
        record = ctypes.create_string_buffer(CALL_STRUCT.pack(*fields))
        run_worker(linear_worker(), ctypes.addressof(record), num_threads)

    def record(self, row_kind: str, output_kind: str, *, has_residual: bool = False) -> int:
        """The address of `LayerFields` for rows of a kind; valid as long as this object."""
        key = row_kind, output_kind, has_residual
        if key not in self._records:
            self._records[key] = self._record(*key)
        return ctypes.addressof(self._records[key])

    def _record(self, row_kind: str, output_kind: str, has_residual: bool) -> ctypes.Array[Any]:
        lanes, is_paired = host_width(), row_kind == "bfloat16"
        has_blocks = is_paired and has_tiles()
        matrix = self.weights[0].matrix
        channels_at_once = ROW_BYTES_AT_ONCE // ELEMENT_BYTES[row_kind]
        if any(count % TILE_WEIGHTS for count in self.columns):
            channels_at_once = self._num_channels  # the last two tiles share columns
        fields: list[int] = [
            *LayerFields(
                num_outputs=len(self.columns),
                num_channels=self._num_channels,
                row_bytes=ELEMENT_BYTES[row_kind],
                output_bytes=ELEMENT_BYTES[output_kind],
                channels_at_once=channels_at_once,
                tile_rows=TILE_ROWS[lanes],
                tiles=tile_addresses(self._kind, is_paired)[0],
                widen=widen_kernel("int8", is_paired).address if self._kind == "int8" else 0,
                wide_tiles=tile_addresses(row_kind, is_paired)[0],
                pack=pack_kernel(self._kind).address if has_blocks else 0,
                blocks=block_addresses()[0] if has_blocks else 0,
                weight_bytes=matrix.element_size(),
                weight_stride=matrix.shape[1] * matrix.element_size(),
                lanes=lanes,
                prefetch=prefetch_kernel().address,
            )
        ]
        first_column = 0
        for place, num_columns in enumerate(self.columns):
            matrix, bias, scale = self.weights[place]
            second = None if self.activation is None else self.weights[1]
            bias_kind = None if bias is None else kind_of(bias)
            finish = [
                finish_kernel(
                    self.activation, bias_kind, output_kind, has_residual, scale is not None, n
                )
                for n in (lanes, TILE_WEIGHTS)
            ]
            fields += OutputFields(
                first_column=first_column,
                num_columns=num_columns,
                weight=matrix.data_ptr(),
                scale=address_or_0(scale),
                bias=address_or_0(bias),
                second_weight=address_or_0(second and second.matrix),
                second_scale=address_or_0(second and second.scale),
                second_bias=address_or_0(second and second.bias),
                bias_bytes=0 if bias is None else bias.element_size(),
                finish=finish[0].address,
                finish_narrow=finish[1].address,
            )
            first_column += num_columns
        return (ctypes.c_int64 * len(fields))(*fields)


def place_of(weight: Weight) -> tuple[object, ...]:
    """Where a weight lies, and as what."""
    matrix, bias, scale = weight
    place = matrix.data_ptr(), matrix.dtype, matrix.shape
    return *place, address_or_0(bias), address_or_0(scale)
