"""Tokens to text: detokenization and stop strings. Knows a tokenizer, never an engine or a model.

A `TextOutput` reads what a `LiveRequest` was given, whenever it is asked to; what an exception cut
off is read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError, InvalidRequestError, PagedKVError
from .live_request import LiveRequest
from .sampling_params import SamplingParams
from .text import Detokenizer
from .token_logprob import TokenLogprob


class TextUpdate(NamedTuple):
    """A token with the text that became known by it, or the end of a request without one."""

    token_id: int | None
    text: str
    finish_reason: str | None
    log_probability: float | None
    likeliest: Sequence[tuple[int, float]]  # tokens in its place, with `logprobs`
    prompt_logprobs: Sequence[TokenLogprob | None]  # with the first token, where wanted
    error: PagedKVError | None


class _Reading(NamedTuple):
    """How far an output was read. Replaced as a whole: there is nothing between two of them."""

    detokenizer: Detokenizer
    num_tokens: int  # that were read
    is_over: bool
    updates: tuple[TextUpdate, ...]  # those that may not have been taken ...
    first: int  # ... and how many came before them


class TextOutput:
    """The text of one request as its tokens come: one thread catches up, another may take."""

    def __init__(self, live: LiveRequest, detokenizer: Detokenizer) -> None:
        self.live = live
        self.is_paused = False  # until what waits was taken
        self._num_taken = 0
        self._reading = _Reading(detokenizer, 0, is_over=False, updates=(), first=0)

    @property
    def num_waiting(self) -> int:
        """Updates that nobody has taken."""
        reading = self._reading
        return reading.first + len(reading.updates) - self._num_taken

    @property
    def is_over(self) -> bool:
        """Whether its last update is known."""
        return self._reading.is_over

    @property
    def newest(self) -> TextUpdate | None:
        """The update that was read last, unless it was taken before the last `catch_up`."""
        updates = self._reading.updates
        return updates[-1] if updates else None

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string or a tokenizer that fails has ended what the engine has not."""
        return self._reading.is_over and self.live.finish_reason is None

    def take(self) -> TextUpdate | None:
        """The oldest update that nobody has taken, if there is one."""
        reading = self._reading
        index = self._num_taken - reading.first
        if index == len(reading.updates):
            return None
        self._num_taken += 1
        return reading.updates[index]

    def pass_over(self) -> None:
        """Read what it has been given so far, of which nobody waits for updates but for an end."""
        self.catch_up()
        reading = self._reading
        self._num_taken = reading.first + len(reading.updates) - reading.is_over

    def catch_up(self) -> None:
        """Read the tokens that have come, up to the end of the request or a stop string."""
        reading, live = self._reading, self.live
        if reading.is_over:
            return
        first = self._num_taken
        detokenizer, updates = (
            copy(reading.detokenizer),
            list(reading.updates[first - reading.first :]),
        )
        num_read, is_over = reading.num_tokens, False
        while num_read < len(live.token_ids) and not is_over:
            updates.append(self._read(detokenizer, num_read))
            num_read += 1
            is_over = updates[-1].finish_reason is not None
        if not is_over and live.finish_reason is not None:  # for which no token stands
            detokenizer.finish()
            text = detokenizer.take_new_text(is_final=True)
            updates.append(TextUpdate(None, text, live.finish_reason, None, (), (), live.error))
            is_over = True
        self._reading = _Reading(detokenizer, num_read, is_over, tuple(updates), first)

    def _read(self, detokenizer: Detokenizer, index: int) -> TextUpdate:
        """One token. A stop string ends the request with it, but not before `min_tokens`."""
        live = self.live
        token_id, finish_reason, error, text = live.token_ids[index], None, None, ""
        if index + 1 == len(live.token_ids) and live.finish_reason in ("stop", "length"):
            finish_reason = live.finish_reason
        try:
            may_stop = index + 1 >= live.params.least_tokens
            is_end = finish_reason == "stop"  # an end token has no text
            if not is_end and detokenizer.append(token_id, may_stop):
                finish_reason = "stop"
            if finish_reason is not None:
                detokenizer.finish()
            text = detokenizer.take_new_text(is_final=finish_reason is not None)
        except MemoryError:
            raise  # nobody's fault: it is read again
        except Exception as failure:  # the tokenizer's code: it ends this request alone
            error = PagedKVError(f"the tokenizer fails on token {token_id}: {failure!r}")
            error.__cause__ = failure
            finish_reason = "error"
        log_probability = live.log_probabilities[index] if live.log_probabilities else None
        likeliest = live.likeliest[index] if live.likeliest else ()
        looked_at = live.prompt_logprobs if index == 0 else ()
        return TextUpdate(
            token_id, text, finish_reason, log_probability, likeliest, looked_at, error
        )


class OutputProcessor:
    """Makes text of tokens. Without a tokenizer there is none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        if tokenizer is not None and not hasattr(tokenizer, "backend_tokenizer"):
            raise ConfigError(
                f"{type(tokenizer).__name__} cannot decode token by token; a fast tokenizer can"
            )
        self.tokenizer = tokenizer

    def check(self, params: SamplingParams) -> None:
        """Raise `InvalidRequestError` for what cannot be done with this tokenizer."""
        if params.stop_strings and self.tokenizer is None:
            raise InvalidRequestError("stop strings need a tokenizer")

    def follow(
        self, live: LiveRequest, prompt_token_ids: Sequence[int], *, goes_on: bool = False
    ) -> TextOutput:
        """The text of a request, from its first token on; of one that `goes_on`, from its next."""
        stop_strings = live.params.stop_strings
        text = TextOutput(live, Detokenizer(self.tokenizer, prompt_token_ids, stop_strings))
        if goes_on:
            text.pass_over()
        return text

    def text_of(self, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> str:
        """The whole text of tokens that follow a prompt."""
        detokenizer = Detokenizer(self.tokenizer, prompt_token_ids, ())
        for token_id in token_ids:
            detokenizer.append(token_id, may_stop=False)
        detokenizer.finish()
        return detokenizer.text
