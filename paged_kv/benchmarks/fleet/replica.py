"""One replica on paper: the real scheduler and block manager on a clock. Knows no other replica.

Nothing stands in for them but the model, whose tokens `following` makes up, and the time that it
takes, which the machine's `StepTime` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from paged_kv.scheduler.request import Request
from paged_kv.scheduler.scheduler import Scheduler
from paged_kv.scheduler.step import ScheduledStep

from ...blocks.block_manager import BlockManager
from ...blocks.events import CacheEvent
from ...blocks.token_chain import TokenIds
from .machines import NO_WORK, Machine, Work
from .traffic import Conversation, following


@dataclass(eq=False, kw_only=True)
class Job:
    """One turn of a conversation, and what became of it. Times are seconds of the simulation."""

    conversation: Conversation
    turn: int
    prompt: TokenIds
    num_outputs: int
    arrival: float
    first: float | None = None  # when the first token came
    last: float | None = None  # and the last
    num_hit_tokens: int | None = None  # of the prompt, where it started first
    num_placed: int = 0  # replicas that it was given to
    request: Request | None = field(default=None, repr=False)  # where it is now

    @property
    def name(self) -> str:
        return f"{self.conversation.number}.{self.turn}"

    @property
    def is_over(self) -> bool:
        return self.last is not None

    @property
    def known_tokens(self) -> TokenIds:
        """Prompt and output so far, wherever it ran before."""
        return self.prompt if self.request is None else self.request.known_tokens.copy()


@dataclass(kw_only=True)
class Counts:
    """What a replica has done, its earlier lives included."""

    num_steps: int = 0
    num_tokens: int = 0  # computed
    num_sampled: int = 0  # tokens that requests got
    num_preemptions: int = 0
    busy_seconds: float = 0.0
    running_seconds: float = 0.0  # sequences times seconds
    block_seconds: float = 0.0  # blocks in use times seconds

    @classmethod
    def of(cls, parts: Sequence[Counts]) -> Counts:
        """All of them together."""
        return cls(**{name: sum(getattr(part, name) for part in parts) for name in vars(cls())})

    def minus(self, other: Counts) -> Counts:
        """What came after `other`."""
        return Counts(**{name: its - getattr(other, name) for name, its in vars(self).items()})


class Replica:
    """Steps as an engine does: schedule, wait for as long as the step takes, update, finish."""

    def __init__(self, number: int, machine: Machine, *, record_events: bool = False) -> None:
        self.number = number
        self.machine = machine
        self.counts: Counts = Counts()
        self.work: Work = NO_WORK  # of the step that began last
        self.is_alive: bool = True
        self.life: int = 0  # how often it has begun: what comes of an earlier life is void
        self._record_events = record_events
        self._begin_empty()

    def _begin_empty(self) -> None:
        machine = self.machine
        self.manager: BlockManager = BlockManager(
            machine.geometry,
            num_blocks=machine.num_blocks,
            max_num_seqs=machine.max_num_seqs,
            max_model_len=machine.max_model_len,
            prefix_caching=True,
            record_events=self._record_events,
        )
        self.scheduler: Scheduler = Scheduler(self.manager, token_budget=machine.token_budget)
        self.jobs: dict[str, Job] = {}
        self._without_token: set[str] = set()
        self._step: ScheduledStep | None = None
        self._num_preempted = 0

    @property
    def load(self) -> int:
        """Requests that it has and has not finished."""
        return len(self.jobs)

    @property
    def is_computing(self) -> bool:
        return self._step is not None

    def add(self, job: Job) -> None:
        """Take a job, with the tokens that it has already."""
        tokens = job.known_tokens
        num_left = job.num_outputs - (len(tokens) - len(job.prompt))
        job.request = Request(job.name, tokens, max_tokens=num_left)
        job.num_placed += 1
        self.scheduler.add(job.request)
        self.jobs[job.name] = job
        if job.first is None:
            self._without_token.add(job.name)

    def begin_step(self) -> float | None:
        """How long the next step takes; None where there is nothing to do."""
        if not self.jobs:
            return None
        step = self.scheduler.schedule()
        assert step is not None, "no request is paused"
        self._step = step
        self.work = self._work_of(step)
        seconds = self.machine.step_time.seconds(self.work)
        counts, pool = self.counts, self.manager.pool
        counts.num_steps += 1
        counts.num_tokens += step.plan.num_tokens
        counts.num_sampled += len(step.sampled_seq_ids)
        counts.busy_seconds += seconds
        counts.running_seconds += seconds * self.scheduler.num_running
        counts.block_seconds += seconds * pool.num_allocated
        return seconds

    def _work_of(self, step: ScheduledStep) -> Work:
        plan = step.plan
        num_new = plan.num_scheduled_tokens
        seen = plan.context_lens * num_new + num_new * (num_new + 1) // 2
        num_blocks = self.manager.num_held(plan.seq_ids)[0].sum()
        return Work(plan.num_tokens, int(seen.sum()), int(num_blocks) * self.machine.block_bytes)

    def end_step(self, now: float) -> list[Job]:
        """The step is over; the jobs that are."""
        step, self._step = self._step, None
        assert step is not None
        if self._without_token:
            for request in step.sampled_requests:
                if request.request_id in self._without_token:
                    self._without_token.remove(request.request_id)
                    self.jobs[request.request_id].first = now
        sampled = following(self.manager.last_token_ids[step.sampled_seq_ids])
        over = []
        for request in self.scheduler.update(step, sampled):
            self.scheduler.finish(request)
            job = self.jobs.pop(request.request_id)
            job.last = now
            self._note_hits(job)
            over.append(job)
        self._note_preemptions()
        return over

    def _note_hits(self, job: Job) -> None:
        """Where a job has started first is what counts."""
        assert job.request is not None
        if job.num_hit_tokens is None:
            job.num_hit_tokens = job.request.num_hit_tokens

    def _note_preemptions(self) -> None:
        total = self.scheduler.statistics().num_preemptions
        self.counts.num_preemptions += total - self._num_preempted
        self._num_preempted = total

    def take_events(self) -> list[CacheEvent]:
        """What became of cached blocks since the last call."""
        return self.manager.take_events()

    def die(self) -> list[Job]:
        """All is lost but the tokens that were told; the jobs that were here, in their order."""
        lost = list(self.jobs.values())
        for job in lost:
            self._note_hits(job)
        self.is_alive = False
        self.life += 1
        self.jobs, self._step = {}, None
        return lost

    def revive(self) -> None:
        self._begin_empty()
        self.is_alive = True
