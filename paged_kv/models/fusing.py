"""A model's own modules computed on a CPU by fewer and faster operations, where that is the same.

Knows modules, never requests. No architecture is listed: a module is replaced where its code uses
no other names than the replacement knows, and where both give the same on a few tokens. All else
stays as it is. Weights stay where they are and are read at each call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Final, Protocol, TypeGuard, cast

import torch
from torch import Tensor, nn

from ..kernels.cpu.dense import DenseLayer, Weight, is_served
from ..kernels.cpu.token_rows import rms_norm, turn
from .active_step import Probe, running
from .replacements import Forward, Replacements
from .widening import WideLinear

# How far two ways to compute the same may be apart, as a relative norm.
TOLERANCE: Final = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}

ROW_DTYPES: Final = (torch.float32, torch.bfloat16)  # of rows that are normed

PROJECTIONS: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED_PARTS: Final = ("gate_proj", "up_proj", "down_proj", "act_fn")
ATTENTION_NAMES: Final = frozenset(
    {
        *PROJECTIONS,
        *("ALL_ATTENTION_FUNCTIONS", "_attn_implementation", "apply_rotary_pos_emb"),
        *("attention_dropout", "attn_logit_softcapping", "config", "contiguous"),
        *("eager_attention_forward", "get_interface", "getattr", "head_dim", "k_norm"),
        *("layer_idx", "q_norm", "reshape", "scaling", "shape", "sliding_window", "training"),
        *("transpose", "update", "view"),
    }
)
GATED_NAMES: Final = frozenset(GATED_PARTS)
NORM_NAMES: Final = frozenset(
    {
        *("_norm", "dtype", "eps", "float", "float32", "mean", "pow", "rsqrt", "to", "torch"),
        *("type_as", "variance_epsilon", "weight"),
    }
)
ACTIVATIONS: Final = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
}

Attention = Callable[..., Tensor]  # of a layer's queries, keys and values [T, heads, dim]


class Replacement(Protocol):
    """Takes the place of a module's forward."""

    def __call__(self, *arguments: Any, **options: Any) -> Any: ...


def is_plain(module: nn.Module, names: frozenset[str]) -> bool:
    """Whether the forward of a module is its class's, and uses no other names than these."""
    kind: Any = type(module)
    code = [kind.forward.__code__]
    if "_norm" in names and hasattr(kind, "_norm"):
        code.append(kind._norm.__code__)
    return "forward" not in module.__dict__ and all(names.issuperset(c.co_names) for c in code)


def served(tensor: Tensor) -> bool:
    """Whether a tensor is computed with here: on a CPU, and nobody asks for its gradient."""
    return tensor.device.type == "cpu" and not torch.is_grad_enabled()


def rows_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


class Dense:
    """Linear layers that read the same rows, computed together: as their weights are now."""

    def __init__(self, activation: str | None = None) -> None:
        self._activation = activation
        self._layer: DenseLayer | None = None

    def layer(self, *modules: nn.Linear) -> DenseLayer | None:
        """None where a weight has become one that is not served."""
        weights = [
            Weight(cast(Tensor, parameters["weight"]), parameters["bias"])
            for parameters in (module._parameters for module in modules)
        ]
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
    return is_itself and is_served(module.weight)


def is_untouched(*modules: Any) -> bool:
    """Whether these are linear layers to which nobody listens, and which nobody has changed."""
    for module in modules:
        if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
            return False
        if not isinstance(module.__dict__.get("forward"), (FastLinear, Trial)):
            return False
    return True


class FastLinear:
    def __init__(self, module: nn.Linear, original: Forward) -> None:
        self.module, self.original = module, original
        self._dense = Dense()

    def __call__(self, input: Tensor) -> Tensor:
        layer = self._dense.layer(self.module) if served(input) else None
        if layer is None:
            return self.original(input)  # type: ignore[no-any-return]
        output = layer(rows_of(input))[0]
        return output.view(*input.shape[:-1], output.shape[1])


@dataclass
class FastNorm:
    """RMS norms whose weight counts from 0, or from 1."""

    module: Any
    original: Forward
    is_offset: bool

    def __call__(self, hidden_states: Tensor) -> Tensor:
        module, weight = self.module, self.module._parameters["weight"]
        fits = hidden_states.shape[-1:] == weight.shape and weight.is_contiguous()
        fits = fits and hidden_states.dtype in ROW_DTYPES and weight.dtype in ROW_DTYPES
        if not (fits and served(hidden_states)):
            return self.original(hidden_states)  # type: ignore[no-any-return]
        epsilon = getattr(module, "variance_epsilon", None) or module.eps
        return rms_norm(hidden_states, weight, epsilon, is_offset=self.is_offset)


class GatedLinear:
    """down(activation(gate(x)) * up(x)), the inner part in one pass over both weights."""

    def __init__(self, module: nn.Module, original: Forward, activation: str) -> None:
        self.module, self.original = module, original
        self._inner, self._outer = Dense(activation), Dense()

    def __call__(self, x: Tensor) -> Tensor:
        gate, up, down, act_fn = (cast(Any, self.module._modules.get(n)) for n in GATED_PARTS)
        is_heard = act_fn is None or act_fn._forward_hooks or act_fn._forward_pre_hooks
        inner = outer = None
        if not is_heard and served(x) and is_untouched(gate, up, down):
            inner, outer = self._inner.layer(gate, up), self._outer.layer(down)
        if inner is None or outer is None:
            return self.original(x)  # type: ignore[no-any-return]
        output = outer(inner(rows_of(x))[0])[0]
        return output.view(*x.shape[:-1], output.shape[1])


class TurnedAttention:
    """Queries, keys and values in one pass, turned in place, as Llama's attention has them."""

    def __init__(self, module: Any, original: Forward, attend: Attention) -> None:
        self.module, self.original, self._attend = module, original, attend
        self.settings: Mapping[str, object] = {}  # that attention is called with
        self._inner, self._outer = Dense(), Dense()
        self._norms = [name for name in ("q_norm", "k_norm") if name in module._modules]

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: object = None,
        **options: Any,
    ) -> Any:
        module, size = self.module, self.module.head_dim
        query, key, value, last = (module._modules.get(name) for name in PROJECTIONS)
        inner = outer = None
        is_usual = (
            position_embeddings is not None
            and position_embeddings[0].shape[:-1] == hidden_states.shape[:-1]
            and attention_mask is None
            and past_key_values is None
            and served(hidden_states)
        )
        if is_usual and is_untouched(query, key, value, last):
            inner, outer = self._inner.layer(query, key, value), self._outer.layer(last)
        if inner is None or outer is None or position_embeddings is None:
            return self.original(
                hidden_states, position_embeddings=position_embeddings,
                attention_mask=attention_mask, past_key_values=past_key_values, **options,
            )  # fmt: skip
        projected = inner(rows_of(hidden_states))
        heads = [one.view(one.shape[0], one.shape[1] // size, size) for one in projected]
        for place, norm in enumerate(self._norms):
            heads[place] = module._modules[norm](heads[place]).contiguous()
        turn(heads[0], heads[1], *(rows_of(one) for one in position_embeddings))
        output = self._attend(module, *heads, **self.settings)
        output = outer(output.view(output.shape[0], -1))[0]
        return output.view(*hidden_states.shape[:-1], output.shape[1]), None


# -- trials ---------------------------------------------------------------------------------------


@dataclass
class Rehearsal(Probe):
    """Writes down what attention is called with, and answers with numbers of its own."""

    calls: list[tuple[tuple[Tensor, Tensor, Tensor], Mapping[str, object]]] = field(
        default_factory=list
    )

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        settings: Mapping[str, object],
    ) -> Tensor:
        self.calls.append(((query.clone(), key.clone(), value.clone()), settings))
        output = query.new_empty(*query.shape[:2], value.shape[2])
        numbers = torch.arange(output.numel(), dtype=torch.float64)
        return torch.sin(numbers).to(query.dtype).view_as(output)


@dataclass
class Trial:
    """Computes a module's output both ways, hands out its own, and says if they are the same."""

    module: nn.Module
    original: Forward
    candidates: list[Any]
    rehearsal: Rehearsal
    found: Replacement | None = None

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        calls = self.rehearsal.calls
        before = len(calls)
        expected = self.original(*arguments, **options)
        expected_calls = calls[before:]
        for candidate in self.candidates:
            del calls[before:]
            if isinstance(candidate, TurnedAttention):
                candidate.settings = expected_calls[0][1] if expected_calls else {}
            with suppress(Exception):  # whatever it is, this module stays as it was
                given = candidate(*arguments, **options)
                if is_same(given, expected) and is_same(calls[before:], expected_calls):
                    self.found = candidate
                    break
        calls[before:] = expected_calls
        return expected


def is_same(given: Any, expected: Any) -> bool:
    """Whether two trees of tensors and plain values agree, tensors up to rounding."""
    if isinstance(expected, Tensor):
        if not isinstance(given, Tensor) or given.shape != expected.shape:
            return False
        if given.dtype is not expected.dtype:
            return False
        difference = (given.double() - expected.double()).norm()
        return bool(difference <= TOLERANCE[expected.dtype] * expected.double().norm())
    if isinstance(expected, (tuple, list)):
        return len(given) == len(expected) and all(map(is_same, given, expected))
    return bool(given == expected)


def candidates_of(module: Any, attend: Attention) -> list[Replacement]:
    """What may take the place of a module's forward."""
    original = module.forward
    if is_linear(module):
        return [FastLinear(module, original)]
    if is_plain(module, ATTENTION_NAMES) and all(
        is_linear(getattr(module, name, None)) for name in PROJECTIONS
    ):
        return [TurnedAttention(module, original, attend)]
    if is_plain(module, GATED_NAMES) and all(
        is_linear(getattr(module, name, None)) for name in GATED_PARTS[:3]
    ):
        activation = ACTIVATIONS.get(type(module.act_fn).__name__)
        has_bias = {getattr(module, name).bias is not None for name in GATED_PARTS[:2]}
        if activation is None or len(has_bias) > 1:
            return []
        return [GatedLinear(module, original, activation)]
    weight = getattr(module, "weight", None)
    if is_plain(module, NORM_NAMES) and isinstance(weight, Tensor) and weight.ndim == 1:
        return [FastNorm(module, original, is_offset) for is_offset in (False, True)]
    return []


# -- the whole model ------------------------------------------------------------------------------


def fuse(model: nn.Module, run: Callable[[], object], attend: Attention) -> Replacements:
    """Replace what can be replaced; `run` computes a few tokens, `attend` is their attention.

    Nothing is replaced of a model that is not on a CPU, nor where `run` raises anything.
    """
    fused, trials = Replacements(), Replacements()
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return fused
    rehearsal = Rehearsal()
    tried = [
        Trial(module, module.forward, candidates, rehearsal)
        for module in model.modules()
        if (candidates := candidates_of(module, attend))
    ]
    try:
        for trial in tried:
            trials.replace(trial.module, trial)
        with running(rehearsal):
            run()
    finally:
        trials.undo()
    for trial in tried:
        if trial.found is not None:
            fused.replace(trial.module, trial.found)
    return fused
