"""What the models of the zoo are put together from: sizes, layers, and what becomes of a model."""

from __future__ import annotations

from typing import Any, NamedTuple

VOCAB_SIZE = 300
MAX_MODEL_LEN = 512
WINDOW = 24

# What a configuration has unless it says otherwise.
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
# Some configurations want numbers; no model gives a token outside the vocabulary.
NUMBERED_TOKENS = {"bos_token_id": 1, "eos_token_id": VOCAB_SIZE}
ALTERNATING = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": WINDOW,
}
ATTENTION_ALONE = {"layer_types": ["full_attention"] * 3}
HEAD_DIM = {"head_dim": 16}
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
INDEXER = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8}
CHUNKED = {
    "num_hidden_layers": 4,
    "layer_types": ["chunked_attention", "full_attention"] * 2,
    "no_rope_layers": [1, 0, 1, 0],
    "attention_chunk_size": WINDOW,
    "head_dim": 16,
    "num_local_experts": 2,
    "intermediate_size_mlp": 96,
}
# After a norm behind each layer, tokens repeat unless weights are wider and activations odd.
BERT = {"is_decoder": True, "initializer_range": 0.4, "hidden_act": "tanh"}
# Of the decoder that is taken out of an encoder-decoder.
BART = {
    "d_model": 64,
    **{f"{half}_layers": 2 for half in ("encoder", "decoder")},
    **{f"{half}_attention_heads": 4 for half in ("encoder", "decoder")},
    **{f"{half}_ffn_dim": 96 for half in ("encoder", "decoder")},
}
GEMMA3N = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "sliding_window": WINDOW,
    "head_dim": 16,
    "intermediate_size": [96] * 6,
    "activation_sparsity_pattern": [0.0] * 6,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
}
GEMMA4 = {
    **ALTERNATING,
    "head_dim": 16,
    "global_head_dim": 32,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 0,
}
LINEAR = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "head_dim": 16,
}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_d_ssm": 128,
    "mamba_chunk_size": 16,
}
PROMPT_MEDIA = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10_000.0, **parameters}}


def layered_rope(**full_attention: Any) -> dict[str, Any]:
    """RoPE of each kind of layer, the same or with other parameters where attention is full."""
    plain = {"rope_type": "default", "rope_theta": 10_000.0}
    both = {"sliding_attention": plain, "full_attention": {**plain, **full_attention}}
    return {"rope_parameters": both}


class Outcome(NamedTuple):
    """The route by which a model is served, or the words of the error that refuses it."""

    route: str = ""
    refusal: str = ""


EXACT = Outcome("attention interface")
GATHERED = Outcome("gathering")
GATHERED_STATES = Outcome("gathering, with states")
UNFIT_OPTIONS = Outcome(refusal="the model's generation config sets encoder_no_repeat_ngram_size=3")
NO_KEYS = Outcome(refusal="stores no keys and values, so needs no blocks")
OTHER_IN_PIECES = Outcome(
    refusal="says something else where its tokens come in pieces: it sees later ones, or depends "
    "on more than keys, values and states of them"
)
NOT_IN_PIECES = Outcome(refusal="cannot compute tokens in pieces")
NOT_ALONE = Outcome(refusal="cannot compute a token by itself")
INDEXED = Outcome(
    refusal="stores a DynamicIndexedLayer in layer 0, which is neither keys and values of every "
    "token nor a state of fixed size"
)
OWN_STATE = Outcome(refusal="keeps a state of its own")
ENCODER_DECODER = Outcome(refusal="is an encoder-decoder model")
SELECTED_BLOCKS = Outcome(refusal="passes arguments that paged_kv does not know: block_indices")
WIDE_HEADS = Outcome(refusal="key_dim must be a multiple of 8 from 8 to 256, got 512")


class Configuration(NamedTuple):
    """A transformers class, what differs from `SIZES`, what is special, and what becomes of it."""

    class_name: str
    settings: dict[str, Any]
    special: str
    outcome: Outcome = EXACT
