"""What a model does to each token's row on its own, on a CPU: RMS norms and rotary turns.

Knows rows, nothing of models. One worker hands stretches of rows to a microkernel, which is given
the addresses of up to four matrices whose rows belong together.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from math import gcd
from struct import Struct
from typing import Any, Final, NamedTuple

import torch
from llvmlite import ir
from torch import Tensor

from .elements import ELEMENT_BYTES, decode, encode, load_raw
from .native_code import address_of, call, fetch_add, kind_of, load_long, native, worker
from .threads import run_worker
from .vectors import FLOAT, Emitter, MachineCode, host_width

ROWS_AT_ONCE: Final = 8  # that a thread takes
MIN_THREAD_BYTES: Final = 1 << 17  # fewer are not worth another thread


class CallFields(NamedTuple):
    """Of a call: the first rows of four matrices, and the bytes from one row to the next."""

    counter: int
    kernel: int
    num_rows: int
    first: int
    first_stride: int
    second: int
    second_stride: int
    third: int
    third_stride: int
    fourth: int
    fourth_stride: int


CALL: Final = CallFields(*range(len(CallFields._fields)))
CALL_STRUCT: Final = Struct(f"={len(CALL)}q")


@native
def run_rows(p: int) -> None:
    """Take stretches of rows until none is left."""
    counter, num_rows = load_long(p, CALL.counter), load_long(p, CALL.num_rows)
    first, second = load_long(p, CALL.first), load_long(p, CALL.second)
    third, fourth = load_long(p, CALL.third), load_long(p, CALL.fourth)
    while True:
        row = fetch_add(counter) * ROWS_AT_ONCE
        if row >= num_rows:
            break
        call(
            load_long(p, CALL.kernel),
            (first + row * load_long(p, CALL.first_stride),
             second + row * load_long(p, CALL.second_stride),
             third + row * load_long(p, CALL.third_stride),
             fourth + row * load_long(p, CALL.fourth_stride),
             min(ROWS_AT_ONCE, num_rows - row)),
        )  # fmt: skip


def run_rows_of(parameters: Any) -> None:
    run_rows(address_of(parameters))


@cache
def row_worker() -> int:
    """The address of the worker, compiled when first asked for and kept on disk."""
    return int(worker(run_rows_of).address)


def run_on_rows(kernel: int, matrices: Sequence[int], row_bytes: int, num_rows: int) -> None:
    """Call a kernel for all rows; `matrices` are four addresses, each with its stride in bytes."""
    num_units = min(row_bytes * num_rows // MIN_THREAD_BYTES, -(-num_rows // ROWS_AT_ONCE))
    num_threads = min(torch.get_num_threads(), num_units)
    if num_threads <= 1:
        row_function(kernel)(*matrices[::2], num_rows)
        return
    counter = ctypes.c_int64(0)
    fields = CallFields(ctypes.addressof(counter), kernel, num_rows, *matrices)
    record = ctypes.create_string_buffer(CALL_STRUCT.pack(*fields))
    run_worker(row_worker(), ctypes.addressof(record), num_threads)


@cache
def row_function(kernel: int) -> Callable[..., None]:
    """A kernel as a Python function."""
    function: Callable[..., None] = ctypes.CFUNCTYPE(None, *(ctypes.c_int64,) * 5)(kernel)
    return function


# -- RMS norms ------------------------------------------------------------------------------------


class Norm(NamedTuple):
    """x / sqrt(mean(x**2) + epsilon) * weight, or * (1 + weight) with `is_offset`."""

    weight: Tensor  # float32 or bfloat16
    epsilon: float
    is_offset: bool = False


@cache
def norm_kernel(
    num_channels: int, kind: str, weight_kind: str, epsilon: float, is_offset: bool
) -> MachineCode:
    """Arguments: source, target (rows of `kind`), weight, nothing, number of rows.

    The weight counts from 0, or from 1 with `is_offset`.
    """
    lanes, item = gcd(host_width(), num_channels), ELEMENT_BYTES[kind]
    emitter = Emitter("norm", 5)
    source, target, weight, _, num_rows = emitter.arguments
    builder = emitter.builder
    width = num_channels * item
    with emitter.loop(emitter.long(0), num_rows, 1) as row:
        line = builder.add(source, emitter.times(row, width))
        output = builder.add(target, emitter.times(row, width))
        squares = emitter.variable(emitter.constant(0.0, lanes))
        with emitter.loop(emitter.long(0), emitter.long(num_channels), lanes) as channel:
            vector = loaded(emitter, line, channel, kind, lanes)
            builder.store(emitter.fma(vector, vector, builder.load(squares)), squares)
        total = emitter.reduce(builder.load(squares), builder.fadd)
        mean = builder.fmul(total, ir.Constant(FLOAT, 1 / num_channels))
        root = emitter.call("llvm.sqrt.f32", FLOAT, builder.fadd(mean, ir.Constant(FLOAT, epsilon)))
        factor = emitter.splat(builder.fdiv(ir.Constant(FLOAT, 1.0), root), lanes)
        with emitter.loop(emitter.long(0), emitter.long(num_channels), lanes) as channel:
            vector = builder.fmul(loaded(emitter, line, channel, kind, lanes), factor)
            scale = loaded(emitter, weight, channel, weight_kind, lanes)
            if is_offset:
                scale = builder.fadd(scale, emitter.constant(1.0, lanes))
            else:  # the weight is multiplied in the rows' precision
                vector = decode(emitter, encode(emitter, vector, kind), kind)[0]
            at = builder.add(output, emitter.times(channel, item))
            emitter.store(encode(emitter, builder.fmul(vector, scale), kind), at)
    return MachineCode("norm", emitter.finish())


def loaded(emitter: Emitter, line: Any, channel: Any, kind: str, lanes: int) -> Any:
    """Elements of a line as floats."""
    at = emitter.builder.add(line, emitter.times(channel, ELEMENT_BYTES[kind]))
    return decode(emitter, load_raw(emitter, at, kind, lanes), kind)[0]


def rms_norm(rows: Tensor, norm: Norm) -> Tensor:
    """A norm of the last dimension of rows, which are float32 or bfloat16."""
    rows, weight = rows.contiguous(), norm.weight
    num_channels = rows.shape[-1]
    output = torch.empty_like(rows)
    kernel = norm_kernel(num_channels, kind_of(rows), kind_of(weight), norm.epsilon, norm.is_offset)
    stride = num_channels * rows.element_size()
    matrices = (rows.data_ptr(), stride, output.data_ptr(), stride, weight.data_ptr(), 0, 0, 0)
    run_on_rows(kernel.address, matrices, stride, rows.numel() // num_channels)
    return output


# -- rotary positions -----------------------------------------------------------------------------


@cache
def turn_kernel(
    num_heads: tuple[int, int], head_dim: int, num_turned: int, kind: str, angle_kind: str
) -> MachineCode:
    """Turn queries and keys in place: channel i with channel i + `num_turned` / 2.

    Arguments: queries and keys (rows of heads), cosines and sines (rows of `num_turned`), number of
    rows.
    """
    half = num_turned // 2
    lanes, item = gcd(host_width(), half), ELEMENT_BYTES[kind]
    emitter = Emitter("turn", 5)
    queries, keys, cosines, sines, num_rows = emitter.arguments
    builder = emitter.builder
    with emitter.loop(emitter.long(0), num_rows, 1) as row:
        at_angles = emitter.times(row, num_turned * ELEMENT_BYTES[angle_kind])
        angles = [builder.add(start, at_angles) for start in (cosines, sines)]
        with emitter.loop(emitter.long(0), emitter.long(half), lanes) as channel:
            opposite = emitter.offset(channel, half)
            cosine, sine, far_cosine, far_sine = (
                loaded(emitter, line, place, angle_kind, lanes)
                for place in (channel, opposite)
                for line in angles
            )
            for start, count in zip((queries, keys), num_heads, strict=True):
                line = builder.add(start, emitter.times(row, count * head_dim * item))
                with emitter.loop(emitter.long(0), emitter.long(count), 1) as head:
                    place = builder.add(line, emitter.times(head, head_dim * item))
                    near = loaded(emitter, place, channel, kind, lanes)
                    far = loaded(emitter, place, opposite, kind, lanes)
                    turned = builder.fsub(builder.fmul(near, cosine), builder.fmul(far, sine))
                    across = emitter.fma(far, far_cosine, builder.fmul(near, far_sine))
                    for channels, vector in ((channel, turned), (opposite, across)):
                        at = builder.add(place, emitter.times(channels, item))
                        emitter.store(encode(emitter, vector, kind), at)
    return MachineCode("turn", emitter.finish())


def turn(queries: Tensor, keys: Tensor, cosines: Tensor, sines: Tensor) -> None:
    """Turn contiguous queries and keys [T, H, D] in place by angles [T, R], R <= D.

    Channels i and i + R / 2 are turned together, as Llama has it; those behind R stay.
    """
    cosines, sines = cosines.contiguous(), sines.contiguous()
    num_tokens, num_heads, head_dim = queries.shape
    heads, num_turned = (num_heads, keys.shape[1]), cosines.shape[-1]
    kernel = turn_kernel(heads, head_dim, num_turned, kind_of(queries), kind_of(cosines))
    size, angle_bytes = head_dim * queries.element_size(), num_turned * cosines.element_size()
    rows = (queries.data_ptr(), heads[0] * size, keys.data_ptr(), heads[1] * size)
    angles = (cosines.data_ptr(), angle_bytes, sines.data_ptr(), angle_bytes)
    run_on_rows(kernel.address, (*rows, *angles), rows[1], num_tokens)
