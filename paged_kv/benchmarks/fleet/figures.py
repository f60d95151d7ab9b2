"""What a run says in numbers. Knows outcomes, never how they came about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from ..serving import Limits
from .replica import Job
from .simulation import Outcome

# Quantiles of Student's t, two-sided 95 %, by degrees of freedom; beyond, the normal one.
T_QUANTILES: Final = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179),
    *(2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)
NORMAL: Final = 1.96

UNITS: Final = {
    "hit rate": "%",
    "requests that keep the limits": "%",
    "goodput": "requests/s",
    "output tokens": "tokens/s",
    "time to first token, p50": "s",
    "time to first token, p99": "s",
    "between tokens, p50": "ms",
    "between tokens, p99": "ms",
    "sequences at once": "sequences",
    "memory in use": "%",
    "preemptions": "per 1000 requests",
    "deaths": "replicas",
    "requests moved": "requests",
    "requests without an end": "requests",
    "requests": "requests",
    "steps": "steps",
}


def figures_of(outcome: Outcome, limits: Limits) -> dict[str, float]:
    """By the names of `UNITS`. `between tokens` is the mean of each request.

    Who has no first token by the end counts with the time that it has waited.
    """
    jobs, counts, machine = outcome.counted, outcome.counts, outcome.settings.machine
    firsts = [(outcome.end if job.first is None else job.first) - job.arrival for job in jobs]
    gaps = [1000 * gap_of(job) for job in jobs if job.last is not None and job.num_outputs > 1]
    started = [job for job in jobs if job.num_hit_tokens is not None]
    num_good = sum(is_good(job, limits) for job in jobs)
    busy = max(counts.busy_seconds, 1e-9)
    return {
        "hit rate": 100 * hit_rate(started),
        "requests that keep the limits": 100 * num_good / max(len(jobs), 1),
        "goodput": num_good / outcome.window,
        "output tokens": counts.num_sampled / outcome.window,
        "time to first token, p50": percentile(firsts, 50),
        "time to first token, p99": percentile(firsts, 99),
        "between tokens, p50": percentile(gaps, 50),
        "between tokens, p99": percentile(gaps, 99),
        "sequences at once": counts.running_seconds / busy,
        "memory in use": 100 * counts.block_seconds / busy / machine.num_blocks,
        "preemptions": 1000 * counts.num_preemptions / max(len(jobs), 1),
        "deaths": float(outcome.num_deaths),
        "requests moved": float(sum(job.num_placed > 1 for job in outcome.jobs)),
        "requests without an end": float(sum(not job.is_over for job in jobs)),
        "requests": float(len(jobs)),
        "steps": float(outcome.num_steps),
    }


def hit_rate(jobs: Sequence[Job]) -> float:
    """Of the tokens of prompts, those that a cache had where they started first."""
    hits = sum(job.num_hit_tokens or 0 for job in jobs)
    return hits / max(sum(len(job.prompt) for job in jobs), 1)


def gap_of(job: Job) -> float:
    """Mean seconds from token to token."""
    assert job.first is not None
    assert job.last is not None
    return (job.last - job.first) / max(job.num_outputs - 1, 1)


def is_good(job: Job, limits: Limits) -> bool:
    """Whether it has ended within the limits."""
    if job.first is None or job.last is None:
        return False
    is_early = limits.first_token is None or job.first - job.arrival <= limits.first_token
    return is_early and (limits.between is None or gap_of(job) <= limits.between)


def percentile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(values, percent)) if len(values) else 0.0


class Estimate(NamedTuple):
    """The mean over seeds and half of its 95 % interval (0 where there is one seed)."""

    mean: float
    half: float


def estimate(values: Sequence[float]) -> Estimate:
    count = len(values)
    if count < 2:
        return Estimate(float(np.mean(values)), 0.0)
    quantile = T_QUANTILES[count - 2] if count - 2 < len(T_QUANTILES) else NORMAL
    spread = float(np.std(values, ddof=1))
    return Estimate(float(np.mean(values)), quantile * spread / count**0.5)
