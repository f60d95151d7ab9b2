"""Text to token ids and back. Knows a tokenizer, never a model or a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import InvalidRequestError, PromptTooLongError
from ..validation import is_integer
from .handover import PrefilledPrompt
from .text_length import least_tokens

ChatMessages: TypeAlias = Sequence[Mapping[str, Any]]
# Also {"prompt": text} and {"prompt_token_ids": ids}; ids may be an array with one dimension.
Prompt: TypeAlias = (
    str | Sequence[int] | ChatMessages | Mapping[str, Any] | NDArray[Any] | Tensor | PrefilledPrompt
)
PROMPT_KEYS: Final = ("prompt", "prompt_token_ids")
# What the decoder needs to see of the prompt to know whether the first word needs a space.
PROMPT_CONTEXT_TOKENS: Final = 8
MAX_SHOWN: Final = 200  # characters of a wrong prompt
LIKELY_LENGTH: Final = 16  # characters of a token that most texts stay below by far
# More tokens than a character has bytes: what is still broken then stays broken.
MAX_INCOMPLETE_TOKENS: Final = 8
MAX_KEPT_CHARACTERS: Final = 1 << 16  # of text that was taken
REPLACEMENT: Final = "\ufffd"


def encode_prompt(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase | None, max_tokens: int | None = None
) -> list[int]:
    """Token ids of a prompt: text, token ids as they are, or chat messages by their template.

    Text that begins with the token that the tokenizer would put before it gets no second one.
    Raises `InvalidRequestError` for what is none of these. What is certain to be more than
    `max_tokens` is refused by its length, before it is looked at.
    """
    if isinstance(prompt, PrefilledPrompt):
        require_fit(len(prompt.prompt_token_ids), max_tokens)
        return list(prompt.prompt_token_ids)
    prompt = unpacked(prompt)
    if isinstance(prompt, (bytes, bytearray)) or not isinstance(prompt, Sequence):
        raise wrong_type(prompt)
    if not prompt:
        raise InvalidRequestError("the prompt is empty")
    if not isinstance(prompt, str) and is_integer(prompt[0]):
        require_fit(len(prompt), max_tokens)
    if not isinstance(prompt, str) and all(map(is_integer, prompt)):
        return [int(cast(int, token_id)) for token_id in prompt]
    if not isinstance(prompt, str) and not all(isinstance(item, Mapping) for item in prompt):
        raise wrong_type(prompt)
    if tokenizer is None:
        raise InvalidRequestError("without a tokenizer a prompt must be token ids")
    if isinstance(prompt, str):
        return encode_text(prompt, tokenizer, max_tokens)
    return encode_chat(cast(ChatMessages, prompt), tokenizer, max_tokens)


def encode_chat(
    messages: ChatMessages,
    tokenizer: PreTrainedTokenizerBase | None,
    max_tokens: int | None,
    *,
    add_special_tokens: bool = False,
    **template_options: Any,
) -> list[int]:
    """Token ids of chat messages by their template, which `template_options` are for.

    A prompt for an answer follows them unless `add_generation_prompt` is False.
    """
    if tokenizer is None or tokenizer.chat_template is None:
        raise InvalidRequestError("chat messages need a tokenizer with a chat template")
    options = {"add_generation_prompt": True, **template_options}
    try:
        rendered = tokenizer.apply_chat_template(
            cast("list[dict[str, str]]", list(messages)), tokenize=False, **options
        )
    except Exception as error:  # a template is a program of the model's: it may raise anything
        raise InvalidRequestError(f"the chat template refuses the messages: {error}") from error
    return encode_text(str(rendered), tokenizer, max_tokens, add_special_tokens=add_special_tokens)


def unpacked(prompt: Prompt) -> Prompt:
    """A prompt without the dict or the array that it came in."""
    if isinstance(prompt, Mapping):
        keys = [key for key in PROMPT_KEYS if key in prompt]
        if len(keys) != 1 or len(prompt) != 1:
            raise wrong_type(prompt)
        inner = prompt[keys[0]]
        if isinstance(inner, Mapping) or isinstance(inner, str) != (keys[0] == "prompt"):
            raise wrong_type(prompt)
        prompt = inner
    if isinstance(prompt, (np.ndarray, Tensor)):
        numbers = prompt.tolist()
        if prompt.ndim != 1 or not all(map(is_integer, numbers)):
            raise wrong_type(prompt)
        return cast("list[int]", numbers)
    return prompt


def is_message(value: object) -> bool:
    """Whether it is one message of a chat, not a prompt in a dict."""
    return isinstance(value, Mapping) and not any(key in value for key in PROMPT_KEYS)


def encode_text(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None,
    *,
    add_special_tokens: bool = True,
) -> list[int]:
    """Raises `InvalidRequestError` for text that is certain to be too long, or cannot be read."""
    if max_tokens is not None and len(text) > LIKELY_LENGTH * max_tokens:
        require_fit(least_tokens(len(text), tokenizer), max_tokens)
    try:
        text.encode()  # a lone surrogate is no text
        token_ids = list(tokenizer.encode(text, add_special_tokens=add_special_tokens))
    except Exception as error:  # what tokenizers raise has no common base
        raise InvalidRequestError(f"the tokenizer refuses the prompt: {error}") from error
    begin = tokenizer.bos_token_id  # which a rendered template already has
    is_doubled = begin is not None and token_ids[:2] == [begin, begin]
    is_doubled = is_doubled and text.startswith(str(tokenizer.bos_token))
    if is_doubled and not text.startswith(str(tokenizer.bos_token) * 2):
        del token_ids[0]
    return token_ids


def require_fit(least: int, max_tokens: int | None) -> None:
    if max_tokens is not None and least > max_tokens:
        raise PromptTooLongError(
            f"a prompt of {least} or more tokens leaves no room for output within the model "
            f"length of {max_tokens + 1}"
        )


def wrong_type(prompt: object) -> InvalidRequestError:
    return InvalidRequestError(
        "a prompt must be text, token ids, chat messages or a dict of prompt or prompt_token_ids, "
        f"got {repr(prompt)[:MAX_SHOWN]}"
    )


class Detokenizer:
    """Turns one sequence's new tokens into text as they come, and finds stop strings in it.

    What a token adds is the text of the newest tokens with it, less their text without it: what
    comes before a token decides whether its word needs a space, and several tokens may share a
    character. (`tokenizers.DecodeStream` raises on byte tokens that are not UTF-8.)
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        prompt_token_ids: Sequence[int],
        stop_strings: Sequence[str],
    ) -> None:
        self._backend = None if tokenizer is None else tokenizer.backend_tokenizer
        self._context = list(prompt_token_ids[-PROMPT_CONTEXT_TOKENS:])
        self._context_text = self._decode(self._context)
        self._undecoded: list[int] = []  # tokens of a character that is not complete
        self._stop_strings = stop_strings
        self._held_back = max((len(stop) - 1 for stop in stop_strings), default=0)
        self._num_emitted = 0
        self.text: str = ""  # of a long one only the end: a windowed request may go on for ever

    def append(self, token_id: int, may_stop: bool) -> bool:
        """Add a token; True when a stop string came with it. The text then ends before it."""
        if self._backend is None:
            return False
        self._undecoded = [*self._undecoded, token_id]  # copies of this object keep theirs
        decoded = self._decode(self._context + self._undecoded)
        is_incomplete = decoded.endswith(REPLACEMENT) or len(decoded) <= len(self._context_text)
        if is_incomplete and len(self._undecoded) < MAX_INCOMPLETE_TOKENS:
            return False
        length_before = len(self.text)
        self._take(decoded)
        return may_stop and self._cut_at_stop_string(length_before)

    def _cut_at_stop_string(self, length_before: int) -> bool:
        """End the text before the first stop string that reaches into its new part."""
        found = [
            self.text.find(stop, max(length_before - len(stop) + 1, 0))
            for stop in self._stop_strings
        ]
        positions = [position for position in found if position >= 0]
        if positions:
            self.text = self.text[: min(positions)]
        return bool(positions)

    def _decode(self, token_ids: Sequence[int]) -> str:
        if self._backend is None:
            return ""
        return str(self._backend.decode(token_ids, skip_special_tokens=True))

    def _take(self, decoded: str) -> None:
        """Move the undecoded tokens, whose text with the context is `decoded`, to the context."""
        if decoded.startswith(self._context_text) or self._context_text.endswith(REPLACEMENT):
            self.text += decoded[len(self._context_text) :]
        else:
            self.text += self._decode(self._undecoded)
        self._context, self._undecoded = self._undecoded, []
        self._context_text = self._decode(self._context)

    def finish(self) -> None:
        """No token follows: an incomplete character becomes a replacement character."""
        if self._undecoded:
            self._take(self._decode(self._context + self._undecoded))

    def take_new_text(self, is_final: bool) -> str:
        """Text not yet taken, less what may turn out to be the start of a stop string."""
        end = len(self.text) if is_final else max(len(self.text) - self._held_back, 0)
        start, self._num_emitted = self._num_emitted, max(end, self._num_emitted)
        new_text = self.text[start : self._num_emitted]
        num_done = self._num_emitted - self._held_back
        if num_done > MAX_KEPT_CHARACTERS:
            self.text, self._num_emitted = self.text[num_done:], self._held_back
        return new_text
