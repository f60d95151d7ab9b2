"""Put an engine together: size its pool and make its parts. Knows settings, never requests."""

from __future__ import annotations

from typing import Final

import torch

from ..cache.formats import KVFormat, resolve_format
from ..cache.kv_cache import PagedKVCache
from ..cache.layer_spec import LayerSpec, cache_geometry, num_blocks_for
from ..models.huggingface import PagedModel
from ..models.loading import end_token_ids, model_length, move_model
from ..scheduler.scheduler import Scheduler
from ..units import parse_memory
from .config import EngineConfig
from .engine import Engine
from .model_runner import ModelRunner

DEFAULT_KV_MEMORY: Final = 1 << 30
HOST_BYTES_PER_SECOND: Final = 1e10
FLOPS_PER_SECOND: Final = {"cpu": 1e11, "cuda": 1e14}


def build_engine(
    model: PagedModel, config: EngineConfig, device: torch.device | str | None
) -> Engine:
    """An engine for a model, which moves to `device` if one is given.

    Without `kv_memory` or `num_blocks` the pool is what `max_num_seqs` full-length sequences need,
    at most `DEFAULT_KV_MEMORY`.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    max_model_len = model_length(model.model, config.max_model_len)
    layers = model.layers(fitted_format(model, config))
    num_blocks = pool_size(config, layers, model.dtype, max_model_len)
    num_host_blocks = 0
    if config.swap_space:
        num_host_blocks = num_blocks_for(parse_memory(config.swap_space), layers, model.dtype)
    if device is not None:
        move_model(model.model, device)
    cache = PagedKVCache(
        layers,
        num_blocks=num_blocks,
        dtype=model.dtype,
        device=model.device,
        num_host_blocks=num_host_blocks,
    )
    manager = cache.new_manager(
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        prefix_caching=config.prefix_caching,
        model_fingerprint=model.fingerprint(),
    )
    if config.sink_window is not None:
        manager.fitted_window(config.sink_window)  # or it raises
    scheduler = Scheduler(
        manager,
        token_budget=config.token_budget,
        max_prefill_tokens=config.max_prefill_tokens,
        swap_cost=swap_cost(model, cache),
    )
    runner = ModelRunner(model, cache)
    return Engine(runner, scheduler, end_token_ids(model.model), config.sink_window)


def fitted_format(model: PagedModel, config: EngineConfig) -> KVFormat:
    """The format that is asked for; its head keeps all sinks where every request is windowed."""
    kv_format, window = resolve_format(config.kv_format), config.sink_window
    if window is None:
        return kv_format
    _ = model.rotations  # or it raises
    if kv_format.is_native:
        return kv_format
    num_sinks = max(kv_format.num_sink_tokens, window.num_sink_tokens)
    return kv_format.with_options(num_sink_tokens=num_sinks)


def pool_size(
    config: EngineConfig, layers: list[LayerSpec], dtype: torch.dtype, max_model_len: int
) -> int:
    """Blocks of the pool."""
    if config.num_blocks is not None:
        return config.num_blocks
    if config.kv_memory is not None:
        return num_blocks_for(parse_memory(config.kv_memory), layers, dtype)
    geometry = cache_geometry(layers, dtype)
    longest = geometry.max_blocks(max_model_len)
    if config.sink_window is not None:
        longest = max(longest, config.sink_window.fitted(geometry).max_blocks(geometry))
    wanted = config.max_num_seqs * (longest + 1)
    return min(wanted, num_blocks_for(DEFAULT_KV_MEMORY, layers, dtype))


def swap_cost(model: PagedModel, cache: PagedKVCache) -> float:
    """Tokens that can be computed in the time in which one block is copied to or from the host.

    From two assumptions that hold within a factor of a few: see `HOST_BYTES_PER_SECOND` and
    `FLOPS_PER_SECOND`; two floating-point operations for each parameter and token.
    """
    device_type = cache.device.type if cache.device.type in FLOPS_PER_SECOND else "cpu"
    token_seconds = 2 * model.num_parameters / FLOPS_PER_SECOND[device_type]
    return cache.block_bytes / HOST_BYTES_PER_SECOND / token_seconds
