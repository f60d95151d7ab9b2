"""The most that a windowed sequence may hold, by arithmetic: what memory is drawn beside.

Knows shapes of models and windows, never what was measured.
"""

from __future__ import annotations

from typing import NamedTuple


class Stream(NamedTuple):
    """Layers, kv heads and channels of a model in float32; sinks and window."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_sink_tokens: int
    window_size: int


DEMO = Stream(5, 2, 64, 4, 1020)
SMOLLM2 = Stream(30, 3, 64, 32, 992)


def bound(stream: Stream, kv_format: str, *, has_sinks: bool = True) -> int:
    """Bytes: more than these blocks a sequence never holds at the end of a step."""
    import torch

    from paged_kv import PagedKVCache
    from paged_kv.blocks.sink_window import SinkWindow
    from paged_kv.cache.formats import FORMATS
    from paged_kv.cache.layer_spec import LayerSpec, cache_geometry, usual_kv_dtype

    sinks = stream.num_sink_tokens if has_sinks else 0
    window = SinkWindow(sinks, stream.window_size + stream.num_sink_tokens - sinks)
    form = FORMATS[kv_format]
    if not form.is_native:
        form = form.with_options(num_sink_tokens=max(form.num_sink_tokens, sinks))
    dim = stream.head_dim
    layer = LayerSpec(kv_format=form, num_kv_heads=stream.num_kv_heads, key_dim=dim, value_dim=dim)
    layers = [layer] * stream.num_layers
    dtype = usual_kv_dtype(layers, torch.float32)
    geometry = cache_geometry(layers, dtype)
    most = geometry.max_blocks(window.fitted(geometry).max_stored(geometry))
    return most * PagedKVCache(layers, num_blocks=2, dtype=dtype).block_bytes
