"""Compute a half-precision model in float32 on a CPU, with its large weights as they are.

Knows modules and their parameters, never requests. Weights of linear layers and embeddings keep
their precision and are widened where they are read; all else of the model is small, and becomes
float32 until `undo`. Nothing is rounded on the way: float32 holds every bfloat16 and float16.
"""

from __future__ import annotations

import logging
import platform
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..cache.device_memory import require_device
from .adapters import adapters_own
from .replacements import Replacements
from .wrapped_weights import has_wrapped_weights

logger: Final = logging.getLogger("paged_kv")


def usual_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The precision to compute in: the weights', but on a CPU float32 where it has no unit for it.

    Without such a unit a processor multiplies numbers of half precision several times slower.
    """
    is_half = dtype is torch.float16 or (dtype is torch.bfloat16 and not has_bfloat16_unit())
    return torch.float32 if device_type == "cpu" and is_half else dtype


def computes_wide(model: PreTrainedModel, device: torch.device | str | None) -> bool:
    """Whether to compute in float32 what is stored in half precision; says so.

    Quantized weights take what comes in as they were made to, and are left so.
    """
    device_type = model.device.type if device is None else require_device(device).type
    is_wide = usual_dtype(model.dtype, device_type) is not model.dtype
    is_wide = is_wide and not has_wrapped_weights(model)
    if is_wide:
        name = str(model.dtype).removeprefix("torch.")
        logger.warning(
            "computing in float32: this processor has no unit for %s; weights and cache stay %s, "
            "and dtype=torch.%s computes in it all the same", *(name,) * 3,
        )  # fmt: skip
    return is_wide


def has_bfloat16_unit() -> bool:
    """Whether this processor multiplies bfloat16: AVX512_BF16, AMX, or ARM's."""
    try:
        from ..kernels.cpu.vectors import host_features
    except ImportError:  # llvmlite is missing
        return False
    names = (
        {"+bf16"} if platform.machine() in ("arm64", "aarch64") else {"+avx512bf16", "+amx-bf16"}
    )
    return not names.isdisjoint(host_features())


@dataclass
class WideLinear:
    """A linear layer in the precision of what comes in."""

    module: nn.Linear

    def __call__(self, input: Tensor) -> Tensor:
        weight, bias = self.module.weight.to(input.dtype), self.module.bias
        return nn.functional.linear(input, weight, None if bias is None else bias.to(input.dtype))


@dataclass
class WideEmbedding:
    """Rows of an embedding in float32."""

    module: nn.Embedding

    def __call__(self, input: Tensor) -> Tensor:
        rows: Tensor = nn.functional.embedding(input, self.module.weight)
        return rows.to(torch.float32)


class WidenedModel:
    """A model that computes in float32 until `undo`."""

    def __init__(self, model: nn.Module) -> None:
        self._forwards = Replacements()
        self._narrow: list[tuple[Tensor, Tensor]] = []
        kinds: dict[type, Any] = {nn.Linear: WideLinear, nn.Embedding: WideEmbedding}
        kept: set[int] = set()
        others: set[int] = set()
        small = {id(module) for module in adapters_own(model)}
        known: list[nn.Module] = []
        for module in model.modules():
            is_known = type(module) in kinds and "forward" not in module.__dict__
            is_known = is_known and id(module) not in small
            known += [module] if is_known else []
            for name, parameter in module.named_parameters(recurse=False):
                (kept if is_known and name == "weight" else others).add(id(parameter))
        try:
            for module in known:
                self._forwards.replace(module, kinds[type(module)](module))
            for tensor in [*model.parameters(), *model.buffers()]:
                is_kept = id(tensor) in kept - others
                if tensor.is_floating_point() and not is_kept:
                    self._narrow.append((tensor, tensor.data))
                    tensor.data = tensor.data.to(torch.float32)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        while self._narrow:
            tensor, data = self._narrow.pop()
            tensor.data = data
        self._forwards.undo()
