"""Text to token ids and back. Knows a tokenizer, never a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from .errors import InvalidRequestError

ChatMessages: TypeAlias = Sequence[Mapping[str, Any]]
Prompt: TypeAlias = str | Sequence[int] | ChatMessages
# What the decoder needs to see of the prompt to know whether the first word needs a space.
PROMPT_CONTEXT_TOKENS = 8


def encode_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Token ids of a prompt: text, token ids as they are, or chat messages by their template."""
    if not isinstance(prompt, str) and all(isinstance(item, int) for item in prompt):
        return [int(token_id) for token_id in prompt]  # type: ignore[arg-type]
    if tokenizer is None:
        raise InvalidRequestError("without a tokenizer a prompt must be token ids")
    if isinstance(prompt, str):
        if not prompt:
            raise InvalidRequestError("the prompt is empty")
        return list(tokenizer.encode(prompt))
    if not all(isinstance(item, Mapping) for item in prompt):
        raise InvalidRequestError(
            f"a prompt must be text, token ids or chat messages, got {prompt!r}"
        )
    if tokenizer.chat_template is None:
        raise InvalidRequestError("chat messages need a tokenizer with a chat template")
    rendered = tokenizer.apply_chat_template(
        cast("list[dict[str, str]]", list(prompt)), add_generation_prompt=True, tokenize=False
    )
    return list(tokenizer.encode(rendered, add_special_tokens=False))


class Detokenizer:
    """Turns one sequence's new tokens into text as they come, and finds stop strings in it."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        prompt_token_ids: Sequence[int],
        stop_strings: Sequence[str],
    ) -> None:
        self._backend = None if tokenizer is None else tokenizer.backend_tokenizer
        self._stream = DecodeStream(
            ids=list(prompt_token_ids[-PROMPT_CONTEXT_TOKENS:]), skip_special_tokens=True
        )
        self._undecoded: list[int] = []  # tokens of a character that is not complete
        self._stop_strings = stop_strings
        self._held_back = max((len(stop) - 1 for stop in stop_strings), default=0)
        self._num_emitted = 0
        self.text = ""

    def append(self, token_id: int, may_stop: bool) -> bool:
        """Add a token; True when a stop string came with it. The text then ends before it."""
        if self._backend is None:
            return False
        self._undecoded.append(token_id)
        piece = self._stream.step(self._backend, token_id)
        if piece is None:
            return False
        self._undecoded.clear()
        searched_from = max(len(self.text) - self._held_back, 0)
        self.text += piece
        if not may_stop:
            return False
        found = [self.text.find(stop, searched_from) for stop in self._stop_strings]
        positions = [position for position in found if position >= 0]
        if positions:
            self.text = self.text[: min(positions)]
        return bool(positions)

    def finish(self) -> None:
        """No token follows: an incomplete character becomes a replacement character."""
        if self._undecoded and self._backend is not None:
            self.text += self._backend.decode(self._undecoded, skip_special_tokens=True)
            self._undecoded.clear()

    def take_new_text(self, is_final: bool) -> str:
        """Text not yet taken, less what may turn out to be the start of a stop string."""
        end = len(self.text) if is_final else max(len(self.text) - self._held_back, 0)
        start, self._num_emitted = self._num_emitted, max(end, self._num_emitted)
        return self.text[start : self._num_emitted]
