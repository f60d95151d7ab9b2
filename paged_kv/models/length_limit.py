"""How long sequences of a model may become, and why not longer. Knows configurations alone."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from transformers import PreTrainedModel

from ..errors import ConfigError


class LengthLimit(NamedTuple):
    """Tokens of the longest sequence, None where nothing limits it; and why not more.

    Beyond it, positions are unknown, or a token's angles depend on the other `lengths` of a batch,
    or its query on its `place` in the batch.
    """

    num_tokens: int | None
    reason: str
    depends_on: Literal["position", "lengths", "place"]


def find_length_limit(model: PreTrainedModel) -> LengthLimit:
    """As far as positions go, and no step computes for one sequence what it does not for another.

    Beyond their limit some models embed all tokens of a batch by the longest of its sequences, or
    scale queries by their place in the batch: keys that were stored earlier would be wrong then.
    """
    config, name = model.config.get_text_config(), type(model).__name__
    length = getattr(config, "max_position_embeddings", None)
    longest = None if length is None else int(length)
    limits = [LengthLimit(longest, f"{name} knows no positions", "position")]
    for parameters in rope_parameters(config):
        kind = parameters.get("rope_type", parameters.get("type"))
        if kind == "dynamic":
            reason = f"{name} uses dynamic RoPE, whose angles depend on the length of the batch"
            limits.append(LengthLimit(longest or 0, reason, "lengths"))
        if kind == "longrope":
            original = parameters.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None)
            reason = f"{name} uses longrope RoPE, whose angles depend on the length of the batch"
            limits.append(LengthLimit(int(original or 0), reason, "lengths"))
    if getattr(config, "attn_temperature_tuning", False) and hasattr(config, "floor_scale"):
        reason = f"{name} scales queries by their place in the batch (attn_temperature_tuning)"
        limits.append(LengthLimit(int(config.floor_scale) - 1, reason, "place"))
    known = [limit for limit in limits if limit.num_tokens is not None]
    return min(reversed(known), key=lambda limit: limit.num_tokens or 0) if known else limits[0]


def rope_parameters(config: object) -> list[dict[str, Any]]:
    """Every set of RoPE parameters of a configuration, for all layers or for each kind of layer."""
    found: list[dict[str, Any]] = []
    for attribute in ("rope_parameters", "rope_scaling"):
        parameters = getattr(config, attribute, None) or {}
        found += [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return found


def model_length(model: PreTrainedModel, max_model_len: int | None) -> int:
    """The longest sequence: the model's own limit, or less; raises `ConfigError` for more."""
    limit, reason, _ = find_length_limit(model)
    if max_model_len is None:
        if limit is None:
            raise ConfigError("this model states no length limit; give max_model_len")
        return limit
    if max_model_len < 1 or (limit is not None and max_model_len > limit):
        raise ConfigError(
            f"max_model_len must be from 1 to {limit}, got {max_model_len}: beyond that {reason}"
        )
    return int(max_model_len)
