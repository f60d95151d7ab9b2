"""Sequences that fork, draft and swap over one cache, each beside a twin that runs alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from paged_kv.blocks.geometry import BlockGeometry
from paged_kv.blocks.host_blocks import SwappedSequence
from paged_kv.blocks.step_plan import StepPlan
from paged_kv.cache.attention import paged_attention
from paged_kv.cache.formats import INT2, INT4, INT8, NATIVE
from paged_kv.cache.kv_cache import PagedKVCache
from paged_kv.cache.layer_formats import KVFormats, resolve_formats
from paged_kv.cache.layer_spec import LayerSpec
from tests.support.arrays import ids
from tests.support.fleets import Fleet
from tests.support.token_streams import Stream, make_stream

FORMATS = (NATIVE, INT8, INT4, INT2, resolve_formats("int2,1=native"))

QUANTIZED = (INT8, INT4, INT2)

MAX_LENGTH = 620

every_format = pytest.mark.parametrize("kv_format", FORMATS, ids=lambda f: f.name)

every_quantized = pytest.mark.parametrize("kv_format", QUANTIZED, ids=lambda f: f.name)


def layers_of(kv_format: KVFormats) -> list[LayerSpec]:
    first, second = resolve_formats(kv_format).of(2)
    return [
        LayerSpec(kv_format=first, num_kv_heads=2, key_dim=16, value_dim=8),
        LayerSpec(kv_format=second, num_kv_heads=1, key_dim=8, value_dim=16),
    ]


def branch(stream: Stream, length: int, seed: int, layers: list[LayerSpec]) -> Stream:
    """A stream that begins with the same `length` tokens and then goes its own way."""
    other = make_stream(layers, len(stream) - length, seed, stream.keys[0].dtype, gqa_group=2)
    return Stream(
        *(
            [
                torch.cat([old[:length], new])
                for old, new in zip(getattr(stream, name), getattr(other, name), strict=True)
            ]
            for name in ("queries", "keys", "values")
        )
    )


class SharingFleet(Fleet):
    """A fleet whose sequences fork, draft and swap. All blocks without users are poisoned."""

    def __init__(
        self, layers: list[LayerSpec], *, num_host_blocks: int = 0, **options: object
    ) -> None:
        super().__init__(layers, **options)
        self.cache = PagedKVCache(
            layers,
            num_blocks=self.cache.num_blocks,
            dtype=self.cache.dtype,
            num_host_blocks=num_host_blocks,
        )
        self.manager = self.cache.new_manager(
            max_num_seqs=self.manager.max_num_seqs, max_model_len=self.manager.max_model_len
        )
        self.poison_unused()

    @property
    def num_used(self) -> int:
        return self.manager.pool.num_allocated

    def poison_unused(self) -> None:
        unused = np.flatnonzero(self.manager.pool.ref_counts == 0)
        super().poison_blocks(unused.astype(np.int32))

    def poison_blocks(self, block_ids: np.ndarray) -> None:
        """Of blocks that were let go, those that nobody else uses."""
        super().poison_blocks(block_ids[self.manager.pool.ref_counts[block_ids] == 0])

    def fork(self, seq_id: int, stream: Stream) -> int:
        child = self.manager.fork(seq_id)
        self.streams[child] = stream
        return child

    def step_with_drafts(
        self, seq_id: int, count: int, drafts: Stream, num_drafts: int, num_kept: int
    ) -> StepPlan:
        """`count` tokens of the sequence's stream and drafts of another one, some of them kept."""
        plan = self.manager.reserve(ids(seq_id), ids(count + num_drafts), ids(num_drafts))
        assert plan is not None
        step = self.cache.begin(plan)
        start = int(plan.context_lens[0])
        for layer in range(len(self.cache.layers)):
            tensors = [
                getattr(drafts, name)[layer][start : start + count + num_drafts]
                for name in ("queries", "keys", "values")
            ]
            output = paged_attention(*tensors, self.cache, layer, step)
            assert output.isfinite().all()
        self.manager.commit(plan, ids(count + num_kept))
        self.manager.pool.check_integrity(
            np.concatenate([self.manager.block_ids(s) for s in self.streams])
        )
        self.poison_unused()
        return plan

    def swap_out(self, seq_id: int) -> tuple[SwappedSequence, Stream]:
        swapped = self.manager.swap_out(seq_id)
        assert swapped is not None
        self.cache.swap_out(swapped.device_block_ids, swapped.host_block_ids)
        self.poison_unused()
        return swapped, self.streams.pop(seq_id)

    def swap_in(self, swapped: SwappedSequence, stream: Stream) -> int:
        found = self.manager.swap_in(swapped)
        assert found is not None
        seq_id, block_ids = found
        self.cache.swap_in(block_ids, swapped.host_block_ids)
        self.streams[seq_id] = stream
        return seq_id

    def all_bytes(self, seq_id: int) -> list[Tensor]:
        """Every byte of every block of a sequence, in the order of its tokens, layer by layer."""
        block_ids = torch.as_tensor(self.manager.block_ids(seq_id), dtype=torch.int64)
        return [arena[block_ids].clone() for arena in self.cache.arenas]

    def stored(self, seq_id: int) -> list[Tensor]:
        """The sealed bytes of each layer, then keys and values of all tokens in open blocks."""
        geometry, length = self.manager.geometry, self.length(seq_id)
        num_open_tokens = length - int(self.manager.num_sealed[seq_id]) * geometry.block_size
        rows = torch.as_tensor(self.manager.head_and_tail_ids(seq_id), dtype=torch.int64)
        found = [self.sealed_bytes(seq_id, layer) for layer in range(len(self.cache.layers))]
        for layer, records in zip(self.cache.layers, self.cache.records, strict=True):
            is_small = self.cache.has_small_blocks(layer)
            own_rows = rows * geometry.open_blocks_per_block if is_small else rows
            for view in (records.open_keys, records.open_values):
                tokens = view[own_rows].transpose(1, 2).flatten(0, 1)[:num_open_tokens]
                found.append(tokens.clone())
        return found


class Twins:
    """Sequences that share blocks, and beside each its twin that shares none."""

    def __init__(
        self,
        kv_format: KVFormats,
        *,
        num_blocks: int = 200,
        num_host_blocks: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.layers = layers_of(kv_format)
        options = {"num_blocks": num_blocks, "dtype": dtype, "max_model_len": MAX_LENGTH}
        self.shared = SharingFleet(self.layers, num_host_blocks=num_host_blocks, **options)
        self.alone = SharingFleet(self.layers, **{**options, "num_blocks": 400})
        self.twin: dict[int, int] = {}
        self.chunks: dict[int, list[int]] = {}

    @property
    def geometry(self) -> BlockGeometry:
        return self.shared.manager.geometry

    def start(self, length: int, seed: int = 0) -> int:
        stream = make_stream(self.layers, MAX_LENGTH, seed, self.shared.cache.dtype, gqa_group=2)
        seq_id = self.shared.add(stream)
        self.twin[seq_id] = self.alone.add(stream)
        self.chunks[seq_id] = []
        if length:
            self.step({seq_id: length})
        return seq_id

    def fork(self, seq_id: int, seed: int) -> int:
        stream = branch(self.shared.streams[seq_id], self.shared.length(seq_id), seed, self.layers)
        child = self.shared.fork(seq_id, stream)
        self.chunks[child] = list(self.chunks[seq_id])
        self.twin[child] = self.alone.add(stream)
        for count in self.chunks[child]:
            self.alone.step({self.twin[child]: count})
        return child

    def step(self, counts: dict[int, int]) -> StepPlan:
        """The same step with shared and with unshared blocks: the outputs are equal."""
        plan = self.shared.plan(counts)
        self.shared.manager.check_integrity()
        outputs = self.shared.run(plan)
        self.shared.manager.check_integrity()
        expected = self.alone.step({self.twin[seq_id]: count for seq_id, count in counts.items()})
        for seq_id, count in counts.items():
            self.chunks[seq_id].append(count)
            for output, twin_output in zip(
                outputs[seq_id], expected[self.twin[seq_id]], strict=True
            ):
                torch.testing.assert_close(output, twin_output, rtol=0, atol=1e-6)
        return plan

    def remove(self, seq_id: int) -> None:
        self.shared.remove(seq_id)
        self.alone.remove(self.twin.pop(seq_id))

    def check(self) -> None:
        """Whatever is stored of a sequence is what its twin stores, to the bit."""
        for seq_id, twin in self.twin.items():
            assert self.shared.length(seq_id) == self.alone.length(twin)
            pairs = zip(self.shared.stored(seq_id), self.alone.stored(twin), strict=True)
            assert all(torch.equal(one, other) for one, other in pairs)

    def drain(self) -> None:
        for seq_id in list(self.twin):
            self.remove(seq_id)
        self.shared.manager.check_integrity()
        assert self.shared.num_used == 0


@dataclass(frozen=True)
class Place:
    """Where in a sequence it forks, by the geometry."""

    name: str
    length: Callable[[BlockGeometry], int]


def seal_length(geometry: BlockGeometry) -> int:
    """Tokens at which the first block is sealed; in the native format some length."""
    return geometry.num_head_tokens + geometry.block_size + geometry.min_tail_tokens


PLACES = [
    Place("inside the first block", lambda g: g.open_block_size // 2),
    Place("behind the first block", lambda g: g.open_block_size),
    Place("inside the tail", lambda g: g.num_head_tokens + g.open_block_size + 3),
    Place("behind a tail block", lambda g: g.num_head_tokens + 2 * g.open_block_size),
    Place("one token before a seal", lambda g: seal_length(g) - 1),
    Place("just sealed", seal_length),
    Place("behind a sealed block", lambda g: seal_length(g) + 5),
]

every_place = pytest.mark.parametrize("place", PLACES, ids=lambda place: place.name)
