"""Triton's interpreter, made faster. Kernels compute the same, by the same functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import triton
from triton.runtime import interpreter


def speed_up(patch: pytest.MonkeyPatch) -> None:
    """As long as `patch` lives; nothing happens where kernels are compiled."""
    if triton.knobs.runtime.interpret:
        patch.setattr(interpreter.InterpretedFunction, "__call__", language_once_a_function())
        patch.setattr(interpreter.ReduceOps, "generic_reduce", reduce_by_halves)


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
