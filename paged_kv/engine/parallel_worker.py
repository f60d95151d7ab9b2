"""A process that computes its part of every step, as the process that schedules orders.

Knows commands, a part of a model and of its cache; never requests, and decides nothing.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import NamedTuple, Protocol

import torch

from ..blocks.geometry import IntArray
from ..blocks.step_plan import StepPlan
from ..cache.formats import KVFormat
from ..cache.key_calibration import KeyCalibration
from ..cache.kv_cache import PagedKVCache
from ..models.calibration import Calibration, calibrate
from ..models.model_part import ModelPart, PartSource, leave, load_part
from ..scheduler.step import BlockCopy
from .model_runner import ModelRunner


class Failed(NamedTuple):
    """Why a process has given up: its last word."""

    text: str


class Command(Protocol):
    """What all processes are told to do at once; most have no answer."""

    def run(self, worker: Worker) -> object: ...


class Worker:
    """What a process has of the model and the cache."""

    def __init__(self) -> None:
        self.model: ModelPart | None = None
        self.runner: ModelRunner | None = None

    def forget(self) -> None:
        self.runner = None
        if self.model is not None:
            self.model.close()
        self.model = None
        leave()

    @property
    def part(self) -> ModelPart:
        assert self.model is not None, "the model is loaded first"
        return self.model

    @property
    def steps(self) -> ModelRunner:
        assert self.runner is not None, "the cache is made first"
        return self.runner


# -- commands -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Greet:
    """Answer, now that all that a start takes has been imported."""

    def run(self, worker: Worker) -> bool:
        return True


@dataclass(frozen=True)
class LoadPart:
    """Forget any model that was there, and load this one."""

    part: PartSource

    def run(self, worker: Worker) -> bool:
        worker.forget()
        worker.model = load_part(self.part)
        return True


@dataclass(frozen=True)
class CalibratePart:
    """Run a text through the model; answers with the calibration of this process's heads."""

    token_ids: Sequence[int]

    def run(self, worker: Worker) -> Calibration:
        return calibrate(worker.part, self.token_ids)


@dataclass(frozen=True)
class MakeCache:
    """Make this process's part of the cache; the calibration is of all heads."""

    kv_formats: Sequence[KVFormat]
    calibration: Sequence[KeyCalibration] | None
    num_blocks: int
    num_host_blocks: int
    dtype: torch.dtype

    def run(self, worker: Worker) -> bool:
        model = worker.part
        cache = PagedKVCache(
            model.layers(list(self.kv_formats), self.calibration),
            num_blocks=self.num_blocks,
            num_host_blocks=self.num_host_blocks,
            dtype=self.dtype,
            device=model.device,
        )
        worker.runner = ModelRunner(model, cache)
        return True


@dataclass(frozen=True)
class CopySwapped:
    swap_outs: Sequence[BlockCopy]
    swap_ins: Sequence[BlockCopy]

    def run(self, worker: Worker) -> None:
        worker.steps.copy_swapped(self.swap_outs, self.swap_ins)


@dataclass(frozen=True)
class RunStep:
    plan: StepPlan
    token_ids: IntArray
    logit_tokens: IntArray

    def run(self, worker: Worker) -> None:
        worker.steps.run(self.plan, self.token_ids, self.logit_tokens)


# -- the process ----------------------------------------------------------------------------------


def serve(connection: Connection) -> None:
    """Do what is ordered, until nobody orders any more or something fails."""
    worker = Worker()
    while True:
        try:
            command: Command = connection.recv()
        except EOFError:  # who scheduled is gone, or done
            return
        try:
            answer = command.run(worker)
            if answer is not None:
                connection.send(answer)
        except BaseException as error:
            with_place = traceback.format_exception_only(error)[-1].strip()
            connection.send(Failed(with_place))
            raise


def main(file_number: int) -> None:
    """A worker's whole life; ends the process.

    Signals that go to all processes of a terminal or a service mean the one that schedules, which
    ends this one when it has finished what it has accepted.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.getLogger("paged_kv").setLevel(logging.ERROR)  # the other process says it
    code = 0
    try:
        serve(Connection(file_number))
    except BaseException:
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of a group that is broken would keep it
