"""Attention over paged context, as a model's layer calls it. Knows one layer's tensors, no model.

Many arguments because those of `paged_attention`, most of them optional, are what layers differ in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from reprlib import repr as short_repr

import torch
from torch import Tensor

from ..blocks.retention import KEEPS_ALL, UNLIMITED, Retention
from ..errors import ConfigError
from ..kernels.block_views import LayerBlocks
from ..kernels.new_tokens import NewTokens
from ..kernels.rules import ScoreRules
from ..kernels.step_inputs import KernelPlan
from ..validation import is_finite, require, require_count
from .backend import Backend
from .kv_cache import PagedKVCache, Step
from .layer_spec import FULL_PRECISION_DTYPES, LayerSpec


def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: PagedKVCache,
    layer: int,
    step: Step,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    attention_chunk: int | None = None,
    sink_logits: Tensor | None = None,
    sink_query: Tensor | None = None,
) -> Tensor:
    """Attend from a step's new tokens to all earlier ones, then store their K/V.

    `query` [T, num_q_heads, key_dim], `key` [T, num_kv_heads, key_dim] and `value`
    [T, num_kv_heads, value_dim] are the flattened new tokens of every sequence of the step, in
    the order of the plan. Returns [T, num_q_heads, value_dim]. `scale` defaults to
    key_dim ** -0.5; for the masks see `kernels.rules.ScoreRules`. Call it once for each layer.
    There is no backward pass. Raises, before anything is written, `InvalidStepError` for a step
    that is over or a layer that was called before, `ConfigError` for all else that cannot be.

    In a step with windowed sequences that have evicted (`Step.head_shifts` is not None),
    `sink_query` is the query with positions that many tokens smaller (RoPE: rotated back by as
    many): it scores sinks.
    """
    cache.require_step(step, layer)
    check_tensors((query, key, value), cache.arenas[layer].device)
    if sink_query is not None or sink_logits is not None:
        optional = [tensor for tensor in (sink_query, sink_logits) if tensor is not None]
        check_tensors(optional, cache.arenas[layer].device)
    check_shapes(query, key, value, cache.layers[layer], len(step.inputs.cache_positions))
    check_rules(query.shape[1], softcap, sliding_window, attention_chunk, sink_logits)
    check_retention(cache.layers[layer].retention, sliding_window, attention_chunk)
    check_sink_query(query, sink_query, step, attention_chunk)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    elif not (type(scale) is float and 0 <= scale < math.inf):  # the quick way first
        require("scale", scale, is_finite(scale) and scale >= 0, "at least 0, and finite")
    plan = step.plan_of(layer)
    if plan.step.window_sizes is None:  # of the layer's group no sequence has sinks
        sink_query = None
    output = attend_and_store(
        NewTokens(query, key, value, sink_query),
        cache.layers[layer],
        cache.records[layer],
        plan,
        ScoreRules(scale, softcap, sliding_window, attention_chunk, sink_logits),
        cache.backend,
    )
    step.stored_layers.add(layer)
    return output


def store_tokens(key: Tensor, value: Tensor, cache: PagedKVCache, layer: int, step: Step) -> None:
    """As `paged_attention`, for those who attend by themselves: only stores the step's tokens."""
    cache.require_step(step, layer)
    check_tensors((key, value), cache.arenas[layer].device)
    check_shapes(key, key, value, cache.layers[layer], len(step.inputs.cache_positions))
    if cache.layers[layer].kv_format.rotates_values:
        value = cache.backend.rotate(value)
    new, blocks = NewTokens(key, key, value), cache.records[layer]
    cache.backend.store_tokens(new, blocks, step.plan_of(layer).step)
    step.stored_layers.add(layer)


def attend_by(run: Callable[..., Tensor], cache: PagedKVCache, layer: int, step: Step) -> Tensor:
    """Let `run(blocks, plan, rotates_values=...)` attend and store; it knows that all fits."""
    cache.require_step(step, layer)
    rotates_values = cache.layers[layer].kv_format.rotates_values
    blocks = cache.records[layer]
    output = run(blocks, step.plan_of(layer), rotates_values=rotates_values)
    step.stored_layers.add(layer)
    return output


def attend_and_store(
    new: NewTokens,
    layer: LayerSpec,
    blocks: LayerBlocks,
    plan: KernelPlan,
    rules: ScoreRules,
    backend: Backend,
) -> Tensor:
    """`paged_attention` without its checks and without a cache: nothing is kept but the blocks."""
    rotates_values = layer.kv_format.rotates_values
    if rotates_values:
        new = new._replace(value=backend.rotate(new.value))
    output = backend.attend_and_store(new, blocks, plan, rules)
    return backend.rotate(output) if rotates_values else output


def check_tensors(tensors: Sequence[Tensor], device: torch.device) -> None:
    """Raise `ConfigError` for what kernels cannot read, or would read without its gradient."""
    needs_gradients = torch.is_grad_enabled()
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise ConfigError(f"a tensor was expected, got {short_repr(tensor)}")
        if tensor.device != device:
            raise ConfigError(
                f"the cache is on {device}, a tensor that was given on {tensor.device}"
            )
        if needs_gradients and tensor.requires_grad:
            raise ConfigError(
                "paged attention has no backward pass, but a tensor that was given requires a "
                "gradient: call it under torch.inference_mode() or torch.no_grad()"
            )


def check_shapes(
    query: Tensor, key: Tensor, value: Tensor, layer: LayerSpec, num_tokens: int
) -> None:
    """Raise `ConfigError` unless the tensors are one layer's new tokens, in one precision."""
    expected_key = (num_tokens, layer.num_kv_heads, layer.key_dim)
    expected_value = (num_tokens, layer.num_kv_heads, layer.value_dim)
    if key.shape != expected_key:
        raise ConfigError(f"key must have shape {expected_key}, got {tuple(key.shape)}")
    if value.shape != expected_value:
        raise ConfigError(f"value must have shape {expected_value}, got {tuple(value.shape)}")
    if not query.dtype == key.dtype == value.dtype:
        raise ConfigError(
            "query, key and value must have the same dtype, got "
            f"{query.dtype}, {key.dtype} and {value.dtype}"
        )
    if query.dtype not in FULL_PRECISION_DTYPES:
        raise ConfigError(
            f"query, key and value must be float32, bfloat16 or float16, got {query.dtype}"
        )
    fits = (
        query.ndim == 3
        and query.shape[0] == num_tokens
        and query.shape[1] > 0
        and query.shape[1] % layer.num_kv_heads == 0
        and query.shape[2] == layer.key_dim
    )
    if not fits:
        raise ConfigError(
            f"query must have shape ({num_tokens}, a multiple of {layer.num_kv_heads}, "
            f"{layer.key_dim}), got {tuple(query.shape)}"
        )


def check_rules(
    num_query_heads: int,
    softcap: float | None,
    sliding_window: int | None,
    attention_chunk: int | None,
    sink_logits: Tensor | None,
) -> None:
    """Raise `ConfigError` for masks that leave a token without itself, sinks without a head ..."""
    for name, size in (("sliding_window", sliding_window), ("attention_chunk", attention_chunk)):
        if size is not None:
            require_count(name, size)
    if softcap is not None:
        require("softcap", softcap, is_finite(softcap) and softcap > 0, "positive")
    if sink_logits is not None and sink_logits.shape != (num_query_heads,):
        raise ConfigError(
            f"sink_logits must have shape ({num_query_heads},), got {tuple(sink_logits.shape)}"
        )


def check_retention(
    retention: Retention, sliding_window: int | None, attention_chunk: int | None
) -> None:
    """Raise `ConfigError` for masks that leave tokens to be seen which the layer does not keep."""
    if retention is KEEPS_ALL:  # the quick way first
        return
    for name, kept, size in (
        ("sliding_window", retention.window_size, sliding_window),
        ("attention_chunk", retention.chunk_size, attention_chunk),
    ):
        if kept != UNLIMITED and (size is None or size > kept):
            raise ConfigError(f"{name} must be at most {kept}, which the layer keeps, got {size}")


def check_sink_query(
    query: Tensor, sink_query: Tensor | None, step: Step, attention_chunk: int | None
) -> None:
    """Raise `ConfigError` for windowed sequences whose sinks would be seen where they are not."""
    if step.inputs.window_sizes is not None and attention_chunk is not None:
        raise ConfigError(
            f"windowed sequences and attention_chunk={attention_chunk} do not go together"
        )
    if sink_query is None:
        if step.head_shifts is not None:
            raise ConfigError("windowed sequences have evicted tokens: sink_query is missing")
    elif sink_query.shape != query.shape or sink_query.dtype != query.dtype:
        raise ConfigError(
            f"sink_query must be {query.dtype} of shape {tuple(query.shape)}, got "
            f"{sink_query.dtype} of shape {tuple(sink_query.shape)}"
        )
