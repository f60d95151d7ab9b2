"""A model's decoder layers on a CPU, each in one launch while every sequence has one new token.

Knows modules and the running step. Computed so is a layer of which all parts are replaced (see
`fused_modules`) and untouched since; at all other calls its parts are called one by one.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cache, partial
from typing import Any, Final, cast

import torch
from torch import Tensor

from ..cache.attention import attend_by
from ..kernels.cpu.backend import CpuBackend
from ..kernels.cpu.decoder_layer import MAX_ROWS, DecoderLayer, LayerParts
from ..kernels.cpu.native_code import KINDS
from ..kernels.cpu.plan import CpuPlan
from ..kernels.cpu.token_rows import Norm
from ..kernels.rules import ScoreRules
from .active_step import ActiveStep, Probe, running_step
from .fused_modules import (
    HEAD_NORMS,
    FastNorm,
    GatedLinear,
    TurnedAttention,
    is_heard,
    rows_of,
    served,
)
from .module_snapshot import ModuleSnapshot
from .replacements import Forward, Replacement

LAYER_PARTS: Final = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


class WholeLayer(Replacement):
    """Attention and then a gated linear part, each behind a norm and added to what went in."""

    def __init__(self, module: Any, original: Forward) -> None:
        self.module: Final = module
        self.original: Final = original
        self._local = threading.local()  # a `DecoderLayer` of each thread, and what it was made of

    def __call__(self, hidden_states: Tensor, **options: Any) -> Any:
        active = running_step()
        if isinstance(active, Probe):
            self._make_ready(hidden_states, options)
            return self._by_parts(hidden_states, options)
        if isinstance(active, ActiveStep) and is_usual(active, hidden_states, options):
            decoder = self._decoder(hidden_states)
            if decoder is not None:
                return self._run(decoder, active, hidden_states, options["position_embeddings"])
        return self.original(hidden_states, **options)

    def _by_parts(self, hidden: Tensor, options: dict[str, Any]) -> Tensor:
        """What this stands for, in words of modules."""
        norm, attention, gate_norm, gated = (getattr(self.module, name) for name in LAYER_PARTS)
        hidden = hidden + attention(hidden_states=norm(hidden), **options)[0]
        return cast(Tensor, hidden + gated(gate_norm(hidden)))

    def _make_ready(self, hidden: Tensor, options: dict[str, Any]) -> None:
        """Compile what the first step would wait for."""
        decoder, embeddings = self._decoder(hidden), options.get("position_embeddings")
        if decoder is not None and embeddings is not None:
            angles = [rows_of(one) for one in embeddings]
            for rotates_values in (True, False):
                decoder[0].records(rows_of(hidden), angles, rotates_values=rotates_values)

    def _decoder(self, hidden: Tensor) -> tuple[DecoderLayer, ScoreRules] | None:
        """What computes this layer in the running thread; None where that cannot be."""
        kept = self._local.__dict__
        if not (kept and kept["dtype"] is hidden.dtype and kept["snapshot"].holds()):
            parts = parts_of(self.module)
            kept["dtype"], kept["snapshot"] = hidden.dtype, ModuleSnapshot(self.module)
            kept["decoder"] = None
            if parts is not None and multiplies(parts, hidden.dtype):
                kept["decoder"] = DecoderLayer(parts), rules_of(self.module.self_attn)
        return cast("tuple[DecoderLayer, ScoreRules] | None", kept["decoder"])

    def _run(
        self,
        decoder: tuple[DecoderLayer, ScoreRules],
        active: ActiveStep,
        hidden: Tensor,
        embeddings: Sequence[Tensor],
    ) -> Tensor:
        backend = cast(CpuBackend, active.cache.backend)
        angles = [rows_of(one).contiguous() for one in embeddings]
        run = partial(backend.run_layer, *decoder, rows_of(hidden), angles)
        place = active.cache_layer[self.module.self_attn.layer_idx]
        return attend_by(run, active.cache, place, active.step).view(hidden.shape)


def is_usual(active: ActiveStep, hidden: Tensor, options: dict[str, Any]) -> bool:
    """Whether a call is one of a step that has one new token for each of some sequences."""
    plan, embeddings = active.step.plan, options.get("position_embeddings")
    return (
        isinstance(plan, CpuPlan)
        and not plan.has_prefills
        and active.turns is None
        and active.observe is None
        and embeddings is not None
        and options.get("attention_mask") is None
        and options.get("past_key_values") is None
        and hidden.shape[:2] == (1, len(plan.step.cache_positions))
        and hidden.shape[:2] == embeddings[0].shape[:2]
        and hidden.shape[1] <= MAX_ROWS
        and hidden.is_contiguous()
        and served(hidden)
    )


def parts_of(module: Any) -> LayerParts | None:
    """What a layer is made of now; None where not all of it is replaced, or somebody listens."""
    children = module._modules
    norm, attention, gate_norm, gated = (children[name] for name in LAYER_PARTS)
    attention_by, gated_by = attention.__dict__.get("forward"), gated.__dict__.get("forward")
    is_replaced = isinstance(attention_by, TurnedAttention) and isinstance(gated_by, GatedLinear)
    if not is_replaced or is_heard(attention) or is_heard(gated):
        return None
    norms = [norm_of(norm), norm_of(gate_norm)]
    head_norms = [attention._modules.get(name) for name in HEAD_NORMS]
    norms += [norm_of(each) for each in head_norms if each is not None]
    around, inside = attention_by.layers(), gated_by.layers()
    if around is None or inside is None or any(each is None for each in norms):
        return None
    found = iter(cast("list[Norm]", norms))
    return LayerParts(
        attention_norm=next(found),
        gate_norm=next(found),
        head_norms=[None if each is None else next(found) for each in head_norms],
        projections=around[0],
        attention_output=around[1],
        gate=inside[0],
        down=inside[1],
        head_dim=attention.head_dim,
    )


def norm_of(module: Any) -> Norm | None:
    forward = module.__dict__.get("forward")
    return None if not isinstance(forward, FastNorm) or is_heard(module) else forward.norm()


def rules_of(attention: Any) -> ScoreRules:
    """What attention was called with on trial; layers with the same share their rules."""
    settings = attention.forward.settings
    scale = settings["scaling"] or attention.head_dim**-0.5
    rules = shared_rules(scale, settings["softcap"], settings["sliding_window"])
    sinks = settings["s_aux"]
    return rules if sinks is None else rules._replace(sink_logits=sinks)


@cache
def shared_rules(scale: float, softcap: float | None, sliding_window: int | None) -> ScoreRules:
    return ScoreRules(scale, softcap, sliding_window)


def multiplies(parts: LayerParts, dtype: torch.dtype) -> bool:
    """Whether rows of a precision are multiplied as they are."""
    layers = parts.projections, parts.attention_output, parts.gate, parts.down
    return all(layer.row_kind(dtype) == KINDS.get(dtype) for layer in layers)
