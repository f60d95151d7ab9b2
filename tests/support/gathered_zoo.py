"""Tiny models whose attention cannot read blocks, by name: as `zoo`, for the other route."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import PreTrainedModel

from . import zoo

NAMES_OF_DECODERS = {
    "num_hidden_layers": 2,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 96,
}
# Name -> transformers class, and what differs from `zoo.SIZES`.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    # They never call transformers' attention interface.
    "falcon": ("FalconForCausalLM", {}),
    "falcon-grouped": ("FalconForCausalLM", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-alibi": ("FalconForCausalLM", {"alibi": True, "multi_query": False}),
    "bloom": ("BloomForCausalLM", {}),
    "mpt": ("MptForCausalLM", {"max_seq_len": zoo.MAX_MODEL_LEN}),
    "gptj": ("GPTJForCausalLM", {"rotary_dim": 8}),
    "codegen": ("CodeGenForCausalLM", {"rotary_dim": 8}),
    "gpt-neo": (
        "GPTNeoForCausalLM",
        {
            "num_hidden_layers": 2,
            "attention_types": [[["global", "local"], 1]],
            "window_size": zoo.WINDOW,
        },
    ),
    # It makes its own mask. With sdpa transformers' own is not causal in prompts.
    "doge": ("DogeForCausalLM", {"attn_implementation": "eager"}),
    "diffllama": ("DiffLlamaForCausalLM", {}),  # calls attention twice
    "bart-decoder": ("BartForCausalLM", NAMES_OF_DECODERS),  # takes no position_ids
    # Its window is in the mask alone.
    "phimoe-window": ("PhimoeForCausalLM", {**zoo.EXPERTS, "sliding_window": zoo.WINDOW}),
}


@cache
def model(name: str) -> PreTrainedModel:
    """A model of `ARCHITECTURES`, built once. Tests give it back as they found it."""
    class_name, settings = ARCHITECTURES[name]
    return zoo.build(class_name, **settings)


@cache
def expected_tokens(name: str) -> list[list[int]]:
    """What a model of `ARCHITECTURES` itself continues each prompt with, one prompt at a time."""
    return zoo.generate_alone(model(name), zoo.prompts())
