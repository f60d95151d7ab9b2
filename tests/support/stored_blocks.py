"""A small model whose blocks go to a block store, and engines on it that come and go."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from paged_kv import LLM, SamplingParams
from tests.support.small_llm import assert_nothing_is_held, tokens_of

GREEDY = SamplingParams(max_tokens=12)


def llama(**options: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.3,
        eos_token_id=None,
        **options,
    )
    torch.manual_seed(1)
    return LlamaForCausalLM(config).eval()


def gemma() -> Gemma3ForCausalLM:
    """Five of six layers see a window."""
    config = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=48,
        max_position_embeddings=2048,
        initializer_range=0.3,
        eos_token_id=None,
        pad_token_id=0,
        bos_token_id=None,
    )
    torch.manual_seed(2)
    return Gemma3ForCausalLM(config).eval()


MODEL = llama()


def prompt_of(length: int, seed: int) -> list[int]:
    return [random.Random(seed + 1000 * place).randrange(64) for place in range(length)]


PROMPT = prompt_of(700, 1)


def open_llm(store: object, model: Any = MODEL, **options: Any) -> LLM:
    settings = {"kv_format": "native", "num_blocks": 300, "max_num_seqs": 8, "calibration": None}
    return LLM(model, block_store=store, **{**settings, **options})


def served(
    store: object, prompts: Sequence[list[int]] = (PROMPT,), params: Any = GREEDY, **options: Any
) -> tuple[list[list[int]], Any, int]:
    """Tokens of a new engine, its store's figures, and how many prompt tokens it has hit."""
    with open_llm(store, **options) as llm:
        tokens = tokens_of(llm.generate(list(prompts), params))
        assert_nothing_is_held(llm)
        llm.engine.tier.flush()
        return tokens, llm.block_store_statistics(), llm.statistics().num_hit_tokens


def warm_tokens(prompts: Sequence[list[int]], params: Any = GREEDY, **options: Any) -> Any:
    """What an engine answers that has its own cache and no store."""
    with open_llm(None, **options) as llm:
        for prompt in prompts:
            llm.generate([prompt], GREEDY)
        return tokens_of(llm.generate(list(prompts), params))


@torch.no_grad()
def change_one_row(model: LlamaForCausalLM) -> None:
    """Which samples of the weights do not show."""
    weight = model.model.layers[1].mlp.down_proj.weight
    weight[3, 5] += 0.25
