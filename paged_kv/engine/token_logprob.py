"""How likely a model finds a token. Knows numbers, never where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class TokenLogprob(NamedTuple):
    """A token's log-probability by the model's own logits, and those of the likeliest ones."""

    token_id: int
    logprob: float
    likeliest: Sequence[tuple[int, float]]  # token ids and log-probabilities, best first
