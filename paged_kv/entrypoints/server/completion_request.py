"""The body of `POST /v1/completions`. Knows its fields, never what comes back."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, TypeAlias

from pydantic import Field, PlainValidator, model_validator

from ...engine.sampling_params import SamplingParams
from .parameters import OF_COMPLETIONS, UNAPPLIED, Parameter
from .refusal import Refusal
from .sampling_fields import MAX_LOGPROBS, SamplingFields

DEFAULT_MAX_TOKENS: Final = 16  # OpenAI's
OnePrompt: TypeAlias = str | list[int]


def as_prompts(given: Any) -> list[OnePrompt]:
    """Text, token ids, or a list of these; ids are no bool and no float."""
    if given in ("", []):
        raise Refusal("prompt is empty", param="prompt")
    prompts = [given] if is_prompt(given) else given
    if not isinstance(prompts, list) or not prompts or not all(map(is_prompt, prompts)):
        raise Refusal(
            f"prompt must be text, token ids or a list of these, got {reprlib.repr(given)}",
            param="prompt",
        )
    return prompts


def is_prompt(value: object) -> bool:
    if isinstance(value, str):
        return bool(value)
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


class CompletionRequest(SamplingFields):
    """With `echo` an answer begins with its prompt, and `max_tokens` 0 asks for nothing else."""

    unapplied: ClassVar[Mapping[str, Parameter]] = {**UNAPPLIED, **OF_COMPLETIONS}

    prompt: Annotated[list[OnePrompt], PlainValidator(as_prompts)]
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _check_length(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise Refusal("max_tokens 0 needs echo: true", param="max_tokens")
        return self

    @property
    def is_echo_alone(self) -> bool:
        return self.max_tokens == 0

    def params(self) -> SamplingParams:
        most = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        return self.sampling_params(
            max_tokens=max(most, 1),  # the engine always gives one: an echo alone drops it
            logprobs=self.logprobs,
            prompt_logprobs=self.logprobs if self.echo else None,
        )
