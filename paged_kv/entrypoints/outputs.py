"""What comes back from requests: events token by token, and outputs put together from them.

Knows tokens, texts and how samples compare; never an engine or where the events come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..engine.sampling_params import SamplingParams
from ..engine.text import Prompt
from ..engine.token_logprob import TokenLogprob
from ..errors import PagedKVError


@dataclass(kw_only=True)
class Completion:
    """One continuation. `finish_reason`: "stop", "length", "error", or "abort" by somebody else."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    log_probability: float | None = None  # of all its tokens, where wanted; a beam's score
    logprobs: list[TokenLogprob] | None = None  # of each of its tokens, with `logprobs`
    error: PagedKVError | None = None


@dataclass(kw_only=True)
class RequestOutput:
    """A prompt and its `n` continuations."""

    prompt: Prompt
    prompt_token_ids: list[int]
    completions: list[Completion]
    # Of each token of the prompt, with `prompt_logprobs`; None for the first.
    prompt_logprobs: list[TokenLogprob | None] | None = None

    @property
    def text(self) -> str:
        """The first continuation's text."""
        return self.completions[0].text

    @property
    def token_ids(self) -> list[int]:
        """The first continuation's tokens."""
        return self.completions[0].token_ids


@dataclass(frozen=True, kw_only=True)
class StreamEvent:
    """A new token of one continuation: of prompt `prompt_index`, sample `sample_index`."""

    prompt_index: int
    sample_index: int
    token_id: int | None
    text: str
    finish_reason: str | None
    log_probability: float | None
    likeliest: Sequence[tuple[int, float]]  # token ids and log-probabilities, with `logprobs`
    prompt_logprobs: Sequence[TokenLogprob | None]  # with the first token, where wanted
    error: PagedKVError | None


class OutputAssembler:
    """Puts the events of many requests together: `outputs[prompt_index]` grows as they come."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        token_ids: Sequence[list[int]],
        params: Sequence[SamplingParams],
    ) -> None:
        self._params = params
        self._num_unfinished = [p.num_samples for p in params]
        self.outputs: list[RequestOutput] = [
            RequestOutput(
                prompt=prompt,
                prompt_token_ids=ids,
                completions=[
                    Completion(logprobs=None if p.logprobs is None else [])
                    for _ in range(p.num_samples)
                ],
            )
            for prompt, ids, p in zip(prompts, token_ids, params, strict=True)
        ]

    def add(self, event: StreamEvent) -> RequestOutput | None:
        """Take one event; the request's output, if this event ends the last of its samples.

        With `best_of` that output holds the `n` best samples, or all of them if one failed.
        """
        output = self.outputs[event.prompt_index]
        completion = output.completions[event.sample_index]
        completion.text += event.text
        if event.token_id is not None:
            completion.token_ids.append(event.token_id)
        if event.prompt_logprobs and event.sample_index == 0:
            output.prompt_logprobs = list(event.prompt_logprobs)
        completion.finish_reason = event.finish_reason
        completion.error = event.error
        if event.log_probability is not None:
            completion.log_probability = (completion.log_probability or 0.0) + event.log_probability
            if completion.logprobs is not None and event.token_id is not None:
                completion.logprobs.append(
                    TokenLogprob(event.token_id, event.log_probability, event.likeliest)
                )
        if event.finish_reason is None:
            return None
        self._num_unfinished[event.prompt_index] -= 1
        if self._num_unfinished[event.prompt_index] > 0:
            return None
        keep_best(output, self._params[event.prompt_index])
        return output


def keep_best(output: RequestOutput, params: SamplingParams) -> None:
    """With `best_of`, leave the `n` likeliest samples, best first; all of them if one failed."""
    if params.best_of is None or any(c.error for c in output.completions):
        return
    output.completions.sort(key=mean_log_probability, reverse=True)
    del output.completions[params.n :]


def mean_log_probability(completion: Completion) -> float:
    return (completion.log_probability or 0.0) / max(len(completion.token_ids), 1)
