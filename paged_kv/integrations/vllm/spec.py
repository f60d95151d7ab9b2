"""A page of vLLM is a block of paged_kv. Knows sizes, never who owns a page.

vLLM's block i of a sequence is the tokens [i * b, (i + 1) * b), b = `open_block_size`; its table
only ever grows. A sealed block lies where the first of its open blocks lay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import torch
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec

from ...blocks.geometry import BlockGeometry
from ...cache.layer_spec import LayerSpec, cache_geometry, usual_kv_dtype
from ...errors import ConfigError
from .config import current_settings, layer_spec
from .manager import PagedKVManager
from .windows import PagedKVWindowManager

WINDOW_FIELDS: Final = ("sliding_window", "extra_retained_tokens")


@dataclass(frozen=True, kw_only=True)
class PagedKVPages:
    """One layer's pages: `block_size` is the open block size, `state_content_bytes` a record."""

    layer: LayerSpec
    geometry: BlockGeometry
    model_itemsize: int  # bytes of an element in vLLM's own cache

    def bytes_per_token(self) -> float:
        """Of one sealed token in this layer."""
        return float(self.page_size_bytes / self.geometry.block_size)  # type: ignore[attr-defined]

    def most_pages(self, longest: int) -> int:
        """That a request of so many tokens holds, if it keeps all of them.

        A step that seals gives pages back after it.
        """
        geometry = self.geometry
        first = max(longest - 2 * geometry.block_size, 1)
        most = max(map(geometry.blocks_held, range(first, longest + 1)))
        if geometry.seals:
            tail = geometry.table_width(geometry.block_size + geometry.min_tail_tokens - 1)
            most += max(geometry.open_blocks_per_block - 1, tail - 2)
        return most

    @classmethod
    def merge(cls, specs: Sequence[Any]) -> Any:
        """The spec of all of them; vLLM makes groups of what an AssertionError keeps apart."""
        first = specs[0]
        for spec in specs:
            if not isinstance(spec, PagedKVPages) or spec.layer != first.layer:
                raise ConfigError("paged_kv: all layers must have the same heads and precision")
            if spec != first:
                raise AssertionError(f"{spec} beside {first}")
        return first


@register_kv_cache_spec(manager_class=PagedKVManager, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class PagedKVSpec(PagedKVPages, FullAttentionSpec):  # type: ignore[misc]
    """Of a layer that keeps all, whether or not it sees all."""

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """The most that one request holds."""
        return int(self.most_pages(vllm_config.model_config.max_model_len) * self.page_size_bytes)


@register_kv_cache_spec(
    manager_class=PagedKVWindowManager, uniform_type_base_spec=SlidingWindowSpec
)
@dataclass(frozen=True, kw_only=True)
class PagedKVWindowSpec(PagedKVPages, SlidingWindowSpec):  # type: ignore[misc]
    """Of a layer that keeps what its window may still see."""

    def max_admission_blocks_per_request(
        self, max_in_flight_tokens: int, max_model_len: int, num_steps: int = 2
    ) -> int:
        """The most pages of a request, with so many steps and tokens in flight.

        Every step in flight can have left a tail open that the next one seals.
        """
        geometry, tail, seen = self.geometry, 0, self.sliding_window - 1
        if geometry.seals:
            tail = geometry.table_width(geometry.block_size + geometry.min_tail_tokens - 1)
            seen = max(seen, geometry.min_tail_tokens)
        num_tokens = min(seen + max_in_flight_tokens, max_model_len)
        num_blocks = cdiv(num_tokens, geometry.block_size) + 1
        most = min(num_blocks * geometry.open_blocks_per_block, num_blocks + (num_steps + 1) * tail)
        return int(min(geometry.num_head_blocks + most, self.most_pages(max_model_len)))

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        most = self.max_admission_blocks_per_request(
            vllm_config.max_in_flight_tokens,
            vllm_config.model_config.max_model_len,
            vllm_config.max_concurrent_batches,
        )
        return int(most * self.page_size_bytes)


def paged_spec(spec: AttentionSpec) -> PagedKVSpec | PagedKVWindowSpec:
    """What vLLM would have of a layer, as pages of records."""
    values = {field.name: getattr(spec, field.name) for field in fields(spec) if field.init}
    kind: type[PagedKVSpec | PagedKVWindowSpec] = PagedKVSpec
    if type(spec) is SlidingWindowSpec:
        if current_settings().keeps_all:
            values = {name: values[name] for name in values if name not in WINDOW_FIELDS}
        else:
            kind = PagedKVWindowSpec
    elif type(spec) is not FullAttentionSpec:
        raise ConfigError(f"paged_kv stores full attention and windows only, a layer has {spec}")
    layer = layer_spec(spec.num_kv_heads, spec.head_size, spec.head_size_v)
    dtype = usual_kv_dtype([layer], spec.dtype)
    geometry = cache_geometry([layer], dtype)
    values |= {
        "block_size": geometry.open_block_size,
        "tokens_per_state": geometry.open_block_size,
        "state_content_bytes": layer.record_layout(dtype).record_bytes,
        "dtype": dtype,
        "layer": layer,
        "geometry": geometry,
        "model_itemsize": spec.dtype.itemsize,
    }
    return kind(**values)


def arena_of(kv_cache: torch.Tensor, spec: LayerSpec, dtype: torch.dtype) -> torch.Tensor:
    """vLLM's pages [num_blocks, num_kv_heads, 1, ...] as records, wherever they were allocated."""
    raw = kv_cache.view(torch.uint8)
    return raw.view(raw.shape[0], spec.num_kv_heads, spec.record_layout(dtype).record_bytes)
