"""What completions and chats may ask for alike, and what it means to an engine.

Knows the fields of requests, never prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, Final, Literal

from pydantic import Field, model_validator

from ...blocks.sink_window import SinkWindow
from ...engine.sampling_params import SamplingParams
from ...engine.structured_output import StructuredOutput
from .json_body import unknown
from .output_form import ResponseFormat, StructuredOutputs, form_of
from .parameters import UNAPPLIED, Parameter
from .refusal import Refusal
from .strict_model import StrictModel

MAX_SAMPLES: Final = 128  # of one prompt, as OpenAI's
MAX_LOGPROBS: Final = 20
SEEDS: Final = 1 << 64
ALL_TOKENS: Final = -1  # of vLLM's top_k
# Whose name and meaning are the engine's own.
COPIED: Final = frozenset(field.name for field in fields(SamplingParams)) - {
    *("logit_bias", "logprobs", "logits_processors", "prompt_logprobs", "max_tokens"),
    *("seed", "sink_window", "structured_output", "top_k"),
}


class StreamOptions(StrictModel):
    include_usage: bool = False
    continuous_usage_stats: bool = False

    include_obfuscation: Literal[False] = False  # chunks are not padded


class WindowField(StrictModel):
    num_sink_tokens: int = SinkWindow.num_sink_tokens
    window_size: int = SinkWindow.window_size


class SamplingFields(StrictModel):
    """Fields of a request; `unapplied` are parameters that are known and change nothing."""

    unapplied: ClassVar[Mapping[str, Parameter]] = UNAPPLIED

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MAX_SAMPLES)
    best_of: int | None = Field(None, ge=1, le=MAX_SAMPLES)
    seed: int | None = Field(None, ge=-SEEDS // 2, lt=SEEDS)
    max_tokens: int | None = Field(None, ge=0)
    min_tokens: int | None = None
    stop: Any = None  # one or a list: the engine says what is wrong
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    top_h: float | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    logit_bias: dict[str, float] | None = None
    bad_words_ids: list[list[int]] | None = None
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: Any = None  # one or a list
    exponential_decay_length_penalty: Any = None  # a start and a factor
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    sink_window: WindowField | None = None
    adapter: str | None = None
    cache_salt: str | None = Field(None, min_length=1)
    priority: int = Field(0, ge=-(1 << 31), lt=1 << 31)
    return_token_ids: bool = False

    @model_validator(mode="before")
    @classmethod
    def _take_known(cls, values: Any) -> Any:
        """Without what changes nothing."""
        assert isinstance(values, dict)
        applied = {}
        for name, value in values.items():
            if name in cls.model_fields:
                if value is not None:
                    applied[name] = value
            elif name in cls.unapplied:
                cls.unapplied[name].check(value)
            else:
                raise unknown(name)
        return applied

    @model_validator(mode="after")
    def _check(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise Refusal("stream_options need stream: true", param="stream_options")
        if self.best_of is not None and self.best_of < self.n:
            raise Refusal(f"best_of {self.best_of} is less than n {self.n}", param="best_of")
        if self.stream and self.best_of not in (None, self.n):
            raise Refusal("best_of compares what is finished: no stream", param="best_of")
        return self

    def sampling_params(self, **chosen: Any) -> SamplingParams:
        """As the engine wants it; `chosen` are what a completion and a chat say in their own ways.

        Raises `ConfigError` for values out of their range.
        """
        names = COPIED & self.model_fields_set
        window = self.sink_window
        return SamplingParams(
            **{name: getattr(self, name) for name in names},
            logit_bias=bias_of(self.logit_bias or {}),
            top_k=0 if self.top_k == ALL_TOKENS else self.top_k,
            seed=None if self.seed is None else self.seed % SEEDS,
            structured_output=self.output_form,
            sink_window=None if window is None else SinkWindow(**window.model_dump()),
            **chosen,
        )

    @property
    def output_form(self) -> StructuredOutput | None:
        return form_of(self.response_format, self.structured_outputs)


def bias_of(given: Mapping[str, float]) -> dict[int, float]:
    """In JSON every key is text."""
    wrong = [key for key in given if not (key.isascii() and key.isdecimal() and len(key) < 20)]
    if wrong:
        raise Refusal(f"logit_bias: {wrong[0]!r:.40} is no token id", param="logit_bias")
    return {int(key): value for key, value in given.items()}
