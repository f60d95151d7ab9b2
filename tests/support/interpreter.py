"""Triton's interpreter, made faster. Kernels compute the same, by the same functions.

Most of its time goes into the types of values, not into their numbers: what says the same of the
same type is made once.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import triton
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def speed_up(patch: pytest.MonkeyPatch) -> None:
    """As long as `patch` lives; nothing happens where kernels are compiled."""
    if triton.knobs.runtime.interpret:
        patch.setattr(interpreter.InterpretedFunction, "__call__", language_once_a_function())
        patch.setattr(interpreter.ReduceOps, "generic_reduce", reduce_by_halves)
        patch.setattr(interpreter, "_get_np_dtype", remembered_by_name(interpreter._get_np_dtype))
        patch.setattr(core.tensor, "__init__", tensor_of_remembered_shape())
        patch.setattr(core.block_type, "__init__", remembered_block_type(core.block_type.__init__))
        patch.setattr(TritonSemantic, "broadcast_impl_value", unless_shapes_are_one())
        # Computed as int64 beside every sum and product, and looked at in debug mode alone.
        patch.setattr(TritonSemantic, "binary_op_sanitize_overflow_impl", lambda *_: None)


def language_once_a_function() -> Any:
    """A call inside a kernel, for which the interpreter replaces its language as for a launch.

    The first call of a function may find something left to replace, in a module that the kernel
    does not name; later ones never do, and take a third of the time.
    """
    seen: set[Any] = set()

    def call(function: Any, *args: Any, **named: Any) -> Any:
        if function.fn not in seen:
            seen.add(function.fn)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **named)

    return call


def reduce_by_halves(reduction: Any, tensors: tuple[Any, ...]) -> list[Any]:
    """A reduction by a function of ours: on halves of the tensor, not on element after element."""
    (tensor,) = tensors
    assert reduction.axis is not None
    assert not reduction.keep_dims
    numbers = np.moveaxis(tensor.handle.data, reduction.axis, 0)
    while len(numbers) > 1:
        halves = (reduction.to_tensor(half, tensor.dtype) for half in np.split(numbers, 2))
        numbers = reduction.combine_fn.fn(*halves).handle.data
    return [reduction.to_tensor(numbers[0], tensor.dtype)]


def remembered_by_name(numpy_type: Any) -> Any:
    """The type of NumPy for elements of one of Triton's: a table, which was made on every call."""
    known: dict[str, np.dtype[Any]] = {}

    def remembered(type_: core.dtype) -> np.dtype[Any]:
        name = type_.scalar.name
        if name not in known:
            known[name] = numpy_type(type_.scalar)
        return known[name]

    return remembered


def tensor_of_remembered_shape() -> Any:
    """A tensor, whose shape as constants is made anew for every intermediate result."""
    shapes: dict[tuple[int, ...], tuple[core.tuple, core.constexpr]] = {}

    def init(tensor: core.tensor, handle: Any, type_: core.dtype) -> None:
        sizes = tuple(type_.shape) if type_.is_block() else ()
        if sizes not in shapes:
            shape = core.tuple([core.constexpr(size) for size in sizes])
            shapes[sizes] = shape, core.constexpr(math.prod(sizes))
        tensor.handle, tensor.type, tensor.dtype = handle, type_, type_.scalar
        tensor.shape, tensor.numel = shapes[sizes]

    return init


def remembered_block_type(check: Any) -> Any:
    """A type of tensors, whose shape is checked and written out once."""
    known: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}

    def init(block_type: core.block_type, element_type: core.dtype, shape: Any) -> None:
        sizes = tuple(getattr(size, "value", size) for size in shape)
        key = element_type.name, sizes
        if key not in known:
            check(block_type, element_type, shape)
            known[key] = vars(block_type).copy()
        vars(block_type).update(known[key])

    return init


def unless_shapes_are_one() -> Any:
    """Tensors that have one remembered shape are as they should be."""
    broadcast = TritonSemantic.broadcast_impl_value

    def broadcast_others(
        semantic: TritonSemantic, left: core.tensor, right: core.tensor
    ) -> tuple[core.tensor, core.tensor]:
        return (left, right) if left.shape is right.shape else broadcast(semantic, left, right)

    return broadcast_others
