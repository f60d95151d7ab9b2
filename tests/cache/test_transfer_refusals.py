"""What an import refuses, by name, and that nothing is left behind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from paged_kv.cache import transfer
from paged_kv.cache.formats import INT2, INT8, NATIVE
from paged_kv.cache.transfer import import_sequence
from paged_kv.errors import InvalidStepError, OutOfBlocksError, TransferError
from tests.support.calibrations import calibrated
from tests.support.exported_sequences import (
    SMALL_FORMAT,
    SharingFleet,
    assert_refused,
    exported,
    forged,
    forged_sequence,
    frozen,
    num_blocks_of,
    parts_of,
    small_layer,
    state_of,
    tokens_of,
)
from tests.support.token_streams import make_stream


@pytest.mark.parametrize("kv_format", [NATIVE.with_options(block_size=4), INT2, INT8],
                         ids=["native", "int2", "int8"])  # fmt: skip
def test_every_flipped_byte_is_refused(kv_format):
    layer = small_layer(kv_format)
    data = exported([layer], 8 if kv_format.is_native else 190)
    target = SharingFleet([layer], num_blocks=30, max_num_seqs=2, max_model_len=200)
    before = state_of(target)
    flipped = bytearray(data)
    for position in range(len(data)):
        for mask in (0x01, 0x80, 0xFF):
            flipped[position] = data[position] ^ mask
            with pytest.raises(TransferError):
                import_sequence(target.cache, target.manager, flipped)
        flipped[position] = data[position]
        if position % 500 == 0:
            assert state_of(target) == before
    assert state_of(target) == before
    import_sequence(target.cache, target.manager, flipped)


def test_every_truncation_and_extension_is_refused():
    layer = small_layer()
    data = exported([layer], 190)
    target = SharingFleet([layer], num_blocks=30, max_num_seqs=2, max_model_len=200)
    before = state_of(target)
    for length in range(len(data)):
        with pytest.raises(TransferError):
            import_sequence(target.cache, target.manager, data[:length])
    for extra in (b"\0", data[-1:], bytes(32), data):
        assert_refused(target, data + extra, r"^there are \d+ bytes .*: truncated or extended$")
    assert_refused(target, data[:-1], r"^there are \d+ bytes .*: truncated or extended$")
    assert_refused(target, data[1:], r"^an exported sequence begins with b'paged_kv', these data")
    assert_refused(target, b"", r"^0 bytes are too few for an exported sequence$")
    assert state_of(target) == before


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"kv_format": replace(SMALL_FORMAT, name="int4", key_bits=4)},
            r"^header\.layers\[1\]\.kv_format\.name is 'int4' .* 'int2' here$",
        ),
        (
            {"kv_format": replace(SMALL_FORMAT, key_clip=0.5)},
            r"^header\.layers\[1\]\.kv_format\.key_clip is 0\.5 in the data, 0\.75 here$",
        ),
        (
            {"kv_format": replace(SMALL_FORMAT, key_group_size=32)},
            r"kv_format\.key_group_size is 32 ",
        ),
        (
            {"kv_format": replace(SMALL_FORMAT, has_error_feedback=True)},
            r"kv_format\.has_error_feedback is True in the data, False here$",
        ),
        ({"num_kv_heads": 2}, r"^header\.layers\[1\]\.num_kv_heads is 2 in the data, 1 here$"),
        ({"key_dim": 16}, r"^header\.layers\[1\]\.key_dim is 16 in the data, 8 here$"),
        ({"value_dim": 16}, r"^header\.layers\[1\]\.value_dim is 16 in the data, 8 here$"),
    ],
    ids=["format", "clip", "group size", "feedback", "heads", "key_dim", "value_dim"],
)
def test_other_layers_are_refused_by_name(changes, match):
    layer = small_layer()
    target = SharingFleet([layer, layer])
    assert_refused(target, exported([layer, replace(layer, **changes)]), match)


def test_other_geometry_dtype_layer_count_version_and_model_are_refused_by_name():
    layer = small_layer()
    target = SharingFleet([layer, layer])
    assert_refused(target, exported([layer]), r"^header\.layers has length 1 in the data, 2 here$")
    no_tail = small_layer(SMALL_FORMAT.with_options(min_tail_tokens=0))
    assert_refused(target, exported([no_tail] * 2), r"kv_format\.min_tail_tokens is 0 .* 32 here$")
    data = exported([layer] * 2, dtype=torch.bfloat16)
    assert_refused(target, data, r"^header\.dtype is 'bfloat16' in the data, 'float32' here$")
    data = exported([layer] * 2)
    header, body = parts_of(data)
    assert_refused(target, forged(header, body, version=2), r"^version is 2 in the data, 4 here$")
    other = header | {"byte_order": "big"}
    assert_refused(target, forged(other, body), r"^header\.byte_order is 'big' in the data")
    other = header | {"geometry": header["geometry"] | {"num_head_tokens": 0}}
    assert_refused(
        target, forged(other, body), r"^header\.geometry\.num_head_tokens is 0 in the data, 16 here"
    )
    fingerprint = r"^header\.fingerprint is '.*' in the data, '.*' here$"
    assert_refused(target, data, fingerprint, model_fingerprint=b"another model")
    other = header | {"comment": "more"}
    assert_refused(target, forged(other, body), r"^header has \['comment'\] on one side only$")


def test_another_calibration_is_refused():
    layer = small_layer(INT2)
    one, other = (calibrated(layer, seed) for seed in (1, 2))
    data = exported([one])
    for target in (other, layer):
        assert_refused(SharingFleet([target]), data, r"^header\.layers\[0\]\.calibration is '")
    SharingFleet([one]).take(data, make_stream([one], 400, 1, torch.float32))


def test_a_manager_for_another_model_is_refused_by_its_root():
    layer = small_layer()
    source, target = SharingFleet([layer]), SharingFleet([layer])
    source.manager = source.cache.new_manager(
        max_num_seqs=1, max_model_len=100, model_fingerprint=b"one"
    )
    seq_id = source.manager.add_sequence([1, 2, 3])
    assert_refused(target, source.export(seq_id), r"^header\.root is ")
    data = source.export(seq_id, model_fingerprint=b"one")
    assert_refused(target, data, r"^header\.fingerprint is ")
    target.manager = target.cache.new_manager(
        max_num_seqs=1, max_model_len=100, model_fingerprint=b"one"
    )
    import_sequence(target.cache, target.manager, data, model_fingerprint=b"one")


def test_unknown_tokens_are_refused_where_prefixes_are_cached():
    layer = small_layer()
    source = SharingFleet([layer])
    seq_id = source.add(make_stream([layer], 300, 1, torch.float32))
    source.step({seq_id: 300})
    target = SharingFleet([layer], prefix_caching=True)
    assert_refused(target, source.export(seq_id), r"^of 300 computed tokens 0 are known; ")


def test_max_model_len_is_kept():
    layer = small_layer()
    for length, computed in ((300, 300), (300, 1)):
        source = SharingFleet([layer])
        seq_id = source.add_tokens(
            make_stream([layer], 300, 1, torch.float32), tokens_of(1, length)
        )
        source.step({seq_id: computed})
        data = source.export(seq_id)
        short = SharingFleet([layer], max_model_len=299)
        assert_refused(short, data, r"^the sequence has 300 tokens; max_model_len is 299 here$")
        target = SharingFleet([layer], max_model_len=300)
        copy = import_sequence(target.cache, target.manager, data)
        target.manager.check_integrity()
        if computed == length:
            with pytest.raises(InvalidStepError):
                target.manager.reserve([copy], [1])


def test_sizes_and_counts_that_cannot_be_are_refused_by_name():
    layer = small_layer()
    target = SharingFleet([layer], max_model_len=400)
    geometry = target.manager.geometry
    header, body = parts_of(exported([layer]))
    size = len(body)
    for other in (body[:-16], body + bytes(16), b"", body * 2):
        match = rf"^the data hold {len(other)} bytes of tokens .* as in their header has {size}$"
        assert_refused(target, forged(header, other), match)
    too_long = forged(header, body, header_bytes=2**32 - 1)
    assert_refused(target, too_long, r"^a header of 4294967295 bytes exceeds the \d+ of the data$")
    for name in ("num_computed_tokens", "num_known_tokens", "num_sealed"):
        for value in (-1, True, False, 1.0, None, "1", [1], {}):
            changed = forged(header | {name: value}, body)
            assert_refused(target, changed, rf"^header\.{name} must be a count, got ")
    for num_sealed in (2, 3, 10**6, 10**30):
        changed = forged(header | {"num_sealed": num_sealed}, body)
        match = r"^header\.num_sealed is .*; with 300 of 300 tokens computed it is 0 to 1$"
        assert_refused(target, changed, match)
    # As many as there are whole blocks, which leaves no tail: the tables have no room for it.
    length = geometry.num_head_tokens + 2 * geometry.block_size
    target = SharingFleet([layer], max_model_len=length)
    assert_refused(target, forged_sequence(target.cache, length, length, 2), r"it is 0 to 1$")
    target.manager.remove_sequence(
        import_sequence(
            target.cache, target.manager, forged_sequence(target.cache, length, length, 1)
        )
    )


@pytest.mark.parametrize("prefix_caching", [False, True], ids=["plain", "prefix caching"])
def test_too_few_blocks_or_seq_ids(prefix_caching):
    layer = small_layer()
    stream = make_stream([layer], 500, 1, torch.float32)
    data = exported([layer], 400)
    needed = num_blocks_of(data, layer)
    options = {"max_num_seqs": 2, "prefix_caching": prefix_caching}
    fleet = SharingFleet([layer], num_blocks=needed, **options)
    seq_id = fleet.add_tokens(stream, tokens_of(2, 500))
    fleet.step({seq_id: 1})
    match = rf"^{needed} blocks asked for, {needed - 1} are free$"
    assert_refused(fleet, data, match, OutOfBlocksError)
    fleet.remove(seq_id)
    copy = fleet.take(data, stream)
    assert fleet.manager.num_free_blocks == 0
    fleet.remove(copy)
    assert fleet.manager.num_free_blocks == needed
    copy = fleet.take(data, stream)  # now in blocks that were cached
    fleet.manager.check_integrity()
    fleet = SharingFleet([layer], max_num_seqs=1, prefix_caching=prefix_caching)
    fleet.take(data, stream)
    assert_refused(fleet, data, r"^all 1 sequences are in use \(max_num_seqs\)$", OutOfBlocksError)


def test_outstanding_steps_and_seq_ids_without_a_sequence():
    layer = small_layer()
    fleet = SharingFleet([layer])
    stream = make_stream([layer], 300, 1, torch.float32)
    seq_id = fleet.add_tokens(stream, tokens_of(1, 300))
    fleet.step({seq_id: 200})
    data = fleet.export(seq_id)
    plan = fleet.plan({seq_id: 1})
    before = state_of(fleet)
    with pytest.raises(InvalidStepError, match="commit or roll back"):
        fleet.export(seq_id)
    assert state_of(fleet) == before
    assert_refused(fleet, data, "commit or roll back", InvalidStepError)
    fleet.manager.rollback(plan)
    for wrong in (-1, 7, 8, 1000):
        with pytest.raises(InvalidStepError, match=f"seq_id {wrong} holds no sequence"):
            fleet.export(wrong)
    assert fleet.export(seq_id) == data


def test_a_copy_that_fails_leaves_nothing_behind(monkeypatch):
    layer = small_layer()
    data = exported([layer])
    target = SharingFleet([layer], prefix_caching=True)
    assert target.manager.pool.peak_allocated == 0
    before = frozen([target.manager.sequences.state, target.manager.num_free_blocks])

    def fail(*arguments: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "write_records", fail)
        with pytest.raises(MemoryError):
            import_sequence(target.cache, target.manager, data)
    target.manager.check_integrity()
    assert frozen([target.manager.sequences.state, target.manager.num_free_blocks]) == before
    assert target.manager.num_free_seqs == target.manager.max_num_seqs
    assert target.manager.num_cached_blocks == 0
    import_sequence(target.cache, target.manager, data)
