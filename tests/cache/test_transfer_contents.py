"""What an export says of others, nothing, and what an import takes in: only numbers and tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from paged_kv.cache import transfer
from paged_kv.cache.formats import INT2, INT8, NATIVE
from paged_kv.cache.transfer import import_sequence
from paged_kv.errors import ConfigError, TransferError
from tests.support.exported_sequences import (
    ALL_FORMATS,
    DTYPES,
    SharingFleet,
    assert_refused,
    exported,
    forged,
    layers_of,
    parts_of,
    small_layer,
    tokens_of,
)
from tests.support.token_streams import make_stream

LENGTH = 333  # ends within an open block of every format


def fleet_with_a_past(layers, poison: int, past: int, **options) -> tuple[SharingFleet, int]:
    """A fleet whose blocks have held `poison` and other sequences, and a sequence in it."""
    fleet = SharingFleet(layers, poison=poison, **options)
    for number in range(past):
        seq_id = fleet.manager.add_sequence()
        fleet.streams[seq_id] = make_stream(layers, 400 + number, 90 + number, torch.float32)
        fleet.feed({seq_id: [150, 1, 249 + number]})
        fleet.poison = 0x5A
        fleet.remove(seq_id)
    stream = make_stream(layers, LENGTH, 1, torch.float32)
    seq_id = fleet.add_tokens(stream, tokens_of(1, LENGTH))
    fleet.step({seq_id: LENGTH})
    return fleet, seq_id


@DTYPES
@ALL_FORMATS
def test_what_lay_in_its_blocks_before_does_not_travel(kv_format, dtype):
    """Exports of a sequence are the same to the byte, whatever its cache has held before."""
    layers = layers_of(kv_format)
    data = [
        fleet.export(seq_id)
        for fleet, seq_id in (
            fleet_with_a_past(layers, poison, past, dtype=dtype)
            for poison, past in ((0x00, 0), (0xFF, 0), (0xAB, 3))
        )
    ]
    assert data[1] == data[0]
    assert data[2] == data[0]


@ALL_FORMATS
def test_what_travels_of_no_sequence_is_cleared_on_arrival_too(kv_format):
    """Older exports hold what was there: it does not get into the pool, nor on from there."""
    layers = layers_of(kv_format)
    data = exported(layers, LENGTH)
    header, body = parts_of(data)
    first, second = (SharingFleet(layers) for _ in range(2))
    copy = first.take(data, make_stream(layers, LENGTH, 1, torch.float32))
    records = [
        arena[torch.as_tensor(first.manager.block_ids(copy), dtype=torch.int64)]
        for arena in first.cache.arenas
    ]
    for index, layer in enumerate(layers):
        layout = layer.record_layout(torch.float32)
        records[index][-1, :, layout.token_bytes * first.cache.geometry.open_block_size :] = 0xFF
    token_bytes = body[: header["token_bytes"]]
    stale = token_bytes + b"".join(each.numpy().tobytes() for each in records)
    seq_id = import_sequence(second.cache, second.manager, forged(header, stale))
    assert second.export(seq_id) == data


def body_with(data: bytes, offset: int, number: np.ndarray) -> bytes:
    """An export with a number in its records, at a byte offset from their start."""
    header, body = parts_of(data)
    start = header["token_bytes"] + offset
    changed = body[:start] + number.tobytes() + body[start + number.nbytes :]
    return forged(header, changed)


WORDS = {
    torch.float32: [np.float32(math.nan), np.float32(math.inf), np.float32(-math.inf)],
    torch.float16: [np.float16(math.nan), np.float16(math.inf), np.float16(-math.inf)],
    torch.bfloat16: [np.uint16(0x7FC0), np.uint16(0x7F80), np.uint16(0xFF80)],
}


@DTYPES
@pytest.mark.parametrize("order", [transfer.CHANNEL_MAJOR_KEYS, transfer.CHANNEL_MAJOR_VALUES])
@pytest.mark.parametrize("kv_format", [NATIVE, INT8, INT2], ids=["native", "int8", "int2"])
def test_keys_and_values_that_are_not_finite_are_refused(kv_format, dtype, order):
    layer = small_layer(kv_format)
    data = exported([layer], LENGTH, dtype=dtype)
    header, body = parts_of(data)
    target = SharingFleet([layer], dtype=dtype, prefix_caching=True)
    size = target.cache.geometry.open_block_size
    item = dtype.itemsize
    places = {
        "first key": 0,
        "last key": (size * layer.key_dim - 1) * item,
        "first value": size * layer.key_dim * item,
        "last value": size * (layer.key_dim + layer.value_dim) * item - item,
    }
    for place in places.values():
        for word in WORDS[dtype]:
            changed_header, changed = parts_of(body_with(data, place, word))
            assert_refused(
                target,
                forged(changed_header | {"record_order": order}, changed),
                r"^the K/V of layer 0 are not all finite$",
            )
    assert import_sequence(target.cache, target.manager, forged(header, body)) == 0


@pytest.mark.parametrize("kv_format", [INT8, INT2], ids=["int8", "int2"])
@pytest.mark.parametrize("section", ["key_scale", "key_zero", "value_scale", "value_zero"])
def test_scales_and_zero_points_that_are_not_finite_are_refused(kv_format, section):
    layer = small_layer(kv_format)
    layout = layer.record_layout(torch.float32)
    if section not in layout.section_bytes:
        pytest.skip("a symmetric format has none")
    data = exported([layer], LENGTH)
    target = SharingFleet([layer])
    num_head = target.cache.geometry.num_head_blocks
    assert parts_of(data)[0]["num_sealed"] >= 1
    first = num_head * layout.record_bytes + layout.offset(section)
    for place in (first, first + layout.section_bytes[section] - 2):
        for word in WORDS[torch.float16]:
            assert_refused(target, body_with(data, place, word), r"layer 0 are not all finite$")


def test_codes_are_no_numbers_that_could_be_infinite():
    layer = small_layer(INT2)
    layout = layer.record_layout(torch.float32)
    data = exported([layer], LENGTH)
    target = SharingFleet([layer])
    start = target.cache.geometry.num_head_blocks * layout.record_bytes
    changed = body_with(data, start, np.full(8, 0xFF, dtype=np.uint8))
    import_sequence(target.cache, target.manager, changed)


def test_the_layer_is_named_and_what_was_cached_stays():
    layers = layers_of(NATIVE)
    data = exported(layers, 40)
    target = SharingFleet(layers, prefix_caching=True, num_blocks=4)
    stream = make_stream(layers, 64, 5, torch.float32)
    own = target.add_tokens(stream, tokens_of(5, 64))
    target.step({own: 64})
    target.manager.remove_sequence(own)
    num_cached = target.manager.num_cached_blocks
    header, _ = parts_of(data)
    second_layer = header["layer_bytes"][0]
    changed = body_with(data, second_layer, np.float32(math.nan))
    assert_refused(target, changed, r"^the K/V of layer 1 are not all finite$")
    assert target.manager.num_cached_blocks == num_cached


def test_token_ids_that_no_vocabulary_has_are_refused():
    layer = small_layer(NATIVE)
    data = exported([layer], 40)
    header, body = parts_of(data)
    target = SharingFleet([layer])
    negative = np.int32(-5).tobytes() + body[4:]
    assert_refused(target, forged(header, negative), r"^token id -5 is outside a vocabulary")
    largest = int(tokens_of(1, 40).max())
    for vocab_size in (largest, 1):
        assert_refused(target, data, r"is outside a vocabulary of ", vocab_size=vocab_size)
    for vocab_size in (0, -3, 2.5, True):
        assert_refused(target, data, "vocab_size must", ConfigError, vocab_size=vocab_size)
    import_sequence(target.cache, target.manager, data, vocab_size=largest + 1)


@pytest.mark.parametrize(
    "data",
    [None, "text", 7, [1], memoryview(b"abcdefgh")[::2]],
    ids=["none", "text", "number", "list", "gaps"],
)
def test_what_is_no_bytes_is_refused(data):
    target = SharingFleet([replace(small_layer())])
    with pytest.raises(TransferError):
        import_sequence(target.cache, target.manager, data)
