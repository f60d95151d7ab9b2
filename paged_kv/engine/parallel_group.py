"""The processes that compute a model together with this one: started, told, watched, ended.

Knows commands and processes, never what a step computes. This process is rank 0, and the only one
that schedules. What one of them cannot finish none can: a process that dies or fails in the middle
of a step ends the whole group, and whoever steps the engine is told who it was.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..blocks.geometry import IntArray
from ..blocks.step_plan import StepPlan
from ..cache.decode_tables import Drawn
from ..cache.formats import KVFormat
from ..cache.key_calibration import KeyCalibration
from ..cache.kv_cache import NO_ARRAYS, PagedKVCache
from ..cache.step_staging import StagedArray
from ..errors import ConfigError, PagedKVError, StepFailedError
from ..models.adapters import AdapterNames
from ..models.attached_model import AttachedModel
from ..models.calibration import Calibration, calibrate
from ..models.loading import Source, load_tokenizer
from ..models.model_part import (
    ModelPart,
    PartSource,
    joined_heads,
    leave,
    load_part,
    refuse_unsplittable,
)
from ..models.split_modules import Place
from ..scheduler.step import BlockCopy
from .config import EngineConfig
from .model_runner import ModelRunner
from .parallel_worker import (
    CalibratePart,
    Command,
    CopySwapped,
    Failed,
    Greet,
    LoadPart,
    MakeCache,
    RunStep,
)

LAST_WORDS_SECONDS: Final = 5.0  # until it is known who has failed
ENDING_SECONDS: Final = 5.0  # that a process has to end by itself
STARTER: Final = """
import json, sys
sys.path[:] = json.loads(sys.argv[2])
from paged_kv.engine.parallel_worker import main
main(int(sys.argv[1]))
"""

Answer = TypeVar("Answer")


class WorkerProcess(NamedTuple):
    process: subprocess.Popen[bytes]
    connection: Connection

    @classmethod
    def start(cls, num_threads: int) -> WorkerProcess:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", STARTER, str(theirs.fileno()), json.dumps(sys.path)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": str(num_threads)},
            )
        return cls(process, Connection(ours.detach()))

    def end(self) -> None:
        """It ends by itself where nobody orders any more; what does not is killed."""
        self.connection.close()
        try:
            self.process.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()

    def named(self, rank: int, words: str) -> str:
        return f"rank {rank} (process {self.process.pid}) {words}"

    def last_words(self, seconds: float) -> str | None:
        """What became of it; None where it says nothing and lives."""
        try:
            while self.connection.poll(seconds):
                found = self.connection.recv()
                if isinstance(found, Failed):
                    return f"failed: {found.text}"
        except (EOFError, OSError):
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(ENDING_SECONDS)
                return f"ended with {self.ending}"
            return "closed its connection"
        return None

    @property
    def ending(self) -> str:
        code: int = self.process.returncode
        return f"signal {-code}" if code < 0 else f"exit code {code}"


class RankFailed(Exception):
    """What another process has said of its end."""


class WorkerGroup:
    """The other processes, and this one's place among them."""

    def __init__(self, part: PartSource) -> None:
        self.size: Final = part.place.size
        self.num_threads_before: Final = torch.get_num_threads()
        self.failure: str | None = None
        self._workers: list[WorkerProcess] = []
        self._end = weakref.finalize(self, end_all, self._workers)
        try:
            for _ in range(1, self.size):
                self._workers.append(WorkerProcess.start(part.num_threads))
        except BaseException:
            self.close()
            raise

    @property
    def process_ids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers]

    def death(self) -> str | None:
        """Which process has ended without being told to; may be asked in any thread."""
        for rank, worker in enumerate(self._workers, start=1):
            if worker.process.poll() is not None:
                return worker.named(rank, f"ended with {worker.ending}")
        return None

    def kill(self) -> None:
        for worker in self._workers:
            worker.kill()

    def close(self) -> None:
        """End the other processes; none is left when this returns."""
        self._end()
        torch.set_num_threads(self.num_threads_before)

    @contextmanager
    def together(self, command: Command) -> Iterator[None]:
        """Tell all others to do what the body does here; an exception breaks the group up.

        Interrupts wait until the body is done: others could not go on without this process.
        """
        with interrupts_later():
            self.require_whole()
            try:
                self._tell([command] * len(self._workers))
                yield
            except BaseException as error:
                raise self._broken_by(error) from error

    def _tell(self, commands: Sequence[Command]) -> None:
        for worker, command in zip(self._workers, commands, strict=True):
            worker.connection.send(command)

    def _answers(self, kind: type[Answer]) -> list[Answer]:
        """What each of them answers, however long that takes while it lives."""
        answers = []
        for rank, worker in enumerate(self._workers, start=1):
            answer = worker.connection.recv()
            if isinstance(answer, Failed):
                raise RankFailed(worker.named(rank, f"failed: {answer.text}"))
            assert isinstance(answer, kind), f"{answer!r} is no {kind}"
            answers.append(answer)
        return answers

    def require_whole(self) -> None:
        """Raise `StepFailedError` where a process has failed, also since the last step."""
        if self.failure is None:
            for worker in self._workers:
                if worker.connection.poll(0):
                    raise self._broken_by(None)
        else:
            raise StepFailedError(f"{self.failure}; close this LLM and make another")

    def _broken_by(self, error: BaseException | None) -> BaseException:
        """Break the group up; the exception that says why."""
        deadline, said = time.monotonic() + LAST_WORDS_SECONDS, list[str]()
        for rank, worker in enumerate(self._workers, start=1):
            words = worker.last_words(max(deadline - time.monotonic(), 0))
            if words is not None:
                said.append(worker.named(rank, words))
            elif error is not None:
                deadline = 0.0
        if isinstance(error, RankFailed):
            said = [str(error)]
        elif error is not None and not said:
            said.append(f"rank 0 failed: {error!r}")
        self.failure = f"the processes of this model cannot go on: {'; '.join(said)}"
        self.kill()
        leave()
        if error is not None and not isinstance(error, Exception):
            return error
        return StepFailedError(self.failure)

    # -- what all do at once ----------------------------------------------------------------------

    def load(self, part: PartSource) -> ModelPart:
        """This process's part, when all have theirs."""
        commands = [LoadPart(part.at(rank)) for rank in range(1, self.size)]
        try:
            self._tell([Greet()] * len(self._workers))
            self._answers(bool)
            self._tell(commands)
            model = load_part(part)
            self._answers(bool)
        except PagedKVError:
            raise
        except Exception as error:
            raise self._broken_by(error) from error
        return model

    def calibrate(self, model: AttachedModel, token_ids: Sequence[int]) -> Calibration:
        """`models.calibration.calibrate`, of the kv heads of all processes."""
        with self.together(CalibratePart(list(token_ids))):
            own = calibrate(model, token_ids)
            return joined_heads([own, *self._answers(Calibration)])

    def runner(
        self,
        model: ModelPart,
        cache: PagedKVCache,
        kv_formats: Sequence[KVFormat],
        calibration: Sequence[KeyCalibration] | None,
    ) -> ParallelRunner:
        """The runner of all processes; those beside this one make a cache as this one's."""
        command = MakeCache(
            kv_formats, calibration, cache.num_blocks, cache.num_host_blocks, cache.dtype
        )
        with self.together(command):
            self._answers(bool)
        return ParallelRunner(model, cache, self)


class ParallelRunner(ModelRunner):
    """Runs each step in all processes; logits are rank 0's, which this is."""

    def __init__(self, model: AttachedModel, cache: PagedKVCache, group: WorkerGroup) -> None:
        super().__init__(model, cache)
        self.group = group

    @property
    def failure(self) -> str | None:
        return self.group.failure or self.group.death()

    def copy_swapped(self, swap_outs: Sequence[BlockCopy], swap_ins: Sequence[BlockCopy]) -> None:
        if swap_outs or swap_ins:
            with self.group.together(CopySwapped(swap_outs, swap_ins)):
                super().copy_swapped(swap_outs, swap_ins)

    def run(
        self,
        plan: StepPlan,
        token_ids: IntArray,
        logit_tokens: IntArray,
        extra: Mapping[str, StagedArray] = NO_ARRAYS,
        drawn: Drawn | None = None,
        adapters: Sequence[AdapterNames] = (),
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with self.group.together(RunStep(plan, token_ids, logit_tokens)):
            return super().run(plan, token_ids, logit_tokens, extra, drawn, adapters)


def start_group(
    name: object,
    source: Source,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype | None,
    config: EngineConfig,
    device: torch.device | str | None,
) -> tuple[WorkerGroup, ModelPart, PreTrainedTokenizerBase | None]:
    """Load a model in several processes, of which this is one, and its tokenizer.

    Raises before anything is started for what cannot be computed so, and leaves no process behind
    where something fails later.
    """
    size = config.tensor_parallel_size
    source.check()
    require_place_for_group(device)
    found = refuse_unsplittable(name, source, size)
    tokenizer = tokenizer or load_tokenizer(found, None, source)
    with tempfile.TemporaryDirectory(prefix="paged_kv-") as folder:
        part = PartSource(
            name=found,
            source=source,
            dtype=dtype,
            place=Place(0, size),
            store_file=str(Path(folder) / "store"),
            num_threads=config.num_threads or max(torch.get_num_threads() // size, 1),
        )
        group = WorkerGroup(part)
        try:
            return group, group.load(part), tokenizer
        except BaseException:
            group.kill()
            group.close()
            raise


def require_place_for_group(device: torch.device | str | None) -> None:
    """Raise `ConfigError` where this process cannot be one of a group on CPUs."""
    if device is not None and torch.device(device).type != "cpu":
        raise ConfigError(f"tensor_parallel_size above 1 is for CPUs, got the device {device!s}")
    if torch.accelerator.is_available():
        raise ConfigError("tensor_parallel_size above 1 is for machines without an accelerator")
    if sys.platform == "win32":
        raise ConfigError("tensor_parallel_size above 1 needs a POSIX system")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise ConfigError(
            "torch.distributed has a process group in this process, by another LLM with a "
            "tensor_parallel_size or by the program: there can be one"
        )


def end_all(workers: list[WorkerProcess]) -> None:
    while workers:
        workers.pop().end()
    leave()


@contextmanager
def interrupts_later() -> Iterator[None]:
    """Let Ctrl-C wait until the body is done; other threads than the main one never get it."""
    before: Any = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or not callable(before):
        yield
        return
    came: list[tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *call: came.append(call))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, cast(Any, before))
        if came:
            before(*came[-1])
