"""Formats to test with, by label."""

from __future__ import annotations

from paged_kv.cache.formats import INT2, INT4, INT8, NATIVE

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
