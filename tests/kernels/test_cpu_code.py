"""The CPU's compiled code: its arithmetic. What is kept on disk is for test_code_cache."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from paged_kv.kernels.cpu import microkernels as cpu_microkernels
from paged_kv.kernels.cpu import vectors as cpu_vectors
from tests.support import cpu_kernels

on_cpu_kernels = cpu_kernels.on_cpu_kernels
lanes = cpu_kernels.lanes


# -- arithmetic -----------------------------------------------------------------------------------


def vector_function(
    emit: Callable[[cpu_vectors.Emitter, Any], Any], lanes: int
) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """A function over arrays from one over vectors."""
    emitter = cpu_vectors.Emitter("function", 3)
    source, target, count = emitter.arguments
    with emitter.loop(emitter.long(0), count, lanes) as index:
        at = emitter.times(index, 4)
        vector = emitter.load(emitter.offset(source, at), cpu_vectors.FLOAT, lanes)
        emitter.store(emit(emitter, vector), emitter.offset(target, at))
    code = cpu_vectors.MachineCode("function", emitter.finish())

    def call(values: NDArray[np.float32]) -> NDArray[np.float32]:
        padded = np.zeros(-(-len(values) // lanes) * lanes, dtype=np.float32)
        padded[: len(values)] = values
        result = np.empty_like(padded)
        function = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(code.address)
        function(padded.ctypes.data, result.ctypes.data, len(padded))
        return result[: len(values)]

    return call


@pytest.mark.parametrize("lanes", [16, 8, 4])
def test_powers_of_two_are_exact_to_a_few_roundings(lanes):
    exp2 = vector_function(cpu_vectors.Emitter.exp2, lanes)
    values = np.linspace(-126, 0, 400_001, dtype=np.float32)
    result = exp2(values)
    expected = np.exp2(values.astype(np.float64))
    assert np.abs(result / expected - 1).max() <= 3e-7
    assert (result[1:] >= result[:-1] * (1 - 3e-7)).all()
    assert (exp2(np.arange(-126, 1, dtype=np.float32)) == np.exp2(np.arange(-126.0, 1.0))).all()
    far_below = exp2(np.array([-126.5, -1e3, -1e30, -np.inf], dtype=np.float32))
    assert ((far_below >= 0) & (far_below <= 2.0**-126)).all()


@pytest.mark.parametrize("lanes", [16, 8, 4])
def test_tanh_is_exact_to_a_few_roundings(lanes):
    tanh = vector_function(cpu_microkernels.tanh, lanes)
    positive = np.concatenate(
        [np.geomspace(1e-30, 1e30, 2001), np.linspace(0, 12, 100_001), [np.inf]]
    ).astype(np.float32)
    result = tanh(positive)
    assert np.abs(result - np.tanh(positive.astype(np.float64))).max() <= 3e-7
    assert (result <= 1).all()
    assert (tanh(-positive) == -result).all()
