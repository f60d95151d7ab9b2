"""Small models with random weights and the demo model's tokenizer, in folders, for other engines.

Weights are drawn wide, as in `zoo`: attention is far from uniform, and logits far from ties.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

import paged_kv

DEMO = Path(paged_kv.__file__).parent / "demo_model"
SIZES: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
# Tied embeddings drawn wide would say the last token again; the soft cap is low enough to matter.
GEMMA = {
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
    "query_pre_attn_scalar": 1,
    "attn_logit_softcapping": 2.0,
}
# Five layers with a window to one without; normed queries and keys want a small scale.
GEMMA3 = {
    **GEMMA,
    "query_pre_attn_scalar": 64,
    "num_hidden_layers": 6,
    "sliding_window": 70,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
}
TWO_HEADS = {"num_attention_heads": 2}
WIDER = {"hidden_size": 512, "initializer_range": 0.07}
FULL = {"layer_types": ["full_attention"] * 3}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa1": ("Llama", {"num_key_value_heads": 8}),
    "llama-gqa4": ("Llama", {"num_key_value_heads": 2, "head_dim": 128}),
    "llama-gqa8": ("Llama", {"num_key_value_heads": 1, "head_dim": 32}),
    "qwen2-biases": ("Qwen2", {"num_key_value_heads": 2, **WIDER}),
    "gemma2": ("Gemma2", {"num_key_value_heads": 4, "head_dim": 256, **FULL, **GEMMA}),
    "gemma3": ("Gemma3", {"num_key_value_heads": 4, **GEMMA3}),
    "mistral-window": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 100}),
    "narrow": ("Llama", {"num_key_value_heads": 1, "num_hidden_layers": 1, **TWO_HEADS}),
}


def save_model(name: str, folder: Path) -> str:
    family, sizes = MODELS[name]
    name_of_config = {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config")
    config = getattr(transformers, name_of_config)(**{**SIZES, **sizes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=1.0)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / file, folder)
    return str(folder)
