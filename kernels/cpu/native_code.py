"""Functions for native workers: memory at addresses, atomic counters, calls, and how to compile.

Knows numba, and where the rows of a tensor are, nothing of attention. A worker is one function that
every thread runs, with the address of its parameters.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable
from ctypes import addressof, c_char
from typing import Any, Final, NamedTuple, TypeVar, cast

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as numba_intrinsic
from numpy.typing import NDArray
from torch import Tensor

from ...code_cache import keep_on_disk
from .vectors import CACHE_LINE, FLOAT, LONG

Function = TypeVar("Function", bound=Callable[..., Any])

KINDS: Final = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}

_local = threading.local()


class Scratch(NamedTuple):
    """Memory that the threads of a worker write to; who keeps the address keeps the memory."""

    address: int
    memory: NDArray[np.uint8]


def thread_scratch(name: str, num_threads: int, num_bytes: int) -> Scratch:
    """Scratch of `num_bytes` for each thread of a worker; whoever starts one has its own."""
    kept: dict[str, Scratch] = _local.__dict__
    if name not in kept or kept[name].memory.size < num_threads * num_bytes + CACHE_LINE:
        memory = np.empty(num_threads * num_bytes + CACHE_LINE, dtype=np.uint8)
        kept[name] = Scratch(-(-int(memory.ctypes.data) // CACHE_LINE) * CACHE_LINE, memory)
    return kept[name]


def address_of_array(array: NDArray[np.generic]) -> int:
    """Where a writable array lies, 0 if it is empty; `array.ctypes` takes far longer to tell."""
    return addressof(c_char.from_buffer(array.data)) if array.size else 0


def row_addresses(tensor: Tensor) -> tuple[int, int, int]:
    """Of [T, heads, D]: address, bytes from token to token and from head to head."""
    size = tensor.element_size()
    token_stride, head_stride, _ = tensor.stride()
    return tensor.data_ptr(), size * token_stride, size * head_stride


def kind_of(tensor: Tensor) -> str:
    """A tensor's dtype as microkernels name it: "float32", "bfloat16", "float16"."""
    return KINDS[tensor.dtype]


def address_or_0(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def intrinsic(function: Callable[..., Any]) -> Any:
    """Instructions written by hand; callers leave out the first argument, the typing context."""
    return numba_intrinsic(function)


def native(function: Function) -> Function:
    """Compile a function into the worker that calls it.

    Python never calls it, and to compile without wrappers takes less time.
    """
    options: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return cast(Function, numba.njit(error_model="numpy", **options)(function))


def worker(function: Callable[[Any], None]) -> Any:
    """Compile a function of one pointer for native callers; kept on disk where that can be."""
    signature = types.void(types.voidptr)
    try:
        from numba.core.ccallback import CFunc

        callback: Any = CFunc(function, (signature.args, signature.return_type), {}, {})
        keep_on_disk(callback, function)
    except (ImportError, AttributeError, TypeError):  # a numba that makes them otherwise
        return numba.cfunc(signature)(function)
    callback.compile()
    return callback


@intrinsic
def call(typing_context: Any, address: Any, arguments: Any) -> Any:
    """Call native code at an address with a tuple of 64-bit integers."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        unpacked = cgutils.unpack_tuple(builder, values[1])  # type: ignore[no-untyped-call]
        longs = [
            context.cast(builder, value, kind, types.int64)
            for value, kind in zip(unpacked, signature.args[1].types, strict=True)
        ]
        function = ir.FunctionType(ir.VoidType(), [LONG] * len(longs))
        builder.call(builder.inttoptr(values[0], function.as_pointer()), longs)
        return context.get_dummy_value()

    return types.void(types.int64, arguments), codegen


def loader(element: Any, kind: Any) -> Any:
    """A function (address, index) that reads one element."""

    @intrinsic
    def load(typing_context: Any, address: Any, index: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            pointer = builder.inttoptr(values[0], kind.as_pointer())
            return builder.load(builder.gep(pointer, [values[1]]))

        return element(types.int64, types.int64), codegen

    return load


def storer(element: Any, kind: Any) -> Any:
    """A function (address, index, value) that writes one element."""

    @intrinsic
    def store(typing_context: Any, address: Any, index: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            pointer = builder.inttoptr(values[0], kind.as_pointer())
            builder.store(values[2], builder.gep(pointer, [values[1]]))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, element), codegen

    return store


load_long: Callable[[int, int], int] = loader(types.int64, LONG)
load_float: Callable[[int, int], np.float32] = loader(types.float32, FLOAT)
store_long: Callable[[int, int, int], None] = storer(types.int64, LONG)
store_float: Callable[[int, int, np.float32], None] = storer(types.float32, FLOAT)


@intrinsic
def fetch_add(typing_context: Any, address: Any) -> Any:
    """Count up, and return the count before; what was written before is then seen by others."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = builder.inttoptr(values[0], LONG.as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(LONG, 1), "seq_cst")

    return types.int64(types.int64), codegen


@intrinsic
def load_shared(typing_context: Any, address: Any) -> Any:
    """Read what other threads write; what they wrote before is then seen."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(values[0], LONG.as_pointer()), "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def breathe(typing_context: Any) -> Any:
    """Tell the processor that this is a loop that waits, where it can be told."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        if platform.machine().lower() in ("x86_64", "amd64"):
            nothing = ir.FunctionType(ir.VoidType(), [])
            builder.call(builder.module.declare_intrinsic("llvm.x86.sse2.pause", fnty=nothing), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def exchange(typing_context: Any, address: Any, expected: Any, wanted: Any) -> Any:
    """Replace what other threads write, if it is what is expected; whether it was."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = builder.inttoptr(values[0], LONG.as_pointer())
        result = builder.cmpxchg(pointer, values[1], values[2], "seq_cst")
        return builder.extract_value(result, 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def address_of(typing_context: Any, pointer: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.ptrtoint(values[0], LONG)

    return types.int64(types.voidptr), codegen
