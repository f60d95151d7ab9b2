"""Other projects' quantized KV caches as emulated caches, from published formulas.

- KIVI (Liu et al. 2024, arXiv:2402.02750, and its code): keys per channel in groups of 32 tokens,
  values per token in groups of 32 channels, min-max, fp16 scale and minimum. The newest tokens stay
  as they are: of keys fewer than 128, which are then quantized together; of values exactly 128.
- quanto-like: transformers' QuantizedCache with the quanto backend: keys and values per token, in
  groups of 64 channels, min-max; the newest tokens stay until there are 128.
- TurboQuant-like (Zandieh et al. 2025, arXiv:2504.19874), its variant of least squared error: each
  token divided by its norm, turned by a random orthogonal matrix, each coordinate to the nearest of
  the levels of Lloyd and Max for a Gaussian; the norm is fp16. Nothing stays as it is.
- llama.cpp's q8_0 and q4_0 (ggml-quants.c): blocks of 32 along the row with an fp16 scale, by the
  largest magnitude, of q4_0 with its sign. Since pull request 21038 (April 2026) rows are turned by
  a Hadamard matrix before; both are here.
- fp8 e4m3 with scale 1, as vLLM without calibrated scales.

Knows how they quantize, and when. A peer may also be given a head and a tail as ours have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from peers.hadamard import rotate
from peers.parallel_pass import Copies
from torch import Tensor

from paged_kv.blocks.geometry import IntArray

Quantizer = Callable[[Tensor], Tensor]  # [H, T, D], read again
OPEN_ITEMSIZE = 2  # bytes of what is not quantized
# Levels of least squared error for a standard Gaussian, those above 0: Max 1960, IRE Trans. Inf.
# Theory 6(1); each is the mean of what is rounded to it.
GAUSSIAN_LEVELS = {
    2: (0.4528, 1.510),
    3: (0.2451, 0.7560, 1.344, 2.152),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733),
}


def fp16(values: Tensor) -> Tensor:
    return values.half().float()


def min_max(groups: Tensor, dim: int, bits: int) -> Tensor:
    """Codes from the least to the largest value along `dim`, read again."""
    low, high = groups.aminmax(dim=dim, keepdim=True)
    scale, low = fp16((high - low) / ((1 << bits) - 1)), fp16(low)
    codes = ((groups - low) / scale.clamp(min=1e-8)).round()
    return codes.clamp(0, (1 << bits) - 1) * scale + low


def by_channel(bits: int, size: int) -> Quantizer:
    """Groups of `size` tokens of one channel; tokens that fill none stay as they are."""

    def read(rows: Tensor) -> Tensor:
        whole = rows.shape[1] // size * size
        groups = rows[:, :whole].unflatten(1, (-1, size))
        return torch.cat([min_max(groups, 2, bits).flatten(1, 2), rows[:, whole:]], 1)

    return read


def by_token(bits: int, size: int) -> Quantizer:
    """Groups of `size` channels of one token."""
    return lambda rows: min_max(rows.unflatten(2, (-1, size)), -1, bits).flatten(2, 3)


def turbo(bits: int) -> Quantizer:
    """A random rotation, the same for all, and levels for a Gaussian."""
    upper = torch.tensor(GAUSSIAN_LEVELS[bits])
    levels = torch.cat([-upper.flip(0), upper])

    def read(rows: Tensor) -> Tensor:
        width = rows.shape[-1]
        random = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
        matrix = torch.linalg.qr(random)[0]
        norms = fp16(rows.norm(dim=-1, keepdim=True))
        unit = rows @ matrix / norms.clamp(min=1e-8) * width**0.5
        codes = torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2)
        return levels[codes] * norms / width**0.5 @ matrix.T

    return read


def q8_0(rows: Tensor) -> Tensor:
    blocks = rows.unflatten(2, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = (blocks / scale.clamp(min=1e-12)).round()
    return (codes * fp16(scale)).flatten(2, 3)


def q4_0(rows: Tensor) -> Tensor:
    blocks = rows.unflatten(2, (-1, 32))
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = largest / -8
    codes = (blocks / torch.where(scale == 0, torch.inf, scale) + 8.5).floor().clamp(0, 15)
    return ((codes - 8) * fp16(scale)).flatten(2, 3)


def turned(quantizer: Quantizer) -> Quantizer:
    """Of rows that a Hadamard matrix has turned, and turns back."""
    return lambda rows: rotate(quantizer(rotate(rows)))


def fp8(rows: Tensor) -> Tensor:
    return rows.clamp(-448, 448).to(torch.float8_e4m3fn).float()


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A cache of another project. Of a key or value of D channels a token has
    `bits * D / 8 + metadata(D)` bytes once it is quantized.

    `residual` newest tokens stay as they are until they are quantized together, those of values one
    by one with `slides_values`; with 0, every token is quantized at once. A `head` of that many
    first tokens and at least `tail` newest ones, of which `block` are quantized together, replace
    that where `head` is not None.
    """

    name: str
    quantize_keys: Quantizer
    quantize_values: Quantizer
    bits: int
    metadata: Callable[[int], float]
    residual: int = 0
    slides_values: bool = False
    head: int | None = None
    tail: int = 32
    block: int = 128

    def __repr__(self) -> str:
        """What its results depend on, beside the formulas."""
        return f"{self.name} {self.residual} {self.slides_values} {self.head} {self.tail}"

    def with_head_and_tail(self, head: int) -> Peer:
        return replace(self, name=f"{self.name}, head + tail", head=head)

    def ends(self, num_tokens: int) -> tuple[IntArray, IntArray]:
        """For every query t: how many first keys and values are quantized when it reads them."""
        before = np.arange(num_tokens)
        if self.head is not None:
            num_sealed = np.maximum((before - self.head - self.tail) // self.block, 0)
            ends = np.where(num_sealed > 0, self.head + num_sealed * self.block, 0)
            return ends, ends
        if not self.residual:
            return before + 1, before + 1
        ends = before // self.residual * self.residual
        return ends, np.maximum(before - self.residual, 0) if self.slides_values else ends

    def copies(self, layer: int, keys: Tensor, values: Tensor) -> Copies:
        key_ends, value_ends = self.ends(keys.shape[1])
        keys, values = keys.bfloat16().float(), values.bfloat16().float()
        head = self.head or 0
        return Copies(
            open_keys=keys,
            sealed_keys=torch.cat([keys[:, :head], self.quantize_keys(keys[:, head:])], 1),
            open_values=values,
            sealed_values=torch.cat([values[:, :head], self.quantize_values(values[:, head:])], 1),
            key_ends=key_ends,
            value_ends=value_ends,
        )

    def sealed_bytes(self, head_dim: int) -> float:
        """Of a token and kv head."""
        return 2 * (self.bits * head_dim / 8 + self.metadata(head_dim))

    def effective_bytes(self, head_dim: int, num_tokens: int) -> float:
        """The same, of a sequence with what stays as it is."""
        sealed = np.mean([min(int(e[-1]), num_tokens) for e in self.ends(num_tokens + 1)])
        sealed -= (self.head or 0) if sealed else 0
        in_full = (num_tokens - sealed) * 2 * head_dim * OPEN_ITEMSIZE
        return float(sealed * self.sealed_bytes(head_dim) + in_full) / num_tokens


def kivi(bits: int) -> Peer:
    return Peer(
        name=f"KIVI-{bits}",
        quantize_keys=by_channel(bits, 32),
        quantize_values=by_token(bits, 32),
        bits=bits,
        metadata=lambda channels: 4 * channels / 32,
        residual=128,
        slides_values=True,
    )


def rowwise(
    name: str, quantizer: Quantizer, bits: int, metadata: Callable[[int], float], residual: int = 0
) -> Peer:
    return Peer(
        name=name,
        quantize_keys=quantizer,
        quantize_values=quantizer,
        bits=bits,
        metadata=metadata,
        residual=residual,
    )


PEERS = {
    peer.name: peer
    for peer in (
        kivi(2),
        kivi(4),
        *(
            rowwise(f"quanto-like {n}", by_token(n, 64), n, lambda d: 4 * d / 64, residual=128)
            for n in (2, 4)
        ),
        *(rowwise(f"TurboQuant-like {n}", turbo(n), n, lambda d: 2) for n in (2, 3, 4)),
        rowwise("llama.cpp q8_0", q8_0, 8, lambda d: 2 * d / 32),
        rowwise("llama.cpp q8_0, rotated", turned(q8_0), 8, lambda d: 2 * d / 32),
        rowwise("llama.cpp q4_0", q4_0, 4, lambda d: 2 * d / 32),
        rowwise("llama.cpp q4_0, rotated", turned(q4_0), 4, lambda d: 2 * d / 32),
        rowwise("fp8 e4m3", fp8, 8, lambda d: 0),
    )
}
