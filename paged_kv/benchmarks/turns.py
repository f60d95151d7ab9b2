"""Take turns on a machine that others use, and keep the samples that nobody disturbed.

Knows functions and clocks, never what is measured.

A sample counts if the system took no core from this process meanwhile (in long calls, at most one
each 10 ms), and if other processes used at most 4 % of the cores in its round of 0.3 s. Where too
few count in time, the fastest third of all is taken.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Final

import numpy as np

ROUND_SECONDS: Final = 0.3
MAX_FOREIGN_SHARE: Final = 0.04
SWITCH_SECONDS: Final = 0.01  # the kernel's own threads take a core about as often

OfLayer = Callable[[int], object]  # what is timed, on one layer


@dataclass(frozen=True)
class Sampling:
    """How many undisturbed samples of each function are wanted, and for how long."""

    num_wanted: int
    limit_seconds: float


@dataclass(frozen=True)
class Timing:
    seconds: float  # the median of what was kept
    num_undisturbed: int
    num_taken: int
    is_undisturbed: bool


@dataclass(frozen=True)
class Sample:
    seconds: float
    is_undisturbed: bool


def take_turns(
    functions: dict[str, OfLayer], num_layers: int, sampling: Sampling
) -> dict[str, Timing]:
    """Time the functions A B C, B C A, ..., a layer each turn, until enough samples count."""
    for layer in range(2):  # compiles, and touches memory for the first time
        for function in functions.values():
            function(layer % num_layers)
    samples: dict[str, list[Sample]] = {name: [] for name in functions}
    turns = count()
    deadline = time.perf_counter() + sampling.limit_seconds
    while time.perf_counter() < deadline:
        wait_for_quiet(1.0)
        for name, taken in one_round(functions, turns, num_layers).items():
            samples[name] += taken
        num_kept = [sum(s.is_undisturbed for s in taken) for taken in samples.values()]
        if min(num_kept) >= sampling.num_wanted:
            break
    return {name: summary(taken, sampling.num_wanted) for name, taken in samples.items()}


def one_round(
    functions: dict[str, OfLayer], turns: Iterator[int], num_layers: int
) -> dict[str, list[Sample]]:
    """As many turns as fill a round; all of its samples are disturbed if other processes worked.

    Another function begins each turn: whoever runs first after a pause is disturbed the least.
    """
    names = list(functions)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    busy, own, start = busy_seconds(), time.process_time(), time.perf_counter()
    for turn in turns:
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(timed(functions[name], turn % num_layers))
        wall = time.perf_counter() - start
        if wall > ROUND_SECONDS:
            break
    foreign = busy_seconds() - busy - (time.process_time() - own)
    if is_quiet(foreign, wall):
        return samples
    return {name: [Sample(s.seconds, False) for s in taken] for name, taken in samples.items()}


def is_quiet(foreign_seconds: float, wall_seconds: float) -> bool:
    """Whether what others used of the cores in this time is little."""
    return foreign_seconds <= MAX_FOREIGN_SHARE * wall_seconds * (os.cpu_count() or 1)


def wait_for_quiet(limit_seconds: float) -> None:
    """Sleep until others leave the cores alone, so as not to sample, and to disturb, in vain."""
    end = time.perf_counter() + limit_seconds
    while time.perf_counter() < end:
        busy = busy_seconds()
        time.sleep(0.1)
        if is_quiet(busy_seconds() - busy, 0.1):
            return


def timed(function: OfLayer, layer: int) -> Sample:
    switches = involuntary_switches()
    start = time.perf_counter()
    function(layer)
    seconds = time.perf_counter() - start
    num_switches = involuntary_switches() - switches
    return Sample(seconds, num_switches <= seconds // SWITCH_SECONDS)


def involuntary_switches() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def busy_seconds() -> float:
    """What all processes together used of the cores since the machine started."""
    with open("/proc/stat") as lines:
        user, nice, system, _idle, _wait, *interrupts_and_steal = lines.readline().split()[1:9]
    ticks = sum(map(int, (user, nice, system, *interrupts_and_steal)))
    return ticks / os.sysconf("SC_CLK_TCK")


def summary(samples: list[Sample], num_wanted: int) -> Timing:
    """The median of the undisturbed samples; of the fastest third of all where they are too few."""
    kept = [sample.seconds for sample in samples if sample.is_undisturbed]
    num_undisturbed = len(kept)
    if num_undisturbed < num_wanted:
        kept = sorted(sample.seconds for sample in samples)[: -(-len(samples) // 3)]
    is_undisturbed = num_undisturbed >= num_wanted
    return Timing(float(np.median(kept)), num_undisturbed, len(samples), is_undisturbed)


Tell = Callable[[str, dict[str, Timing]], None]  # what is done with the timings of a case


def report_timings(title: str, timings: dict[str, Timing]) -> None:
    print(title, flush=True)
    for name, timing in timings.items():
        counts = f"{timing.num_undisturbed} of {timing.num_taken} samples undisturbed"
        note = "kept" if timing.is_undisturbed else "too few; the fastest third kept"
        print(f"  {name:36} {timing.seconds * 1e6:12.1f} us  {counts}, {note}", flush=True)
