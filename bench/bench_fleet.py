"""A fleet on paper: replicas of the real scheduler and block manager behind routers, by format.

    python bench/bench_fleet.py --json bench/results/fleet.json            (10 000 replica-traces)
    python bench/bench_fleet.py --seeds 1 --seconds 30 --json FILE         (fewer and shorter)

Nothing here is a measurement of a GPU: a step's time is arithmetic on published figures, as
`paged_kv/benchmarks/fleet/machines.py` has them. The model is Llama-3-8B's shape in bfloat16.

*Policies*: 16 L4 cards, every policy and format, the same conversations. *Deaths*: the same fleet
whose replicas die every two minutes on average and come back empty. *Load*: 8 cards, KV-aware, more
and more conversations. *Machines*: the least number of cards with which 95 % of requests keep the
limits, found by bisection for each seed; `int2, read as native` is int2 whose bytes take as long to
read as native's, so that only memory is gained. *Checks*: the simulator beside what is known.

A replica-trace is one replica in one run. The same seeds are the same figures; `simulated` says how
fast they came.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

from report import ROOT, Row, add_arguments, write_report

from paged_kv.benchmarks.fleet import checks
from paged_kv.benchmarks.fleet.figures import UNITS, estimate, figures_of
from paged_kv.benchmarks.fleet.machines import CARDS, Machine, machine_of
from paged_kv.benchmarks.fleet.routing import POLICIES
from paged_kv.benchmarks.fleet.simulation import Fleet, FleetSettings
from paged_kv.benchmarks.fleet.traffic import Traffic
from paged_kv.benchmarks.serving import Limits
from paged_kv.blocks.warming import warm_up

FORMATS = ("native", "int8", "int4", "int2")
READ_AS_NATIVE = "int2, read as native"
KV_AWARE = "KV-aware"
DOWN_SECONDS = 15.0
GOAL = 95.0  # percent of requests that keep the limits
HALF = ", half of 95 %"  # behind a metric: half of its 95 % interval over seeds
LIMITS = {"L4": Limits(3.0, 0.2), "H100": Limits(1.0, 0.05)}
TOKEN_BUDGETS = {"L4": 512, "H100": 2048}
BY_KEPT = "requests that keep the limits"
WITH_HALF = ("hit rate", BY_KEPT, "goodput", "output tokens", "machines")


class Search(NamedTuple):
    """For how many cards serve so many conversations a second; `most` are taken to be enough."""

    card: str
    rate: float
    part: float  # of the seconds of other runs
    most: int
    most_seeds: int


class Sizes(NamedTuple):
    """How much is simulated; seeds are 0, 1 and so on."""

    seeds: int = 10
    seconds: float = 60.0
    replicas: int = 16
    load_replicas: int = 8
    rate: float = 0.75  # conversations a second and replica, of policies
    loads: tuple[float, ...] = (0.5, 0.75, 1.0, 1.5, 2.0, 2.5)
    mean_life: float = 120.0
    searches: tuple[Search, ...] = (
        Search("L4", rate=12.0, part=1.0, most=32, most_seeds=10),
        Search("H100", rate=64.0, part=0.5, most=12, most_seeds=5),
    )
    checked: int = 8000  # requests of the queue


QUICK = Sizes(
    seeds=1,
    seconds=8.0,
    replicas=2,
    load_replicas=2,
    loads=(0.75, 1.5),
    mean_life=8.0,
    searches=(Search("L4", rate=1.5, part=1.0, most=4, most_seeds=1),),
    checked=300,
)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One run; or, for a search, runs of different numbers of replicas, at most so many."""

    case: str
    card: str
    kv_format: str
    rate: float  # conversations a second, of all replicas together
    replicas: int
    seconds: float
    seed: int
    policy: str = KV_AWARE
    mean_life: float | None = None
    is_search: bool = False

    def figures(self, replicas: int) -> dict[str, float]:
        settings = FleetSettings(
            machine=machine(self.card, self.kv_format),
            num_replicas=replicas,
            policy=self.policy,
            mean_life=self.mean_life,
            down_seconds=DOWN_SECONDS,
            warm_up=self.seconds / 4,
        )
        traffic = Traffic(rate=self.rate, seconds=self.seconds)
        return figures_of(Fleet(settings, traffic, self.seed).run(), LIMITS[self.card])


class Done(NamedTuple):
    """What a task found."""

    task: Task
    figures: dict[str, float]
    num_traces: int
    num_steps: float
    seconds: float  # of a processor


def machine(card: str, kv_format: str) -> Machine:
    budget = TOKEN_BUDGETS[card]
    if kv_format != READ_AS_NATIVE:
        return machine_of(CARDS[card], kv_format, token_budget=budget)
    native, int2 = (machine_of(CARDS[card], f, token_budget=budget) for f in ("native", "int2"))
    return int2.reading_like(native)


def perform(task: Task) -> Done:
    began = time.process_time()
    if not task.is_search:
        figures = task.figures(task.replicas)
        traces, steps = task.replicas, figures["steps"]
    else:
        figures, traces, steps = fewest(task)
    return Done(task, figures, traces, steps, time.process_time() - began)


def fewest(task: Task) -> tuple[dict[str, float], int, float]:
    """The least number of replicas that reaches the goal; more than that are taken to do so too."""
    least, traces, steps = 1, 0, 0.0
    enough = task.replicas
    while least < enough:
        tried = (least + enough) // 2
        figures = task.figures(tried)
        traces += tried
        steps += figures["steps"]
        if figures[BY_KEPT] >= GOAL:
            enough = tried
        else:
            least = tried + 1
    return {"machines": float(enough)}, traces, steps


def tasks(sizes: Sizes) -> Iterator[Task]:
    """Those that take longest first."""
    for search in reversed(sizes.searches):
        for kv_format in (*FORMATS, READ_AS_NATIVE):
            for seed in range(min(sizes.seeds, search.most_seeds)):
                yield Task(
                    case=f"machines, {search.card}, {kv_format}",
                    card=search.card,
                    kv_format=kv_format,
                    rate=search.rate,
                    replicas=search.most,
                    seconds=sizes.seconds * search.part,
                    seed=seed,
                    is_search=True,
                )
    for seed in range(sizes.seeds):
        for kv_format in FORMATS:
            its = Task(
                case="",
                card="L4",
                kv_format=kv_format,
                rate=sizes.rate * sizes.replicas,
                replicas=sizes.replicas,
                seconds=sizes.seconds,
                seed=seed,
            )
            for load in sizes.loads:
                yield replace(
                    its,
                    case=f"load {load:g}, {kv_format}",
                    rate=load * sizes.load_replicas,
                    replicas=sizes.load_replicas,
                )
            for policy in POLICIES:
                case = f"policies, {policy}, {kv_format}"
                yield replace(its, case=case, policy=policy)
                if kv_format in (FORMATS[0], FORMATS[-1]):
                    case = f"deaths, {policy}, {kv_format}"
                    yield replace(its, case=case, policy=policy, mean_life=sizes.mean_life)


def rows_of(found: Sequence[Done]) -> list[Row]:
    """Means over seeds; in the order of the cases' names, whatever came first."""
    by_case: dict[str, list[dict[str, float]]] = {}
    for done in sorted(found, key=lambda done: (done.task.case, done.task.seed)):
        by_case.setdefault(done.task.case, []).append(done.figures)
    rows = []
    for case, runs in by_case.items():
        for metric in runs[0]:
            mean, half = estimate([run[metric] for run in runs])
            unit = UNITS.get(metric, "replicas")
            rows.append(Row(case=case, metric=metric, value=mean, unit=unit))
            if metric in WITH_HALF:
                rows.append(Row(case=case, metric=metric + HALF, value=half, unit=unit))
    return rows


def machine_rows(found: Sequence[Done]) -> list[Row]:
    """How many times as many machines native takes, seed by seed; and the most that were tried."""
    by_case: dict[tuple[str, str], dict[int, float]] = {}
    for done in found:
        if done.task.is_search:
            key = done.task.card, done.task.kv_format
            by_case.setdefault(key, {})[done.task.seed] = done.figures["machines"]
    rows = []
    for (card, kv_format), counts in sorted(by_case.items()):
        natives = by_case[card, "native"]
        mean, half = estimate([natives[seed] / counts[seed] for seed in sorted(counts)])
        case = f"machines, {card}, {kv_format}"
        found_counts = list(counts.values())
        rows += [
            Row(case=case, metric="native's machines", value=mean, unit="times"),
            Row(case=case, metric="native's machines" + HALF, value=half, unit="times"),
            Row(case=case, metric="fewest machines", value=min(found_counts), unit="replicas"),
            Row(case=case, metric="most machines", value=max(found_counts), unit="replicas"),
        ]
    return rows


def machine_parameters() -> list[Row]:
    """What each card is on paper, by format."""
    rows = []
    for card in CARDS:
        for kv_format in FORMATS:
            its = machine(card, kv_format)
            case, step_time = f"paper, {its.name}", its.step_time
            token_bytes = its.block_bytes / its.geometry.block_size
            rows += [
                Row(case=case, metric="keys and values", value=its.kv_bytes / 1e9, unit="GB"),
                Row(case=case, metric="blocks", value=its.num_blocks, unit="blocks"),
                Row(case=case, metric="a sealed token", value=token_bytes, unit="B"),
                Row(
                    case=case,
                    metric="tokens that fit",
                    value=its.num_blocks * its.geometry.block_size,
                    unit="tokens",
                ),
                Row(case=case, metric="a step", value=1e3 * step_time.step, unit="ms"),
                Row(case=case, metric="a token", value=1e6 * step_time.token, unit="us"),
                Row(case=case, metric="a GB read", value=1e12 * step_time.byte, unit="ms"),
            ]
    return rows


def check_rows(num_requests: int, *, is_quick: bool) -> list[Row]:
    """The simulator beside what is known."""
    rows = []
    for utilization in (0.5, 0.8):
        waited, expected = checks.waits(utilization, num_requests)
        rows.append(
            beside(f"checks, one at a time, {utilization:g} busy", "wait", waited, "steps",
                   "M/D/1", expected)
        )  # fmt: skip
    if is_quick:
        return rows
    report = json.loads((ROOT / "bench" / "results" / "budget.json").read_text())
    measured = {(row["case"], row["metric"]): row["value"] for row in report["rows"]}
    workload = checks.measured_workload()
    total = sum(item.num_outputs for item in workload)
    replays = [
        checks.replay(checks.measured_machine(name, workload), workload) for name in checks.FORMATS
    ]
    speeds = [measured[checks.CASE.format(name), "output tokens"] for name in checks.FORMATS]
    step_time = checks.fitted_time(replays, [total / speed for speed in speeds])
    case = "checks, SmolLM2 on a CPU"
    rows.append(Row(case=case, metric="a step", value=1e3 * step_time.step, unit="ms"))
    rows.append(Row(case=case, metric="a token", value=1e3 * step_time.token, unit="ms"))
    for name, replayed in zip(checks.FORMATS, replays, strict=True):
        told = checks.told_by(replayed, step_time)
        for metric, unit in checks.MEASURED.items():
            known = measured[checks.CASE.format(name), metric]
            rows.append(beside(f"{case}, {name}", metric, told[metric], unit, "measured", known))
    return rows


def beside(case: str, metric: str, value: float, unit: str, baseline: str, known: float) -> Row:
    """A figure of the simulator by one that is known; the ratio is the simulator's to that."""
    return Row(case=case, metric=metric, value=value, unit=unit, baseline=baseline,
               baseline_value=known, ratio=value / known)  # fmt: skip


def simulated_rows(found: Sequence[Done], sizes: Sizes) -> list[Row]:
    steps, seconds = (sum(getattr(done, name) for done in found) for name in Done._fields[3:])
    traces = sum(done.num_traces for done in found)
    case = "simulated"
    return [
        Row(case=case, metric="seeds", value=sizes.seeds, unit="seeds"),
        Row(case=case, metric="seconds of each run", value=sizes.seconds, unit="s"),
        Row(case=case, metric="replica-traces", value=traces, unit="traces"),
        Row(case=case, metric="steps", value=steps, unit="steps"),
        Row(case=case, metric="steps a second of a core", value=steps / seconds, unit="steps/s"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, help=f"of each case ({Sizes().seeds})")
    parser.add_argument("--seconds", type=float, help=f"of arrivals in a run ({Sizes().seconds:g})")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="(all cores)")
    add_arguments(parser)
    arguments = parser.parse_args()
    sizes = QUICK if arguments.quick else Sizes()
    for name in ("seeds", "workers"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    if arguments.seconds is not None and not 1 <= arguments.seconds <= 86_400:
        parser.error(f"--seconds must be from 1 to 86400, got {arguments.seconds:g}")
    if arguments.seeds is not None:
        sizes = sizes._replace(seeds=arguments.seeds)
    if arguments.seconds is not None:
        sizes = sizes._replace(seconds=arguments.seconds)
    todo = list(tasks(sizes))
    if arguments.workers == 1:
        found = list(map(perform, todo))
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(arguments.workers, context, initializer=warm_up) as pool:
            found = []
            for done in pool.map(perform, todo):
                found.append(done)
                print(f"\r{len(found)} of {len(todo)} ", end="", file=sys.stderr, flush=True)
    rows = [
        *simulated_rows(found, sizes),
        *machine_parameters(),
        *check_rows(sizes.checked, is_quick=arguments.quick),
        *rows_of(found),
        *machine_rows(found),
    ]
    write_report("fleet", rows, arguments.json)


if __name__ == "__main__":
    main()
