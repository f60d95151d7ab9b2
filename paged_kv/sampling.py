"""How one request wants its tokens chosen and when it ends. Plain data, validated once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    LogitsProcessor = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling and stopping of one request.

    `temperature` 0 is greedy. Then, in this order: `top_k` keeps the k most likely tokens (None:
    all), `top_p` the smallest set of at least that probability, `min_p` tokens at least that
    fraction as likely as the likeliest. With a `seed`, the tokens depend on nothing but the
    logits, whatever else is in the batch. `max_tokens` None means as many as the model's length
    allows. `n` continuations are sampled independently. Generation ends with the model's
    end-of-sequence token unless `ignore_eos`, with any of `stop_token_ids`, and before any of the
    `stop` strings; none of the three ends it before `min_tokens`.

    `logits_processors` are called as transformers calls its own, with ids [1, num_tokens] and
    logits [1, vocab_size], so any `transformers.LogitsProcessor` serves.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 128
    min_tokens: int = 0
    n: int = 1
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logits_processors: Sequence[LogitsProcessor] = ()

    def __post_init__(self) -> None:
        require(
            "temperature", self.temperature, 0 <= self.temperature < math.inf, "at least 0, finite"
        )
        require("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "None or at least 1")
        require("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]")
        require("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1]")
        require("seed", self.seed, self.seed is None or 0 <= self.seed < 1 << 64, "None or 64 bits")
        require(
            "max_tokens",
            self.max_tokens,
            self.max_tokens is None or self.max_tokens >= 1,
            "None or at least 1",
        )
        require("min_tokens", self.min_tokens, self.min_tokens >= 0, "at least 0")
        require("n", self.n, self.n >= 1, "at least 1")
        require("stop", self.stop, all(self.stop_strings), "strings that are not empty")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


def require(name: str, value: object, is_valid: bool, expected: str) -> None:
    """Raise `ConfigError` naming the setting, its value and what was expected."""
    if not is_valid:
        raise ConfigError(f"{name} must be {expected}, got {value!r}")
