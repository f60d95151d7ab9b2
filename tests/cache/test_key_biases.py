"""Models whose keys have a large bias in some channels, as Qwen2's, in 8 bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paged_kv import FORMATS, LayerSpec, PagedKVCache, paged_attention

CONTEXT = 1000
CHANNELS = [3, 20, 41]


def output_error(name: str, bias: float) -> float:
    """Relative error of attention from one more token, against keys and values as they were."""
    layer = LayerSpec(kv_format=FORMATS[name], num_kv_heads=2, key_dim=64, value_dim=64)
    cache = PagedKVCache([layer], num_blocks=80, dtype=torch.float32)
    manager = cache.new_manager(max_num_seqs=1, max_model_len=CONTEXT + 1)
    seq_id = manager.add_sequence()
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, CONTEXT + 1, 2, 64, generator=generator)
    key[..., CHANNELS] += bias
    for start, end in ((0, CONTEXT), (CONTEXT, CONTEXT + 1)):
        plan = manager.reserve([seq_id], [end - start])
        assert plan is not None
        new = (rows[start:end] for rows in (query, key, value))
        output = paged_attention(*new, cache, 0, cache.begin(plan))
        manager.commit(plan)
    scores = torch.einsum("hd,khd->hk", query[-1].double(), key.double()) / 8
    expected = torch.einsum("hk,khd->hd", scores.softmax(-1), value.double()).numpy()
    error = np.linalg.norm(output[0].double().numpy() - expected)
    return float(error / np.linalg.norm(expected))


@pytest.mark.parametrize("bias", [0.0, 100.0, 300.0])
def test_one_scale_a_channel_bears_it(bias):
    assert output_error("int8", bias) <= 0.012


def test_one_scale_a_token_does_not():
    assert output_error("int8-token", 0.0) <= 0.012
    assert output_error("int8-token", 300.0) > 0.2
