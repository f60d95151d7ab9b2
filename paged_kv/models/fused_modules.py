"""Modules of a model on a CPU computed by fewer and faster operations.

Knows what each module computes, not which models have it. What a replacement does not serve, at
any call, it leaves to the forward that it has replaced. Weights stay where they are and are read
at each call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, Final, TypeGuard, cast

import torch
from torch import Tensor, nn

from ..kernels.cpu.dense import DenseLayer, Weight, is_served
from ..kernels.cpu.token_rows import Norm, rms_norm, turn
from .replacements import Forward, Replacement
from .split_modules import finished, inner_linear
from .widening import WideLinear
from .wrapped_weights import codes_and_factors, has_known_codes

ROW_DTYPES: Final = (torch.float32, torch.bfloat16)  # of rows that are normed

PROJECTIONS: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
HEAD_NORMS: Final = ("q_norm", "k_norm")
GATED_PARTS: Final = ("gate_proj", "up_proj", "down_proj", "act_fn")

Attention = Callable[..., Tensor]  # of a layer's queries, keys and values [T, heads, dim]


def served(tensor: Tensor) -> bool:
    """Whether a tensor is computed with here: on a CPU, and nobody asks for its gradient."""
    return tensor.device.type == "cpu" and not torch.is_grad_enabled()


def rows_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def weight_of(module: nn.Linear) -> Weight | None:
    """A linear layer's weight as it is now; None where it is one that nobody but itself knows."""
    parameters = module._parameters
    weight, bias = cast(Tensor, parameters["weight"]), parameters["bias"]
    if type(weight) in (Tensor, nn.Parameter):
        return Weight(weight, bias)
    if not has_known_codes(weight):
        return None
    codes, factors = codes_and_factors(weight)
    return Weight(codes, bias, factors)


class Dense:
    """Linear layers that read the same rows, computed together: as their weights are now."""

    def __init__(self, activation: str | None = None) -> None:
        self._activation = activation
        self._layer: DenseLayer | None = None

    def layer(self, *modules: nn.Linear) -> DenseLayer | None:
        """None where a weight has become one that is not served."""
        found = [weight_of(module) for module in modules]
        weights = [weight for weight in found if weight is not None]
        if len(weights) < len(found):
            return None
        if self._layer is None or not self._layer.is_of(weights):
            matrices = [weight.matrix for weight in weights]
            is_one = len({(matrix.dtype, matrix.shape[1:]) for matrix in matrices}) == 1
            if not (is_one and all(map(is_served, matrices))):
                return None
            self._layer = DenseLayer(weights, self._activation)
        return self._layer


def is_linear(module: Any) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear layer and nothing more."""
    if type(module) is not nn.Linear:
        return False
    is_itself = isinstance(module.__dict__.get("forward"), (WideLinear, NoneType))
    weight = weight_of(module) if is_itself else None
    return weight is not None and is_served(weight.matrix)


def is_heard(module: nn.Module) -> bool:
    """Whether somebody listens to a module, or changes what goes in and out."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_untouched(*modules: Any) -> bool:
    """Whether these are linear layers to which nobody listens, and which nobody has changed."""
    for module in modules:
        if type(module) is not nn.Linear or is_heard(module):
            return False
        if not isinstance(module.__dict__.get("forward"), Replacement):
            return False
    return True


class FastLinear(Replacement):
    def __init__(self, module: nn.Linear, original: Forward) -> None:
        self.module: Final = module
        self.original: Final = original
        self._dense = Dense()

    def __call__(self, input: Tensor) -> Tensor:
        layer = self._dense.layer(self.module) if served(input) else None
        if layer is None:
            return self.original(input)  # type: ignore[no-any-return]
        output = layer(rows_of(input))[0]
        return output.view(*input.shape[:-1], output.shape[1])


@dataclass
class FastNorm(Replacement):
    """RMS norms whose weight counts from 0, or from 1."""

    module: Any
    original: Forward
    is_offset: bool

    def norm(self) -> Norm | None:
        """None where the weight has become one that is not served."""
        module, weight = self.module, self.module._parameters["weight"]
        if not (weight.is_contiguous() and weight.dtype in ROW_DTYPES):
            return None
        epsilon = getattr(module, "variance_epsilon", None) or module.eps
        return Norm(weight, epsilon, self.is_offset)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        norm = self.norm()
        fits = norm is not None and hidden_states.shape[-1:] == norm.weight.shape
        fits = fits and hidden_states.dtype in ROW_DTYPES and served(hidden_states)
        if norm is None or not fits:
            return self.original(hidden_states)  # type: ignore[no-any-return]
        return rms_norm(hidden_states, norm)


class GatedLinear(Replacement):
    """down(activation(gate(x)) * up(x)), the inner part in one pass over both weights."""

    def __init__(self, module: nn.Module, original: Forward, activation: str) -> None:
        self.module: Final = module
        self.original: Final = original
        self._inner, self._outer = Dense(activation), Dense()
        self._act_fn: Any = module.act_fn

    def layers(self) -> tuple[DenseLayer, DenseLayer] | None:
        """The inner part and what is behind it; None where somebody has changed a module."""
        gate, up, down, act_fn = (cast(Any, self.module._modules.get(n)) for n in GATED_PARTS)
        is_the_same = act_fn is self._act_fn and not is_heard(act_fn)
        if not (is_the_same and is_untouched(gate, up, inner_linear(down))):
            return None
        inner, outer = self._inner.layer(gate, up), self._outer.layer(inner_linear(down))
        return None if inner is None or outer is None else (inner, outer)

    def __call__(self, x: Tensor) -> Tensor:
        layers = self.layers() if served(x) else None
        if layers is None:
            return self.original(x)  # type: ignore[no-any-return]
        inner, outer = layers
        output = finished(self.module._modules["down_proj"], outer(inner(rows_of(x))[0])[0])
        return output.view(*x.shape[:-1], output.shape[1])


class TurnedAttention(Replacement):
    """Queries, keys and values in one pass, turned in place, as Llama's attention has them."""

    def __init__(self, module: Any, original: Forward, attend: Attention) -> None:
        self.module: Final = module
        self.original: Final = original
        self._attend = attend
        self.settings: Mapping[str, object] = {}  # that attention is called with
        self._inner, self._outer = Dense(), Dense()
        self._norms = [name for name in HEAD_NORMS if name in module._modules]

    def layers(self) -> tuple[DenseLayer, DenseLayer] | None:
        """Before attention and behind it; None where somebody has changed a module."""
        query, key, value, last = (self.module._modules.get(name) for name in PROJECTIONS)
        if not is_untouched(query, key, value, inner_linear(last)):
            return None
        inner = self._inner.layer(*cast(Any, (query, key, value)))
        outer = self._outer.layer(inner_linear(last))
        return None if inner is None or outer is None else (inner, outer)

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: object = None,
        **options: Any,
    ) -> Any:
        module, size = self.module, self.module.head_dim
        is_usual = (
            position_embeddings is not None
            and position_embeddings[0].shape[:-1] == hidden_states.shape[:-1]
            and attention_mask is None
            and past_key_values is None
            and served(hidden_states)
        )
        layers = self.layers() if is_usual else None
        if layers is None or position_embeddings is None:
            return self.original(
                hidden_states, position_embeddings=position_embeddings,
                attention_mask=attention_mask, past_key_values=past_key_values, **options,
            )  # fmt: skip
        inner, outer = layers
        projected = inner(rows_of(hidden_states))
        heads = [one.view(one.shape[0], one.shape[1] // size, size) for one in projected]
        for place, norm in enumerate(self._norms):
            heads[place] = module._modules[norm](heads[place]).contiguous()
        turn(heads[0], heads[1], *(rows_of(one) for one in position_embeddings))
        output = self._attend(module, *heads, **self.settings)
        output = outer(output.view(output.shape[0], -1))[0]
        output = finished(module._modules["o_proj"], output)
        return output.view(*hidden_states.shape[:-1], output.shape[1]), None
