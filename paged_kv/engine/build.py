"""Put an engine together: size its pool and make its parts. Knows settings, never requests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from transformers import PreTrainedTokenizerBase

from ..blocks.warming import warm_up
from ..cache.backend import TORCH_BACKEND
from ..cache.block_entries import BlockEntries
from ..cache.device_memory import usual_kv_memory
from ..cache.formats import KVFormat
from ..cache.key_calibration import KeyCalibration
from ..cache.kv_cache import PagedKVCache
from ..cache.layer_formats import resolve_formats
from ..cache.layer_groups import max_blocks, num_blocks_for
from ..cache.layer_spec import LayerSpec, cache_geometry, usual_kv_dtype
from ..errors import ConfigError
from ..models.attached_model import AttachedModel
from ..models.calibration import Calibrate, Calibration, calibrate, usual_calibration
from ..models.generation_config import generation_options
from ..models.length_limit import model_length
from ..models.loading import end_token_ids, move_model
from ..models.model_identity import whole_fingerprint
from ..models.model_part import ModelPart
from ..scheduler.scheduler import Scheduler
from ..stores.block_store import BlockStore
from ..stores.opening import open_store
from ..units import parse_memory
from ..validation import require
from .block_tier import BlockTier
from .build_speculation import find_speculation
from .config import USUAL, EngineConfig
from .decode_graphs import DecodeGraphs
from .engine import Engine
from .model_runner import ModelRunner
from .parallel_group import WorkerGroup
from .sampling_params import SamplingParams

HOST_BYTES_PER_SECOND: Final = 1e10
FLOPS_PER_SECOND: Final = {"cpu": 1e11, "cuda": 1e14}


def build_engine(
    model: AttachedModel,
    config: EngineConfig,
    device: torch.device | str | None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    group: WorkerGroup | None = None,
) -> Engine:
    """An engine for a model, which moves to `device` if one is given.

    With a `group` this process is its rank 0, and the model a part of one. The usual calibration
    needs a tokenizer, for its text; without one nothing is calibrated.

    Without `kv_memory` or `num_blocks` the pool is what `max_num_seqs` full-length sequences need,
    at most `usual_kv_memory`. Raises
    `ConfigError`, with the model where it was, for what cannot be.
    """
    before = model.device
    require("the model's device", str(before), before.type != "meta", "one that holds numbers")
    max_model_len = model_length(model.model, config.max_model_len)
    model.check_batch(config.token_budget)
    kv_formats = fitted_formats(model, config)
    model.layers(kv_formats)  # or it raises
    usual_options(model, config)  # or it raises
    store = find_store(model, config)
    if device is not None:
        move_model(model.model, device)
    try:
        make = calibrate if group is None else group.calibrate
        calibration = find_calibration(model, config, kv_formats, tokenizer, make)
        layers = model.layers(kv_formats, calibration)
        engine = engine_where_it_is(model, config, layers, max_model_len, tokenizer)
        if group is not None:
            assert isinstance(model, ModelPart), "a group computes a model in parts"
            engine.cache.num_parts = group.size
            engine.runner = group.runner(model, engine.cache, kv_formats, calibration)
        if store is not None:
            engine.tier = tier_of(engine, store)
    except BaseException:
        if model.device != before:
            move_model(model.model, before)
        raise
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    return engine


def engine_where_it_is(
    model: AttachedModel,
    config: EngineConfig,
    layers: list[LayerSpec],
    max_model_len: int,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Engine:
    """An engine on the device of its model."""
    dtype = config.kv_dtype or usual_kv_dtype(layers, model.dtype)
    swap_space, num_host_blocks = parse_memory(config.swap_space, "swap_space", least=0), 0
    swap_space //= config.tensor_parallel_size
    if model.keeps_states:
        what = "0: states of recurrent layers, which this model has, are not swapped"
        require("swap_space", config.swap_space, not swap_space, what)
    if swap_space:
        num_host_blocks = num_blocks_for(swap_space, layers, dtype)
    cache = PagedKVCache(
        layers,
        num_blocks=pool_size(config, layers, dtype, model.device, max_model_len),
        dtype=dtype,
        device=model.device,
        num_host_blocks=num_host_blocks,
    )
    manager = cache.new_manager(
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        prefix_caching=config.prefix_caching and not model.keeps_states,
        model_fingerprint=model.fingerprint(),
        record_events=config.record_events,
    )
    if config.sink_window is not None:
        manager.fitted_window(config.sink_window)  # or it raises
    scheduler = Scheduler(
        manager,
        token_budget=config.token_budget,
        max_prefill_tokens=config.max_prefill_tokens,
        swap_cost=swap_cost(model, cache),
    )
    warm_up()
    graphs = None
    has_kernels = cache.device.type == "cuda" and cache.backend is not TORCH_BACKEND
    # Of several tables plans are made on the host.
    can_capture = model.route == "fused" and not cache.has_several_tables
    if has_kernels and can_capture and not config.enforce_eager:
        graphs = DecodeGraphs(model, cache, manager)
    runner = ModelRunner(model, cache, graphs)
    ends = end_token_ids(model.model)
    options = usual_options(model, config)
    speculation = find_speculation(config, model, manager, tokenizer)
    return Engine(
        runner,
        scheduler,
        ends,
        config.sink_window,
        options,
        tokenizer,
        speculation,
        config.max_slowdown,
    )


def find_store(model: AttachedModel, config: EngineConfig) -> BlockStore | None:
    """Where blocks outlive the engine, if anywhere."""
    store = config.block_store
    if store is None or isinstance(store, BlockStore):
        found = store
    else:
        found = open_store(store, config.block_store_size)
    what = "None: states of recurrent layers, which this model has, are no blocks"
    require("block_store", store, not (model.keeps_states and found is not None), what)
    return found


def tier_of(engine: Engine, store: BlockStore) -> BlockTier:
    model, cache = engine.model, engine.cache

    def entries() -> BlockEntries:
        return BlockEntries(cache, whole_fingerprint(model.model))

    return BlockTier(store, engine.scheduler, entries, lambda: model.adapters.names)


def usual_options(model: AttachedModel, config: EngineConfig) -> dict[str, Any]:
    """What the model's generation config says of sampling; `ConfigError` where it is unfit."""
    if config.generation_config is None:
        return {}
    options = generation_options(model.model)
    try:
        SamplingParams(**options)
    except ConfigError as error:
        raise ConfigError(f"the model's generation config: {error}") from error
    return options


def fitted_formats(model: AttachedModel, config: EngineConfig) -> list[KVFormat]:
    """Of each layer what is asked for; heads keep all sinks where every request is windowed."""
    formats, num_sink_tokens = resolve_formats(config.kv_format), 0
    if config.sink_window is not None:
        _ = model.rotations  # or it raises
        num_sink_tokens = config.sink_window.num_sink_tokens
    return formats.of(len(model.layer_shapes), num_sink_tokens=num_sink_tokens)


def find_calibration(
    model: AttachedModel,
    config: EngineConfig,
    kv_formats: Sequence[KVFormat],
    tokenizer: PreTrainedTokenizerBase | None,
    make: Calibrate = calibrate,
) -> Sequence[KeyCalibration] | None:
    """What formats want to know of each layer; None where they do not, or nobody says."""
    wanted = config.calibration
    if isinstance(wanted, (str, Path)) and wanted != USUAL:
        wanted = Calibration.load(wanted)
    if isinstance(wanted, Calibration):
        wanted.require_model(model)
        return wanted.layers
    if wanted is None or tokenizer is None:
        return None
    if not any(each.wants_calibration for each in kv_formats):
        return None
    if model.route == "gather":  # it tells of no queries
        return None
    return usual_calibration(model, tokenizer, make).layers


def pool_size(
    config: EngineConfig,
    layers: list[LayerSpec],
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
) -> int:
    """Blocks of the pool, of which each process has its part of the memory."""
    num_parts = config.tensor_parallel_size
    if config.num_blocks is not None:
        return config.num_blocks
    if config.kv_memory is not None:
        asked = parse_memory(config.kv_memory, "kv_memory")
        return num_blocks_for(asked // num_parts, layers, dtype)
    longest = max_blocks(layers, dtype, max_model_len)
    if config.sink_window is not None:
        fitted = config.sink_window.fitted(cache_geometry(layers, dtype))
        longest = max(longest, max_blocks(layers, dtype, max_model_len, fitted))
    wanted = config.max_num_seqs * (longest + 1)
    most = usual_kv_memory(device) // num_parts
    return min(wanted, num_blocks_for(most, layers, dtype))


def swap_cost(model: AttachedModel, cache: PagedKVCache) -> float:
    """Tokens that can be computed in the time in which one block is copied to or from the host.

    From two assumptions that hold within a factor of a few: see `HOST_BYTES_PER_SECOND` and
    `FLOPS_PER_SECOND`; two floating-point operations for each parameter and token.
    """
    device_type = cache.device.type if cache.device.type in FLOPS_PER_SECOND else "cpu"
    token_seconds = 2 * model.num_parameters / FLOPS_PER_SECOND[device_type]
    return cache.block_bytes / HOST_BYTES_PER_SECOND / token_seconds
