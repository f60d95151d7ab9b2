"""Sealed bytes stay what they are: a seeded run against hashes taken before the house was rebuilt.

Numbers are small integers over 64, exact in every precision, so that no library's random numbers
and no machine's rounding decide what is stored.
"""

from __future__ import annotations

from hashlib import sha256

import numpy as np
import pytest
import torch

from paged_kv import KVFormat, LayerSpec, PagedKVCache, paged_attention
from paged_kv.cache.formats import INT8_TOKEN

INT2 = KVFormat(name="int2", key_bits=2, value_bits=2, key_clip=0.75, value_clip=0.8)
FORMATS = {  # as they were then
    "int8": INT8_TOKEN,
    "int4": KVFormat(name="int4", key_bits=4, value_bits=4),
    "int2": INT2,
    "int2, groups of 32": INT2.with_options(key_group_size=32),
}
LENGTH = 700
# Of the sealed records of every sequence in both layers, at commit fdfb6e3.
GOLDEN = {
    ("int8", torch.float32): "dad9bc49d49be6ffcf9c997ed5a4ab2ba157368495d8b9a6fda2098dddbfe67a",
    ("int8", torch.bfloat16): "ef6996e1ce4b8d190f77eb5d859c591fc7b88e5618059367da02c3daf124e264",
    ("int4", torch.float32): "03c418ae99c320ea77e7d8cc232dc2091ef0116f72633f27bd9e08bc992b998c",
    ("int4", torch.bfloat16): "db63350222722cdf57d1b55c9119cda93d54b0984a8ebf8392b040e8f58d1660",
    ("int2", torch.float32): "0ed42dcf9e709201ae66f32f497b6b8e841dd6c24566a3f4d8d4baf797efe4d9",
    ("int2", torch.bfloat16): "fe58bd09aae0f09dd89a6e36174346256084f52e6cf97e8189179d9da68e8021",
    (
        "int2, groups of 32",
        torch.float32,
    ): "bd4b8b77531c297069d82c204cf0cbae131ddca8cdc1e9ab8603cc348595c123",
    (
        "int2, groups of 32",
        torch.bfloat16,
    ): "31b16cf84d9f15fa525c53c5b09290fe1dd828fea56da79f1380915776ea6371",
}


def sealed_bytes(kv_format: KVFormat, dtype: torch.dtype) -> tuple[int, str]:
    """Sealed blocks, and a hash of them, after prompts in chunks and decoding, two layers."""
    layer = LayerSpec(kv_format=kv_format, num_kv_heads=2, key_dim=64, value_dim=64)
    cache = PagedKVCache([layer] * 2, num_blocks=256, dtype=dtype)
    manager = cache.new_manager(max_num_seqs=3, max_model_len=LENGTH)
    sequences = np.array([manager.add_sequence() for _ in range(3)])
    rng = np.random.default_rng(15)
    tokens = rng.integers(-256, 257, size=(3, LENGTH, 2, 3, 2, 64)) / 64  # layer; q, k, v; head
    tokens[:, :, :, 1, :, ::7] *= 8  # channels that stand out, as those of keys do
    lengths = np.zeros(3, dtype=np.int64)
    for counts in ([300, 170, 1], [1, 1, 400], *[[1, 1, 1]] * 20, [279, 128, 65]):
        plan = manager.reserve(sequences, np.array(counts))
        assert plan is not None
        step = cache.begin(plan)
        ends = lengths + counts
        ranges = list(zip(range(3), lengths.tolist(), ends.tolist(), strict=True))
        for layer in range(2):
            new = np.concatenate([tokens[i, start:end, layer] for i, start, end in ranges])
            query, key, value = torch.from_numpy(new).to(dtype).unbind(1)
            paged_attention(query, key, value, cache, layer, step)
        manager.commit(plan)
        lengths = ends
    digest = sha256()
    num_sealed = 0
    for sequence in sequences.tolist():
        body = torch.as_tensor(manager.body_ids(sequence), dtype=torch.int64)
        num_sealed += len(body)
        for arena in cache.arenas:
            digest.update(arena[body].numpy().tobytes())
    return num_sealed, digest.hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_sealed_bytes_are_those_of_before(name: str, dtype: torch.dtype) -> None:
    num_sealed, digest = sealed_bytes(FORMATS[name], dtype)
    assert num_sealed >= 8
    assert digest == GOLDEN[name, dtype]
