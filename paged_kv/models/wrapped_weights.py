"""Weights that are tensors of other classes, as libraries for quantized weights make them.

Such a weight has no memory of its own: tensors behind it have. The module that has it knows how to
compute with it; of others only those of 8 bits are known here, as torchao's `Int8Tensor` has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def has_wrapped_weights(model: nn.Module) -> bool:
    return any(hasattr(parameter, "__tensor_flatten__") for parameter in model.parameters())


def stored_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Those that lie in memory: the tensor itself, or what it says is behind it."""
    flatten: Any = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor
        return
    names, _ = flatten()
    for name in names:
        yield from stored_tensors(getattr(tensor, name))


def codes_and_factors(weight: Any) -> tuple[Tensor, Tensor]:
    """Of a weight that `has_known_codes`: int8 [N, K], and a factor of each row, [N]."""
    return weight.qdata, weight.scale.view(-1)


def has_known_codes(weight: Any) -> bool:
    """Whether a weight [N, K] is codes of 8 bits times a factor of their row, and nothing more."""
    names = ("qdata", "scale", "zero_point", "act_quant_kwargs", "act_quant_scale", "act_pre_scale")
    if type(weight).__name__ != "Int8Tensor" or not all(hasattr(weight, name) for name in names):
        return False
    codes, scale, zero_point, *others = (getattr(weight, name) for name in names)
    return (
        all(other is None for other in others)  # of what comes in nothing is quantized
        and codes.dtype is torch.int8
        and codes.ndim == 2
        and scale.dtype is torch.float32
        and scale.shape == (len(codes), 1)
        and scale.is_contiguous()
        and (zero_point is None or not zero_point.any())
    )
