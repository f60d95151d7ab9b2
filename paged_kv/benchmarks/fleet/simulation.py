"""A fleet as a queue of events: conversations arrive, steps end, replicas die and come back.

Knows when what happens, never how a replica decides.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from ...errors import ConfigError
from .machines import Machine
from .replica import Counts, Job, Replica
from .routing import POLICIES, BlockAware
from .traffic import Conversation, Traffic, continued


@dataclass(frozen=True, kw_only=True)
class FleetSettings:
    """So many replicas of one machine behind a router.

    With `mean_life` each dies after a time that is exponentially distributed and comes back empty
    `down_seconds` later. What it was given is then given to others, with the tokens that it has.
    `patience` is for how long after the last arrival the fleet still serves; who has not ended by
    then counts as one who kept no limit. What arrives in the first `warm_up` seconds, when caches
    are empty, is served and not counted.
    """

    machine: Machine
    num_replicas: int
    policy: str
    mean_life: float | None = None
    down_seconds: float = 30.0
    patience: float = 60.0
    warm_up: float = 15.0

    def __post_init__(self) -> None:
        if self.num_replicas < 1:
            raise ConfigError(f"num_replicas must be at least 1, got {self.num_replicas}")
        if not self.warm_up >= 0:
            raise ConfigError(f"warm_up must be at least 0, got {self.warm_up}")
        if self.policy not in POLICIES:
            known = ", ".join(POLICIES)
            raise ConfigError(f"policy must be one of {known}, got {self.policy!r}")


@dataclass(kw_only=True)
class Outcome:
    """What came of it: every job in the order of arrival, and what the replicas did together."""

    settings: FleetSettings
    traffic: Traffic
    jobs: list[Job]
    counts: Counts  # from the end of the warm-up to the last arrival
    num_steps: int  # in all
    num_deaths: int
    end: float  # of the run

    @property
    def counted(self) -> list[Job]:
        """Jobs that arrived after the warm-up."""
        return [job for job in self.jobs if job.arrival >= self.settings.warm_up]

    @property
    def window(self) -> float:
        """Seconds in which they arrived."""
        return self.traffic.seconds - self.settings.warm_up


class Fleet:
    """One run of one seed."""

    def __init__(self, settings: FleetSettings, traffic: Traffic, seed: int) -> None:
        self.settings = settings
        self.traffic = traffic
        self.now: float = 0.0
        self.num_deaths: int = 0
        self.jobs: list[Job] = []
        self._policy = POLICIES[settings.policy](seed)
        self._follows = isinstance(self._policy, BlockAware)
        self.replicas: list[Replica] = [
            Replica(number, settings.machine, record_events=self._follows)
            for number in range(settings.num_replicas)
        ]
        self._alive = list(self.replicas)
        self._stranded: list[Job] = []  # while nobody is alive
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = 0
        self._looks: list[Counts] = []
        self._rng = np.random.default_rng((seed, 3))  # of lives
        self._arriving = traffic.conversations(seed)

    def run(self) -> Outcome:
        """Until everything is over, or patience is."""
        self._next_conversation()
        self._at(self.settings.warm_up, self._look)
        self._at(self.traffic.seconds, self._look)
        if self.settings.mean_life is not None:
            for replica in self.replicas:
                self._await_death(replica)
        end = self.traffic.seconds + self.settings.patience
        while self._events and self._events[0][0] <= end:
            self.now, _, happen = heapq.heappop(self._events)
            happen()
            if self._is_over:
                break
        before, after = self._looks
        return Outcome(
            settings=self.settings,
            traffic=self.traffic,
            jobs=self.jobs,
            counts=after.minus(before),
            num_steps=sum(replica.counts.num_steps for replica in self.replicas),
            num_deaths=self.num_deaths,
            end=self.now,
        )

    def _look(self) -> None:
        """What all replicas together have done until now."""
        self._looks.append(Counts.of([replica.counts for replica in self.replicas]))

    @property
    def _is_over(self) -> bool:
        """Whether nobody comes any more and all have left; deaths alone go on for ever."""
        return (
            len(self._looks) == 2
            and not self._stranded
            and not any(replica.load for replica in self.replicas)
        )

    def _at(self, when: float, happen: Callable[[], None]) -> None:
        """What is due at the same time happens in the order in which it was planned."""
        heapq.heappush(self._events, (when, self._num_events, happen))
        self._num_events += 1

    # -- requests -------------------------------------------------------------------------------

    def _next_conversation(self) -> None:
        conversation = next(self._arriving, None)
        if conversation is not None:
            self._at(conversation.arrival, partial(self._begin, conversation))

    def _begin(self, conversation: Conversation) -> None:
        self._ask(conversation, 0, None)
        self._next_conversation()

    def _ask(self, conversation: Conversation, turn: int, before: Job | None) -> None:
        """A turn arrives; one that would be too long for the model ends the conversation."""
        if before is None:
            prompt = conversation.prompt(turn)
        else:
            answer = continued(int(before.prompt[-1]), before.num_outputs)
            prompt = conversation.prompt(turn, np.concatenate([before.prompt, answer]))
        num_outputs = conversation.answers[turn]
        if len(prompt) + num_outputs > self.settings.machine.max_model_len:
            return
        job = Job(
            conversation=conversation,
            turn=turn,
            prompt=prompt,
            num_outputs=num_outputs,
            arrival=self.now,
        )
        self.jobs.append(job)
        self._place(job)

    def _place(self, job: Job) -> None:
        if not self._alive:
            self._stranded.append(job)
            return
        replica = self._policy.choose(job, self._alive)
        replica.add(job)
        if not replica.is_computing:
            self._compute(replica)

    def _answered(self, job: Job) -> None:
        conversation, turn = job.conversation, job.turn + 1
        again = self.now + conversation.pauses[job.turn]
        if turn < conversation.num_turns and again < self.traffic.seconds:
            self._at(again, partial(self._ask, conversation, turn, job))

    # -- steps ----------------------------------------------------------------------------------

    def _compute(self, replica: Replica) -> None:
        seconds = replica.begin_step()
        if seconds is not None:
            self._at(self.now + seconds, partial(self._computed, replica, replica.life))

    def _computed(self, replica: Replica, life: int) -> None:
        if replica.life != life:
            return
        over = replica.end_step(self.now)
        if self._follows:
            self._policy.follow(replica, replica.take_events())
        for job in over:
            self._policy.ended(replica, job)
            self._answered(job)
        self._compute(replica)

    # -- failures -------------------------------------------------------------------------------

    def _await_death(self, replica: Replica) -> None:
        assert self.settings.mean_life is not None
        lasts = float(self._rng.exponential(self.settings.mean_life))
        self._at(self.now + lasts, partial(self._die, replica))

    def _die(self, replica: Replica) -> None:
        self.num_deaths += 1
        self._alive.remove(replica)
        lost = replica.die()
        self._policy.forget(replica)
        self._at(self.now + self.settings.down_seconds, partial(self._revive, replica))
        for job in lost:
            self._place(job)

    def _revive(self, replica: Replica) -> None:
        replica.revive()
        self._alive = [each for each in self.replicas if each.is_alive]
        self._await_death(replica)
        stranded, self._stranded = self._stranded, []
        for job in stranded:
            self._place(job)
