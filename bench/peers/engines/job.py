"""What every engine's process reads and answers: one workload, a line for each round.

Knows requests and times, no engine. Imports nothing that is not in Python itself, because it runs
in each engine's own environment.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

ANSWER = "answer "  # opens a line that is meant for us; engines print others


@dataclass
class Job:
    """Requests that come all at once: greedy, and to their full length."""

    model: str  # a folder as transformers has it
    precision: str  # "float32" or "bfloat16"
    kv: str  # what the engine calls the precision of its cache
    prompts: list[list[int]]
    num_new: list[int]
    has_prefix_cache: bool
    num_threads: int
    longest: int  # tokens of the longest request
    extra: dict[str, Any] = field(default_factory=dict)  # of this engine alone


@dataclass
class Round:
    """What one round gave; times are seconds since all requests were known."""

    tokens: list[list[int]]
    times: list[list[float]]  # when each token was known
    kv_bytes: int | None = None  # held at most; None where an engine does not say
    rss_bytes: int = 0  # of the process, at most


class Clock:
    """Notes tokens as they come."""

    def __init__(self, num_requests: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(num_requests)]
        self.times: list[list[float]] = [[] for _ in range(num_requests)]
        self._began = time.perf_counter()

    def note(self, index: int, tokens: list[int]) -> None:
        self.tokens[index] += [int(token) for token in tokens]
        self.times[index] += [time.perf_counter() - self._began] * len(tokens)


def serve(prepare: Callable[[Job], Callable[[], Round]]) -> None:
    """Read a job, prepare an engine for it, and run a round for each line that follows."""
    job = Job(**json.loads(sys.stdin.readline()))
    os.environ["OMP_NUM_THREADS"] = str(job.num_threads)
    run = prepare(job)
    say({})
    for _ in sys.stdin:
        done = run()
        done.rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        say(asdict(done))


def say(answer: dict[str, Any]) -> None:
    print("\n" + ANSWER + json.dumps(answer), flush=True)
