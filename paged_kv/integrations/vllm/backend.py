"""vLLM's attention backend: paged_kv's kernels on vLLM's pages, driven by vLLM's block tables.

Knows one step and one layer at a time, never requests.

Many arguments because vLLM calls with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheLayout

from ...blocks.geometry import BlockGeometry, BlockIds, IntArray
from ...cache.backend import choose_backend
from ...cache.embedding import (
    EmbeddedLayer,
    KernelPlan,
    NewTokens,
    ScoreRules,
    step_from_block_table,
    warm_up,
)
from ...cache.layer_spec import cache_geometry, usual_kv_dtype
from ...errors import ConfigError
from .config import layer_spec
from .spec import PagedKVPages, PagedKVWindowSpec, arena_of, paged_spec
from .windows import WindowTables


class PagedKVBackend(AttentionBackend):  # type: ignore[misc]
    # Attention comes first: a chunk sees itself in full precision.
    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        return str(AttentionBackendEnum.CUSTOM.name)

    @staticmethod
    def get_impl_cls() -> type[PagedKVImpl]:
        return PagedKVImpl

    @staticmethod
    def get_builder_cls() -> type[PagedKVMetadataBuilder]:
        return PagedKVMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int]:
        return [open_block_size() if kv_cache_spec is None else kv_cache_spec.block_size]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        return spec if isinstance(spec, PagedKVPages) else paged_spec(spec)


def open_block_size() -> int:
    """Of the model that is being configured."""
    from vllm.config import get_current_vllm_config

    model = get_current_vllm_config().model_config
    layer = layer_spec(1, model.get_head_size(), model.get_head_size())
    return cache_geometry([layer], usual_kv_dtype([layer], model.dtype)).open_block_size


@dataclass
class PagedKVMetadata:
    num_tokens: int
    plan: KernelPlan  # for all layers of the step


class PagedKVMetadataBuilder(AttentionMetadataBuilder):  # type: ignore[misc]
    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.kernels: Final = choose_backend(device)
        warm_up(kv_cache_spec.layer, kv_cache_spec.dtype, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> PagedKVMetadata:
        step = common_attn_metadata
        starts = step.query_start_loc_cpu[: step.num_reqs + 1].numpy().astype(np.int64)
        seq_lens = step.seq_lens[: step.num_reqs].cpu().numpy().astype(np.int64)
        table = step.block_table_tensor[: step.num_reqs].cpu().numpy()
        geometry, query_lens = self.kv_cache_spec.geometry, np.diff(starts)
        shared = num_shared(geometry, seq_lens - query_lens, table)
        if isinstance(self.kv_cache_spec, PagedKVWindowSpec):
            tables = WindowTables(seq_lens, table, shared)
            window = self.kv_cache_spec.sliding_window
            seq_lens, table, shared = tables.behind(geometry, window, query_lens)
        inputs = step_from_block_table(
            geometry, starts, seq_lens, table, self.device, min_sealed=shared
        )
        return PagedKVMetadata(int(starts[-1]), self.kernels.plan(inputs))


def num_shared(geometry: BlockGeometry, context_lens: IntArray, table: BlockIds) -> IntArray | None:
    """[N] sealed blocks at the least: where the second place is null, a block was sealed.

    A prefix that was taken over is sealed to its end, which the lengths alone do not say.
    """
    most = int((context_lens.max(initial=0) - geometry.num_head_tokens) // geometry.block_size)
    if not geometry.seals or most <= 0:
        return None
    indices = np.arange(most)
    ends = geometry.num_head_tokens + (indices + 1) * geometry.block_size
    is_sealed = table[:, geometry.body_places(indices) + 1] == 0
    is_sealed &= ends <= context_lens[:, None]
    shared: IntArray = (is_sealed * (indices + 1)).max(axis=1)
    return shared


class PagedKVImpl(AttentionImpl):  # type: ignore[misc]
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        refused = {
            "ALiBi": alibi_slopes is not None,
            "KV sharing between layers": kv_sharing_target_layer_name is not None,
            f"attention of type {attn_type}": attn_type != AttentionType.DECODER,
        }
        for what, is_asked_for in refused.items():
            if is_asked_for:
                raise ConfigError(f"paged_kv cannot be used: the model has {what}")
        self.num_heads: int = num_heads
        self.head_size: int = head_size
        self.num_kv_heads: int = num_kv_heads
        self.scale: float = float(scale)
        self.kv_cache_dtype: str = kv_cache_dtype
        # Of as many tokens, itself included, in vLLM as here.
        self.rules: Final = ScoreRules(
            float(scale), logits_soft_cap or None, sliding_window, sink_logits=sinks
        )
        self.layer: Final = layer_spec(num_kv_heads, head_size, head_size)
        self.embedded: EmbeddedLayer | None = None

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: PagedKVMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if attn_metadata is None:  # vLLM measures its memory
            return output.zero_()
        if self.embedded is None:
            geometry = cache_geometry([self.layer], kv_cache.dtype)
            arena = arena_of(kv_cache, self.layer, kv_cache.dtype)
            self.embedded = EmbeddedLayer(arena, self.layer, kv_cache.dtype, geometry)
        n = attn_metadata.num_tokens
        new = NewTokens(query[:n], key[:n], value[:n])
        with torch.no_grad():
            self.embedded.attend_and_store(new, attn_metadata.plan, self.rules, out=output[:n])
        return output
