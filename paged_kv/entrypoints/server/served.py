"""The model that is served: its names, its engine and its tokens' texts, for all endpoints.

Knows what requests call a model and what an engine makes of it, never HTTP.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any, Final, Protocol

from transformers import PreTrainedTokenizerBase

from ...blocks.sink_window import SinkWindow
from ...engine.sampling_params import SamplingParams
from ...engine.text import Prompt
from ..batch import naming_prompt
from ..llm import LLM
from .generation import Generation, RunningRequest
from .refusal import Refusal
from .sampling_fields import SamplingFields
from .settings import ServerSettings
from .token_texts import TokenTexts

DEFAULT_TEMPERATURE: Final = 1.0  # OpenAI's


class Observer(Protocol):
    """Who knows what the engine does; may be asked in any thread."""

    def statistics(self) -> dict[str, Any]:
        """Live figures as plain JSON."""

    def exposition(self) -> bytes:
        """Metrics, as Prometheus scrapes them."""


class ServedEngine(Protocol):
    """Who takes requests, as `AsyncLLM` does; it may speak for several."""

    @property
    def is_accepting(self) -> bool: ...

    @property
    def failure(self) -> str | None:
        """Why it will never take requests again, though nobody has closed it."""

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        priority: int,
        timeout: float | None,
        wait: bool,
    ) -> RunningRequest: ...


class ServedModel(Protocol):
    """What has to be known of a model to read requests to it."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None: ...

    @property
    def adapters(self) -> tuple[str, ...]: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def sink_window(self) -> SinkWindow | None: ...

    def completed(self, params: SamplingParams) -> SamplingParams:
        """With what the model says of options that a request leaves open."""

    def max_prompt_tokens(self, params: SamplingParams) -> int | None:
        """The longest prompt that leaves room for output; None where there is no limit."""


class ModelOfLLM:
    """The model of an `LLM` of this process."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._intake = llm.engine.intake
        self.tokenizer: Final = llm.tokenizer
        self.max_model_len: Final = llm.max_model_len
        self.sink_window: Final = self._intake.sink_window

    @property
    def adapters(self) -> tuple[str, ...]:
        return self._llm.adapters

    def completed(self, params: SamplingParams) -> SamplingParams:
        return self._intake.completed(params)

    def max_prompt_tokens(self, params: SamplingParams) -> int | None:
        return self._intake.max_prompt_tokens(params)


class Served:
    """One engine under the name of its model, and of each of its adapters."""

    def __init__(
        self,
        engine: ServedEngine,
        settings: ServerSettings,
        observer: Observer,
        model: ServedModel,
    ) -> None:
        self.engine = engine
        self.settings = settings
        self.observer = observer
        self.model = model
        self.token_texts: Final = TokenTexts(model.tokenizer)
        self.created: int = int(time.time())

    @property
    def names(self) -> list[str]:
        """What requests may call it: its own name, then its adapters'."""
        own = self.settings.model_name
        return [own, *(name for name in self.model.adapters if name != own)]

    def check_name(self, name: str | None) -> str:
        """The name that answers give; None is the model's own."""
        if name is None:
            return self.settings.model_name
        if name not in self.names:
            message = f"the model {name!r:.200} does not exist"
            raise Refusal(message, 404, code="model_not_found", param="model")
        return name

    def completed(self, params: SamplingParams, body: SamplingFields) -> SamplingParams:
        """With what the server decides: the adapter that a model's name means, and OpenAI's
        temperature where neither the request nor the model says one.
        """
        model = self.model
        if model.completed(params).temperature is None:
            params = replace(params, temperature=DEFAULT_TEMPERATURE)
        is_endless = params.max_tokens is None and (params.sink_window or model.sink_window)
        if is_endless and not body.stream:
            raise Refusal("a windowed request needs max_tokens or stream", param="max_tokens")
        name = self.check_name(body.model)
        if name == self.settings.model_name:
            return params
        if params.adapter not in (None, name):
            raise Refusal(
                f"adapter {params.adapter!r:.200} is not the model {name!r}", param="adapter"
            )
        return replace(params, adapter=name)

    @asynccontextmanager
    async def generation(
        self, prompts: Sequence[Prompt], params: SamplingParams, priority: int
    ) -> AsyncIterator[Generation]:
        """Requests of all prompts, which end with the block. Raises what the engine refuses."""
        most, least = self.settings.max_requests, self.settings.min_priority
        if len(prompts) * params.num_samples > most:
            message = f"{len(prompts)} prompts of {params.num_samples} samples are more than {most}"
            raise Refusal(f"{message} requests", param="prompt" if len(prompts) > 1 else "n")
        if priority < least:
            message = f"priority must be at least {least} on this server, got {priority}"
            raise Refusal(message, param="priority")
        async with AsyncExitStack() as stack:
            requests = []
            for index, prompt in enumerate(prompts):
                with naming_prompt(index, len(prompts)):
                    request = await self.engine.submit(
                        prompt,
                        params,
                        priority=priority,
                        timeout=self.settings.request_timeout,
                        wait=False,
                    )
                requests.append(await stack.enter_async_context(request))
            yield Generation(requests)
