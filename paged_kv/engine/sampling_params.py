"""How one request wants its tokens chosen and when it ends.

Knows values and their ranges, validated once; never a model, whose vocabulary and length they are
held to elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, cast

from ..blocks.sink_window import SinkWindow
from ..errors import ConfigError
from ..validation import MAX_COUNT, is_finite, is_flag, is_integer, is_list_of, require
from .structured_output import StructuredOutput

if TYPE_CHECKING:
    from torch import Tensor

    LogitsProcessor = Callable[[Tensor, Tensor], Tensor]

MAX_SAMPLES: Final = 1 << 16  # of one request
MAX_BIAS: Final = 1e4  # of a logit
MAX_LOGPROBS: Final = 1 << 10  # of one token
# Least and greatest value, and whether the least itself is excluded.
NUMBERS: Final[dict[str, tuple[float, float, bool]]] = {
    "temperature": (0.0, math.inf, False),
    "top_h": (0.0, 1.0, True),
    "top_p": (0.0, 1.0, True),
    "min_p": (0.0, 1.0, False),
    "typical_p": (0.0, 1.0, True),
    "epsilon_cutoff": (0.0, 1.0, False),
    "eta_cutoff": (0.0, 1.0, False),
    "repetition_penalty": (0.01, 100.0, False),
    "frequency_penalty": (-100.0, 100.0, False),
    "presence_penalty": (-100.0, 100.0, False),
}
COUNTS: Final[dict[str, tuple[int, float]]] = {
    "top_k": (0, math.inf),
    "seed": (0, (1 << 64) - 1),
    "no_repeat_ngram_size": (0, MAX_COUNT),
    "forced_bos_token_id": (0, MAX_COUNT),
    "max_tokens": (1, math.inf),
    "min_tokens": (0, math.inf),
    "n": (1, MAX_SAMPLES),
    "best_of": (1, MAX_SAMPLES),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
}
GIVEN: Final = ("frequency_penalty", "presence_penalty", "n", "stop_token_ids")  # never None
TOKEN_LISTS: Final = ("suppress_tokens", "begin_suppress_tokens", "stop_token_ids")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling and stopping of one request. What is None is as the model's generation config says,
    and where that is silent, switched off.

    `temperature` 0 is greedy. Then, in this order: `top_h` limits the entropy of what is kept,
    `top_k` keeps the k most likely tokens (0: all), `top_p` the smallest set of at least that
    probability, `min_p` tokens at least that fraction as likely as the likeliest, `typical_p` the
    most typical ones of that probability, `epsilon_cutoff` and `eta_cutoff` what is likelier than
    that. With a `seed`, the tokens depend on nothing but the logits, whatever else is in the batch.

    Before that, and for greedy requests too: `logit_bias` is added to tokens' logits; the
    `repetition_penalty` divides positive logits of all tokens so far and multiplies negative ones;
    `frequency_penalty` is subtracted for each time a token was generated, `presence_penalty` once;
    no n-gram of `no_repeat_ngram_size` tokens comes twice, and none of `bad_words_ids` at all;
    `suppress_tokens` never come, `begin_suppress_tokens` not as the first;
    `forced_bos_token_id` follows a prompt of one token, `forced_eos_token_id` is the last of
    `max_tokens`; `exponential_decay_length_penalty` (start, factor) favours the end. All mean what
    they mean to transformers' `generate`, the penalties of frequency and presence what they mean to
    OpenAI. `logits_processors` are called as transformers calls its own, with ids [1, num_tokens]
    and logits [1, vocab_size], so any `transformers.LogitsProcessor` serves. A `structured_output`
    leaves only tokens that its form allows.

    `max_tokens` None means as many as the model's length allows; for a windowed request, without
    end. `n` continuations are sampled independently, on shared blocks of the prompt; with `best_of`
    that many are, and the `n` of the highest mean log-probability are kept. Generation ends with
    the model's end-of-sequence token unless `ignore_eos`, with any of `stop_token_ids`, and before
    any of the `stop` strings; none of the three ends it before `min_tokens`. Special tokens have no
    text: stop at them with `stop_token_ids`. With `logprobs` each token comes with its
    log-probability by the model's own logits and with those of so many likeliest ones, with
    `prompt_logprobs` each token of the prompt, which then shares no cached blocks. Requests
    share cached blocks only with requests of the same `cache_salt`, and of the same `adapter`: the
    name of one of a peft model's adapters, "__base__" for none, or None for what is active in the
    model. With a `sink_window` the request is windowed: it may go on for ever in constant memory;
    None is the engine's own setting.
    """

    temperature: float | None = None
    top_h: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    repetition_penalty: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    no_repeat_ngram_size: int | None = None
    bad_words_ids: Sequence[Sequence[int]] | None = None
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | Sequence[int] | None = None
    exponential_decay_length_penalty: tuple[int, float] | None = None
    max_tokens: int | None = 128
    min_tokens: int | None = None
    n: int = 1
    best_of: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    cache_salt: str | None = None
    adapter: str | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logits_processors: Sequence[LogitsProcessor] = ()
    structured_output: StructuredOutput | None = None
    sink_window: SinkWindow | None = None

    def __post_init__(self) -> None:
        for name, (least, most, is_open) in NUMBERS.items():
            value = getattr(self, name)
            expected = number_range(least, most, is_open)
            is_none = value is None and name not in GIVEN
            require(name, value, is_none or is_in(value, least, most, is_open), expected)
        for name, (fewest, greatest) in COUNTS.items():
            value = getattr(self, name)
            is_none = value is None and name not in GIVEN
            require(name, value, is_none or is_integer(value), "None or an integer")
            is_valid = is_none or fewest <= value <= greatest
            is_open = greatest == math.inf
            expected = f"at least {fewest}" if is_open else f"from {fewest} to {greatest}"
            require(name, value, is_valid, expected if name in GIVEN else f"None or {expected}")
        for name in TOKEN_LISTS:
            value = getattr(self, name)
            is_none = value is None and name not in GIVEN
            require(name, value, is_none or is_tokens(value), "a list of token ids")
        self._check_rules()
        self._check_stops()

    def _check_rules(self) -> None:
        words, forced, decay = (
            self.bad_words_ids,
            self.forced_eos_token_id,
            self.exponential_decay_length_penalty,
        )
        is_words = words is None or is_list_of(words, lambda word: is_tokens(word) and bool(word))
        require("bad_words_ids", words, is_words, "a list of lists of token ids")
        is_token = forced is None or is_integer(forced) or (is_tokens(forced) and bool(forced))
        require("forced_eos_token_id", forced, is_token, "a token id or a list of them")
        is_pair = decay is None or (
            is_list_of(decay, is_finite) and len(decay) == 2 and is_integer(decay[0])
        )
        is_pair = is_pair and (decay is None or (decay[0] >= 0 and decay[1] > 0))
        expected = "None or a number of tokens and a factor above 0"
        require("exponential_decay_length_penalty", decay, is_pair, expected)
        bias = self.logit_bias
        is_bias = isinstance(bias, Mapping) and all(
            is_integer(token) and is_in(value, -MAX_BIAS, MAX_BIAS, is_open=False)
            for token, value in bias.items()
        )
        expected = f"numbers from -{MAX_BIAS:g} to {MAX_BIAS:g} by token id"
        require("logit_bias", bias, is_bias, expected)
        is_functions = is_list_of(self.logits_processors, callable)
        require("logits_processors", self.logits_processors, is_functions, "a list of functions")
        is_enough = self.best_of is None or self.n <= self.best_of
        expected = f"None or at least n ({self.n}) and at most {MAX_SAMPLES}"
        require("best_of", self.best_of, is_enough, expected)

    def _check_stops(self) -> None:
        is_text = self.stop is None or isinstance(self.stop, str)
        is_text = is_text or is_list_of(self.stop, lambda s: isinstance(s, str))
        require("stop", self.stop, is_text, "a string or a list of strings")
        require("stop", self.stop, all(self.stop_strings), "strings that are not empty")
        require("ignore_eos", self.ignore_eos, is_flag(self.ignore_eos), "True or False")
        for name in ("cache_salt", "adapter"):
            value = getattr(self, name)
            require(name, value, value is None or isinstance(value, str), "None or a string")
        form = self.structured_output
        is_form = form is None or isinstance(form, StructuredOutput)
        require("structured_output", form, is_form, "None or a StructuredOutput")
        if form is not None and self.ignore_eos:
            raise ConfigError("structured_output ends with the end token: ignore_eos cannot be")
        is_window = self.sink_window is None or isinstance(self.sink_window, SinkWindow)
        require("sink_window", self.sink_window, is_window, "None or a SinkWindow")

    def completed(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """With what a model's generation config says of the fields that are None."""
        missing = {name: v for name, v in defaults.items() if getattr(self, name) is None}
        return replace(self, **missing) if missing else self

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def num_samples(self) -> int:
        """Continuations that are computed."""
        return self.best_of or self.n

    @property
    def is_greedy(self) -> bool:
        return not self.temperature

    @property
    def least_tokens(self) -> int:
        """`min_tokens`, which nothing ends the request before."""
        return self.min_tokens or 0

    @property
    def limits(self) -> tuple[int, float, float]:
        """`top_k` (0: all), `top_p` and `min_p` as numbers."""
        return self.top_k or 0, 1.0 if self.top_p is None else self.top_p, self.min_p or 0.0

    @property
    def is_scored(self) -> bool:
        """Whether the log-probabilities of its tokens are wanted."""
        return self.best_of is not None or self.logprobs is not None


def is_tokens(value: object) -> bool:
    return is_list_of(value, is_integer)


def is_in(value: object, least: float, most: float, is_open: bool) -> bool:
    """Whether a value is a finite number of a range, whose lower end is excluded if it is open."""
    if not is_finite(value):
        return False
    number = float(cast(float, value))
    return least <= number <= most and not (is_open and number == least)


def number_range(least: float, most: float, is_open: bool) -> str:
    if most == math.inf:
        return f"a finite number {'above' if is_open else 'of at least'} {least:g}"
    return f"a number in {'(' if is_open else '['}{least:g}, {most:g}]"
