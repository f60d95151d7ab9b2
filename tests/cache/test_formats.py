"""The formats and their record layout: sizes, alignment, sections, and refused values."""

from __future__ import annotations

import itertools

import pytest

from paged_kv.cache.formats import (
    FORMATS,
    INT2,
    INT4,
    INT8,
    NATIVE,
    WIDE_SHARES,
    KVFormat,
    RecordLayout,
    block_geometry,
    resolve_format,
)
from paged_kv.errors import ConfigError

BF16, FP32 = 2, 4
HEAD_DIMS = range(8, 257, 8)

PLAIN4, PLAIN2 = (KVFormat(name=f"plain{bits}", key_bits=bits, value_bits=bits) for bits in (4, 2))
EVERY_QUANTIZED_FORMAT = [
    *(
        base.with_options(block_size=block_size, key_group_size=group)
        for base, block_size, group in itertools.product(
            (INT8, INT4, INT2, PLAIN4, PLAIN2), (64, 128), (32, 64, None)
        )
        if group is None or group < block_size
    ),
    *(INT2.with_options(wide_key_share=share) for share in WIDE_SHARES if share != 0.25),
    *(INT4.with_options(wide_key_share=share) for share in WIDE_SHARES if share != 0.0625),
    *(
        f
        for f in FORMATS.values()
        if f.name in ("int8-token", "k4v2", "int3", "int2-long", "kivi2")
    ),
    *(
        KVFormat(name=f"k{key_bits}v{value_bits}", key_bits=key_bits, value_bits=value_bits)
        for key_bits, value_bits in itertools.product((8, 4, 2), (8, 4, 3, 2))
        if key_bits != value_bits
    ),
]


def describe(kv_format: KVFormat) -> str:
    group, share = kv_format.key_group_size, kv_format.wide_key_share
    return f"{kv_format.name}-block{kv_format.block_size}-g{group}-w{share}"


def layout_of(
    kv_format: KVFormat, key_dim: int = 128, value_dim: int = 128, itemsize: int = BF16
) -> RecordLayout:
    return RecordLayout(
        kv_format=kv_format, key_dim=key_dim, value_dim=value_dim, itemsize=itemsize
    )


# -- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kv_format", "bytes_per_token"),
    [
        pytest.param(NATIVE, 512, id="native"),
        pytest.param(INT8, 266, id="int8"),
        pytest.param(FORMATS["int8-token"], 260, id="int8-token"),
        pytest.param(INT4, 136, id="int4"),
        pytest.param(INT4.with_options(block_size=64), 140, id="int4-block64"),
        pytest.param(FORMATS["k4v2"], 102, id="k4v2"),
        pytest.param(INT2, 82, id="int2"),
        pytest.param(INT2.with_options(block_size=128), 78, id="int2-block128"),
        pytest.param(FORMATS["int2-long"], 80, id="int2-long"),
        pytest.param(PLAIN4, 136, id="4 bits as KIVI"),
        pytest.param(PLAIN2, 72, id="2 bits as KIVI"),
        pytest.param(FORMATS["kivi2"], 84, id="kivi2"),
    ],
)
def test_bytes_per_token_at_head_dim_128_in_bf16(kv_format, bytes_per_token):
    layout = layout_of(kv_format)
    assert layout.bytes_per_token == bytes_per_token
    assert layout.record_bytes == bytes_per_token * kv_format.block_size


@pytest.mark.parametrize(
    ("kv_format", "tokens"),
    [(NATIVE, 16), (INT8, 32), (INT4, 32), (INT2, 8), (FORMATS["int2-long"], 16)],
    ids=lambda value: getattr(value, "name", None),
)
def test_open_capacity_at_head_dim_128_in_bf16(kv_format, tokens):
    assert layout_of(kv_format).open_capacity == tokens


@pytest.mark.parametrize("kv_format", [*EVERY_QUANTIZED_FORMAT, NATIVE], ids=describe)
def test_records_of_every_head_dim_are_aligned_and_hold_a_power_of_two_of_open_tokens(kv_format):
    for key_dim, itemsize in itertools.product(HEAD_DIMS, (BF16, FP32)):
        for value_dim in {8, 24, 128, 256, key_dim}:
            layout = layout_of(kv_format, key_dim, value_dim, itemsize)
            case = (key_dim, value_dim, itemsize)
            capacity = layout.open_capacity
            assert layout.record_bytes % 16 == 0, case
            assert capacity >= 1, case
            assert capacity & (capacity - 1) == 0, case
            assert kv_format.block_size % capacity == 0, case
            token_bytes = (key_dim + value_dim) * itemsize
            assert capacity * token_bytes <= layout.record_bytes < 2 * capacity * token_bytes, case


@pytest.mark.parametrize("kv_format", EVERY_QUANTIZED_FORMAT, ids=describe)
def test_sections_of_every_head_dim_are_aligned_disjoint_and_fit_the_record(kv_format):
    for key_dim, value_dim in itertools.product(HEAD_DIMS, (8, 40, 128, 256)):
        layout = layout_of(kv_format, key_dim, value_dim)
        sections = layout.section_bytes
        spans = sorted((layout.offset(name), layout.offset(name) + sections[name])
                       for name in sections)  # fmt: skip
        assert spans[0][0] == 0
        assert spans[-1][1] <= layout.record_bytes < spans[-1][1] + 16
        for (_, end), (next_start, _) in itertools.pairwise(spans):
            assert end <= next_start, (key_dim, value_dim)
        assert all(start % 16 == 0 for start, _ in spans), (key_dim, value_dim)


@pytest.mark.parametrize("kv_format", EVERY_QUANTIZED_FORMAT, ids=describe)
def test_sections_hold_every_code_scale_and_zero_point(kv_format):
    key_dim, value_dim, tokens = 96, 40, kv_format.block_size
    key_bits, value_bits = kv_format.key_bits, kv_format.value_bits
    num_wide = {0.0: 0, 0.0625: 8, 0.125: 16, 0.25: 24, 0.3125: 32, 0.375: 40, 0.5: 48}[
        kv_format.wide_key_share
    ]
    expected = {
        "key_codes": tokens * key_dim * key_bits // 8,
        "value_codes": tokens * value_dim * {3: 2}.get(value_bits, value_bits) // 8,
        "value_scale": 2 * tokens,
    }
    if num_wide:
        expected["wide_codes"] = tokens * num_wide * 2 // 8
    if value_bits == 3:
        expected["upper_value_codes"] = tokens * value_dim // 8
    if kv_format.has_token_keys:
        expected["key_scale"] = 2 * tokens
    else:
        group_size = kv_format.key_group_size or tokens
        per_channel = 2 * key_dim * tokens // group_size
        expected |= {"key_scale": per_channel, "key_zero": per_channel}
    if value_bits < 8 and not kv_format.rotates_values:
        expected["value_zero"] = 2 * tokens
    assert layout_of(kv_format, key_dim, value_dim).section_bytes == expected


def test_native_record_is_sixteen_full_precision_tokens():
    layout = layout_of(NATIVE, key_dim=40, value_dim=24, itemsize=FP32)
    assert layout.record_bytes == 16 * (40 + 24) * 4
    assert layout.open_capacity == 16


def test_unknown_section_has_no_offset():
    with pytest.raises(KeyError, match="value_zero"):
        layout_of(INT8).offset("value_zero")


# -- refused values -----------------------------------------------------------------------------


@pytest.mark.parametrize("base", [INT8, INT4, INT2], ids=lambda f: f.name)
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *itertools.product(("key_bits", "value_bits"), (0, 1, 5, 16, -2, 4.0, 3.0, True)),
        ("key_bits", 3),
        ("wide_key_share", 0.3),
        ("wide_key_share", -0.25),
        ("wide_key_share", 1.0),
        ("wide_key_clip", 0.0),
        ("block_size", 0),
        ("block_size", 16),
        ("block_size", 96),
        ("block_size", 256),
        ("block_size", -128),
        ("key_group_size", 0),
        ("key_group_size", 16),
        ("key_group_size", 48),
        ("key_group_size", 256),
        ("key_clip", 0.0),
        ("key_clip", -0.5),
        ("key_clip", 1.5),
        ("key_clip", float("nan")),
        ("value_clip", 0.0),
        ("value_clip", 1.01),
        ("value_clip", float("inf")),
        ("num_sink_tokens", -1),
        ("min_tail_tokens", -32),
    ],
)
def test_bad_setting_is_refused_by_name_and_value(base, setting, value):
    with pytest.raises(ConfigError, match=rf"{setting} must .*got {value}$"):
        base.with_options(**{setting: value})


@pytest.mark.parametrize("value", [0, -16, 12, 100])
def test_native_block_size_must_be_a_power_of_two(value):
    with pytest.raises(ConfigError, match=rf"block_size must be a power of two, got {value}$"):
        NATIVE.with_options(block_size=value)


@pytest.mark.parametrize("setting", ["num_sink_tokens", "min_tail_tokens"])
def test_native_refuses_negative_token_counts(setting):
    with pytest.raises(ConfigError, match=rf"{setting} must not be negative, got -4$"):
        NATIVE.with_options(**{setting: -4})


def test_key_group_may_not_exceed_the_block():
    with pytest.raises(ConfigError, match=r"at most block_size \(64\), got 128$"):
        INT2.with_options(block_size=64, key_group_size=128)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_bits": 8, "value_bits": 4, "wide_key_share": 0.25}, "must be 2 or 4 .* is 8"),
        ({"key_bits": 4, "value_bits": 3, "block_size": 64}, "block_size of 128, got 64"),
        ({"key_bits": 4, "value_bits": 4, "has_token_keys": True}, "needs key_bits 8"),
        (
            {"key_bits": 8, "value_bits": 8, "has_token_keys": True, "key_group_size": 32},
            "needs key_bits 8 and no key_group_size, got 8 and 32",
        ),
        (
            {"key_bits": 8, "value_bits": 8, "has_token_keys": True, "has_error_feedback": True},
            "keys that are quantized per channel",
        ),
        ({"key_bits": None, "value_bits": 2}, "native is both None"),
        ({"key_bits": 8, "value_bits": None}, "native is both None"),
        (
            {"key_bits": None, "value_bits": None, "block_size": 16, "rotates_values": True},
            "values that are quantized",
        ),
        ({"key_bits": 2, "value_bits": 2, "rotates_values": 1}, "rotates_values must be a bool"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        KVFormat(name="odd", **options)


@pytest.mark.parametrize("size", [0, -8, 4, 12, 100, 264, 512])
@pytest.mark.parametrize("name", ["key_dim", "value_dim"])
@pytest.mark.parametrize("kv_format", FORMATS.values(), ids=FORMATS)
def test_bad_head_dim_is_refused_by_name_and_value(kv_format, name, size):
    with pytest.raises(ConfigError, match=rf"{name} must be a multiple of 8 .*, got {size}$"):
        layout_of(kv_format, **{name: size})


def test_config_error_is_a_value_error():
    with pytest.raises(ValueError, match="bits"):
        KVFormat(name="int3", key_bits=3, value_bits=3)


# -- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_resolve_format_finds_every_name(name):
    assert resolve_format(name).name == name


def test_resolve_format_returns_a_given_format_itself():
    kv_format = INT2.with_options(key_clip=0.7)
    assert resolve_format(kv_format) is kv_format


@pytest.mark.parametrize("name", ["int5", "", "INT8", "fp8"])
def test_resolve_format_refuses_an_unknown_name_and_lists_the_known(name):
    expected = rf"unknown KV format '{name}'; expected one of native, int8, int8-token, int4, "
    with pytest.raises(ConfigError, match=expected):
        resolve_format(name)


def test_with_options_changes_only_what_it_names():
    changed = INT2.with_options(key_group_size=32)
    assert (changed.key_group_size, changed.num_key_groups) == (32, 2)
    assert changed.with_options(key_group_size=64) == changed.with_options(key_group_size=None)
    assert changed.with_options(key_group_size=64) == INT2


# -- geometry -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kv_format", "open_block_size", "num_head_tokens"),
    [(NATIVE, 16, 0), (INT8, 32, 32), (INT4, 32, 32), (INT2, 8, 8)],
    ids=["native", "int8", "int4", "int2"],
)
def test_head_is_one_open_block_by_default(kv_format, open_block_size, num_head_tokens):
    geometry = block_geometry([layout_of(kv_format)])
    assert geometry.open_block_size == open_block_size
    assert geometry.num_head_tokens == num_head_tokens
    assert geometry.min_tail_tokens == kv_format.min_tail_tokens
    assert geometry.seals is (kv_format is not NATIVE)


@pytest.mark.parametrize(("sinks", "head"), [(0, 0), (1, 8), (8, 8), (9, 16), (20, 24)])
def test_sink_tokens_are_rounded_up_to_whole_open_blocks(sinks, head):
    kv_format = INT2.with_options(num_sink_tokens=sinks)
    assert block_geometry([layout_of(kv_format)]).num_head_tokens == head


def test_layers_that_share_a_table_use_the_smallest_open_block():
    int8, int4 = (f.with_options(block_size=64, min_tail_tokens=24) for f in (INT8, INT4))
    geometry = block_geometry([layout_of(int8), layout_of(INT2), layout_of(int4)])
    assert geometry.open_block_size == 8


def test_a_native_layer_beside_quantized_ones_has_their_open_blocks():
    native = NATIVE.with_options(block_size=64, num_sink_tokens=4, min_tail_tokens=24)
    assert block_geometry([layout_of(native), layout_of(INT2)]) == block_geometry([layout_of(INT2)])


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(NATIVE, id="native as it is alone"),
        pytest.param(INT2.with_options(block_size=128), id="block_size"),
        pytest.param(INT2.with_options(num_sink_tokens=5), id="num_sink_tokens"),
        pytest.param(INT2.with_options(min_tail_tokens=0), id="min_tail_tokens"),
    ],
)
@pytest.mark.parametrize("swap", [False, True])
def test_layers_that_cannot_share_a_table_are_refused(other, swap):
    layouts = [layout_of(INT2), layout_of(other)]
    with pytest.raises(ConfigError, match="layers that share a block table must agree"):
        block_geometry(layouts[::-1] if swap else layouts)
