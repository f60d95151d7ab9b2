"""What is known of replicas without simulating them: a queue's closed form, and a measured run.

Knows bench/results/budget.json, in which SmolLM2-135M serves 64 requests on a CPU, in a pool for 8
sequences of `native`; it is given to whoever asks, and read by others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...cache.layer_groups import block_bytes, num_blocks_for, sequence_bytes
from ...cache.layer_spec import cache_geometry
from ..workloads import Lengths, Shape, Workload, make_workload, mean_tokens
from .machines import L4, Machine, ModelShape, StepTime, machine_of
from .replica import Job, Replica
from .simulation import Fleet, FleetSettings
from .traffic import Conversation, Traffic

SMOLLM2: Final = ModelShape(
    name="SmolLM2-135M",
    num_parameters=134.5e6,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
)
# As the command says that budget.json names.
NUM_VOCAB: Final = 49_152
LONGEST: Final = 8192
NUM_SEQUENCES: Final = 8
SHAPE: Final = Shape(Lengths(300, 0.8, 4096), Lengths(1000, 0.6, 3000))
NUM_REQUESTS: Final = 64
FORMATS: Final = ("native", "int8", "int2")
CASE: Final = "lognormal, {}"
MEASURED: Final = {  # metrics of the report, with their units
    "output tokens": "tokens/s",
    "sequences at once, while others wait": "sequences",
    "between tokens, p50": "ms",
    "preemptions": "times",
}


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Steps of a replica that served a workload, all of which was there from the start."""

    work: NDArray[np.float64]  # [steps, 4]: 1, tokens, pairs, bytes
    num_sampled: NDArray[np.int64]  # [steps] tokens that requests got
    num_running: NDArray[np.int64]  # [steps] sequences, those that end with it included
    is_crowded: NDArray[np.bool_]  # [steps] whether others wait
    num_preemptions: int


def measured_machine(kv_format: str, workload: Workload) -> Machine:
    """The pool of the run in this format; its step takes no time yet."""
    natives, layers = SMOLLM2.layers("native"), SMOLLM2.layers(kv_format)
    budget = NUM_SEQUENCES * sequence_bytes(natives, SMOLLM2.dtype, round(mean_tokens(workload)))
    return Machine(
        name=f"SmolLM2, {kv_format}",
        geometry=cache_geometry(layers, SMOLLM2.dtype),
        num_blocks=num_blocks_for(budget, layers, SMOLLM2.dtype),
        block_bytes=block_bytes(layers, SMOLLM2.dtype),
        step_time=StepTime(1.0),
        token_budget=1024,
        max_num_seqs=128,
        max_model_len=LONGEST,
    )


def measured_workload() -> Workload:
    return make_workload(SHAPE, NUM_REQUESTS, NUM_VOCAB)


def replay(machine: Machine, workload: Workload) -> Replay:
    """Serve a workload, every request of which is there from the start."""
    replica = Replica(0, machine)
    for number, item in enumerate(workload):
        replica.add(job_of(number, item.prompt, item.num_outputs))
    work, sampled, running, crowded = [], [], [], []
    while replica.begin_step() is not None:
        num_before = replica.counts.num_sampled
        work.append((1.0, *map(float, replica.work)))
        running.append(replica.scheduler.num_running)
        replica.end_step(0.0)
        crowded.append(replica.scheduler.num_waiting > 0)
        sampled.append(num_before)
    totals = np.array([*sampled, replica.counts.num_sampled])
    return Replay(
        work=np.array(work),
        num_sampled=np.diff(totals),
        num_running=np.array(running),
        is_crowded=np.array(crowded),
        num_preemptions=replica.counts.num_preemptions,
    )


def job_of(number: int, prompt: Any, num_outputs: int) -> Job:
    """A conversation of one turn."""
    tokens = np.array(prompt, dtype=np.int32)
    conversation = Conversation(
        number=number, arrival=0.0, prefix=tokens, questions=[], answers=[], pauses=[]
    )
    return Job(
        conversation=conversation, turn=0, prompt=tokens, num_outputs=num_outputs, arrival=0.0
    )


def fitted_time(replays: Sequence[Replay], seconds: Sequence[float]) -> StepTime:
    """Seconds of a step and of each token, with which runs come to about their `seconds`."""
    work = np.array([each.work.sum(axis=0)[:2] for each in replays])
    took = np.array(seconds)
    parts = np.linalg.lstsq(work / took[:, None], np.ones(len(took)), rcond=None)[0]
    return StepTime(*map(float, parts))


def told_by(replayed: Replay, step_time: StepTime) -> dict[str, float]:
    """What a run says where steps take so long, as the report of the measured one says it."""
    seconds = replayed.work[:, :2] @ np.array(step_time[:2])
    crowded = seconds * replayed.is_crowded
    gaps = np.repeat(seconds, replayed.num_sampled)
    return {
        "output tokens": float(replayed.num_sampled.sum() / seconds.sum()),
        "sequences at once, while others wait": float(
            (replayed.num_running * crowded).sum() / max(crowded.sum(), 1e-9)
        ),
        "between tokens, p50": float(1000 * np.median(gaps)),
        "preemptions": float(replayed.num_preemptions),
    }


def waits(utilization: float, num_requests: int, seed: int = 0) -> tuple[float, float]:
    """Mean steps that requests wait where one at a time is served, in one step each, and what
    Pollaczek and Khinchine's formula says of an endless queue (M/D/1)."""
    machine = replace(machine_of(L4, "native"), step_time=StepTime(1.0), max_num_seqs=1)
    one = Lengths(16, 0.0, 16)
    traffic = Traffic(
        rate=utilization,
        seconds=num_requests / utilization,
        num_prefixes=1,
        prefix=one,
        question=one,
        answer=Lengths(1, 0.0, 1),
        mean_turns=1.0,
    )
    settings = FleetSettings(machine=machine, num_replicas=1, policy="round robin", warm_up=0.0)
    jobs = [job for job in Fleet(settings, traffic, seed).run().jobs if job.first is not None]
    waited = [job.first - job.arrival - 1.0 for job in jobs if job.first is not None]
    return float(np.mean(waited)), utilization / (2 * (1 - utilization))
