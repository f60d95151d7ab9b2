"""A fleet of sequences over one cache, whose unused blocks are poisoned.

Reads stored blocks with code of its own (numpy, float64), so that tests do not compare the
library with itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paged_kv.blocks.block_manager import BlockManager
from paged_kv.blocks.sink_window import SinkWindow
from paged_kv.blocks.step_plan import StepPlan
from paged_kv.cache.attention import paged_attention
from paged_kv.cache.formats import KVFormat
from paged_kv.cache.kv_cache import PagedKVCache
from paged_kv.cache.layer_spec import LayerSpec, cache_geometry
from paged_kv.kernels.eager.rotation import rotate
from tests.support.arrays import ids
from tests.support.token_streams import Stream

NAN_BYTE = 0xFF  # an arena full of it reads as NaN in float32, bfloat16 and float16


class Fleet:
    """Sequences over one cache. Every block is poisoned before its first use and once freed."""

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        *,
        dtype: torch.dtype = torch.float32,
        num_blocks: int = 200,
        max_num_seqs: int = 8,
        max_model_len: int = 2048,
        poison: int = NAN_BYTE,
        backend: str | None = None,
        device: str = "cpu",
    ) -> None:
        self.poison = poison
        self.cache = PagedKVCache(
            layers, num_blocks=num_blocks, dtype=dtype, device=device, backend=backend
        )
        for arena in self.cache.arenas:
            arena.fill_(poison)
        self.manager = BlockManager(
            cache_geometry(layers, dtype),
            num_blocks=num_blocks,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            retentions=self.cache.groups.retentions,
        )
        self.streams: dict[int, Stream] = {}
        self.offsets: dict[int, int] = {}  # positions that a stream's tokens are told to be on

    def add(self, stream: Stream, sink_window: SinkWindow | None = None) -> int:
        seq_id = self.manager.add_sequence(self.manager.chain_tokens((), sink_window=sink_window))
        self.streams[seq_id] = stream
        return seq_id

    def remove(self, seq_id: int) -> None:
        freed = self.manager.all_block_ids(seq_id)
        self.manager.remove_sequence(seq_id)
        del self.streams[seq_id]
        self.poison_blocks(freed)

    def length(self, seq_id: int) -> int:
        """Tokens that are computed, evicted ones included."""
        manager = self.manager
        return int(manager.num_computed_tokens[seq_id] + manager.num_evicted_tokens[seq_id])

    def plan(self, counts: dict[int, int]) -> StepPlan:
        plan = self.manager.reserve(ids(*counts), ids(*counts.values()))
        assert plan is not None, "the pool of this test is too small"
        return plan

    def step(self, counts: dict[int, int], **options: object) -> dict[int, list[Tensor]]:
        """Compute `counts[seq_id]` more tokens of each; outputs by seq_id, then by layer."""
        return self.run(self.plan(counts), **options)

    def run(self, plan: StepPlan, **options: object) -> dict[int, list[Tensor]]:
        """Run and commit a plan over all layers."""
        step = self.cache.begin(plan)
        outputs: dict[int, list[Tensor]] = {int(seq_id): [] for seq_id in plan.seq_ids}
        starts = plan.positions[plan.query_start_loc[:-1]]
        starts = starts - [self.offsets.get(int(seq_id), 0) for seq_id in plan.seq_ids]
        for layer in range(len(self.cache.layers)):
            query, key, value, sink_query = (
                torch.cat([tokens(self.streams[int(seq_id)])[layer][start : start + count]
                           for seq_id, start, count in zip(
                               plan.seq_ids, starts, plan.num_scheduled_tokens, strict=True)]
                          ).to(self.cache.device)
                for tokens in (lambda s: s.queries, lambda s: s.keys, lambda s: s.values,
                               lambda s: s.sink_queries or s.queries)
            )  # fmt: skip
            if step.head_shifts is not None:
                options["sink_query"] = sink_query
            masks = {**options, **self.masks(layer)}
            output = paged_attention(query, key, value, self.cache, layer, step, **masks)
            parts = output.cpu().split(plan.num_scheduled_tokens.tolist())
            for seq_id, part in zip(plan.seq_ids, parts, strict=True):
                outputs[int(seq_id)].append(part)
        evicted_ids = self.manager.commit(plan)
        let_go = np.concatenate([evicted_ids, *(part.freed_block_ids for part in plan.parts)])
        self.poison_blocks(let_go[self.manager.pool.ref_counts[let_go] == 0])
        return outputs

    def masks(self, layer: int) -> dict[str, object]:
        """What a layer's attention is called with, beside what a step's is."""
        return {}

    def feed(self, counts: dict[int, Sequence[int]]) -> None:
        """Feed each sequence its chunks, one chunk of every sequence a step."""
        for turn in range(max(map(len, counts.values()))):
            self.step({seq_id: c[turn] for seq_id, c in counts.items() if turn < len(c)})

    def poison_blocks(self, block_ids: NDArray[np.int32]) -> None:
        for arena in self.cache.arenas:
            arena[torch.as_tensor(block_ids, dtype=torch.int64)] = self.poison

    def sealed_bytes(self, seq_id: int, layer: int = 0) -> Tensor:
        """Every byte of the sealed records of a sequence: [blocks, heads, record_bytes]."""
        body = torch.as_tensor(self.manager.body_ids(seq_id), dtype=torch.int64)
        return self.cache.arenas[layer][body].clone()

    def context(self, seq_id: int, layer: int = 0) -> tuple[NDArray, NDArray]:
        """Stored keys and values [tokens, heads, dim] in float64, in the order of positions.

        Head and tail are the stream's own tokens in the stored precision, not what the cache
        holds; the body is what the sealed records say.
        """
        length = self.length(seq_id)
        stream = self.streams[seq_id]
        keys = stream.keys[layer][:length].to(self.cache.dtype).double().numpy()
        spec = self.cache.layers[layer]
        kv_format = spec.kv_format
        values = as_stored(stream.values[layer][:length], kv_format, self.cache.dtype)
        values = values.double().numpy()
        if kv_format.rotates_values:
            values = hadamard_product(values)
        position = self.manager.geometry.num_head_tokens
        for block_id in self.manager.body_ids(seq_id):
            end = position + self.manager.geometry.block_size
            read = small_blocks if self.cache.has_small_blocks(spec) else dequantized_block
            keys[position:end], values[position:end] = read(self.cache, layer, int(block_id))
            position = end
        return keys, values


def plane_codes(packed: NDArray[np.uint8], bits: int) -> NDArray[np.int64]:
    """Codes [tokens, dim] of one block and head from its bytes [rows, dim], plane by plane."""
    planes = [packed.astype(np.int64) >> shift & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return np.concatenate(planes)


def small_blocks(
    cache: PagedKVCache, layer: int, block_id: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The same of a block in full precision, whose tokens lie in small blocks on a CPU."""
    spec, geometry = cache.layers[layer], cache.geometry
    num_small, size = geometry.open_blocks_per_block, geometry.open_block_size
    block = cache.arenas[layer][block_id].view(cache.dtype).double().numpy()
    small = block.reshape(num_small, spec.num_kv_heads, -1)
    keys, values = np.split(small, [size * spec.key_dim], axis=2)
    keys = keys.reshape(num_small, spec.num_kv_heads, spec.key_dim, size)
    values = values.reshape(num_small, spec.num_kv_heads, size, spec.value_dim)
    return (
        keys.transpose(0, 3, 1, 2).reshape(-1, spec.num_kv_heads, spec.key_dim),
        values.transpose(0, 2, 1, 3).reshape(-1, spec.num_kv_heads, spec.value_dim),
    )


def dequantized_block(
    cache: PagedKVCache, layer: int, block_id: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Keys and values [block_size, heads, dim] of a sealed block, in float64, as they were given.

    Values that are stored rotated are turned back.
    """
    spec, sealed = cache.layers[layer], cache.records[layer].sealed
    assert sealed is not None
    keys, values = [], []
    for head in range(spec.num_kv_heads):
        view = {
            name: None if tensor is None else tensor[block_id, head].cpu().numpy()
            for name, tensor in sealed._asdict().items()
        }
        wide = None if spec.wide_channels is None else spec.wide_channels[head]
        keys.append(dequantized_keys(view, spec.kv_format, wide))
        values.append(dequantized_values(view, spec.kv_format))
    return np.stack(keys, axis=1), np.stack(values, axis=1)


def dequantized_keys(
    view: dict[str, NDArray], kv_format: KVFormat, wide: NDArray[np.int64] | None
) -> NDArray[np.float64]:
    """Keys [block_size, dim] of one block and head from its sections."""
    bits, scale = kv_format.key_bits, view["key_scale"].astype(np.float64)
    codes = plane_codes(view["key_codes"], bits)
    if wide is not None:
        codes[:, wide] += plane_codes(view["wide_codes"], 2) << bits
    if bits == 8:
        codes -= 128
    if kv_format.has_token_keys:
        return codes * scale[:, None]
    group = np.arange(len(codes)) * len(scale) // len(codes)
    return codes * scale[group] + view["key_zero"].astype(np.float64)[group]


def dequantized_values(view: dict[str, NDArray], kv_format: KVFormat) -> NDArray[np.float64]:
    """Values [block_size, dim] of one block and head from its sections."""
    bits, scale = kv_format.value_bits, view["value_scale"].astype(np.float64)[:, None]
    codes = plane_codes(view["value_codes"], 2 if bits == 3 else bits)
    if bits == 3:
        codes += plane_codes(view["upper_value_codes"], 1) << 2
    if bits == 8:
        values = (codes - 128) * scale
    elif kv_format.rotates_values:
        values = (codes - (2**bits - 1) / 2) * scale
    else:
        values = codes * scale + view["value_zero"].astype(np.float64)[:, None]
    return hadamard_product(values) if kv_format.rotates_values else values


def as_stored(values: Tensor, kv_format: KVFormat, dtype: torch.dtype) -> Tensor:
    """Values as the open blocks of a format hold them: rotated, perhaps, and rounded."""
    return (rotate(values) if kv_format.rotates_values else values).to(dtype)


def hadamard_product(rows: NDArray) -> NDArray[np.float64]:
    """Rows [..., dim] times Hadamard matrices of the powers of two that make up `dim`."""
    rows, start = np.array(rows, dtype=np.float64), 0
    for size in (256, 128, 64, 32, 16, 8):
        if rows.shape[-1] & size:
            part = rows[..., start : start + size]
            half = size
            while half > 1:  # sums and differences of halves, of quarters, ...
                half //= 2
                pairs = part.reshape(*part.shape[:-1], size // half // 2, 2, half)
                first, second = pairs[..., 0, :], pairs[..., 1, :]
                part = np.stack([first + second, first - second], -2).reshape(part.shape)
            rows[..., start : start + size] = part / np.sqrt(size)
            start += size
    return rows
