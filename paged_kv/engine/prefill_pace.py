"""How much of prompts a step computes, for others decode meanwhile. Knows times, no requests."""

from __future__ import annotations

from time import perf_counter
from typing import Final

import numpy as np

from ..scheduler.scheduler import Scheduler
from ..scheduler.step import ScheduledStep
from .step_costs import StepCosts

LEAST_TOKENS: Final = 16  # of prompts in a step, however long it takes
PATIENCE: Final = 6  # steps that a request waits until its prompt is computed whatever it takes
MOST_DOUBT: Final = 0.3  # of what a step of decodes alone takes, before one is looked at


class PrefillPace:
    """Keeps a step to about `max_slowdown` times what a step of its decodes alone takes.

    It learns what steps cost and sets the scheduler's `most_beside_decodes` by that. While prompts
    come all the time no step is one of decodes alone: where it is not known any more what one would
    take, a step computes no prompts, to see. Where nobody decodes, nothing is limited; and nothing
    while a request has waited for a while to begin, as others come faster than small pieces are
    computed: many decodes at once cost less than few.
    """

    def __init__(self, scheduler: Scheduler, max_slowdown: float) -> None:
        self._scheduler = scheduler
        self._max_slowdown = max_slowdown
        self._costs = StepCosts()
        self._last_end = 0.0

    def note(self, scheduled: ScheduledStep, began: float) -> None:
        """A step is over that began at this `perf_counter`, or when the one before it was over."""
        began, self._last_end = max(began, self._last_end), perf_counter()
        if scheduled.plan.num_draft_tokens is not None:  # what a draft adds is neither
            return
        num_new = np.diff(scheduled.plan.query_start_loc)
        num_decodes = int(np.count_nonzero(num_new == 1))
        num_prompt_tokens = int(num_new.sum()) - num_decodes
        self._costs.learn(num_decodes, num_prompt_tokens, self._last_end - began)
        most: int | None = None
        if self._scheduler.num_steps_waited <= PATIENCE:
            looks = num_prompt_tokens > 0 and num_decodes > 0
            looks = looks and self._costs.doubt(num_decodes, 0) > MOST_DOUBT
            most = 0 if looks else self.most_tokens(num_decodes)
        self._scheduler.most_beside_decodes = most

    def most_tokens(self, num_decodes: int) -> int | None:
        """Of prompts, in a step in which so many others decode; None is no limit."""
        costs, num_decodes = self._costs, max(num_decodes, 1)
        if not costs.token_seconds:
            return None
        seconds = self._max_slowdown * costs.seconds(num_decodes, 0)
        left = seconds - costs.seconds(num_decodes, 1)
        return max(1 + int(left / costs.token_seconds), LEAST_TOKENS)
