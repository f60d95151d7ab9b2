"""Random tokens: of a sequence, layer by layer, and of every kind that a block may hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache

import torch
from torch import Tensor

from paged_kv.cache.layer_spec import LayerSpec


@dataclass
class Stream:
    """The tokens of one sequence: for each layer, query, key and value [length, heads, dim]."""

    queries: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    sink_queries: list[Tensor] = field(default_factory=list)  # of one that has a SinkWindow

    def __len__(self) -> int:
        return len(self.keys[0])


def make_stream(
    layers: Sequence[LayerSpec], length: int, seed: int, dtype: torch.dtype, gqa_group: int = 1
) -> Stream:
    """Random tokens whose keys have a mean and a spread for each channel, as real keys do."""
    sizes = tuple((layer.num_kv_heads, layer.key_dim, layer.value_dim) for layer in layers)
    drawn = drawn_tokens(sizes, length, seed, gqa_group)
    return Stream(*([t.to(dtype, copy=True) for t in tensors] for tensors in drawn))


@lru_cache(maxsize=100)  # a file of tests asks for few, in one format after the other
def drawn_tokens(
    sizes: tuple[tuple[int, int, int], ...], length: int, seed: int, gqa_group: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Queries, keys and values of a stream over layers of (heads, key dim, value dim)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    queries, keys, values = [], [], []
    for heads, key_dim, value_dim in sizes:
        keys.append(
            normal(length, heads, key_dim) * normal(heads, key_dim) + normal(heads, key_dim)
        )
        queries.append(normal(length, heads * gqa_group, key_dim))
        values.append(normal(length, heads, value_dim))
    return queries, keys, values


@cache
def tokens_of_every_kind(length: int, heads: int, dim: int, seed: int) -> Tensor:
    """[blocks, length, heads, dim]: each block another kind of numbers. To be read only.

    Groups of zeros of both signs are left out: which of them is the least is not defined.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(length, heads, dim, generator=generator)

    outliers = normal()
    outliers[:, :, ::5] *= 1000.0
    some_equal = normal()
    some_equal[::3] = 0.25  # constant tokens
    some_equal[:, :, ::4] = -3.3  # constant channels
    halves = torch.randint(-127, 128, (length, heads, dim), generator=generator) * 0.5
    zeros_of_both_signs = normal().abs()
    zeros_of_both_signs[normal() > 0] = -0.0
    zeros_of_both_signs[normal() > 1] = 0.0
    zeros_of_both_signs[:, :, :2] = 1.0
    zeros_of_both_signs[:2] = 1.0
    return torch.stack(
        [
            normal(),
            outliers,
            some_equal,
            halves,  # ties, to be rounded to even
            zeros_of_both_signs,
            torch.full((length, heads, dim), -0.0),
            torch.zeros(length, heads, dim),
            torch.full((length, heads, dim), 0.37),
            normal() * 1e-6,  # scales that are no normal halves
            normal() * 3e4,  # scales beyond those of halves, which saturate
        ]
    )


@cache
def in_float32_only(length: int, heads: int, dim: int, seed: int) -> Tensor:
    """As above: numbers that are infinite, or zero, in half precision."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(3, length, heads, dim, generator=generator)
    factors = torch.tensor([1e30, 1e-40, 3e38]).view(-1, 1, 1, 1)
    values = normal * factors
    values[2] = normal[2].sign() * 3e38
    return torch.cat([values, torch.full((1, length, heads, dim), -1e30)])
