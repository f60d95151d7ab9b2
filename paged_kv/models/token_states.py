"""What a model keeps of one token, found by computing one. Knows transformers' cache layers."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..errors import UnsupportedModelError

# What comes out of a model that is called as it cannot be.
MODEL_ERRORS: Final = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)


def layers_of_a_token(model: PreTrainedModel) -> list[Any]:
    """The layers of transformers' own cache after one token.

    Raises `UnsupportedModelError` for a model that cannot be called so.
    """
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder model")
    states = DynamicCache(config=model.config)
    try:
        token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        with torch.no_grad():
            model(input_ids=token, past_key_values=states, use_cache=True)
    except MODEL_ERRORS as error:
        raise UnsupportedModelError(f"{name} cannot compute a token by itself") from error
    return list(states.layers)


def states_of_a_token(model: PreTrainedModel) -> list[tuple[Tensor, Tensor]]:
    """What each layer stores for one token: keys [1, H, 1, D] and values.

    Raises `UnsupportedModelError` where that is not all that a model remembers.
    """
    name = type(model).__name__
    found: list[tuple[Tensor, Tensor]] = []
    for layer in layers_of_a_token(model):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        is_plain = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
        if not is_plain or keys is None or values is None or not keys.numel():
            raise UnsupportedModelError(
                f"{name} stores a {type(layer).__name__} in layer {len(found)}, which is not keys "
                "and values of every token"
            )
        found.append((keys, values))
    if not found:
        raise UnsupportedModelError(f"{name} stores nothing in a cache")
    return found
