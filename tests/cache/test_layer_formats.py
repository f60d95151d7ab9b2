"""Which layer has which format: what users may say, and what follows for all layers."""

from __future__ import annotations

import pytest
import torch

from paged_kv.cache.formats import INT2, INT2_LONG, INT4, INT8, NATIVE
from paged_kv.cache.layer_formats import LayerFormats, formats_name, resolve_formats
from paged_kv.cache.layer_spec import LayerSpec, cache_geometry
from paged_kv.errors import ConfigError

MIXED = "int2,0=int8,-1=native"


@pytest.mark.parametrize(
    "kv_format",
    [
        MIXED,
        " int2 , 0 = int8,-1=native",
        {"default": "int2", 0: "int8", -1: "native"},
        {-1: NATIVE, "default": INT2, 0: INT8},
        ["int8", INT2, "int2", "native"],
        resolve_formats(MIXED),
    ],
)
def test_the_same_in_many_ways(kv_format):
    formats = resolve_formats(kv_format).of(4)
    assert [each.name for each in formats] == ["int8", "int2", "int2", "native"]
    assert formats_name(formats) == "int2,0=int8,3=native"
    assert resolve_formats(formats_name(formats)).of(4) == formats


def test_all_layers_alike_are_as_they_are():
    for kv_format in (NATIVE, INT8, INT4, INT2_LONG):
        assert resolve_formats(kv_format).of(3) == [kv_format] * 3
        assert resolve_formats(kv_format.name) == LayerFormats(kv_format)
        assert formats_name([kv_format] * 3) == kv_format.name


def test_blocks_may_be_larger_than_a_formats_own():
    assert resolve_formats("int8@128").of(2) == [INT8.with_options(block_size=128)] * 2
    formats = resolve_formats("int8@128,1=int2").of(3)
    assert {each.block_size for each in formats} == {128}
    assert formats_name(formats) == "int8@128,1=int2@128"
    assert formats_name(resolve_formats("int8,1=int4").of(3)) == "int8,1=int4"
    assert formats_name(resolve_formats("native,1=int2@128").of(3)) == "native,1=int2@128"
    for name in ("int8@128,1=int2", "native,1=int2@128", "int2@128,0=native"):
        formats = resolve_formats(name).of(4)
        assert resolve_formats(formats_name(formats)).of(4) == formats


def test_first_tokens_may_be_quantized_too():
    assert resolve_formats("int8/0").of(2) == [INT8.with_options(num_sink_tokens=0)] * 2
    both = INT8.with_options(block_size=128, num_sink_tokens=0)
    assert resolve_formats("int8@128/0") == LayerFormats(both)
    assert {each.num_sink_tokens for each in resolve_formats("int8/0,1=int2").of(2)} == {4}
    names = ("int8/0", "int8@128/0", "int8/0,1=int2/0,2=native", "int2/40", "int8-token@64/0")
    for name in names:
        assert resolve_formats(name).name == name
        formats = resolve_formats(name).of(3)
        assert formats_name(formats) == name
        assert resolve_formats(formats_name(formats)).of(3) == formats


def test_layers_share_the_largest_sizes_that_any_asks_for():
    formats = resolve_formats("int8,1=int4,2=int2,3=native").of(4)
    assert {each.block_size for each in formats} == {128}
    assert {each.num_sink_tokens for each in formats} == {4}
    assert {each.min_tail_tokens for each in formats} == {32}
    formats = resolve_formats("int2,0=native").of(2, num_sink_tokens=9)
    assert [(each.name, each.num_sink_tokens) for each in formats] == [("native", 9), ("int2", 9)]
    assert {each.block_size for each in formats} == {64}
    layers = [
        LayerSpec(kv_format=each, num_kv_heads=1, key_dim=64, value_dim=64) for each in formats
    ]
    assert cache_geometry(layers, torch.bfloat16) == cache_geometry(layers[1:], torch.bfloat16)


@pytest.mark.parametrize(
    ("kv_format", "message"),
    [
        ("int2,0", "got '0'"),
        ("int2,0=int8,0=int4", "got '0=int4'"),
        ("int2,first=int8", "got 'first=int8'"),
        ("int2,0=int9", "unknown KV format 'int9'"),
        ("", "unknown KV format ''"),
        ("int2,", "got ''"),
        ({0: "int8"}, "has no 'default'"),
        ({"default": "int2", "0": "int8"}, "layer '0', which is no number"),
        ({"default": "int2", 1.5: "int8"}, "layer 1.5, which is no number"),
        ({"default": "int2", True: "int8"}, "layer True, which is no number"),
        ([], "names no layer"),
        (["int8", 3], "unknown KV format 3"),
        (8, "unknown KV format 8"),
        (None, "unknown KV format None"),
        (b"int2", "unknown KV format b'int2'"),
        ("int8@100", "KV format 'int8@100': block_size must be 64 or 128, got 100"),
        ("int3@64", "KV format 'int3@64': value_bits 3 need a block_size of 128, got 64"),
        ("native@48", "KV format 'native@48': block_size must be a power of two, got 48"),
        ("int8@", "KV format 'int8@' must be a format@tokens of a block"),
        ("int8/", "KV format 'int8/' must be .*, a format/first tokens"),
        ("int8/-1", "KV format 'int8/-1' must be"),
        ("int8/0@64", "KV format 'int8/0@64' must be .*, or both in this order"),
        ("int8/0/0", "KV format 'int8/0/0' must be"),
        ("int8/٣", "KV format 'int8/٣' must be"),
        ("int8/9999999", "KV format 'int8/9999999': num_sink_tokens must be .*9999999"),
        ("int8\n/0", r"unknown KV format 'int8\\n/0'"),
        ("int8@-64", "KV format 'int8@-64' must be a format@tokens of a block"),
        ("0=int8", "'0=int8' must begin with the format of all .*, as in 'int2,0=int8'"),
        ("int2," + "9" * 5000 + "=int8", "must be a format, then layer=format"),
        ("int2,٣=int8", "got '٣=int8'"),
    ],
)
def test_what_says_nothing_is_refused_by_name(kv_format, message):
    with pytest.raises(ConfigError, match=message):
        resolve_formats(kv_format)


@pytest.mark.parametrize(
    ("kv_format", "message"),
    [
        ("int2,4=int8", "names layer 4 of a model that stores 4 layers"),
        ("int2,-5=int8", "names layer -5 of a model that stores 4 layers"),
        (["int2"] * 3, "names 3 layers of a model that stores 4"),
        (["int2"] * 5, "names layer 4 of a model that stores 4 layers"),
    ],
)
def test_other_layers_than_there_are_are_refused(kv_format, message):
    with pytest.raises(ConfigError, match=message):
        resolve_formats(kv_format).of(4)


def test_a_layer_named_from_both_ends_is_refused():
    with pytest.raises(ConfigError, match="layer 3 twice"):
        resolve_formats("int2,3=int8,-1=native").of(4)
