"""How one request wants its tokens chosen and when it ends.

Knows values and their ranges, validated once; never a model, whose vocabulary and length they are
held to elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Final

from ..blocks.sink_window import SinkWindow
from ..validation import is_flag, is_integer, is_list_of, require

MAX_SAMPLES: Final = 1 << 16  # of one request

if TYPE_CHECKING:
    from torch import Tensor

    LogitsProcessor = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling and stopping of one request.

    `temperature` 0 is greedy. Then, in this order: `top_k` keeps the k most likely tokens (None:
    all), `top_p` the smallest set of at least that probability, `min_p` tokens at least that
    fraction as likely as the likeliest. With a `seed`, the tokens depend on nothing but the logits,
    whatever else is in the batch. `max_tokens` None means as many as the model's length allows; for
    a windowed request, without end. `n` continuations are sampled independently, on shared blocks
    of the prompt; with `best_of` that many are, and the `n` of the highest mean log-probability are
    kept. Generation ends with the model's end-of-sequence token unless `ignore_eos`, with any of
    `stop_token_ids`, and before any of the `stop` strings; none of the three ends it before
    `min_tokens`. Special tokens have no text: stop at them with `stop_token_ids`. Requests share
    cached blocks only with requests of the same `cache_salt`. With a `sink_window` the request is
    windowed: it may go on for ever in constant memory; None is the engine's own setting.

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
    best_of: int | None = None
    cache_salt: str | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logits_processors: Sequence[LogitsProcessor] = ()
    sink_window: SinkWindow | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p"):
            value = getattr(self, name)
            require(name, value, isinstance(value, Real), "a number")
        for name in ("top_k", "seed", "max_tokens", "best_of"):
            value = getattr(self, name)
            require(name, value, value is None or is_integer(value), "None or an integer")
        for name in ("min_tokens", "n"):
            require(name, getattr(self, name), is_integer(getattr(self, name)), "an integer")
        is_text = isinstance(self.stop, str) or is_list_of(self.stop, lambda s: isinstance(s, str))
        require("stop", self.stop, is_text, "a string or a list of strings")
        require(
            "stop_token_ids",
            self.stop_token_ids,
            is_list_of(self.stop_token_ids, is_integer),
            "a list of token ids",
        )
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
        require("n", self.n, 1 <= self.n <= MAX_SAMPLES, f"from 1 to {MAX_SAMPLES}")
        is_enough = self.best_of is None or self.n <= self.best_of <= MAX_SAMPLES
        expected = f"None or at least n ({self.n}) and at most {MAX_SAMPLES}"
        require("best_of", self.best_of, is_enough, expected)
        require("ignore_eos", self.ignore_eos, is_flag(self.ignore_eos), "True or False")
        is_functions = is_list_of(self.logits_processors, callable)
        require("logits_processors", self.logits_processors, is_functions, "a list of functions")
        is_text = self.cache_salt is None or isinstance(self.cache_salt, str)
        require("cache_salt", self.cache_salt, is_text, "None or a string")
        require("stop", self.stop, all(self.stop_strings), "strings that are not empty")
        is_window = self.sink_window is None or isinstance(self.sink_window, SinkWindow)
        require("sink_window", self.sink_window, is_window, "None or a SinkWindow")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def num_samples(self) -> int:
        """Continuations that are computed."""
        return self.best_of or self.n

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0
