"""Any Hugging Face decoder-only language model on paged blocks, through its own extension points.

Knows transformers, never requests. A step is one flattened ragged batch (1, T): every layer's
attention call lands in `paged_attention_forward`, which finds the step through a context variable,
because keyword arguments do not reach the attention of every architecture. No attention mask is
registered, so transformers builds none.

Many arguments because transformers calls `paged_attention_forward` with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, Final, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from ..blocks.retention import Retention
from ..cache.attention import paged_attention
from ..cache.kv_cache import PagedKVCache, Step
from ..errors import PagedKVError, UnsupportedModelError
from .active_step import (
    ActiveStep,
    LayerCall,
    Observer,
    Probe,
    expect_call,
    running,
    running_step,
)
from .adapters import TokenAdapters, applying
from .attached_model import AttachedModel, LayerShape, Route
from .attachment import fuse_once
from .length_limit import find_length_limit
from .rotary import Rotation, StepTurns, find_rotation

# Not containing "flash", "sdpa", "flex_attention" or "/": transformers treats those specially.
IMPLEMENTATION: Final = "paged_kv"
# Keyword arguments of attention calls that do not change what is computed here.
INERT_ARGUMENTS: Final = frozenset(
    {
        "cache_position",
        "dropout",
        "is_causal",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)
RECURRENT_LAYER_TYPES: Final = ("linear", "mamba", "recurrent", "conv", "rwkv")
# Of these alone a model is no recurrent one, whatever else its architecture can be made of.
ATTENTION_LAYER_TYPES: Final = frozenset(
    {"attention", "full_attention", "sliding_attention", "chunked_attention"}
)
PROBE_LENGTH: Final = 3
REHEARSED_LENGTH: Final = 100
ROTATION_PROBE: Final = (0, 1, 2, 5, 17, 100)  # positions of one token


def paged_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """What transformers calls for each layer: query, key and value are [1, heads, T, dim].

    Of a model that was given a cache of ours, [N, heads, L, dim].
    """
    active = running_step()
    if active is None:
        raise no_step()
    is_batch = not isinstance(active, (ActiveStep, Probe))
    if is_batch:
        expect_call(None)  # it is for one call alone
    check_attention_call(module, query, attention_mask, sliding_window, kwargs, is_batch=is_batch)
    if is_batch:
        call = cast(LayerCall, active)
        output = call.attend(
            query,
            key,
            value,
            scale=scaling,
            softcap=softcap,
            sliding_window=sliding_window,
            attention_chunk=attention_chunk_of(module),
            sink_logits=s_aux,
        )
        return output, None
    tokens = (one[0].transpose(0, 1) for one in (query, key, value))
    output = attend_tokens(
        module,
        *tokens,
        scaling=scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        s_aux=s_aux,
    )
    return output.unsqueeze(0), None


def attend_tokens(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """The attention of a layer: query, key and value are [T, heads, dim]."""
    active = running_step()
    if isinstance(active, Probe):
        settings = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap}
        output = active.attend(module, query, key, value, {**settings, "s_aux": s_aux})
        retention = Retention.of_layer(sliding_window, attention_chunk_of(module))
        active.retentions[cast(int, module.layer_idx)] = retention
        return output
    if not isinstance(active, ActiveStep):
        raise no_step()
    layer_idx, sink_query = cast(int, module.layer_idx), None
    if active.turns is not None:
        query, key, sink_query = active.turns.apply(layer_idx, query, key)
    if active.observe is not None:
        active.observe(active.cache_layer[layer_idx], query, key)
    return paged_attention(
        query,
        key,
        value,
        active.cache,
        active.cache_layer[layer_idx],
        active.step,
        scale=scaling,
        softcap=softcap,
        sliding_window=sliding_window,
        attention_chunk=attention_chunk_of(module),
        sink_logits=s_aux,
        sink_query=sink_query,
    )


def no_step() -> PagedKVError:
    return PagedKVError(
        "this model is attached to a paged_kv LLM; close() that first to call it directly. Or its "
        "attention was set to paged_kv: then call it with a PagedCache that was made after that"
    )


def check_attention_call(
    module: nn.Module,
    query: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None,
    kwargs: dict[str, object],
    *,
    is_batch: bool,
) -> None:
    """Refuse a call that means more than this library computes."""
    name = type(module).__name__
    if attention_mask is not None:
        raise UnsupportedModelError(f"{name} brings its own attention mask")
    if not is_batch and query.shape[0] != 1:
        raise UnsupportedModelError(f"{name} reshapes the batch to {query.shape[0]} rows")
    if not getattr(module, "is_causal", True):
        raise UnsupportedModelError(f"{name} is not causal")
    unknown = {k for k, v in kwargs.items() if v is not None} - INERT_ARGUMENTS
    if unknown:
        raise UnsupportedModelError(
            f"{name} passes arguments that paged_kv does not know: {', '.join(sorted(unknown))}"
        )
    if layer_type_of(module) == "sliding_attention" and sliding_window is None:
        raise UnsupportedModelError(f"{name} has a sliding window but does not pass it on")


def layer_type_of(module: nn.Module) -> str | None:
    layer_types = getattr(getattr(module, "config", None), "layer_types", None)
    return layer_types[module.layer_idx] if layer_types else None


def attention_chunk_of(module: nn.Module) -> int | None:
    """Chunked attention is never passed as an argument: it is read from the configuration."""
    if layer_type_of(module) != "chunked_attention":
        return None
    return cast(int, cast(Any, module.config).attention_chunk_size)


AttentionInterface.register(IMPLEMENTATION, paged_attention_forward)


class PagedModel(AttachedModel):
    """A causal language model attached to paged attention.

    Attaching switches the model's attention implementation and takes it out of training mode. On a
    CPU it also replaces modules (see `fusing`), and with `widens` the model computes in float32
    (see `widening`). `close()` gives all back. Raises `UnsupportedModelError`, and leaves the model
    as it was, where paged attention would not compute what the model means.
    """

    route: ClassVar[Route] = "fused"
    implementation: ClassVar[str | None] = IMPLEMENTATION

    def __init__(self, model: PreTrainedModel, *, widens: bool = False) -> None:
        refuse_unsupported(model)
        super().__init__(model, widens=widens)

    def _make_ready(self) -> None:
        self._cache_layer = {layer: place for place, layer in enumerate(self.layer_shapes)}
        fuse_once(self.model, self._rehearse, attend_tokens)

    @torch.inference_mode()
    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        logit_rows: Tensor,
        cache: PagedKVCache,
        step: Step,
        adapters: TokenAdapters | None = None,
        observe: Observer | None = None,
    ) -> Tensor:
        if self.is_closed:
            raise PagedKVError("this LLM is closed")
        turns = None
        if step.is_windowed is not None:
            turns = StepTurns(positions, step.is_windowed, step.head_shifts, self.rotations, {})
            positions = turns.model_positions
        active = ActiveStep(cache, step, self._cache_layer, turns, observe)
        with running(active):
            return self._call(token_ids, positions, logit_rows, adapters)

    @torch.inference_mode()
    def _try_adapters(self, adapters: TokenAdapters) -> None:
        """Run a few tokens with adapters, or raise whatever that raises."""
        positions = torch.arange(len(adapters.of_tokens), device=self.device)
        with running(Probe()):
            self._call(positions, positions, positions[-1:], adapters)

    @cached_property
    def rotations(self) -> dict[int, Rotation]:
        return rotations_of(self.model)

    def _call(
        self,
        token_ids: Tensor,
        positions: Tensor,
        logit_rows: Tensor,
        adapters: TokenAdapters | None = None,
    ) -> Tensor:
        ids, places = token_ids[None], positions[None]
        keeps_logits = "logits_to_keep" in self._arguments
        arguments = {"logits_to_keep": logit_rows} if keeps_logits else {}
        with applying(self.model, adapters, keeps_logits=keeps_logits):
            logits: Tensor = self.model(
                input_ids=ids, position_ids=places, use_cache=False, **arguments
            ).logits
        return logits[0] if keeps_logits else logits[0, logit_rows]

    @torch.inference_mode()
    def _rehearse(self) -> None:
        """Run a few different tokens, far apart as long as the model reaches."""
        limit = find_length_limit(self.model).num_tokens
        last = min(limit or REHEARSED_LENGTH, REHEARSED_LENGTH) - 1
        positions = torch.tensor([0, last // 2, last], device=self.device)
        tokens = torch.arange(len(positions), device=self.device)
        self._call(tokens, positions, tokens[-1:])

    @torch.inference_mode()
    def _probe(self) -> tuple[dict[int, LayerShape], int]:
        probe = Probe()
        tokens = torch.zeros(PROBE_LENGTH, dtype=torch.int64, device=self.device)
        positions = torch.arange(PROBE_LENGTH, device=self.device)
        name = type(self.model).__name__
        if "position_ids" not in self._arguments:
            raise UnsupportedModelError(f"{name} takes no position_ids")
        try:
            with running(probe):
                logits = self._call(tokens, positions, positions[-1:])
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise UnsupportedModelError(
                f"{name} cannot compute tokens of several sequences in one row without masks and a "
                "cache of its own"
            ) from error
        check_probe(self.model, probe)
        self.layer_retentions: Mapping[int, Retention] = probe.retentions
        return dict(sorted(probe.shapes.items())), logits.shape[-1]


def rotations_of(model: PreTrainedModel) -> dict[int, Rotation]:
    """`PagedModel.rotations` of a model whose attention is ours."""
    name, config = type(model).__name__, model.config.get_text_config()
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise UnsupportedModelError(f"{name} attends in chunks, which a window cannot shift")
    limit, reason, what = find_length_limit(model)
    if what != "position":
        raise UnsupportedModelError(f"beyond {limit} tokens, where a window may go, {reason}")
    limit = limit or max(ROTATION_PROBE) + 1
    positions = torch.tensor(
        [position for position in ROTATION_PROBE if position < limit], device=model.device
    )
    probe = Probe()
    with torch.inference_mode(), running(probe):
        ids = torch.ones_like(positions)
        model(input_ids=ids[None], position_ids=positions[None], use_cache=False)
    candidates = [  # one tensor for all layers that turn alike: they share their phases
        buffer.double()
        for buffer_name, buffer in model.named_buffers(remove_duplicate=False)
        if buffer_name.endswith("inv_freq") and "original" not in buffer_name
    ]
    rotations = {}
    for layer, (query, key) in probe.tokens.items():
        found = [find_rotation(tokens, positions, candidates) for tokens in (query, key)]
        if found[0] is None or found[1] is None:
            raise UnsupportedModelError(
                f"{name} cannot be windowed: layer {layer} does not embed positions by turning "
                "queries and keys (RoPE) at frequencies that it tells"
            )
        rotations[layer] = found[1]
    return rotations


def check_probe(model: PreTrainedModel, probe: Probe) -> None:
    """Raise `UnsupportedModelError` where a forward pass did not tell of all its attention."""
    name, config = type(model).__name__, model.config.get_text_config()
    if len(probe.shapes) != config.num_hidden_layers:
        raise UnsupportedModelError(
            f"{name} calls the attention interface in {len(probe.shapes)} of its "
            f"{config.num_hidden_layers} layers"
        )
    if has_unlisted_window(config) and probe.windows == {None}:
        raise UnsupportedModelError(
            f"{name} has a sliding window of {config.sliding_window} but passes none on"
        )


def refuse_unsupported(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModelError` for what no probe can see."""
    refuse_encoder_decoder(model)
    name, config = type(model).__name__, model.config.get_text_config()
    layer_types = getattr(config, "layer_types", None) or ()
    recurrent = [
        kind for kind in layer_types if any(word in kind for word in RECURRENT_LAYER_TYPES)
    ]
    has_attention_alone = layer_types and ATTENTION_LAYER_TYPES.issuperset(layer_types)
    if recurrent:
        raise UnsupportedModelError(
            f"{name} has recurrent layers ({recurrent[0]}); their state is not a KV cache"
        )
    if getattr(model, "_is_stateful", False) and not has_attention_alone:
        raise UnsupportedModelError(f"{name} keeps a state of its own, which is not a KV cache")


def refuse_encoder_decoder(model: PreTrainedModel) -> None:
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{type(model).__name__} is an encoder-decoder model")


def has_unlisted_window(config: object) -> bool:
    """True where a window is configured but no list of layer types says for which layers.

    One that hides nothing, because no sequence is longer, is none.
    """
    window = getattr(config, "sliding_window", None)
    longest = getattr(config, "max_position_embeddings", None)
    return (
        window is not None
        and (longest is None or window < longest)
        and getattr(config, "use_sliding_window", True) is not False
        and not getattr(config, "layer_types", None)
    )
