"""Serve a workload and note when each token came and what was held. Knows an engine, no options."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import numpy as np

from ..engine.engine import Engine
from ..engine.live_request import SequenceUpdate
from ..engine.sampling_params import SamplingParams
from ..errors import GenerationError
from .report import Row
from .workloads import WorkItem, Workload


class Limits(NamedTuple):
    """What a request must keep to count: seconds to its first token, and from token to token."""

    first_token: float | None = None
    between: float | None = None


@dataclass
class Occupancy:
    """How many sequences held blocks in a stretch of time."""

    most: int = 0
    area: float = 0.0  # sequences times seconds
    seconds: float = 0.0

    def add(self, num_running: int, seconds: float) -> None:
        self.most = max(self.most, num_running)
        self.area += num_running * seconds
        self.seconds += seconds

    @property
    def mean(self) -> float:
        return self.area / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, kw_only=True)
class Served:
    """What came of a workload. Times are seconds from its start, requests as they arrived."""

    workload: Workload
    times: list[list[float]]  # when each token of each request was there
    seconds: float
    peak_bytes: int  # of blocks in use at once
    held: Occupancy  # from the start to the last token
    crowded: Occupancy  # while others waited for room
    num_preemptions: int

    @property
    def first_token(self) -> list[float]:
        """Seconds from its arrival, of each request."""
        return [
            times[0] - item.arrival for times, item in zip(self.times, self.workload, strict=True)
        ]

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens, of all requests together."""
        return [gap for times in self.times for gap in np.diff(times).tolist()]

    def num_good(self, limits: Limits) -> int:
        """Requests that keep the limits; between its tokens the mean of each counts."""
        first = np.array(self.first_token)
        between = np.array([float(np.mean(np.diff(t))) if len(t) > 1 else 0.0 for t in self.times])
        is_good = np.ones(len(first), dtype=bool)
        for values, limit in ((first, limits.first_token), (between, limits.between)):
            if limit is not None:
                is_good &= values <= limit
        return int(is_good.sum())

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.times)) / self.seconds


def serve(
    engine: Engine,
    workload: Workload,
    advance: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Served:
    """Serve all requests, each from its arrival on, greedily and to its full length.

    The engine does nothing else meanwhile; what its prefix cache knew before is forgotten.
    `advance` is called whenever a request is over.
    """
    engine.manager.reset_prefix_cache()
    pool, scheduler = engine.manager.pool, engine.scheduler
    pool.peak_allocated = pool.num_allocated
    num_preempted = scheduler.statistics().num_preemptions
    times: dict[str, list[float]] = {str(index): [] for index in range(len(workload))}
    waiting = iter(enumerate(workload))
    index, item = next(waiting, (0, None))
    held, crowded, last, began = Occupancy(), Occupancy(), 0.0, clock()
    try:
        while item is not None or engine.has_unfinished:
            while item is not None and item.arrival <= clock() - began:
                engine.add_request(str(index), item.prompt, wanted(item))
                index, item = next(waiting, (0, None))
            if not engine.has_unfinished:
                assert item is not None
                sleep(max(item.arrival - (clock() - began), 0.0))
                now = clock() - began
                held.add(0, now - last)
                last = now
                continue
            updates = [each for each in engine.step() if isinstance(each, SequenceUpdate)]
            is_crowded = scheduler.num_waiting > 0
            now = clock() - began
            for update in updates:
                if update.error is not None:
                    raise GenerationError(f"a request failed: {update.error}", []) from update.error
                times[update.request_id].append(now)
            num_over = sum(update.finish_reason is not None for update in updates)
            running = scheduler.num_running + num_over
            for occupancy in (held, crowded) if is_crowded else (held,):
                occupancy.add(running, now - last)
            last = now
            for _ in range(num_over):
                advance()
    finally:
        engine.abort_all(times)  # an exception leaves none behind
    return Served(
        workload=workload,
        times=list(times.values()),
        seconds=last,
        peak_bytes=pool.peak_allocated * engine.cache.block_bytes,
        held=held,
        crowded=crowded,
        num_preemptions=scheduler.statistics().num_preemptions - num_preempted,
    )


def wanted(item: WorkItem) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=item.num_outputs, ignore_eos=True)


def take_turns(
    engines: Mapping[str, Engine],
    workload: Workload,
    repeats: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, list[Served]]:
    """Every engine in turn, `repeats` times, after a few requests that do not count."""
    few = [item._replace(arrival=0.0, num_outputs=min(item.num_outputs, 4)) for item in workload]
    for engine in engines.values():
        serve(engine, few[: engine.manager.num_free_seqs][:2])
    found: dict[str, list[Served]] = {name: [] for name in engines}
    for turn in range(repeats):
        names = list(engines)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found[name].append(serve(engines[name], workload, advance))
    return found


class Figure(NamedTuple):
    """One number of a run: whether more is better, or None where neither is."""

    metric: str
    unit: str
    is_more_better: bool | None
    of: Callable[[Served], float]


def percentiles(name: str, seconds: Callable[[Served], list[float]]) -> Iterator[Figure]:
    for percent in (50, 90, 99):

        def value(run: Served, percent: int = percent) -> float:
            found = seconds(run)
            return 1000 * float(np.percentile(found, percent)) if found else 0.0

        yield Figure(f"{name}, p{percent}", "ms", False, value)


TIMES = (
    *percentiles("time to first token", lambda run: run.first_token),
    *percentiles("between tokens", lambda run: run.gaps),
)
RATES = (
    Figure("output tokens", "tokens/s", True, lambda run: run.tokens_per_second),
    Figure("requests", "requests/s", True, lambda run: len(run.times) / run.seconds),
)
HELD = (
    Figure("sequences at once, most", "sequences", True, lambda run: run.held.most),
    Figure("sequences at once, mean", "sequences", True, lambda run: run.held.mean),
    Figure("sequences at once, while others wait", "sequences", True, lambda run: run.crowded.mean),
    Figure("peak KV", "MiB", False, lambda run: run.peak_bytes / 2**20),
    Figure("preemptions", "times", None, lambda run: run.num_preemptions),
)


def goodput(limits: Limits) -> tuple[Figure, ...]:
    """How many requests keep the limits; nothing where there are none."""
    if limits == Limits():
        return ()
    parts = ((limits.first_token, "first token"), (limits.between, "between tokens"))
    said = ", ".join(f"{what} within {1000 * s:g} ms" for s, what in parts if s is not None)
    return (
        Figure(
            f"goodput: {said}",
            "requests/s",
            True,
            lambda run: run.num_good(limits) / run.seconds,
        ),
        Figure(
            "requests that keep the limits",
            "%",
            True,
            lambda run: 100 * run.num_good(limits) / len(run.times),
        ),
    )


def rows_of(case: str, runs: Mapping[str, list[Served]], figures: tuple[Figure, ...]) -> list[Row]:
    """Medians over the runs of each engine, beside those of the first."""
    first = next(iter(runs))
    rows = []
    for name, mine in runs.items():
        for figure in figures:
            value, baseline = (median(map(figure.of, some)) for some in (mine, runs[first]))
            better, worse = (value, baseline) if figure.is_more_better else (baseline, value)
            is_compared = name != first and figure.is_more_better is not None
            rows.append(
                Row(
                    case=f"{case}, {name}",
                    metric=figure.metric,
                    value=value,
                    unit=figure.unit,
                    baseline=first if is_compared else None,
                    baseline_value=baseline if is_compared else None,
                    ratio=better / worse if is_compared and worse else None,
                )
            )
    return rows
