"""What users give to one call: one prompt or many, one set of parameters or one for each.

Knows the forms that they come in, never what they mean to a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch

from ..engine.handover import PrefilledPrompt
from ..engine.sampling_params import SamplingParams
from ..engine.text import ChatMessages, Prompt, is_message
from ..errors import ConfigError, InvalidRequestError
from ..validation import is_integer, is_list_of


@contextmanager
def naming_prompt(index: int, num_prompts: int) -> Iterator[None]:
    """Let refusals of one of several prompts say which it is."""
    try:
        yield
    except InvalidRequestError as error:
        if num_prompts == 1:
            raise
        raise type(error)(f"prompt {index}: {error}") from error


def as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many, as a list: text, token ids and chat messages are each one prompt.

    Of an array with two dimensions each row is one.
    """
    if isinstance(prompts, (np.ndarray, torch.Tensor)) and prompts.ndim == 2:
        prompts = list(prompts)
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence):
        return [cast(Prompt, prompts)]
    if not prompts:
        raise InvalidRequestError("no prompts given")
    if is_integer(prompts[0]) or is_message(prompts[0]):
        return [cast("Sequence[int] | ChatMessages", prompts)]
    return list(cast("Sequence[Prompt]", prompts))


def handovers_of(prompts: Sequence[Prompt]) -> list[PrefilledPrompt | None]:
    """Of each prompt what was computed of it elsewhere."""
    return [prompt if isinstance(prompt, PrefilledPrompt) else None for prompt in prompts]


def as_params(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    """Sampling parameters for each of `count` prompts."""
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    if not is_list_of(params, lambda p: isinstance(p, SamplingParams)):
        raise ConfigError(f"params must be SamplingParams, got {params!r}")
    if len(params) != count:
        raise ConfigError(f"{count} prompts, but {len(params)} sampling parameters")
    return list(params)
