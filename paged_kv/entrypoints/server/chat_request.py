"""The body of `POST /v1/chat/completions`. Knows its fields, never what comes back."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator
from transformers import PreTrainedTokenizerBase

from ...engine.sampling_params import SamplingParams
from ...engine.text import encode_chat
from .parameters import OF_CHATS, UNAPPLIED, Parameter
from .refusal import Refusal
from .sampling_fields import MAX_LOGPROBS, SamplingFields
from .strict_model import StrictModel

# What the functions that run a template take beside the template's own variables.
NO_TEMPLATE_VARIABLES: Final = frozenset(
    name
    for function in (PreTrainedTokenizerBase.apply_chat_template, encode_chat)
    for name in inspect.signature(function).parameters
) - {"documents"}


def joined_parts(content: Any) -> Any:
    """Text, or the texts of parts, a line each."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"a part of type {kind!r:.40} is not supported: parts are text")
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError('a part of type "text" has a "text" and nothing else')
    return "\n".join(part["text"] for part in content)


class Message(StrictModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(joined_parts)]
    name: str | None = None


class ChatFields(StrictModel):
    """What becomes a prompt by the model's chat template."""

    messages: list[Message] = Field(min_length=1)
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _check_variables(cls, given: dict[str, Any]) -> dict[str, Any]:
        wrong = sorted(NO_TEMPLATE_VARIABLES & given.keys())
        if wrong:
            raise ValueError(f"{wrong[0]} is no variable of a template")
        return given

    @property
    def template_options(self) -> dict[str, Any]:
        """The prompt of an answer follows the messages, unless the last of them goes on."""
        begins = self.add_generation_prompt
        return {
            "add_generation_prompt": not self.continue_final_message if begins is None else begins,
            "continue_final_message": self.continue_final_message,
            **(self.chat_template_kwargs or {}),
        }

    @property
    def plain_messages(self) -> list[dict[str, str]]:
        return [message.model_dump(exclude_none=True) for message in self.messages]


class ChatRequest(SamplingFields, ChatFields):
    unapplied: ClassVar[Mapping[str, Parameter]] = {**UNAPPLIED, **OF_CHATS}

    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="before")
    @classmethod
    def _take_tools(cls, values: Any) -> Any:
        """Tools that are not to be called."""
        if values.get("tool_choice") == "none":
            return {name: value for name, value in values.items() if name != "tools"}
        return values

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise Refusal("top_logprobs need logprobs: true", param="top_logprobs")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise Refusal(
                f"max_tokens {both[0]} and max_completion_tokens {both[1]} differ",
                param="max_completion_tokens",
            )
        return self

    def params(self) -> SamplingParams:
        most = self.max_tokens if self.max_tokens is not None else self.max_completion_tokens
        return self.sampling_params(
            max_tokens=most, logprobs=(self.top_logprobs or 0) if self.logprobs else None
        )
