"""Attention that is measured: its shapes, its contents, and torch's own attention over them.

Knows tensors, never blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..blocks.geometry import BlockGeometry, IntArray
from .turns import Sampling, Tell, report_timings, take_turns

COLD_BYTES: Final = 1 << 28  # of contiguous K/V over all layers, at least
MAX_LAYERS: Final = 16

Attention = Callable[[int], Tensor]  # [T, Hq, D] of one layer
Sdpa = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # [B, Hq, L, D], K/V, mask


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sequences of these lengths, the last `num_new` tokens of each being the timed step's own."""

    kind: str  # decode, call, prefill, append or seal
    lengths: tuple[int, ...]
    heads: tuple[int, int]  # of queries and of K/V
    head_dim: int = 64
    num_new: int = 1
    is_cold: bool = True  # more layers than the processor's caches hold
    is_half: bool = False  # queries and K/V, other than in blocks, are bfloat16

    @property
    def contiguous(self) -> str:
        """What torch's own attention is called."""
        return f"contiguous {'bf16' if self.is_half else 'fp32'} SDPA"

    @property
    def tolerance(self) -> tuple[float, float]:
        """Of two ways to compute the same: relative and absolute."""
        return (2e-2, 2e-3) if self.is_half else (1e-3, 1e-4)

    def assert_close(self, output: Tensor, expected: Tensor) -> None:
        relative, absolute = self.tolerance
        torch.testing.assert_close(output, expected, rtol=relative, atol=absolute)

    @property
    def num_layers(self) -> int:
        if not self.is_cold:
            return 2
        layer_bytes = sum(self.lengths) * self.heads[1] * self.head_dim * 2 * 4
        return min(max(-(-COLD_BYTES // layer_bytes), 2), MAX_LAYERS)

    def context_lens(self, geometry: BlockGeometry) -> IntArray:
        """Tokens that are stored before the timed step; for `seal`, one fewer than seal a block."""
        if self.kind != "seal":
            return np.array(self.lengths) - self.num_new
        full = geometry.num_head_tokens + geometry.block_size + geometry.min_tail_tokens
        assert full <= min(self.lengths)
        return np.full(len(self.lengths), full - 1)


def ragged_lengths(count: int, shortest: int, longest: int) -> tuple[int, ...]:
    """Log-uniform lengths, both ends among them."""
    bounds = np.log(shortest), np.log(longest)
    lengths = np.exp(np.random.default_rng(0).uniform(*bounds, count)).astype(int)
    return (shortest, *lengths[1:-1].tolist(), longest)


CASES = {
    "16x2048 8/2 64": Case(kind="decode", lengths=(2048,) * 16, heads=(8, 2)),
    "64x512 8/8 64": Case(kind="decode", lengths=(512,) * 64, heads=(8, 8)),
    "4x8192 32/8 128": Case(kind="decode", lengths=(8192,) * 4, heads=(32, 8), head_dim=128),
    "32 ragged 16-4096 8/2 64": Case(
        kind="decode", lengths=ragged_lengths(32, 16, 4096), heads=(8, 2)
    ),
    "prefill chunk 512 on 4096 context": Case(
        kind="prefill", lengths=(4608,), heads=(8, 2), num_new=512
    ),
    "prefill chunk 512 on 4096 context, in bf16": Case(
        kind="prefill", lengths=(4608,), heads=(8, 2), num_new=512, is_half=True
    ),
    "append 64 sequences": Case(kind="append", lengths=(120,) * 64, heads=(8, 8)),
    "seal 64 blocks": Case(kind="seal", lengths=(320,) * 64, heads=(8, 8)),
    "call 1x16 1/1 64": Case(kind="call", lengths=(16,), heads=(1, 1), is_cold=False),
}
QUICK_CASES = {
    "4x512 8/2 64": Case(kind="decode", lengths=(512,) * 4, heads=(8, 2), is_cold=False),
    "8 ragged 16-512 8/2 64": Case(
        kind="decode", lengths=ragged_lengths(8, 16, 512), heads=(8, 2), is_cold=False
    ),
    "prefill chunk 64 on 448 context": Case(
        kind="prefill", lengths=(512,), heads=(8, 2), num_new=64, is_cold=False
    ),
    "append 8 sequences": Case(kind="append", lengths=(300,) * 8, heads=(8, 2), is_cold=False),
    "seal 8 blocks": Case(kind="seal", lengths=(320,) * 8, heads=(8, 2), is_cold=False),
    "call 1x16 1/1 64": CASES["call 1x16 1/1 64"],
}


# -- contents, and attention over them where they are contiguous ----------------------------------


@dataclass(frozen=True)
class Contents:
    """What all sides hold, layer by layer: B sequences of up to S tokens, and T queries."""

    keys: list[Tensor]  # [B, H, S, D], padding behind each sequence's end
    values: list[Tensor]
    queries: list[Tensor]  # [T, Hq, D] of the timed step

    @classmethod
    def random(cls, case: Case) -> Contents:
        generator = torch.Generator().manual_seed(0)
        num_seqs, num_layers = len(case.lengths), range(case.num_layers)
        stored = num_seqs, case.heads[1], max(case.lengths), case.head_dim
        asked = num_seqs * case.num_new, case.heads[0], case.head_dim
        dtype = torch.bfloat16 if case.is_half else torch.float32

        def some(shape: tuple[int, ...]) -> Tensor:
            return empty(shape).normal_(generator=generator).to(dtype)

        return cls(
            keys=[some(stored) for _ in num_layers],
            values=[some(stored) for _ in num_layers],
            queries=[some(asked) for _ in num_layers],
        )

    def tokens(self, layer: int, rows: IntArray, positions: IntArray) -> tuple[Tensor, Tensor]:
        """Keys and values [T, H, D] of these tokens of these sequences."""
        row_ids, token_ids = torch.from_numpy(rows), torch.from_numpy(positions)
        return self.keys[layer][row_ids, :, token_ids], self.values[layer][row_ids, :, token_ids]


def empty(shape: tuple[int, ...]) -> Tensor:
    """Memory from numpy, which asks for huge pages, as the cache's is: they read faster."""
    return torch.from_numpy(np.empty(shape, dtype=np.float32))


def visible_tokens(case: Case) -> Tensor | None:
    """[B, 1, L, S] True where a new token attends; None where each attends to all there is."""
    new = torch.arange(case.num_new)[None, None, :, None]
    first = torch.tensor(case.lengths)[:, None, None, None] - case.num_new
    visible = torch.arange(max(case.lengths)) <= first + new
    return None if visible.all() else visible


def masks(case: Case) -> dict[str, Tensor | None]:
    visible = visible_tokens(case)
    if visible is None:
        return {"": None}
    additive = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
    return {", boolean mask": visible, ", additive mask": additive}


def folded_sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """The heads of a group become query rows of their kv head; `mask` has a row for each."""
    rows = query.reshape(len(key), key.shape[1], -1, query.shape[3])
    output = functional.scaled_dot_product_attention(rows, key, value, attn_mask=mask)
    return output.view(query.shape)


def gqa_sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, enable_gqa=True
    )


def expanded_sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """A copy of each kv head for every query head of its group, made in each call."""
    group_size = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(group_size, dim=1) for tensor in (key, value))
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def contiguous_attention(
    case: Case, contents: Contents, sdpa: Sdpa, mask: Tensor | None, layer: int
) -> Tensor:
    query = contents.queries[layer]
    query = query.view(-1, case.num_new, *query.shape[1:]).transpose(1, 2)  # [B, Hq, L, D]
    output = sdpa(query, contents.keys[layer], contents.values[layer], mask)
    return output.transpose(1, 2).flatten(0, 1)


def contiguous_variants(case: Case, contents: Contents) -> dict[str, Attention]:
    """Every way to ask torch for the same attention."""
    variants: dict[str, Attention] = {}
    group_size = case.heads[0] // case.heads[1]
    for suffix, mask in masks(case).items():
        folded_mask = None if mask is None else mask.repeat(1, 1, group_size, 1)
        ways: dict[str, tuple[Sdpa, Tensor | None]] = {"folded heads": (folded_sdpa, folded_mask)}
        if group_size > 1:
            ways |= {"enable_gqa": (gqa_sdpa, mask), "expanded heads": (expanded_sdpa, mask)}
        for name, (sdpa, its_mask) in ways.items():
            attention = partial(contiguous_attention, case, contents, sdpa, its_mask)
            variants[name + suffix] = attention
    return variants


def fastest_contiguous(
    name: str, case: Case, contents: Contents, sampling: Sampling, tell: Tell = report_timings
) -> tuple[str, Attention]:
    """The way that takes torch the least time here, all of them being equal in what they return."""
    variants = contiguous_variants(case, contents)
    outputs = [attention(0) for attention in variants.values()]
    for output in outputs[1:]:
        case.assert_close(output, outputs[0])
    if len(variants) == 1:
        return next(iter(variants.items()))
    timings = take_turns({**variants}, case.num_layers, sampling)
    tell(f"{name}, {case.contiguous}", timings)
    best = min(timings, key=lambda variant: timings[variant].seconds)
    return best, variants[best]


def per_sequence_attention(case: Case, contents: Contents) -> Attention:
    """One call for each sequence, on K/V of exactly its length."""

    def exact(padded: Tensor) -> list[Tensor]:
        sizes = [case.heads[1] * length * case.head_dim for length in case.lengths]
        parts = empty((sum(sizes),)).split(sizes)  # type: ignore[no-untyped-call]
        return [
            part.view(1, case.heads[1], length, case.head_dim).copy_(padded[row, :, :length])
            for row, (part, length) in enumerate(zip(parts, case.lengths, strict=True))
        ]

    keys, values = ([exact(layer) for layer in kv] for kv in (contents.keys, contents.values))

    def attend_each(layer: int) -> Tensor:
        query = contents.queries[layer][:, :, None]
        outputs = [
            folded_sdpa(query[row : row + 1], keys[layer][row], values[layer][row], None)
            for row in range(len(case.lengths))
        ]
        return torch.cat(outputs)[:, :, 0]

    return attend_each
