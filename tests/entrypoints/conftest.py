"""A small model of bytes, its tokenizer, and LLMs over it that are closed at the end."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from paged_kv import LLM
from tests.support.small_llm import (
    CHAT_TEMPLATE,
    MODEL_LEN,
    MakeLLM,
    assert_nothing_is_held,
    model_tokens,
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Token i is byte i, then <s> and </s>."""
    vocab = {letter: byte for byte, letter in bytes_to_unicode().items()}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def pristine_model(tokenizer) -> LlamaForCausalLM:
    """Never attached to an LLM: the reference. Weights are wide, so that tokens vary."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MODEL_LEN,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def model(pristine_model) -> LlamaForCausalLM:
    return copy.deepcopy(pristine_model)


@pytest.fixture
def make_llm(model, tokenizer) -> Iterator[MakeLLM]:
    """Makes LLMs over the test's model; checks that nothing is held, and closes them at the end."""
    made: list[LLM] = []

    def make(**options: Any) -> LLM:
        settings = {"tokenizer": tokenizer, "kv_format": "native", "max_num_seqs": 8, **options}
        made.append(LLM(model, **settings))
        return made[-1]

    yield make
    for llm in made:
        assert_nothing_is_held(llm)
        llm.close()


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(256) for _ in range(length)] for length in (1, 5, 17, 63, 120, 33)]


@pytest.fixture(scope="session")
def greedy(pristine_model, prompts) -> list[list[int]]:
    """What the model itself generates for each prompt."""
    return [model_tokens(pristine_model, prompt) for prompt in prompts]
