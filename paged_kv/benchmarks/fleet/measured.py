"""What a replica on paper says of a run that was measured: bench/results/budget.json.

Knows one report: SmolLM2-135M on a CPU, in a pool for 8 sequences of `native`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...cache.layer_groups import block_bytes, num_blocks_for, sequence_bytes
from ...cache.layer_spec import cache_geometry
from ..workloads import Lengths, Shape, Workload, make_workload, mean_tokens
from .machines import Machine, ModelShape, StepTime
from .replica import Job, Replica
from .traffic import Conversation

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
