"""Workers one after another on the same threads, which are started once for all of them.

Knows workers' addresses and those of their parameters, not what they do. A stage begins when every
thread that takes part is through with the one before. Who takes part is counted as threads come:
there may be fewer than were asked for, and one that comes late joins the stage that is running.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any, Final, NamedTuple

import numpy as np

from .native_code import (
    address_of,
    address_of_array,
    breathe,
    call,
    exchange,
    fetch_add,
    load_long,
    load_shared,
    native,
    worker,
)
from .threads import run_worker

POLLS: Final = 2000  # before a thread sleeps: some 50 us, in which a stage mostly ends
THREAD_BITS: Final = 16
THREADS: Final = (1 << THREAD_BITS) - 1
FUTEX_CALLS: Final = {"x86_64": 202, "aarch64": 98}  # the number of Linux's system call
FUTEX_WAIT, FUTEX_WAKE = 128, 129  # within a process


class Stage(NamedTuple):
    """A worker and its parameters, by their addresses."""

    worker: int
    parameters: int


class RunFields(NamedTuple):
    """Of a run; its stages lie behind."""

    state: int  # the running stage, then threads that are through with it, then all that take part
    num_sleepers: int
    num_stages: int
    system_call: int  # the function for it; 0: threads poll until they may go on
    futex_call: int


RUN: Final = RunFields(*range(len(RunFields._fields)))


@native
def stage_of(p: int) -> int:
    return int(load_shared(p) >> (2 * THREAD_BITS))


@native
def call_futex(p: int, operation: int, number: int) -> None:
    """On the upper half of the state: the stage."""
    call(
        load_long(p, RUN.system_call),
        (load_long(p, RUN.futex_call), p + 4, operation, number, 0, 0, 0),
    )


@native
def meet(p: int, stage: int) -> None:
    """Wait until all that take part are through with a stage.

    A thread that waits long sleeps: on a busy machine it would use up the time of the others.
    """
    sleepers = p + 8 * RUN.num_sleepers
    while True:
        before = load_shared(p)
        members, through = before & THREADS, (before >> THREAD_BITS) & THREADS
        if through + 1 < members:
            if exchange(p, before, before + (1 << THREAD_BITS)):
                break
        elif exchange(p, before, ((stage + 1) << (2 * THREAD_BITS)) | members):
            if load_shared(sleepers):
                call_futex(p, FUTEX_WAKE, THREADS)
            return
    polls = 0
    while stage_of(p) == stage:
        breathe()
        polls += 1
        if polls > POLLS and load_long(p, RUN.system_call):
            fetch_add(sleepers)
            call_futex(p, FUTEX_WAIT, stage)  # returns at once if that has ended


@native
def run_stages(p: int) -> None:
    num_stages, stages = load_long(p, RUN.num_stages), p + 8 * len(RUN)
    first = fetch_add(p) >> (2 * THREAD_BITS)  # one more takes part
    for stage in range(first, num_stages):
        call(load_long(stages, 2 * stage), (load_long(stages, 2 * stage + 1),))
        if stage + 1 < num_stages:
            meet(p, stage)


def run_stages_of(parameters: Any) -> None:
    run_stages(address_of(parameters))


@cache
def stages_worker() -> int:
    """The address of the worker, compiled when first asked for and kept on disk."""
    return int(worker(run_stages_of).address)


@cache
def system_call_address() -> int:
    """The C library's function for system calls; 0 where threads cannot sleep by it."""
    if sys.platform != "linux" or sys.byteorder != "little":
        return 0
    if platform.machine() not in FUTEX_CALLS:
        return 0
    return ctypes.cast(ctypes.CDLL(None).syscall, ctypes.c_void_p).value or 0


class Stages:
    """Stages that are run again and again; each finds its own counters as it needs them."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        fields = RunFields(
            state=0,
            num_sleepers=0,
            num_stages=len(stages),
            system_call=system_call_address(),
            futex_call=FUTEX_CALLS.get(platform.machine(), 0),
        )
        self._record = np.array([*fields, *(part for stage in stages for part in stage)])
        self._address = address_of_array(self._record)
        self._longs = self._record.data

    def set_parameters(self, stage: int, parameters: int) -> None:
        """Give a stage other parameters."""
        self._longs[len(RUN) + len(Stage._fields) * stage + 1] = parameters

    def run(self, num_threads: int) -> None:
        self._longs[RUN.state] = self._longs[RUN.num_sleepers] = 0
        run_worker(stages_worker(), self._address, num_threads)
