"""Workers one after another: none begins before the one before has ended, on any threads."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from paged_kv.kernels.cpu import stages
from paged_kv.kernels.cpu import threads as cpu_threads
from paged_kv.kernels.cpu.native_code import address_of_array
from paged_kv.kernels.cpu.stages import Stage, Stages
from paged_kv.kernels.cpu.token_rows import CallFields, Norm, norm_kernel, rms_norm, row_worker
from tests.kernels.test_cpu_threads import plain_threads

plain_threads = plain_threads

NUM_STAGES, NUM_ROWS, NUM_CHANNELS = 40, 64, 256


class Chain:
    """Each stage norms the rows of the one before it, by weights of its own."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.full((NUM_STAGES + 1, NUM_ROWS, NUM_CHANNELS), torch.nan)
        self.rows[0] = torch.randn(NUM_ROWS, NUM_CHANNELS, generator=generator)
        self.weights = torch.rand(NUM_STAGES, NUM_CHANNELS, generator=generator) + 0.5
        kernel = norm_kernel(NUM_CHANNELS, "float32", "float32", 1e-5, False)
        self.counters = np.zeros(NUM_STAGES, dtype=np.int64)
        self.records, list_of_stages = [], []
        for stage in range(NUM_STAGES):
            source, target = self.rows[stage], self.rows[stage + 1]
            fields = CallFields(
                address_of_array(self.counters[stage:]),
                kernel.address, NUM_ROWS,
                source.data_ptr(), 4 * NUM_CHANNELS, target.data_ptr(), 4 * NUM_CHANNELS,
                self.weights[stage].data_ptr(), 0, 0, 0,
            )  # fmt: skip
            record = np.array(fields, dtype=np.int64)
            self.records.append(record)
            list_of_stages.append(Stage(row_worker(), address_of_array(record)))
        self.stages = Stages(list_of_stages)

    def check(self, num_threads: int) -> None:
        self.rows[1:] = torch.nan
        self.counters[:] = 0
        self.stages.run(num_threads)
        rows = self.rows[0]
        for weight in self.weights:
            rows = rms_norm(rows, Norm(weight, 1e-5))
        assert torch.equal(self.rows[-1], rows)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 8])
def test_a_stage_finds_all_that_the_one_before_it_wrote(num_threads):
    chain = Chain()
    for _ in range(100):
        chain.check(num_threads)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_on_plain_threads(num_threads, plain_threads):
    chain = Chain()
    for _ in range(50):
        chain.check(num_threads)


def test_fewer_threads_than_were_asked_for(monkeypatch):
    """As inside another parallel region, or where the system gives no more."""
    launch = cpu_threads.launcher()
    monkeypatch.setattr(stages, "run_worker", lambda worker, p, count: launch(worker, p, 1))
    Chain().check(4)


@pytest.mark.parametrize("polls", ["sleeps", "polls"])
def test_threads_that_wait_long(polls, monkeypatch):
    """With far more threads than processors some stages take longer than a thread polls."""
    if polls == "polls":
        monkeypatch.setattr(stages, "system_call_address", lambda: 0)
    chain = Chain()
    for _ in range(5):
        chain.check(32)


def test_a_thread_that_comes_when_all_is_done_does_nothing():
    chain = Chain()
    chain.check(2)
    chain.rows[1:] = torch.nan
    late = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(stages.stages_worker())
    state = chain.stages._longs
    state[0] = NUM_STAGES << (2 * stages.THREAD_BITS) | 2
    late(chain.stages._address)
    assert chain.rows[1:].isnan().all()
