"""What tests of an LLM over a small model share: requests, texts, and that nothing is held."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from paged_kv import LLM, SamplingParams
from paged_kv.entrypoints.outputs import Completion, RequestOutput, StreamEvent

MODEL_LEN = 512

NUM_NEW_TOKENS = 30

FORMATS = ("native", "int8", "int4", "int2")

CHAT_TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"

every_format = pytest.mark.parametrize("kv_format", [*FORMATS, "int2,0=native"])

MakeLLM = Callable[..., LLM]


def model_tokens(
    model: LlamaForCausalLM, prompt: list[int], count: int = NUM_NEW_TOKENS, **options: Any
) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, **options
    )
    return output[0, len(prompt) :].tolist()


def params_of(**options: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": NUM_NEW_TOKENS, **options})


def sampling(**options: Any) -> SamplingParams:
    return params_of(**{"temperature": 1.5, "seed": 7, **options})


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


def text_after(tokenizer: PreTrainedTokenizerFast, prompt: list[int], tokens: list[int]) -> str:
    """What the tokens add to the text of the prompt; the prompt must end in a whole character."""
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    after = tokenizer.decode(prompt + tokens, skip_special_tokens=True)
    assert after.startswith(before)
    return after[len(before) :]


def assert_nothing_is_held(llm: LLM) -> None:
    engine = llm.engine
    engine.scheduler.check_integrity()
    assert not engine.has_unfinished
    assert not engine._live
    assert not llm.requests
    assert engine.manager.num_free_blocks == engine.manager.num_blocks
    stats = llm.memory_stats()
    assert stats.free == stats.total
    assert stats.used == stats.wasted == stats.allocated == 0


def assemble(events: Iterator[StreamEvent], count: int) -> list[Completion]:
    """The completions of `count` prompts with one sample each, put together from their events."""
    completions = [Completion() for _ in range(count)]
    for event in events:
        completion = completions[event.prompt_index]
        assert completion.finish_reason is None, "an event after the end"
        completion.text += event.text
        if event.token_id is not None:
            completion.token_ids.append(event.token_id)
        completion.finish_reason = event.finish_reason
        completion.error = event.error
    return completions


def raise_once(function: Callable[..., Any], call: int, error: BaseException) -> Callable[..., Any]:
    """The function, whose `call`-th call raises instead."""
    numbers = itertools.count(1)

    def wrapper(*args: Any, **options: Any) -> Any:
        if next(numbers) == call:
            raise error
        return function(*args, **options)

    return wrapper
