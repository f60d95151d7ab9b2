"""What several test files share: streams of tokens, and a fleet of sequences over one cache.

Reads stored blocks with code of its own (numpy, float64), so that tests do not compare the
library with itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paged_kv.blocks.block_manager import BlockManager
from paged_kv.blocks.sink_window import SinkWindow
from paged_kv.blocks.step_plan import StepPlan
from paged_kv.cache.attention import paged_attention
from paged_kv.cache.formats import INT2, INT4, INT8, NATIVE
from paged_kv.cache.kv_cache import PagedKVCache
from paged_kv.cache.layer_spec import LayerSpec, cache_geometry
from paged_kv.kernels.step_inputs import StepInputs

NAN_BYTE = 0xFF  # an arena full of it reads as NaN in float32, bfloat16 and float16

FORMATS_BY_LABEL = {
    "native": NATIVE,
    "int8": INT8,
    "int4": INT4,
    "int2": INT2,
    "int8-block64": INT8.with_options(block_size=64, key_group_size=64, min_tail_tokens=5),
    "int4-g64-clipped": INT4.with_options(key_group_size=64, key_clip=0.9, value_clip=0.95),
    "int2-g32-clipped": INT2.with_options(key_group_size=32, key_clip=0.75, value_clip=0.8),
    "int2-min-max-no-head-no-tail": INT2.with_options(
        key_clip=1.0, value_clip=1.0, num_sink_tokens=0, min_tail_tokens=0
    ),
}
QUANTIZED_LABELS = [label for label in FORMATS_BY_LABEL if label != "native"]


def ids(*values: int) -> NDArray[np.int64]:
    return np.array(values, dtype=np.int64)


@dataclass
class Stream:
    """The tokens of one sequence: for each layer, query, key and value [length, heads, dim]."""

    queries: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    sink_queries: list[Tensor] = field(default_factory=list)  # of one that has a SinkWindow

    def __len__(self) -> int:
        return len(self.keys[0])


def make_stream(
    layers: Sequence[LayerSpec], length: int, seed: int, dtype: torch.dtype, gqa_group: int = 1
) -> Stream:
    """Random tokens whose keys have a mean and a spread for each channel, as real keys do."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    stream = Stream([], [], [])
    for layer in layers:
        heads, key_dim = layer.num_kv_heads, layer.key_dim
        keys = normal(length, heads, key_dim) * normal(heads, key_dim) + normal(heads, key_dim)
        stream.queries.append(normal(length, heads * gqa_group, key_dim).to(dtype))
        stream.keys.append(keys.to(dtype))
        stream.values.append(normal(length, heads, layer.value_dim).to(dtype))
    return stream


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
        )
        self.streams: dict[int, Stream] = {}
        self.offsets: dict[int, int] = {}  # positions that a stream's tokens are told to be on

    def add(self, stream: Stream, sink_window: SinkWindow | None = None) -> int:
        seq_id = self.manager.add_sequence(self.manager.chain_tokens((), sink_window=sink_window))
        self.streams[seq_id] = stream
        return seq_id

    def remove(self, seq_id: int) -> None:
        freed = self.manager.block_ids(seq_id)
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
            output = paged_attention(query, key, value, self.cache, layer, step, **options)
            parts = output.cpu().split(plan.num_scheduled_tokens.tolist())
            for seq_id, part in zip(plan.seq_ids, parts, strict=True):
                outputs[int(seq_id)].append(part)
        evicted_ids = self.manager.commit(plan)
        self.poison_blocks(plan.freed_block_ids)
        self.poison_blocks(evicted_ids)
        return outputs

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
        values = stream.values[layer][:length].to(self.cache.dtype).double().numpy()
        position = self.manager.geometry.num_head_tokens
        for block_id in self.manager.body_ids(seq_id):
            end = position + self.manager.geometry.block_size
            keys[position:end], values[position:end] = dequantized_block(
                self.cache, layer, int(block_id)
            )
            position = end
        return keys, values


def plane_codes(packed: NDArray[np.uint8], bits: int) -> NDArray[np.int64]:
    """Codes [tokens, dim] of one block and head from its bytes [rows, dim], token by token."""
    rows = len(packed)
    codes = [
        (packed[token % rows].astype(np.int64) >> (token // rows * bits)) & ((1 << bits) - 1)
        for token in range(rows * 8 // bits)
    ]
    return np.stack(codes)


def dequantized_block(
    cache: PagedKVCache, layer: int, block_id: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Keys and values [block_size, heads, dim] of a sealed block, in float64."""
    kv_format = cache.layers[layer].kv_format
    sealed = cache.records[layer].sealed
    assert sealed is not None
    assert kv_format.bits is not None
    keys, values = [], []
    for head in range(cache.layers[layer].num_kv_heads):
        view = {
            name: None if tensor is None else tensor[block_id, head].cpu().numpy()
            for name, tensor in sealed._asdict().items()
        }
        scale = {name: view[f"{name}_scale"].astype(np.float64) for name in ("key", "value")}
        codes = {name: plane_codes(view[f"{name}_codes"], kv_format.bits) for name in scale}
        if kv_format.bits == 8:
            keys.append((codes["key"] - 128) * scale["key"][:, None])
            values.append((codes["value"] - 128) * scale["value"][:, None])
            continue
        group = np.arange(kv_format.block_size) // kv_format.key_group_size
        key_zero, value_zero = (view[n].astype(np.float64) for n in ("key_zero", "value_zero"))
        keys.append(codes["key"] * scale["key"][group] + key_zero[group])
        values.append(codes["value"] * scale["value"][:, None] + value_zero[:, None])
    return np.stack(keys, axis=1), np.stack(values, axis=1)


def step_of(
    query_lens: list[int],
    context_lens: list[int],
    num_sealed: list[int],
    *,
    num_head_tokens: int,
    block_size: int = 128,
) -> StepInputs:
    """A step without blocks, for what reads only its lengths."""
    none = torch.zeros(len(query_lens), 1, dtype=torch.int64)
    table = none.expand(-1, -(-max(context_lens, default=0) // 16))
    starts = np.concatenate([[0], np.cumsum(query_lens)])
    return StepInputs(
        query_lens=tuple(query_lens),
        context_lens_host=tuple(context_lens),
        context_lens=torch.tensor(context_lens),
        query_start_loc=torch.from_numpy(starts),
        positions=torch.zeros(sum(query_lens), dtype=torch.int64),
        open_table=table,
        sealed_table=table,
        num_sealed=torch.tensor(num_sealed),
        stored_tokens=none[0],
        stored_slots=none[0],
        seal_block_ids=none[0],
        seal_sources=none,
        block_size=block_size,
        open_block_size=16,
        num_head_tokens=num_head_tokens,
    )


def tokens_of_every_kind(length: int, heads: int, dim: int, seed: int) -> Tensor:
    """[blocks, length, heads, dim]: each block another kind of numbers.

    Groups of zeros of both signs are left out: which of them is the least is not defined.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(length, heads, dim, generator=generator)

    outliers = normal()
    outliers[:, :, ::5] *= 1000.0
    some_equal = normal()
    some_equal[::3] = 0.25  # constant tokens
    some_equal[:, :, ::4] = -3.3  # constant channels
    halves = torch.randint(-127, 128, (length, heads, dim), generator=generator) * 0.5
    zeros_of_both_signs = normal().abs()
    zeros_of_both_signs[normal() > 0] = -0.0
    zeros_of_both_signs[normal() > 1] = 0.0
    zeros_of_both_signs[:, :, :2] = 1.0
    zeros_of_both_signs[:2] = 1.0
    return torch.stack(
        [
            normal(),
            outliers,
            some_equal,
            halves,  # ties, to be rounded to even
            zeros_of_both_signs,
            torch.full((length, heads, dim), -0.0),
            torch.zeros(length, heads, dim),
            torch.full((length, heads, dim), 0.37),
            normal() * 1e-6,  # scales that are no normal halves
            normal() * 3e4,  # scales beyond those of halves, which saturate
        ]
    )


def in_float32_only(length: int, heads: int, dim: int, seed: int) -> Tensor:
    """As above: numbers that are infinite, or zero, in half precision."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(3, length, heads, dim, generator=generator)
    factors = torch.tensor([1e30, 1e-40, 3e38]).view(-1, 1, 1, 1)
    values = normal * factors
    values[2] = normal[2].sign() * 3e38
    return torch.cat([values, torch.full((1, length, heads, dim), -1e30)])
