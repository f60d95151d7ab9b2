"""What steps cost by what they compute, learned from their times. Knows counts, never requests."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

NOISE: Final = 0.2  # of a time, that says nothing
DRIFT: Final = 0.02  # of a time, by which each part may have changed since the step before
MOST_TIMES: Final = 4.0  # what was expected, that a time counts as
FIRST_SHARE: Final = 0.25  # of the first time, that the parts without a count may have taken
Floats = NDArray[np.float64]


class StepCosts:
    """Seconds of a step: for itself, for each decode and for each token of prompts.

    Where decodes and prompts meet, a step and each decode cost something more: what is made for
    decodes alone cannot compute them then. One time a step tells of five numbers: a Kalman filter
    (Kalman 1960) keeps them with how sure it is of each, so that what a run of like steps says
    nothing about stays as it was. A machine that is busy for a moment moves them by little.
    """

    def __init__(self) -> None:
        self._parts: Floats = np.zeros(5)  # none is negative
        self._covariance: Floats | None = None  # until the first time

    def learn(self, num_decodes: int, num_prompt_tokens: int, seconds: float) -> None:
        """A step of so many took so long."""
        counts = counts_of(num_decodes, num_prompt_tokens)
        if self._covariance is None:
            shares = np.array([FIRST_SHARE, FIRST_SHARE, 1.0, FIRST_SHARE, FIRST_SHARE])
            self._covariance = np.diag((seconds * shares / np.maximum(counts, 1)) ** 2)
        else:
            expected = float(counts @ self._parts)
            seconds = min(seconds, MOST_TIMES * expected) if expected > 0 else seconds
        drift = DRIFT * seconds * (counts > 0) / np.maximum(counts, 1)
        covariance = self._covariance + np.diag(drift**2)
        along = covariance @ counts
        gain = along / (counts @ along + (NOISE * seconds) ** 2)
        surprise = seconds - counts @ self._parts
        self._parts = np.maximum(self._parts + gain * surprise, 0.0)
        self._covariance = covariance - np.outer(gain, along)

    def seconds(self, num_decodes: int, num_prompt_tokens: int) -> float:
        """What such a step is expected to take; 0 before any was seen."""
        return float(counts_of(num_decodes, num_prompt_tokens) @ self._parts)

    def doubt(self, num_decodes: int, num_prompt_tokens: int) -> float:
        """By which part of what is expected such a step may well take more or less."""
        counts = counts_of(num_decodes, num_prompt_tokens)
        expected = float(counts @ self._parts)
        if self._covariance is None or not expected:
            return np.inf
        return float(np.sqrt(counts @ self._covariance @ counts)) / expected

    @property
    def token_seconds(self) -> float:
        """What each token of a prompt adds."""
        return float(self._parts[2])


def counts_of(num_decodes: int, num_prompt_tokens: int) -> Floats:
    """How often a step has each part."""
    is_mixed = num_decodes > 0 and num_prompt_tokens > 0
    parts = (1, num_decodes, num_prompt_tokens, is_mixed, is_mixed * num_decodes)
    return np.array(parts, dtype=np.float64)
