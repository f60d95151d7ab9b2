"""A model's own modules computed on a CPU by fewer and faster operations, where that is the same.

Knows modules, never requests. No architecture is listed: a module is replaced where its code uses
no other names than the replacement knows, and where both give the same on a few tokens. All else
stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from .active_step import Probe, running
from .fused_modules import (
    GATED_PARTS,
    HEAD_NORMS,
    PROJECTIONS,
    Attention,
    FastLinear,
    FastNorm,
    GatedLinear,
    TurnedAttention,
    is_linear,
)
from .replacements import Forward, Replacement, Replacements
from .split_modules import SummedLinear, inner_linear
from .whole_layers import LAYER_PARTS, WholeLayer

# How far two ways to compute the same may be apart, as a relative norm.
TOLERANCE: Final = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}

ATTENTION_NAMES: Final = frozenset(
    {
        *PROJECTIONS,
        *("ALL_ATTENTION_FUNCTIONS", "_attn_implementation", "apply_rotary_pos_emb"),
        *("attention_dropout", "attn_logit_softcapping", "config", "contiguous"),
        *("eager_attention_forward", "get_interface", "getattr", "head_dim", *HEAD_NORMS),
        *("layer_idx", "reshape", "scaling", "shape", "sliding_window", "training"),
        *("transpose", "update", "view"),
    }
)
GATED_NAMES: Final = frozenset(GATED_PARTS)
LAYER_NAMES: Final = frozenset(LAYER_PARTS)
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


def is_plain(module: nn.Module, names: frozenset[str]) -> bool:
    """Whether the forward of a module is its class's, and uses no other names than these."""
    kind: Any = type(module)
    code = [kind.forward.__code__]
    if "_norm" in names and hasattr(kind, "_norm"):
        code.append(kind._norm.__code__)
    return "forward" not in module.__dict__ and all(names.issuperset(c.co_names) for c in code)


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
class Trial(Replacement):
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
        is_linear(inner_linear(getattr(module, name, None))) for name in PROJECTIONS
    ):
        return [TurnedAttention(module, original, attend)]
    if is_plain(module, GATED_NAMES) and all(
        is_linear(inner_linear(getattr(module, name, None))) for name in GATED_PARTS[:3]
    ):
        activation = ACTIVATIONS.get(type(module.act_fn).__name__)
        has_bias = {getattr(module, name).bias is not None for name in GATED_PARTS[:2]}
        if activation is None or len(has_bias) > 1:
            return []
        return [GatedLinear(module, original, activation)]
    if is_plain(module, LAYER_NAMES) and all(hasattr(module, name) for name in LAYER_PARTS):
        if any(type(part) is SummedLinear for part in module.modules()):
            return []  # sums of several processes are in the middle of it
        return [WholeLayer(module, original)]
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
    try:
        with running(Rehearsal()):  # once more, now that all is in place: what is compiled is ready
            run()
    except BaseException:
        fused.undo()
        raise
    return fused
