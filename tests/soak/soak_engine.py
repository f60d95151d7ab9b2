"""Random requests through engines that faults strike; every one has to end as it would alone.

    make soak        or, from the checkout:
    PYTHONPATH=bench python -m tests.soak.soak_engine --requests 100000 --real-requests 2000

`--requests` go through engines on a simulated model (`tests/support/engine_traffic.py`), of which
each has its own geometry, pool, budget and seed, and lives until the end; one in four has a thread
beside it that aborts. `--real-requests` go through an `LLM` on a small real model
(`tests/support/llm_traffic.py`), half of them beside a second thread. `--seconds` ends both early.
What must not happen is printed with how to repeat it, ends its engine, and makes the exit status 1:
a request that is lost, a block that is leaked, a token of somebody else that changed, an exception
that is not the caller's, memory that grows.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Final

import numpy as np
import torch
from report import Row, write_report

from tests.support.engine_traffic import EngineTraffic
from tests.support.faults import Tally, Violation
from tests.support.llm_traffic import LLMTraffic

NUM_ENGINES: Final = 16
TURN: Final = 200  # requests
MOST_MIB_PER_10000: Final = 1.0
WARM_UP_MIB: Final = 2.0
SECONDS_BETWEEN_LINES: Final = 10.0
PAGE_MIB: Final = os.sysconf("SC_PAGE_SIZE") / 2**20
KINDS: Final = {
    "lost": "requests lost",
    "leaked": "leaks",
    "changed": "changed outputs of others",
    "raised": "exceptions that are not the caller's",
}


class Memory:
    """Resident memory as requests come."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []

    def note(self, num_requests: int) -> None:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.points.append((num_requests, pages * PAGE_MIB))

    @property
    def slope(self) -> float:
        """MiB in 10 000 requests, over the second half."""
        points = np.array(self.points[len(self.points) // 2 :])
        if len(points) < 3:
            return 0.0
        return float(np.polyfit(points[:, 0], points[:, 1], 1)[0]) * 10_000

    @property
    def grows(self) -> bool:
        """Whether the slope is too steep, and more than what a short run takes to warm up."""
        num_requests = self.points[-1][0] - self.points[len(self.points) // 2][0]
        growth = self.slope * num_requests / 10_000
        return self.slope >= MOST_MIB_PER_10000 and growth >= WARM_UP_MIB


class Soak:
    """One kind of engines, and what came of their requests."""

    def __init__(self, case: str) -> None:
        self.case = case
        self.tally = Tally()
        self.violations: Counter[str] = Counter()
        self.memory = Memory()
        self.seconds = 0.0

    def report_violation(self, error: Violation, how_to_repeat: str) -> None:
        self.violations[error.kind] += 1
        traceback.print_exception(error)
        print(f"{error}\nTo repeat it: {how_to_repeat}", flush=True)

    @property
    def has_failed(self) -> bool:
        return bool(self.violations) or self.memory.grows

    def rows(self) -> list[Row]:
        tally = self.tally
        num_faults = tally.faults.total()
        rows = [
            self._row("requests", tally.num_requests),
            self._row("tokens", tally.num_tokens),
            self._row("faults", num_faults),
            self._row("recovered", tally.num_recovered, "faults", num_faults),
            *(self._row(name, self.violations[kind], "must be", 0) for kind, name in KINDS.items()),
            self._row("resident memory", self.memory.points[-1][1], unit="MiB"),
            self._row(
                "resident memory slope",
                self.memory.slope,
                "must be below",
                MOST_MIB_PER_10000,
                unit="MiB per 10000 requests",
            ),
            self._row("duration", self.seconds, unit="s"),
        ]
        for title, counts in (
            ("faults", tally.faults),
            ("ends", tally.ends),
            ("events", tally.events),
        ):
            rows += [
                Row(case=f"{self.case}: {title}", metric=name, value=count, unit="")
                for name, count in counts.most_common()
            ]
        return rows

    def _row(
        self,
        metric: str,
        value: float,
        baseline: str | None = None,
        baseline_value: float | None = None,
        unit: str = "",
    ) -> Row:
        return Row(
            case=self.case,
            metric=metric,
            value=value,
            unit=unit,
            baseline=baseline,
            baseline_value=baseline_value,
        )


class Clock:
    """When to stop, and when to say how far it is."""

    def __init__(self, seconds: float | None) -> None:
        self.start = self.last_line = time.perf_counter()
        self.limit = seconds

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    @property
    def is_over(self) -> bool:
        return self.limit is not None and self.seconds >= self.limit

    def say(self, soak: Soak) -> None:
        if time.perf_counter() - self.last_line < SECONDS_BETWEEN_LINES:
            return
        self.last_line = time.perf_counter()
        print(
            f"{soak.case}: {soak.tally.num_requests} requests in {self.seconds:.0f} s, "
            f"{soak.tally.faults.total()} faults, {soak.violations.total()} violations",
            flush=True,
        )


def soak_simulated(count: int, seed: int, only: int | None, clock: Clock) -> Soak:
    """Engines on a simulated model, by turns."""
    soak = Soak("simulated model")
    numbers = range(NUM_ENGINES) if only is None else [only]
    engines = {
        n: EngineTraffic(1000 * seed + n, has_thread=n % 4 == 3, runs_ahead=n % 4 > 1)
        for n in numbers
    }
    done = Tally()  # of engines that failed
    for number in itertools.cycle(numbers):
        if soak.tally.num_requests >= count or not engines or clock.is_over:
            break
        engine = engines.get(number)
        if engine is None:
            continue
        try:
            engine.serve(TURN)
        except Violation as error:
            repeat = f"--requests {engine.tally.num_requests + TURN} --real-requests 0"
            soak.report_violation(error, f"{COMMAND} --seed {seed} --only {number} {repeat}")
            done.add(engines.pop(number).tally)
        soak.tally = sum_of([done, *(each.tally for each in engines.values())])
        soak.memory.note(soak.tally.num_requests)
        clock.say(soak)
    for engine in engines.values():
        engine.close()
    soak.seconds = clock.seconds
    return soak


def soak_real(count: int, seed: int, clock: Clock) -> Soak:
    """One `LLM` on a real model."""
    soak = Soak("real model")
    traffic = LLMTraffic(seed)
    soak.tally = traffic.tally
    for turn in itertools.count():
        if soak.tally.num_requests >= count or clock.is_over:
            break
        try:
            traffic.serve(1, has_thread=turn % 2 == 1)
        except Violation as error:
            repeat = f"--requests 0 --real-requests {soak.tally.num_requests}"
            soak.report_violation(error, f"{COMMAND} --seed {seed} {repeat}")
            break
        soak.memory.note(soak.tally.num_requests)
        clock.say(soak)
    traffic.close()
    soak.seconds = clock.seconds
    return soak


def sum_of(tallies: list[Tally]) -> Tally:
    total = Tally()
    for tally in tallies:
        total.add(tally)
    return total


COMMAND: Final = "PYTHONPATH=bench python -m tests.soak.soak_engine"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--real-requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one engine, to repeat what it did")
    parser.add_argument("--seconds", type=float, help="stop early; a third is for the real model")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # threads that spin for tiny tensors cost more than these do
    limit, soaks = arguments.seconds, []
    if arguments.requests:
        clock = Clock(None if limit is None else limit * 2 / 3)
        soaks.append(soak_simulated(arguments.requests, arguments.seed, arguments.only, clock))
    if arguments.real_requests:
        clock = Clock(None if limit is None else limit / 3)
        soaks.append(soak_real(arguments.real_requests, arguments.seed, clock))
    write_report("soak", [row for soak in soaks for row in soak.rows()], arguments.json)
    for soak in soaks:
        if soak.memory.grows:
            print(f"{soak.case}: memory grows; to repeat it: {COMMAND} --seed {arguments.seed}")
    return int(any(soak.has_failed for soak in soaks))


if __name__ == "__main__":
    sys.exit(main())
