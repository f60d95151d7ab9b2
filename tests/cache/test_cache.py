"""What the cache stores: sealed bytes, exact heads and tails, and what it says of its memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paged_kv.blocks.block_manager import BlockManager
from paged_kv.cache.formats import INT2, INT4, INT8, NATIVE, KVFormat
from paged_kv.cache.kv_cache import PagedKVCache, runs_of
from paged_kv.cache.layer_groups import block_bytes, num_blocks_for
from paged_kv.cache.layer_spec import LayerSpec, cache_geometry
from paged_kv.errors import ConfigError, OutOfBlocksError
from tests.support.fleets import Fleet, as_stored, dequantized_block
from tests.support.kv_formats import FORMATS_BY_LABEL, QUANTIZED_LABELS
from tests.support.token_streams import Stream, make_stream

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
ALL_FORMATS = pytest.mark.parametrize("kv_format", FORMATS_BY_LABEL.values(), ids=FORMATS_BY_LABEL)
QUANTIZED = pytest.mark.parametrize(
    "kv_format", [FORMATS_BY_LABEL[label] for label in QUANTIZED_LABELS], ids=QUANTIZED_LABELS
)


def layer_of(
    kv_format: KVFormat, *, heads: int = 2, key_dim: int = 16, value_dim: int = 24
) -> LayerSpec:
    return LayerSpec(kv_format=kv_format, num_kv_heads=heads, key_dim=key_dim, value_dim=value_dim)


def random_chunks(total: int, seed: int, largest: int = 200) -> list[int]:
    generator, chunks = np.random.default_rng(seed), []
    while sum(chunks) < total:
        chunks.append(min(int(generator.integers(1, largest)), total - sum(chunks)))
    return chunks


# -- sealed blocks ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
@QUANTIZED
def test_sealed_bytes_do_not_depend_on_how_the_tokens_arrived(kv_format, dtype):
    layer = layer_of(kv_format)
    length = 400
    stream = make_stream([layer], length, 7, torch.float32)

    def sealed_after(chunks: list[int], poison: int) -> torch.Tensor:
        fleet = Fleet([layer], dtype=dtype, poison=poison)
        seq_id = fleet.add(stream)
        fleet.feed({seq_id: chunks})
        return fleet.sealed_bytes(seq_id)

    at_once = sealed_after([length], poison=0xFF)
    assert len(at_once) >= 2
    assert torch.equal(sealed_after([1] * length, poison=0xFF), at_once), "one by one"
    assert torch.equal(sealed_after([length], poison=0x00), at_once), "bytes left unwritten"
    for seed in range(3):
        chunks = random_chunks(length, seed)
        assert torch.equal(sealed_after(chunks, poison=0xFF), at_once), chunks


def largest_error(tokens: np.ndarray, layer: LayerSpec, kind: str) -> np.ndarray:
    """Bound on the error of each element of a block [tokens, heads, dim]; 2 % slack for fp16."""
    kv_format = layer.kv_format
    bits = kv_format.key_bits if kind == "keys" else kv_format.value_bits
    greatest = np.abs(tokens).max(axis=2, keepdims=True)
    if kind == "keys" and not kv_format.has_token_keys:
        groups = tokens.reshape(kv_format.num_key_groups, -1, *tokens.shape[1:])
        spread = np.ptp(groups, axis=1).repeat(groups.shape[1], axis=0)
        top_code, clip = np.full(tokens.shape[1:], float((1 << bits) - 1)), kv_format.key_clip
        clip = np.full(tokens.shape[1:], clip)
        if layer.wide_channels is not None:
            np.put_along_axis(top_code, layer.wide_channels, 2.0 ** (bits + 2) - 1, axis=1)
            np.put_along_axis(clip, layer.wide_channels, kv_format.wide_key_clip, axis=1)
    elif bits == 8:
        return 0.51 / 127 * greatest
    else:
        spread, clip = np.ptp(tokens, axis=2, keepdims=True), kv_format.value_clip
        if kv_format.rotates_values:  # around 0, and turned back: a token's norm bounds it
            spread = 2 * np.linalg.norm(tokens, axis=2, keepdims=True) * tokens.shape[2] ** 0.5
        top_code = (1 << bits) - 1
    largest = spread * np.maximum(clip / top_code / 2, (1 - clip) / 2)
    return 1.02 * largest + 1e-3 * np.abs(tokens).max()


@QUANTIZED
def test_sealed_block_holds_its_own_tokens_in_order_to_within_half_a_step(kv_format):
    layer = layer_of(kv_format)
    fleet = Fleet([layer])
    seq_id = fleet.add(make_stream([layer], 400, 7, torch.float32))
    fleet.feed({seq_id: random_chunks(400, 1)})
    position = fleet.manager.geometry.num_head_tokens
    for block_id in fleet.manager.body_ids(seq_id):
        end = position + kv_format.block_size
        keys, values = dequantized_block(fleet.cache, 0, int(block_id))
        for kind, stored in (("keys", keys), ("values", values)):
            tokens = getattr(fleet.streams[seq_id], kind)[0][position:end].double().numpy()
            assert (np.abs(stored - tokens) <= largest_error(tokens, layer, kind)).all()
        position = end


@QUANTIZED
def test_no_group_spans_two_sequences(kv_format):
    """Whatever the neighbour holds, and however its chunks fall, this one's bytes are the same."""
    layer = layer_of(kv_format)
    stream = make_stream([layer], 400, 1, torch.float32)

    def sealed_beside(neighbour_scale: float, neighbour_chunks: list[int]) -> torch.Tensor:
        fleet = Fleet([layer])
        neighbour = make_stream([layer], 400, 2, torch.float32)
        neighbour.keys[0] *= neighbour_scale
        neighbour.values[0] *= neighbour_scale
        other, seq_id = fleet.add(neighbour), fleet.add(stream)
        fleet.feed({other: neighbour_chunks, seq_id: [150, 1, 249]})
        assert len(fleet.sealed_bytes(other)) >= 2
        return fleet.sealed_bytes(seq_id)

    beside_small = sealed_beside(1.0, [150, 1, 249])
    assert torch.equal(sealed_beside(1000.0, [150, 1, 249]), beside_small)
    assert torch.equal(sealed_beside(-3.0, [17, 300, 83]), beside_small)


@QUANTIZED
def test_sealed_block_is_never_rewritten_while_its_owner_lives(kv_format):
    layer = layer_of(kv_format, heads=1)
    fleet = Fleet([layer], num_blocks=200, max_num_seqs=4)
    generator = np.random.default_rng(3)
    snapshots: dict[int, torch.Tensor] = {}
    seed, num_checked = 0, 0
    for _ in range(80):
        if len(fleet.streams) < 4:
            seed += 1
            length = int(generator.integers(150, 700))
            snapshots[fleet.add(make_stream([layer], length, seed, torch.float32))] = torch.empty(0)
        counts = {
            seq_id: min(int(generator.integers(1, 120)), len(stream) - fleet.length(seq_id))
            for seq_id, stream in fleet.streams.items()
        }
        fleet.step(counts)
        for seq_id in list(fleet.streams):
            sealed, before = fleet.sealed_bytes(seq_id), snapshots[seq_id]
            assert torch.equal(sealed[: len(before)], before.view(-1, *sealed.shape[1:]))
            num_checked += len(before)
            snapshots[seq_id] = sealed
            if fleet.length(seq_id) == len(fleet.streams[seq_id]):
                fleet.remove(seq_id)
                del snapshots[seq_id]
    assert num_checked > 200


@DTYPES
@ALL_FORMATS
def test_head_and_tail_stay_exact(kv_format, dtype):
    layer = layer_of(kv_format)
    fleet = Fleet([layer], dtype=dtype)
    seq_id = fleet.add(make_stream([layer], 450, 5, torch.float32))
    geometry, records = fleet.manager.geometry, fleet.cache.records[0]
    for chunk in random_chunks(450, 11, largest=60):
        fleet.step({seq_id: chunk})
        length = fleet.length(seq_id)
        body = len(fleet.manager.body_ids(seq_id)) * geometry.block_size
        head_end = min(geometry.num_head_tokens, length)
        exact = [*range(head_end), *range(head_end + body, length)]
        assert length - head_end - body >= min(geometry.min_tail_tokens, length - head_end)
        block_ids = fleet.manager.head_and_tail_ids(seq_id).tolist()
        for views, original in (
            (records.open_keys, fleet.streams[seq_id].keys[0]),
            (records.open_values, as_stored(fleet.streams[seq_id].values[0], kv_format, dtype)),
        ):
            stored = views[block_ids].transpose(1, 2).flatten(0, 1)[: len(exact)]
            assert torch.equal(stored, original[exact].to(dtype))


def test_clip_and_group_size_reach_the_sealed_bytes():
    def sealed(**options: float) -> torch.Tensor:
        plain = {"key_clip": 1.0, "value_clip": 1.0, "key_group_size": None}
        layer = layer_of(INT2.with_options(**plain | options))
        fleet = Fleet([layer])
        seq_id = fleet.add(make_stream([layer], 200, 1, torch.float32))
        fleet.step({seq_id: 200})
        return fleet.sealed_bytes(seq_id)

    plain = sealed()
    for options in ({"key_clip": 0.8}, {"value_clip": 0.8}, {"key_group_size": 32}):
        assert not torch.equal(sealed(**options), plain), options


# -- layers that share a table ------------------------------------------------------------------


def test_mixed_layers_share_one_table_and_each_seals_as_it_would_alone():
    same = {"min_tail_tokens": 32, "num_sink_tokens": 0, "block_size": 128}
    int8, int4, int2 = (base.with_options(**same) for base in (INT8, INT4, INT2))
    layers = [layer_of(int8, heads=1), layer_of(int2, heads=3, key_dim=40), layer_of(int4)]
    mixed = Fleet(layers)
    stream = make_stream(layers, 600, 3, torch.float32)
    seq_id = mixed.add(stream)
    mixed.feed({seq_id: [100, 1, 1, 300, 198]})
    num_sealed = len(mixed.manager.body_ids(seq_id))
    assert num_sealed == 4
    open_block_sizes = set()
    for index, layer in enumerate(layers):
        alone = Fleet([layer])
        open_block_sizes.add(alone.manager.geometry.open_block_size)
        own = alone.add(
            Stream([stream.queries[index]], [stream.keys[index]], [stream.values[index]])
        )
        alone.step({own: 600})
        sealed = mixed.sealed_bytes(seq_id, index)
        assert len(sealed) == num_sealed
        assert torch.equal(alone.sealed_bytes(own), sealed)
    assert len(open_block_sizes) > 1
    assert mixed.manager.geometry.open_block_size == min(open_block_sizes)


@pytest.mark.parametrize(
    "formats",
    [
        pytest.param((INT2, NATIVE), id="native beside quantized"),
        pytest.param((INT8, INT2), id="min_tail_tokens differ"),
        pytest.param((INT2, INT2.with_options(num_sink_tokens=64)), id="num_sink_tokens differ"),
        pytest.param((INT2, INT2.with_options(block_size=128)), id="block_size differs"),
    ],
)
def test_layers_that_cannot_share_a_table_are_refused(formats):
    layers = [layer_of(kv_format) for kv_format in formats]
    with pytest.raises(ConfigError, match="layers that share a block table must agree"):
        PagedKVCache(layers, num_blocks=4, dtype=torch.float32)


# -- memory -------------------------------------------------------------------------------------


@DTYPES
@ALL_FORMATS
def test_memory_stats_add_up_to_the_bytes_of_the_tensors(kv_format, dtype):
    layers = [layer_of(kv_format, heads=1), layer_of(kv_format, heads=3, key_dim=64)]
    fleet = Fleet(layers, dtype=dtype, num_blocks=150)
    arena_bytes = sum(arena.nbytes for arena in fleet.cache.arenas)
    bytes_of_block = sum(arena[0].nbytes for arena in fleet.cache.arenas)
    token_bytes = dtype.itemsize * (1 * (16 + 24) + 3 * (64 + 24))
    seq_ids = [fleet.add(make_stream(layers, 400, seed, dtype)) for seed in range(3)]
    for counts in ((1, 5, 300), (40, 20, 1), (350, 1, 99)):
        fleet.step(dict(zip(seq_ids, counts, strict=True)))
        stats = fleet.cache.memory_stats(fleet.manager)
        geometry, manager = fleet.manager.geometry, fleet.manager
        lengths = [fleet.length(seq_id) for seq_id in seq_ids]
        num_sealed = sum(len(manager.body_ids(seq_id)) for seq_id in seq_ids)
        num_open = sum(len(manager.head_and_tail_ids(seq_id)) for seq_id in seq_ids)
        num_head = sum(
            min(len(manager.head_and_tail_ids(seq_id)), geometry.num_head_blocks)
            for seq_id in seq_ids
        )
        assert stats.total == arena_bytes
        assert stats.allocated == (num_sealed + num_open) * bytes_of_block
        assert stats.total == stats.allocated + stats.free
        assert stats.free == manager.num_free_blocks * bytes_of_block
        assert stats.body == num_sealed * bytes_of_block
        assert stats.head == num_head * bytes_of_block
        assert stats.head + stats.body + stats.tail == stats.allocated
        open_tokens = sum(lengths) - num_sealed * geometry.block_size
        assert stats.used == stats.body + open_tokens * token_bytes
        assert stats.used + stats.wasted == stats.allocated
        assert stats.wasted >= 0


@ALL_FORMATS
def test_memory_stats_of_an_idle_pool_are_all_free(kv_format):
    layer = layer_of(kv_format)
    fleet = Fleet([layer])
    seq_id = fleet.add(make_stream([layer], 300, 0, torch.float32))
    fleet.step({seq_id: 300})
    fleet.remove(seq_id)
    stats = fleet.cache.memory_stats(fleet.manager)
    assert stats.free == stats.total == fleet.cache.arenas[0].nbytes
    assert stats.allocated == stats.used == stats.wasted == 0
    assert stats.head == stats.body == stats.tail == 0


@DTYPES
@ALL_FORMATS
def test_num_blocks_for_fills_the_budget_and_no_more(kv_format, dtype):
    layers = [layer_of(kv_format, heads=1), layer_of(kv_format, heads=3, key_dim=64)]
    size = block_bytes(layers, dtype)
    for budget in (size, 2 * size - 1, 2 * size, 100 * size + 17):
        num_blocks = num_blocks_for(budget, layers, dtype)
        cache = PagedKVCache(layers, num_blocks=num_blocks, dtype=dtype)
        assert cache.block_bytes == size
        assert sum(arena.nbytes for arena in cache.arenas) <= budget
        assert sum(arena.nbytes for arena in cache.arenas) + size > budget


@pytest.mark.parametrize("missing", [1, 10_000_000])
def test_a_budget_below_one_block_is_refused_with_both_sizes(missing):
    layers = [layer_of(INT2)]
    size = block_bytes(layers, torch.float32)
    with pytest.raises(OutOfBlocksError, match=rf"^{size - missing} bytes .* takes {size} bytes$"):
        num_blocks_for(size - missing, layers, torch.float32)


@pytest.mark.parametrize(
    ("kv_format", "bytes_per_token"),
    [(NATIVE, 512), (INT8, 266), (INT4, 136), (INT2, 82)],
    ids=["native", "int8", "int4", "int2"],
)
def test_bytes_per_token_of_all_heads_and_layers(kv_format, bytes_per_token):
    layer = layer_of(kv_format, heads=4, key_dim=128, value_dim=128)
    cache = PagedKVCache([layer] * 3, num_blocks=2, dtype=torch.bfloat16)
    assert cache.bytes_per_token() == 3 * 4 * bytes_per_token


# -- refused settings ---------------------------------------------------------------------------


@pytest.mark.parametrize("num_blocks", [0, -5])
def test_pool_without_blocks_is_refused(num_blocks):
    layers = [layer_of(INT8)]
    with pytest.raises(ConfigError, match=rf"num_blocks must be at least 1, got {num_blocks}$"):
        PagedKVCache(layers, num_blocks=num_blocks, dtype=torch.float32)
    with pytest.raises(ConfigError, match=rf"num_blocks must be at least 1, got {num_blocks}$"):
        BlockManager(
            cache_geometry(layers, torch.float32),
            num_blocks=num_blocks,
            max_num_seqs=1,
            max_model_len=1,
        )


def test_cache_without_layers_is_refused():
    with pytest.raises(ConfigError, match=r"at least one layer, got none$"):
        PagedKVCache([], num_blocks=1, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.uint8])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ConfigError, match=rf"dtype must be .*, got {dtype}$"):
        PagedKVCache([layer_of(INT8)], num_blocks=1, dtype=dtype)


@pytest.mark.parametrize(("key_dim", "value_dim"), [(20, 16), (16, 0), (264, 16)])
def test_bad_head_dim_is_refused(key_dim, value_dim):
    layer = layer_of(INT8, key_dim=key_dim, value_dim=value_dim)
    with pytest.raises(ConfigError, match="must be a multiple of 8 from 8 to 256"):
        PagedKVCache([layer], num_blocks=1, dtype=torch.float32)


@pytest.mark.parametrize(
    ("block_ids", "runs"),
    [
        ([], []),
        ([7], [(0, 1)]),
        ([4, 5, 6, 2, 3, 9], [(0, 3), (3, 5), (5, 6)]),
        ([3, 2], [(0, 1), (1, 2)]),
    ],
)
def test_ids_that_follow_each_other_are_copied_at_once(block_ids, runs):
    assert runs_of(np.array(block_ids, dtype=np.int32)) == runs


def test_blocks_come_back_from_the_host_as_they_were():
    cache = PagedKVCache([layer_of(INT8)] * 2, num_blocks=9, num_host_blocks=6, dtype=torch.float32)
    for arena in cache.arenas:
        arena.random_(0, 256)
    before = [arena.clone() for arena in cache.arenas]
    out, host, back = (
        np.array(each, dtype=np.int32) for each in ([1, 8, 3, 0], [2, 3, 4, 0], [5, 6, 2, 7])
    )
    cache.swap_out(out, host)
    cache.swap_in(back, host)
    for arena, old in zip(cache.arenas, before, strict=True):
        assert torch.equal(arena[back.tolist()], old[out.tolist()])
        assert torch.equal(arena[out.tolist()], old[out.tolist()])
