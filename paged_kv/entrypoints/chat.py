"""A conversation, turn by turn. Knows messages and an `LLM`, never where lines come from.

What was said before is found in the prefix cache. What no longer fits is forgotten, oldest first;
the system's message stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..engine.sampling_params import SamplingParams
from ..errors import InvalidRequestError, PromptTooLongError

if TYPE_CHECKING:
    from .llm import LLM


class Conversation:
    """Messages so far, and answers to the next one."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None = None) -> None:
        if llm.tokenizer is None or llm.tokenizer.chat_template is None:
            raise InvalidRequestError("a chat needs a tokenizer with a chat template")
        self._llm, self._params = llm, params
        self._opening = [] if system is None else [message("system", system)]
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forget all but the system's message."""
        self.messages = list(self._opening)

    def answer(self, text: str) -> Iterator[str]:
        """The answer to a message, in pieces as they come; what has come counts as said.

        Raises `InvalidRequestError`, forgetting nothing, for a message that is too long by itself.
        """
        self.messages = self._fitted([*self.messages, message("user", text)])
        pieces: list[str] = []
        try:
            for event in self._llm.stream([list(self.messages)], self._params):
                if event.error is not None:
                    raise event.error
                pieces.append(event.text)
                yield event.text
        finally:  # also when nobody wants to hear the rest
            if pieces:
                self.messages.append(message("assistant", "".join(pieces)))
            else:
                self.messages.pop()

    def _fitted(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        """Without the oldest questions and answers, as far as that is needed."""
        first = len(self._opening)
        while not self._fits(messages) and len(messages) > first + 1:
            messages = messages[:first] + messages[first + 2 :]
        self._llm.check(messages, self._params)
        return messages

    def _fits(self, messages: list[dict[str, str]]) -> bool:
        """Whether messages leave room for an answer, in a window for what it still sees."""
        try:
            num_tokens = len(self._llm.check(messages, self._params))
        except PromptTooLongError:
            return False
        window = self._params.sink_window or self._llm.engine.intake.sink_window
        if window is not None:
            return num_tokens <= window.num_sink_tokens + window.window_size
        return num_tokens + (self._params.max_tokens or 1) <= self._llm.max_model_len


def message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}
