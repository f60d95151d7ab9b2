"""Caches that hold the contents of attention cases, and how far their attention is from exact.

Knows blocks and tensors, never times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from ..cache.formats import INT2, INT4, INT8, NATIVE, KVFormat
from ..cache.kv_cache import PagedKVCache, Step
from ..cache.layer_spec import LayerSpec, cache_geometry
from ..kernels import naive
from ..kernels.eager.quantize import dequantize_keys, dequantize_values
from ..kernels.new_tokens import NewTokens
from ..kernels.rules import ScoreRules
from .attention_cases import Case, Contents

FORMATS: Final[dict[str, tuple[KVFormat, torch.dtype]]] = {
    "native fp32": (NATIVE, torch.float32),
    "native bf16": (NATIVE, torch.bfloat16),
    "int8": (INT8, torch.bfloat16),
    "int4": (INT4, torch.bfloat16),
    "int2": (INT2, torch.bfloat16),
}
CHUNK: Final = 256  # tokens of each sequence that are stored at once
NUM_CHECKED: Final = 3  # sequences whose error is measured


@dataclass(frozen=True)
class Paged:
    """A cache that holds the contexts of a case, and the step that is timed on it."""

    cache: PagedKVCache
    step: Step
    contents: Contents
    new_keys: list[Tensor]  # [T, H, D] by layer
    new_values: list[Tensor]

    def attend(self, layer: int) -> Tensor:
        query = self.contents.queries[layer]
        key, value = self.new_keys[layer], self.new_values[layer]
        return attend(self.cache, layer, query, key, value, self.step)

    def attend_and_store(self, layer: int) -> None:
        self.cache.backend.attend_and_store(
            NewTokens(self.contents.queries[layer], self.new_keys[layer], self.new_values[layer]),
            self.cache.records[layer],
            self.step.plan,
            ScoreRules(self.cache.layers[layer].key_dim ** -0.5),
        )

    def store(self, layer: int) -> None:
        store(self.cache, layer, self.new_keys[layer], self.new_values[layer], self.step)


def attend(
    cache: PagedKVCache, layer: int, query: Tensor, key: Tensor, value: Tensor, step: Step
) -> Tensor:
    """The attention call of the cache's backend, nothing around it."""
    rules = ScoreRules(query.shape[-1] ** -0.5)
    new = NewTokens(query, key, value)
    return cache.backend.attend(new, cache.records[layer], step.plan, rules)


def store(cache: PagedKVCache, layer: int, keys: Tensor, values: Tensor, step: Step) -> None:
    """The store call of the cache's backend."""
    new = NewTokens(keys, keys, values)  # no query is stored
    cache.backend.store_tokens(new, cache.records[layer], step.inputs)


def new_cache(case: Case, label: str, backend: str) -> PagedKVCache:
    kv_format, dtype = FORMATS[label]
    layer = LayerSpec(
        kv_format=kv_format,
        num_kv_heads=case.heads[1],
        key_dim=case.head_dim,
        value_dim=case.head_dim,
    )
    geometry = cache_geometry([layer], dtype)
    spare = CHUNK // geometry.open_block_size + 4  # what a step may take before it gives back
    num_blocks = sum(geometry.max_blocks(length) + spare for length in case.lengths)
    layers = [layer] * case.num_layers
    return PagedKVCache(layers, num_blocks=num_blocks, dtype=dtype, backend=backend)


def fill(case: Case, contents: Contents, caches: list[PagedKVCache]) -> list[Paged]:
    """Store the contexts in all caches, in the same scattered blocks, and begin the timed step."""
    manager = caches[0].new_manager(max_num_seqs=len(case.lengths), max_model_len=max(case.lengths))
    free_ids = manager.pool.allocate(manager.num_free_blocks)
    manager.pool.release(np.random.default_rng(1).permutation(free_ids))
    seq_ids = np.array([manager.add_sequence() for _ in case.lengths])
    remaining = case.context_lens(manager.geometry)
    while remaining.any():
        rows = np.flatnonzero(remaining)
        counts = remaining[rows].clip(max=CHUNK)
        plan = manager.reserve(seq_ids[rows], counts)
        assert plan is not None
        steps = [cache.begin(plan) for cache in caches]
        for layer in range(case.num_layers):
            keys, values = contents.tokens(layer, rows[plan.token_rows], plan.positions)
            for cache, step in zip(caches, steps, strict=True):
                store(cache, layer, keys, values, step)
        manager.commit(plan)
        remaining[rows] -= counts
    plan = manager.reserve(seq_ids, np.full(len(seq_ids), case.num_new))
    assert plan is not None
    assert case.kind != "append" or not len(plan.seal_block_ids)
    new = [
        contents.tokens(layer, plan.token_rows, plan.positions) for layer in range(case.num_layers)
    ]
    new_keys, new_values = [pair[0] for pair in new], [pair[1] for pair in new]
    return [Paged(cache, cache.begin(plan), contents, new_keys, new_values) for cache in caches]


def needed_bytes(paged: Paged) -> int:
    """What attention has to read of one layer's arena: sealed sections and open tokens."""
    indices, layer = paged.step.inputs, paged.cache.layers[0]
    layout = layer.record_layout(paged.cache.dtype)
    num_sealed = int(indices.num_sealed.sum())
    num_open_tokens = int(indices.context_lens_host.sum()) - num_sealed * indices.block_size
    sealed_bytes = num_sealed * sum(layout.section_bytes.values())
    return layer.num_kv_heads * (sealed_bytes + num_open_tokens * layout.token_bytes)


# -- errors ---------------------------------------------------------------------------------------


def relative_error(values: Tensor, exact: Tensor) -> float:
    return float((values.double() - exact).norm() / exact.norm())


def attention_error(paged: Paged) -> float:
    """Against float64 attention over the dequantized cache, on layer 0 and some sequences."""
    indices = paged.step.inputs
    last = len(indices.query_lens) - 1
    rows = np.unique(np.linspace(0, last, NUM_CHECKED).astype(int))
    new = NewTokens(paged.contents.queries[0], paged.new_keys[0], paged.new_values[0])
    rules = ScoreRules(new.query.shape[-1] ** -0.5)
    starts, found = indices.query_start_loc.tolist(), paged.attend(0)
    parts = []
    for row in rows.tolist():
        tokens = slice(starts[row], starts[row + 1])
        output = naive.attend_sequence(new, paged.cache.records[0], indices, row, rules)
        parts.append((found[tokens], output))
    return relative_error(*(torch.cat(side) for side in zip(*parts, strict=True)))


def stored_tokens(paged: Paged) -> Tensor:
    """Whatever the step wrote to layer 0, in float64: appended tokens and dequantized blocks."""
    indices, records = paged.step.inputs, paged.cache.records[0]
    block_ids = indices.stored_slots // indices.open_block_size
    offsets = indices.stored_slots % indices.open_block_size
    parts = [blocks[block_ids, :, offsets] for blocks in (records.open_keys, records.open_values)]
    ids, sealed = indices.seal_block_ids, records.sealed
    if len(ids):
        assert sealed is not None
        blocks = sealed.at(ids)
        parts += [
            dequantize_keys(blocks, records.key_bits, records.wide_channels, torch.float64),
            dequantize_values(blocks, records.value_bits, torch.float64),
        ]
    return torch.cat([part.double().flatten() for part in parts])
