"""How much of prompts a step computes, for others decode meanwhile. Knows times, no requests."""

from __future__ import annotations

from time import perf_counter
from typing import Final

import numpy as np

from ..scheduler.scheduler import Scheduler
from ..scheduler.step import ScheduledStep

LEAST_TOKENS: Final = 16  # of prompts in a step, however long it takes
WEIGHT: Final = 0.1  # of the newest time in a mean
MOST_TIMES: Final = 4.0  # the mean, that a time counts as


class PrefillPace:
    """Keeps a step to about `max_slowdown` times what a step of decodes alone takes.

    It measures what such a step takes and what each token of a prompt adds to it, and sets the
    scheduler's `most_beside_decodes` by that. The first prompt tells what a token takes at most;
    until a step of decodes is known, others get as little as they ever do. Where nobody decodes,
    nothing is limited.
    """

    def __init__(self, scheduler: Scheduler, max_slowdown: float) -> None:
        self._scheduler = scheduler
        self._max_slowdown = max_slowdown
        self._decode_seconds: float | None = None  # of a step without prompts
        self._token_seconds: float | None = None  # of a prompt, beside decodes
        self._last_end = 0.0

    def note(self, scheduled: ScheduledStep, began: float) -> None:
        """A step is over that began at this `perf_counter`, or when the one before it was over."""
        began, self._last_end = max(began, self._last_end), perf_counter()
        if scheduled.plan.num_draft_tokens is not None:  # what a draft adds is neither
            return
        num_new = np.diff(scheduled.plan.query_start_loc)
        num_decodes = int(np.count_nonzero(num_new == 1))
        num_prompt_tokens = int(num_new.sum()) - num_decodes
        self._learn(num_decodes, num_prompt_tokens, self._last_end - began)
        self._scheduler.most_beside_decodes = self.most_tokens

    def _learn(self, num_decodes: int, num_prompt_tokens: int, seconds: float) -> None:
        decode, token = self._decode_seconds, self._token_seconds
        if not num_prompt_tokens:
            self._decode_seconds = mixed(decode, seconds)
        elif not num_decodes:
            self._token_seconds = seconds / num_prompt_tokens if token is None else token
        elif decode is not None:
            added = max(seconds - decode, 0.0) / num_prompt_tokens
            self._token_seconds = mixed(token, added)
        elif token is not None:  # a guess, until there is a step of decodes alone
            self._decode_seconds = max(seconds - token * num_prompt_tokens, seconds / 2)

    @property
    def most_tokens(self) -> int | None:
        """Of prompts, in a step in which others decode; None is no limit."""
        if not self._token_seconds:
            return None
        if self._decode_seconds is None:
            return LEAST_TOKENS
        seconds = (self._max_slowdown - 1) * self._decode_seconds
        return max(int(seconds / self._token_seconds), LEAST_TOKENS)


def mixed(mean: float | None, newest: float) -> float:
    """A running mean; a single time, as of a machine that was busy, moves it by little."""
    if mean is None:
        return newest
    return mean + WEIGHT * (min(newest, MOST_TIMES * mean) - mean)
