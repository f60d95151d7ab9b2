"""The CPU's compiled code: its arithmetic, and what is kept of it on disk."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from paged_kv.kernels.cpu import microkernels as cpu_microkernels
from paged_kv.kernels.cpu import vectors as cpu_vectors
from tests.support import cpu_kernels
from tests.support.cpu_kernels import ROOT

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


# -- compiled code on disk ------------------------------------------------------------------------

ADD_TWO = """
import ctypes
from paged_kv.kernels.cpu import vectors as cpu_vectors
write = cpu_vectors._write
def noted(file, code):
    print("compiled")
    write(file, code)
cpu_vectors._write = noted
emitter = cpu_vectors.Emitter("add", 3)
a, b, target = emitter.arguments
emitter.store(emitter.builder.add(a, b), target)
code = cpu_vectors.MachineCode("add", emitter.finish())
result = ctypes.c_int64()
function = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(code.address)
function(40, 2, ctypes.addressof(result))
print(result.value)
"""


def add_two(folder: Path) -> str:
    """Compile a small function in a new process, or read it from the folder; what it prints."""
    result = subprocess.run(
        [sys.executable, "-c", ADD_TWO],
        cwd=ROOT,
        env={**os.environ, "PAGED_KV_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-500:]
    return result.stdout


def test_code_is_compiled_once_and_read_by_later_processes(tmp_path):
    folder = tmp_path / "not" / "there yet"
    assert add_two(folder) == "compiled\n42\n"
    (file,) = folder.iterdir()
    before = file.stat().st_mtime_ns
    assert add_two(folder) == "42\n"
    assert [path.name for path in folder.iterdir()] == [file.name]
    assert file.stat().st_mtime_ns == before


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path):
    (tmp_path / "file").write_text("no folder")
    for _ in range(2):
        assert add_two(tmp_path / "file" / "folder") == "compiled\n42\n"


def test_a_code_file_that_cannot_be_read_costs_only_time(tmp_path):
    add_two(tmp_path)
    (file,) = tmp_path.iterdir()
    file.unlink()
    file.mkdir()
    assert add_two(tmp_path) == "compiled\n42\n"


@pytest.mark.parametrize("damage", ["empty", "truncated", "one byte less", "garbage", "flipped"])
def test_a_damaged_code_file_is_compiled_again(tmp_path, damage):
    """A full disk or a crash leaves files like these."""
    add_two(tmp_path)
    (file,) = tmp_path.iterdir()
    code = file.read_bytes()
    flipped = bytearray(code)
    flipped[41] ^= 0xFF
    damaged = {
        "empty": b"",
        "truncated": code[: len(code) // 2],
        "one byte less": code[:-1],
        "garbage": b"no object file" * 50,
        "flipped": bytes(flipped),
    }
    file.write_bytes(damaged[damage])
    assert add_two(tmp_path) == "compiled\n42\n"
    assert add_two(tmp_path) == "42\n"
