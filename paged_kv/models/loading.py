"""Find and load models and tokenizers, and what their configurations say. Knows no requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import ConfigError, ModelNotFoundError


def load_model(name: str | Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """Load a causal language model; `ModelNotFoundError` where there is none."""
    check_model_path(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto")
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelNotFoundError(f"no causal language model at {str(name)!r}: {error}") from error
    return cast(PreTrainedModel, model)


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    check_model_path(name)
    try:
        return cast(PreTrainedTokenizerBase, cast(Any, AutoTokenizer).from_pretrained(name))
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"no tokenizer at {str(name)!r}: {error}") from error


def check_model_path(name: str | Path) -> None:
    """A folder that does not exist is never looked up on a hub."""
    path = Path(name)
    looks_local = isinstance(name, Path) or path.is_absolute() or str(name)[0:1] in (".", "~")
    if (looks_local or len(path.parts) > 2) and not path.is_dir():
        raise ModelNotFoundError(f"no model folder at {str(name)!r}")


def move_model(model: PreTrainedModel, device: torch.device | str) -> None:
    """Move a model; `ConfigError` where there is no such device."""
    try:
        cast(torch.nn.Module, model).to(device)
    except (AssertionError, RuntimeError) as error:
        raise ConfigError(f"cannot move the model to device {device!r}: {error}") from error


def model_length(model: PreTrainedModel, max_model_len: int | None) -> int:
    """The longest sequence: the model's own limit, or less."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if max_model_len is None:
        if limit is None:
            raise ConfigError("this model states no length limit; give max_model_len")
        return int(limit)
    if max_model_len < 1 or (limit is not None and max_model_len > limit):
        raise ConfigError(f"max_model_len must be from 1 to {limit}, got {max_model_len}")
    return max_model_len


def end_token_ids(model: PreTrainedModel) -> list[int]:
    """The end-of-sequence tokens of a model's generation configuration."""
    configuration = model.generation_config
    found = None if configuration is None else configuration.eos_token_id
    if found is None:
        return []
    return [found] if isinstance(found, int) else list(found)
