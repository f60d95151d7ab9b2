"""Amounts of memory as text, both ways."""

from __future__ import annotations

from reprlib import repr as short_repr

import numpy as np
import pytest

from paged_kv.errors import ConfigError, PagedKVError
from paged_kv.units import format_memory, parse_memory

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("amount", "size"),
    [
        (1, 1),
        (123_456_789, 123_456_789),
        ("512", 512),
        ("512B", 512),
        ("3KB", 3_000),
        ("3MB", 3_000_000),
        ("3GB", 3_000_000_000),
        ("3KiB", 3 * KIB),
        ("3MiB", 3 * MIB),
        ("3GiB", 3 * GIB),
        ("1.5 GB", 1_500_000_000),
        ("1.5GiB", 3 * GIB // 2),
        (".5KiB", 512),
        ("0.25 KB", 250),
        ("  2 MiB  ", 2 * MIB),
        ("1.0006KB", 1000),
        ("2K", 2 * KIB),
        ("512M", 512 * MIB),
        ("2G", 2 * GIB),
        ("8g", 8 * GIB),
        ("1T", KIB * GIB),
        ("1TiB", KIB * GIB),
        ("2TB", 2 * 10**12),
        ("1.5T", 3 * KIB * GIB // 2),
        ("9007199254740993", 9_007_199_254_740_993),
        (np.int64(77), 77),
        (np.uint8(200), 200),
        (2e9, 2_000_000_000),
    ],
)
def test_bytes_of_an_amount(amount, size):
    assert parse_memory(amount) == size
    assert isinstance(parse_memory(amount), int)


@pytest.mark.parametrize("text", ["2gib", "2GIB", "2GiB", "2Gib"])
def test_units_are_read_in_any_case(text):
    assert parse_memory(text) == 2 * GIB


@pytest.mark.parametrize(
    "amount",
    [
        *("", " ", "GiB", "lots", "12 apples", "1.2.3GB", "-5MB", "1 TB2", "1e9", "1,5GB"),
        *("5.", "nan", "infGB", "1 G B", "2Ki", "2P", "2GiB 3MiB", "9" * 100, "9" * 100_000 + "!"),
        *(None, True, float("nan"), float("inf"), np.float32("nan"), [], b"2GiB", 2j),
    ],
)
def test_text_that_is_no_amount_is_refused_by_name(amount):
    with pytest.raises(ConfigError) as caught:
        parse_memory(amount)
    assert short_repr(amount) in str(caught.value)
    assert "GiB" in str(caught.value)  # what was expected
    assert isinstance(caught.value, PagedKVError)


@pytest.mark.parametrize(
    "amount", [10**400, 1 << 63, "9999999999T", 1e300], ids=["digits", "bits", "text", "float"]
)
def test_more_than_any_machine_has_is_refused_by_name(amount):
    with pytest.raises(ConfigError, match=r"^swap_space must be at most \d+ bytes, got "):
        parse_memory(amount, "swap_space")


@pytest.mark.parametrize("amount", [0, "0", "0GiB", 0.0])
def test_no_memory_is_an_amount_where_there_may_be_none(amount):
    assert parse_memory(amount, least=0) == 0


@pytest.mark.parametrize("amount", [0, -1, -(1 << 40), "0", "0.4", "0.0001KB", "0GiB"])
def test_less_than_one_byte_is_refused_by_name(amount):
    with pytest.raises(ConfigError, match="at least 1 byte") as caught:
        parse_memory(amount)
    assert repr(amount) in str(caught.value)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (KIB, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (MIB, "1.0 MiB"),
        (1_500_000, "1.4 MiB"),
        (5 * GIB // 2, "2.5 GiB"),
        (3000 * GIB, "3000.0 GiB"),
        (12.0, "12 B"),
    ],
)
def test_bytes_as_a_person_reads_them(size, text):
    assert format_memory(size) == text


@pytest.mark.parametrize("size", [1, 512, KIB, 3 * KIB, 7 * MIB, 5 * GIB, 900 * GIB])
def test_whole_units_survive_the_round_trip(size):
    assert parse_memory(format_memory(size)) == size
