"""Tiny decoder-only models with random weights, by name, and what they generate by themselves.

Weights are drawn wide (`initializer_range` 0.2 at a hidden size of 64) and output embeddings are
not tied, so that attention is far from uniform and tokens vary: a wrong mask or a lost key then
changes what is generated. No token ends a sequence.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

VOCAB_SIZE = 300
MAX_MODEL_LEN = 512
WINDOW = 24
# Shorter and longer than a block of 16 tokens, the window of 24 and a token budget of 40.
PROMPT_LENGTHS = (1, 5, 17, 40, 64, 97, 131, 150)
NUM_NEW_TOKENS = 24

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_MODEL_LEN,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
ALTERNATING = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": WINDOW,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
CHUNKED = {
    "num_hidden_layers": 4,
    "layer_types": ["chunked_attention", "full_attention"] * 2,
    "no_rope_layers": [1, 0, 1, 0],
    "attention_chunk_size": WINDOW,
    "head_dim": 16,
    "num_local_experts": 2,
    "intermediate_size_mlp": 96,
}


def rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10_000.0, **parameters}}


# Name -> transformers class, and what differs from SIZES.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-rope-linear": ("LlamaForCausalLM", rope("linear", factor=2.0)),
    "llama-rope-llama3": (
        "LlamaForCausalLM",
        rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "llama-rope-yarn": (
        "LlamaForCausalLM",
        rope("yarn", factor=4.0, original_max_position_embeddings=128),
    ),
    # As far as their angles depend on nothing but positions.
    "llama-rope-dynamic": ("LlamaForCausalLM", rope("dynamic", factor=2.0)),
    "gemma3-rope-dynamic": (
        "Gemma3ForCausalLM",
        {
            **ALTERNATING,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                "full_attention": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0},
            },
        },
    ),
    "phi3-rope-longrope": (
        "Phi3ForCausalLM",
        {
            "original_max_position_embeddings": 256,
            **rope("longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 8),
        },
    ),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2-window": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16}),
    "mistral-window": ("MistralForCausalLM", {"sliding_window": WINDOW}),
    "gemma2": (
        "Gemma2ForCausalLM",
        {
            **ALTERNATING,
            "head_dim": 16,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 30.0,
            "query_pre_attn_scalar": 8,
        },
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        {**ALTERNATING, "head_dim": 16, "query_pre_attn_scalar": 8},
    ),
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt2-layer-scale": ("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt-neox": ("GPTNeoXForCausalLM", {}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "phi3": ("Phi3ForCausalLM", {}),
    "phi3-window": ("Phi3ForCausalLM", {"sliding_window": WINDOW}),
    "stablelm": ("StableLmForCausalLM", {}),
    "nemotron": ("NemotronForCausalLM", {}),
    "cohere2": ("Cohere2ForCausalLM", ALTERNATING),
    "opt": ("OPTForCausalLM", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "deepseek-v3": ("DeepseekV3ForCausalLM", {**LATENT_ATTENTION, **EXPERTS}),
    "llama4": ("Llama4ForCausalLM", {**CHUNKED, "attn_temperature_tuning": False}),
    "llama4-temperature": (
        "Llama4ForCausalLM",
        {**CHUNKED, "attn_temperature_tuning": True, "floor_scale": 1200},
    ),
    "gpt-oss": ("GptOssForCausalLM", {**ALTERNATING, **EXPERTS, "head_dim": 16}),
    "mixtral": ("MixtralForCausalLM", EXPERTS),
    "qwen2-moe": ("Qwen2MoeForCausalLM", EXPERTS),
}


def build(class_name: str, **settings: Any) -> PreTrainedModel:
    """A float32 model of a transformers class: `SIZES`, overridden by `settings`."""
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{**SIZES, **settings})).eval()
    assert isinstance(model, PreTrainedModel)
    return model


@cache
def model(name: str) -> PreTrainedModel:
    """A model of `ARCHITECTURES`, built once. Tests give it back as they found it.

    Eager attention is what an architecture means: sdpa leaves out Gemma2's softcap.
    """
    class_name, settings = ARCHITECTURES[name]
    return build(class_name, **settings, attn_implementation="eager")


@cache
def prompts(lengths: tuple[int, ...] = PROMPT_LENGTHS) -> list[list[int]]:
    """Prompts of random token ids, the same on every call."""
    numbers = random.Random(0)
    return [[numbers.randrange(1, VOCAB_SIZE) for _ in range(length)] for length in lengths]


@cache
def expected_tokens(name: str) -> list[list[int]]:
    """What a model of `ARCHITECTURES` itself continues each prompt with, one prompt at a time."""
    return generate_alone(model(name), prompts())


def generate_alone(
    model: PreTrainedModel, prompts: list[list[int]], num_new_tokens: int = NUM_NEW_TOKENS
) -> list[list[int]]:
    """Greedy tokens of transformers' own `generate`, for each prompt by itself."""
    continued = [
        model.generate(torch.tensor([prompt]), max_new_tokens=num_new_tokens, do_sample=False)
        for prompt in prompts
    ]
    return [ids[0, len(prompt) :].tolist() for ids, prompt in zip(continued, prompts, strict=True)]


@torch.inference_mode()
def logits_alone(model: PreTrainedModel, prompt: list[int], output: list[int]) -> Tensor:
    """Logits [len(output), vocab] that a full forward pass gives for each token of `output`."""
    logits: Tensor = model(torch.tensor([prompt + output]), use_cache=False).logits
    return logits[0, len(prompt) - 1 : -1]
