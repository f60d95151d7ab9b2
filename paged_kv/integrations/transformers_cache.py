"""`PagedCache`: quantized blocks where transformers' `generate()` takes a cache.

Knows transformers' `Cache`, which it is; what happens in blocks is `cached_batch`'s.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from operator import index
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..blocks.sink_window import SinkWindow
from ..cache.formats import KVFormat
from ..cache.layer_formats import KVFormats, formats_name, resolve_formats
from ..cache.layer_groups import num_blocks_for
from ..cache.layer_spec import FULL_PRECISION_DTYPES, LayerSpec, cache_geometry, usual_kv_dtype
from ..cache.memory_stats import MemoryStats
from ..errors import ConfigError, InvalidRequestError, UnsupportedModelError
from ..models.active_step import Probe, running
from ..models.attached_model import fingerprint_of
from ..models.attachment import attachments
from ..models.calibration import Calibration
from ..models.huggingface import IMPLEMENTATION, check_probe, refuse_unsupported, rotations_of
from ..models.paged_layer import PagedLayer
from ..models.token_states import states_of_a_token
from ..units import parse_memory
from ..validation import is_integer, require, require_count, require_instance
from .cached_batch import CachedBatch
from .sequence_pool import PoolSettings


class PagedCache(Cache):
    """A cache for `model.generate(..., past_key_values=PagedCache(model, kv_format="int2"))`.

    It takes the place of transformers' `DynamicCache` and keeps keys and values in quantized
    blocks. A model whose attention was set to "paged_kv" before, by its `set_attn_implementation`,
    reads them there; layers of all others are given them back as tensors. In the native format
    nothing differs. Beams and copies of a sequence share blocks. Padding, which an attention mask
    [N, L] given to the model tells, is not stored.

    The pool is made when the first tokens come, for as many sequences as there are then: of
    `num_blocks`, or `kv_memory` bytes ("2GiB"), or else for sequences of `max_cache_len` tokens,
    but at most 1 GiB and half of the memory that is free. `max_cache_len` is the model's own limit
    unless given. `kv_dtype` is the precision of what is not quantized. A `calibration`, or its file
    (`paged-kv calibrate`), is what formats below 8 bits do better with.

    With a `sink_window`, for models whose attention reads blocks, every sequence goes on for ever
    in constant memory, as in an `LLM`.

    Raises `UnsupportedModelError` for models whose state is not keys and values of all tokens, and
    `ConfigError` for settings that cannot be.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        kv_format: KVFormats = "int8",
        *,
        max_cache_len: int | None = None,
        num_blocks: int | None = None,
        kv_memory: int | str | None = None,
        kv_dtype: torch.dtype | None = None,
        calibration: Calibration | str | Path | None = None,
        sink_window: SinkWindow | None = None,
    ) -> None:
        require_instance("model", model, PreTrainedModel)
        formats, attends = resolve_formats(kv_format), attends_to_blocks(model)
        if sink_window is not None:
            require_windows(sink_window, attends=attends)
        if kv_dtype is not None:
            is_known = isinstance(kv_dtype, torch.dtype) and kv_dtype in FULL_PRECISION_DTYPES
            require("kv_dtype", kv_dtype, is_known, "float32, bfloat16 or float16")
        max_cache_len = longest_sequence(model, max_cache_len)
        if num_blocks is not None:
            num_blocks = require_count("num_blocks", num_blocks)
        if kv_memory is not None:
            require("kv_memory", kv_memory, num_blocks is None, "left out beside num_blocks")
            kv_memory = parse_memory(kv_memory, "kv_memory")
        known = find_calibration(model, calibration)
        states = find_states(model, attends=attends)
        num_sinks = 0 if sink_window is None else sink_window.num_sink_tokens
        kv_formats = formats.of(len(states), num_sink_tokens=num_sinks)
        layers = specs_of(states, kv_formats, known)
        dtype = kv_dtype or usual_kv_dtype(layers, states[0][0].dtype)
        geometry, rotations = cache_geometry(layers, dtype), None
        if sink_window is not None:
            sink_window, rotations = sink_window.fitted(geometry), rotations_of(model)
        if kv_memory is not None:
            num_blocks = num_blocks_for(kv_memory, layers, dtype)
        self._batch = CachedBatch(
            PoolSettings(
                layers=layers,
                dtype=dtype,
                device=states[0][0].device,
                max_cache_len=max_cache_len,
                num_blocks=num_blocks,
                sink_window=sink_window,
                rotations=rotations,
            ),
            attends=attends,
        )
        super().__init__(layers=[PagedLayer(self._batch, layer) for layer in range(len(layers))])
        tell_of_padding(model)

    def __repr__(self) -> str:
        settings = self._batch.settings
        return (
            f"PagedCache({formats_name([layer.kv_format for layer in settings.layers])}, "
            f"{len(settings.layers)} layers, "
            f"{self._batch.batch_size} sequences of {self.get_seq_length()})"
        )

    def expect(self, model: PreTrainedModel, attention_mask: object) -> None:
        """A model is called with this mask: positions where a [N, L] tensor has 0 are padding.

        Raises `ConfigError` where the model's attention was changed since the cache was made.
        """
        if attends_to_blocks(model) != self._batch.attends:
            raise ConfigError(
                f"the model's attention is {model.config.get_text_config()._attn_implementation!r} "
                "now, and was another when this cache was made: make a new one"
            )
        is_mask = isinstance(attention_mask, Tensor) and attention_mask.ndim == 2
        self._batch.expect(cast(Tensor, attention_mask) if is_mask else None)

    def memory_stats(self) -> MemoryStats:
        """What the pool holds, in bytes over all layers; nothing before the first tokens came."""
        pool = self._batch.pool
        if pool is not None:
            return pool.cache.memory_stats(pool.manager)
        return MemoryStats(
            total=0, free=0, allocated=0, used=0, wasted=0, head=0, body=0, tail=0, cached=0
        )

    def reset(self) -> None:
        """Forget all tokens; the next ones may be of another batch."""
        self._batch.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i be what row `beam_idx[i]` [N] was; rows that are named twice share blocks."""
        self._batch.select(row_numbers("beam_idx", beam_idx))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, numbers or a mask of all rows, in their order."""
        self._batch.select(row_numbers("indices", indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Let each row stand `repeats` times in its place; the copies share its blocks."""
        require("repeats", repeats, is_integer(repeats) and repeats > 0, "at least 1")
        rows = range(self._batch.batch_size)
        self._batch.select([row for row in rows for _ in range(repeats)])

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Take back the last `-tokens_to_remove` tokens of each row, or all there are.

        A positive number is what transformers used to mean, how many to keep. `generate` gives
        it as a tensor.
        """
        try:
            number = index(tokens_to_remove)
        except TypeError:
            raise InvalidRequestError(
                f"tokens_to_remove must be an integer, got {tokens_to_remove!r}"
            ) from None
        length = self.get_seq_length()
        num_kept = number if number > 0 else length + number
        self._batch.crop(length - min(max(num_kept, 0), length))

    def activate_past_recording(self) -> None:
        """From now on the newest tokens may be taken back: what can go is not quantized yet."""
        self._batch.keeps_drafts = True


def row_numbers(name: str, rows: Tensor) -> list[int]:
    """Rows as integers; a mask names those where it is true."""
    if not isinstance(rows, Tensor) or rows.ndim != 1 or rows.is_floating_point():
        raise InvalidRequestError(f"{name} must be a tensor of row numbers, got {rows!r}")
    if rows.dtype is torch.bool:
        rows = rows.nonzero()[:, 0]
    return cast("list[int]", rows.tolist())


# -- what there is to know of a model -------------------------------------------------------------


def longest_sequence(model: PreTrainedModel, max_cache_len: int | None) -> int:
    """Tokens of the longest sequence: as given, or what the model says."""
    if max_cache_len is not None:
        return require_count("max_cache_len", max_cache_len)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        raise ConfigError("this model states no length limit; give max_cache_len")
    return int(limit)


def attends_to_blocks(model: PreTrainedModel) -> bool:
    """Whether the model's attention is ours, which reads blocks."""
    return bool(model.config.get_text_config()._attn_implementation == IMPLEMENTATION)


def require_windows(sink_window: SinkWindow, *, attends: bool) -> None:
    """Raise `ConfigError` where attention reads no blocks."""
    require_instance("sink_window", sink_window, SinkWindow)
    if not attends:
        raise ConfigError(
            f"{sink_window} needs attention that reads blocks: "
            'model.set_attn_implementation("paged_kv") before the cache is made'
        )


def find_calibration(
    model: PreTrainedModel, calibration: Calibration | str | Path | None
) -> Calibration | None:
    """The calibration, read where it is a file; raises unless it was made for this model."""
    if calibration is None:
        return None
    if isinstance(calibration, (str, Path)):
        calibration = Calibration.load(calibration)
    require_instance("calibration", calibration, Calibration)
    calibration.require_fingerprint(fingerprint_of(model))
    return calibration


def find_states(model: PreTrainedModel, *, attends: bool) -> list[tuple[Tensor, Tensor]]:
    """What each layer stores for one token: keys [1, H, 1, D] and values.

    Raises `UnsupportedModelError` where that is not all that a model remembers, or, where attention
    `attends` to blocks, this would not be what the model means.
    """
    if not attends:
        return states_of_a_token(model)
    refuse_fused(model)
    probe = Probe()
    with running(probe):
        states = states_of_a_token(model)
    check_probe(model, probe)
    shapes = [(keys.shape[1], keys.shape[3], values.shape[3]) for keys, values in states]
    if list(probe.shapes.values()) != shapes:
        raise UnsupportedModelError(
            f"{type(model).__name__} attends to other keys than it stores; give it another "
            "attention implementation"
        )
    return states


def refuse_fused(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModelError` for models whose attention has to be their own."""
    if model in attachments:
        raise UnsupportedModelError(
            "this model is attached to a paged_kv LLM; close() that first, or use that"
        )
    refuse_unsupported(model)
    if model.config.get_text_config() is not model.config:
        raise UnsupportedModelError(
            f"{type(model).__name__} computes more than text, whose masks paged_kv does not know; "
            "give it another attention implementation"
        )


def specs_of(
    states: list[tuple[Tensor, Tensor]],
    kv_formats: Sequence[KVFormat],
    known: Calibration | None,
) -> tuple[LayerSpec, ...]:
    """What the blocks of each layer hold."""
    if known is not None and len(known.layers) != len(states):
        raise ConfigError(
            f"a calibration of {len(known.layers)} layers is not one of this model's {len(states)}"
        )
    return tuple(
        LayerSpec(
            kv_format=kv_formats[layer],
            num_kv_heads=keys.shape[1],
            key_dim=keys.shape[3],
            value_dim=values.shape[3],
            calibration=None if known is None else known.layers[layer],
        )
        for layer, (keys, values) in enumerate(states)
    )


# -- padding --------------------------------------------------------------------------------------

_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def tell_of_padding(model: PreTrainedModel) -> None:
    """Let a model tell the caches that it is called with of their attention masks.

    Nothing else reaches a cache that says which positions are padding.
    """
    if model not in _told:
        model.register_forward_pre_hook(pass_on_mask, with_kwargs=True)
        _told.add(model)


def pass_on_mask(model: PreTrainedModel, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    cache = kwargs.get("past_key_values")
    if isinstance(cache, PagedCache):
        cache.expect(model, kwargs.get("attention_mask"))
