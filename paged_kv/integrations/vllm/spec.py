"""A page of vLLM is a block of paged_kv. Knows sizes, never who owns a page.

vLLM's block i of a sequence is the tokens [i * b, (i + 1) * b), b = `open_block_size`; its table
only ever grows. A sealed block lies where the first of its open blocks lay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec

from ...blocks.geometry import BlockGeometry
from ...cache.layer_spec import LayerSpec, cache_geometry, usual_kv_dtype
from ...errors import ConfigError
from .config import layer_spec
from .manager import PagedKVManager


@register_kv_cache_spec(manager_class=PagedKVManager, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class PagedKVSpec(FullAttentionSpec):  # type: ignore[misc]
    """One layer's pages: `block_size` is the open block size, `state_content_bytes` a record."""

    layer: LayerSpec
    geometry: BlockGeometry
    model_itemsize: int  # bytes of an element in vLLM's own cache

    @classmethod
    def of(cls, spec: AttentionSpec) -> PagedKVSpec:
        """What vLLM would have of a layer, as pages of records."""
        if type(spec) not in (FullAttentionSpec, SlidingWindowSpec):
            raise ConfigError(
                f"paged_kv stores full attention and windows only, a layer has {spec}"
            )
        layer = layer_spec(spec.num_kv_heads, spec.head_size, spec.head_size_v)
        dtype = usual_kv_dtype([layer], spec.dtype)
        geometry = cache_geometry([layer], dtype)
        names = {field.name for field in fields(AttentionSpec) if field.init}
        values = {name: getattr(spec, name) for name in names}  # all is kept, a window only masks
        values |= {
            "block_size": geometry.open_block_size,
            "tokens_per_state": geometry.open_block_size,
            "state_content_bytes": layer.record_layout(dtype).record_bytes,
            "dtype": dtype,
            "layer": layer,
            "geometry": geometry,
            "model_itemsize": spec.dtype.itemsize,
        }
        return cls(**values)

    def bytes_per_token(self) -> float:
        """Of one sealed token in this layer."""
        return float(self.page_size_bytes / self.geometry.block_size)

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """The most that one request holds: a step that seals gives pages back after it."""
        geometry, longest = self.geometry, vllm_config.model_config.max_model_len
        first = max(longest - 2 * geometry.block_size, 1)
        most = max(map(geometry.blocks_held, range(first, longest + 1)))
        if geometry.seals:
            per_block = geometry.open_blocks_per_block
            tail = geometry.table_width(geometry.block_size + geometry.min_tail_tokens - 1)
            most += max(per_block - 1, tail - 2)
        return int(most * self.page_size_bytes)

    @classmethod
    def merge(cls, specs: Sequence[PagedKVSpec]) -> PagedKVSpec:
        if any(spec != specs[0] for spec in specs):
            raise ConfigError("paged_kv: all layers must have the same heads and precision")
        return specs[0]


def arena_of(kv_cache: torch.Tensor, spec: LayerSpec, dtype: torch.dtype) -> torch.Tensor:
    """vLLM's pages [num_blocks, num_kv_heads, 1, ...] as records, wherever they were allocated."""
    raw = kv_cache.view(torch.uint8)
    return raw.view(raw.shape[0], spec.num_kv_heads, spec.record_layout(dtype).record_bytes)
