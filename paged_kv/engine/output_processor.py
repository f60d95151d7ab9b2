"""Tokens to text: detokenization and stop strings. Knows a tokenizer, never an engine or a model.

Whoever steps an engine shows every update to an `OutputProcessor`, and ends a request there that a
stop string has ended here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ..errors import InvalidRequestError, PagedKVError
from .engine import SequenceUpdate
from .sampling_params import SamplingParams
from .text import Detokenizer


class TextUpdate(NamedTuple):
    """A `SequenceUpdate` with the text that became known by it."""

    request_id: str
    token_id: int | None
    text: str
    finish_reason: str | None
    log_probability: float | None
    error: PagedKVError | None


@dataclass(eq=False)
class TextState:
    """The text of a request so far."""

    detokenizer: Detokenizer
    min_tokens: int
    num_tokens: int = 0


class OutputProcessor:
    """The texts of all requests that are not over. Without a tokenizer there is no text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.tokenizer = tokenizer
        self._states: dict[str, TextState] = {}

    def __len__(self) -> int:
        return len(self._states)

    def check(self, params: SamplingParams) -> None:
        """Raise `InvalidRequestError` for what cannot be done with this tokenizer."""
        if params.stop_strings and self.tokenizer is None:
            raise InvalidRequestError("stop strings need a tokenizer")

    def add_request(
        self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams
    ) -> None:
        """Follow a request from its first token on."""
        self._states[request_id] = TextState(
            Detokenizer(self.tokenizer, prompt_token_ids, params.stop_strings), params.min_tokens
        )

    def drop_request(self, request_id: str) -> None:
        """Forget a request that was aborted, if it is known."""
        self._states.pop(request_id, None)

    def process(self, update: SequenceUpdate) -> TextUpdate:
        """The update as text. A stop string ends the request: its `finish_reason` is "stop" then.

        No stop string ends it before `min_tokens`.
        """
        state = self._states[update.request_id]
        detokenizer, finish_reason = state.detokenizer, update.finish_reason
        if update.token_id is not None:
            state.num_tokens += 1
            may_stop = state.num_tokens >= state.min_tokens
            is_end = finish_reason == "stop"  # an end token has no text
            if not is_end and detokenizer.append(update.token_id, may_stop):
                finish_reason = "stop"
        if finish_reason is not None:
            detokenizer.finish()
            del self._states[update.request_id]
        return TextUpdate(
            request_id=update.request_id,
            token_id=update.token_id,
            text=detokenizer.take_new_text(is_final=finish_reason is not None),
            finish_reason=finish_reason,
            log_probability=update.log_probability,
            error=update.error,
        )

    def text_of(self, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> str:
        """The whole text of tokens that follow a prompt."""
        detokenizer = Detokenizer(self.tokenizer, prompt_token_ids, ())
        for token_id in token_ids:
            detokenizer.append(token_id, may_stop=False)
        detokenizer.finish()
        return detokenizer.text
