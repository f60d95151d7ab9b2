"""Formats to test with, by label."""

from __future__ import annotations

from paged_kv.cache.formats import (
    INT2,
    INT2_LONG,
    INT3,
    INT4,
    INT8,
    INT8_TOKEN,
    KIVI2,
    NATIVE,
    KVFormat,
)

FORMATS_BY_LABEL = {
    "native": NATIVE,
    "int8": INT8,
    "int4": INT4,
    "int2": INT2,
    "int8-token": INT8_TOKEN,
    "int8-token-block64": INT8_TOKEN.with_options(block_size=64, min_tail_tokens=5),
    "int4-g64-clipped": INT4.with_options(
        wide_key_share=0.0, key_group_size=64, key_clip=0.9, rotates_values=False
    ),
    "int4-block64-half-wide": INT4.with_options(block_size=64, wide_key_share=0.5),
    "int3": INT3,
    "k4v3-g32-zeros": INT4.with_options(value_bits=3, key_group_size=32, rotates_values=False),
    "int2-long": INT2_LONG,
    "kivi2": KIVI2,
    "int2-g32-min-max-no-head-no-tail": INT2.with_options(
        key_group_size=32, key_clip=1.0, value_clip=1.0, num_sink_tokens=0, min_tail_tokens=0
    ),
    "k8v2": KVFormat(name="k8v2", key_bits=8, value_bits=2, rotates_values=True),
    "k2v8": KVFormat(name="k2v8", key_bits=2, value_bits=8, wide_key_share=0.125),
}

QUANTIZED_LABELS = [label for label in FORMATS_BY_LABEL if label != "native"]
