"""Conversations that begin with shared prefixes: what a fleet is asked, by a seed.

Knows tokens and times, never a replica. The same settings and seed are the same conversations,
however many replicas serve them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ...blocks.token_chain import TokenIds
from ...errors import ConfigError
from ..workloads import Lengths

MULTIPLIER: Final = 1_103_515_245  # of a full period modulo 2**31
INCREMENT: Final = 12_345
MASK: Final = (1 << 31) - 1
PREFIX: Final = Lengths(1500, 0.6, 6000)
QUESTION: Final = Lengths(100, 0.8, 1000)
ANSWER: Final = Lengths(150, 0.7, 600)


def following(last_token_ids: TokenIds) -> NDArray[np.int64]:
    """What stands for a model: the token that follows each of these, always the same one."""
    return (last_token_ids.astype(np.int64) * MULTIPLIER + INCREMENT) & MASK


def continued(last: int, count: int) -> TokenIds:
    """The `count` tokens that follow one by one."""
    tokens = np.empty(count, dtype=np.int32)
    for index in range(count):
        last = (last * MULTIPLIER + INCREMENT) & MASK
        tokens[index] = last
    return tokens


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Conversations a second, what they share, and how they go on.

    Gaps between arrivals are gamma-distributed: `burstiness` is their squared coefficient of
    variation, 1 for a Poisson process. Prefix number k of `num_prefixes` is drawn in proportion to
    k ** -`exponent`. A conversation has `mean_turns` on average, geometrically distributed, at
    most `most_turns`; between an answer and the next turn are `mean_pause` seconds on average.
    Arrivals, of later turns too, end after `seconds`.
    """

    rate: float
    seconds: float = 90.0
    burstiness: float = 1.0
    num_prefixes: int = 256
    exponent: float = 1.0
    prefix: Lengths = PREFIX
    question: Lengths = QUESTION
    answer: Lengths = ANSWER
    mean_turns: float = 3.0
    most_turns: int = 8
    mean_pause: float = 8.0

    def __post_init__(self) -> None:
        for name in ("rate", "seconds", "burstiness", "num_prefixes"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        if not self.mean_turns >= 1 or self.most_turns < 1:
            raise ConfigError(
                "mean_turns and most_turns must be at least 1, got "
                f"{self.mean_turns} and {self.most_turns}"
            )

    def conversations(self, seed: int) -> Iterator[Conversation]:
        """In the order of their arrival."""
        rng = np.random.default_rng((seed, 0))
        weights = np.arange(1, self.num_prefixes + 1, dtype=np.float64) ** -self.exponent
        shares = np.cumsum(weights / weights.sum())
        lengths = self.prefix.draw(self.num_prefixes, rng).tolist()
        prefixes = [rng.integers(MASK, size=size, dtype=np.int32) for size in lengths]
        shape, now, number = 1 / self.burstiness, 0.0, 0
        while True:
            now += float(rng.gamma(shape, 1 / (self.rate * shape)))
            if now >= self.seconds:
                return
            its = np.random.default_rng((seed, 1, number))
            which = int(np.searchsorted(shares, its.random()))
            num_turns = min(int(its.geometric(1 / self.mean_turns)), self.most_turns)
            yield Conversation(
                number=number,
                arrival=now,
                prefix=prefixes[min(which, self.num_prefixes - 1)],
                questions=[
                    its.integers(MASK, size=size, dtype=np.int32)
                    for size in self.question.draw(num_turns, its).tolist()
                ],
                answers=self.answer.draw(num_turns, its).tolist(),
                pauses=its.exponential(self.mean_pause, size=num_turns).tolist(),
            )
            number += 1


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A prefix, then questions and answers in turn; each turn's prompt is all before its answer."""

    number: int
    arrival: float
    prefix: TokenIds
    questions: list[TokenIds]
    answers: list[int]  # tokens
    pauses: list[float]  # after each answer

    @property
    def num_turns(self) -> int:
        return len(self.questions)

    def prompt(self, turn: int, before: TokenIds | None = None) -> TokenIds:
        """Of this turn; `before` is the last turn's prompt with its answer."""
        return np.concatenate([self.prefix if before is None else before, self.questions[turn]])
