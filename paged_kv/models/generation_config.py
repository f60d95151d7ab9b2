"""What a model's generation configuration asks of every request: applied, or refused by name.

Knows transformers' `GenerationConfig`, never an engine. Its names and meanings are those of
`SamplingParams`, where both have them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from transformers import GenerationConfig, PreTrainedModel

from ..errors import ConfigError

# Options that change tokens, each with the values that switch it off.
APPLIED: Final[Mapping[str, tuple[object, ...]]] = {
    "top_h": (None,),
    "top_k": (None, 0),
    "top_p": (None, 1.0),
    "min_p": (None, 0.0),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
}
RENAMED: Final[Mapping[str, tuple[str, tuple[object, ...]]]] = {
    "min_new_tokens": ("min_tokens", (None, 0)),
    "stop_strings": ("stop", (None, [], "")),
}
REFUSED: Final[Mapping[str, tuple[object, ...]]] = {
    "constraints": (None,),
    "dola_layers": (None,),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "force_words_ids": (None,),
    "guidance_scale": (None, 1.0),
    "max_time": (None,),
    "min_length": (None, 0),
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None, 0.0),
    "sequence_bias": (None,),
    "token_healing": (None, False),
    "watermarking_config": (None,),
}
# The rest changes no token that we generate: of how transformers computes them (caches, compiling,
# assistants, whose tokens are checked), of searches with several beams, of what else it returns, of
# the softmax (`renormalize_logits`) or of NaN, which ends a request here (`remove_invalid_values`).
# End tokens and `do_sample` have places of their own; lengths are each request's own.
WITHOUT_EFFECT: Final = frozenset(
    [
        *("_commit_hash", "_from_model_config", "transformers_version"),
        *("assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight"),
        *("assistant_lookbehind", "is_assistant", "max_matching_ngram_size"),
        *("num_assistant_tokens", "num_assistant_tokens_schedule", "prompt_lookup_num_tokens"),
        *("speculation_type", "target_lookbehind", "use_mtp"),
        *("cache_config", "cache_implementation", "compile_config", "continuous_batching_config"),
        *("disable_compile", "low_memory", "max_cache_len", "prefill_chunk_size", "use_cache"),
        *("bos_token_id", "decoder_start_token_id", "pad_token_id"),
        *("diversity_penalty", "early_stopping", "length_penalty", "num_beam_groups"),
        *("output_attentions", "output_hidden_states", "output_logits", "output_scores"),
        *("return_dict_in_generate", "remove_invalid_values", "renormalize_logits"),
        *("do_sample", "eos_token_id", "max_length", "max_new_tokens", "temperature"),
    ]
)


def generation_options(model: PreTrainedModel) -> dict[str, Any]:
    """Values of `SamplingParams` fields that a model's generation configuration sets.

    A temperature is one where it samples (`do_sample`), 1 where it names none. Lengths are not
    among them: those are each request's own. Raises `ConfigError` for what would change tokens and
    cannot be applied.
    """
    configuration = model.generation_config
    return {} if configuration is None else options_of(configuration)


def options_of(configuration: GenerationConfig) -> dict[str, Any]:
    """The same, of a configuration."""
    unfit = {
        name: getattr(configuration, name, None)
        for name, neutral in REFUSED.items()
        if getattr(configuration, name, None) not in neutral
    }
    if unfit:
        told = ", ".join(f"{name}={value!r}" for name, value in sorted(unfit.items()))
        raise ConfigError(
            f"the model's generation config sets {told}, which is not applied; change it, or give "
            "generation_config=None to leave all of it out but the end tokens"
        )
    options = {
        name: getattr(configuration, name)
        for name, neutral in APPLIED.items()
        if getattr(configuration, name, None) not in neutral
    }
    for theirs, (ours, neutral) in RENAMED.items():
        if getattr(configuration, theirs, None) not in neutral:
            options[ours] = getattr(configuration, theirs)
    if getattr(configuration, "do_sample", None):
        temperature = getattr(configuration, "temperature", None)
        options["temperature"] = 1.0 if temperature is None else temperature
    return options
