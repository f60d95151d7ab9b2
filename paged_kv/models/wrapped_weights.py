"""Weights that are tensors of other classes, as libraries for quantized weights make them.

Such a weight has no memory of its own: tensors behind it have. The module that has it knows how to
compute with it; nobody else does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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
