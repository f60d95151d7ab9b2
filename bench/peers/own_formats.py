"""Our own formats as an emulated cache: written from what `KVFormat` says, not from the kernels.

So that a pass in parallel measures them as decoding would, and that each checks the other.
"""

from __future__ import annotations

import numpy as np
import torch
from peers.hadamard import rotate
from peers.parallel_pass import Copies
from torch import Tensor

from paged_kv.cache.layer_groups import sequence_bytes
from paged_kv.cache.layer_spec import LayerSpec, cache_geometry, usual_kv_dtype

FP16_MAX = 65504.0


def fp16(values: Tensor) -> Tensor:
    return values.clamp(-FP16_MAX, FP16_MAX).half().float()


def quotient(values: Tensor, scale: Tensor) -> Tensor:
    """The quotient, and 0 where the scale is 0."""
    return (values / torch.where(scale == 0, torch.inf, scale)).nan_to_num(0.0)


def affine(values: Tensor, dim: int, bits: int, clip: Tensor | float, top: Tensor) -> Tensor:
    """Codes 0 to `top` over the range of values along `dim`, shrunk by `clip`, read again."""
    low, high = values.aminmax(dim=dim, keepdim=True)
    middle, half = (low + high) / 2, (high - low) / 2 * clip
    scale = fp16(2 * half / top)
    zero, offset = (fp16(middle), 128) if bits == 8 else (fp16(middle - half), 0)
    codes = quotient(values - zero, scale).round() + offset
    return (torch.minimum(codes.clamp(min=0), top) - offset) * scale + zero


def symmetric(values: Tensor, bits: int, clip: float) -> Tensor:
    """Codes around 0 with one scale for the last dimension; below 8 bits none is 0 itself."""
    largest = values.abs().amax(-1, keepdim=True)
    if bits == 8:
        scale = fp16(largest / 127)
        return quotient(values, scale).round().clamp(-127, 127) * scale
    top = (1 << bits) - 1
    scale = fp16(2 * (largest * clip) / top)
    return ((quotient(values, scale) + top / 2).round().clamp(0, top) - top / 2) * scale


class OwnFormat:
    """The layers of a model in one format."""

    def __init__(self, name: str, layers: list[LayerSpec], dtype: torch.dtype) -> None:
        self.name, self._layers = name, layers
        self.kv_format = layers[0].kv_format
        self._dtype = usual_kv_dtype(layers, dtype)
        self._geometry = cache_geometry(layers, self._dtype)
        self._num_heads = sum(layer.num_kv_heads for layer in layers)

    def __repr__(self) -> str:
        return f"{self.kv_format} {self._dtype} {[layer.calibration for layer in self._layers]}"

    @property
    def sealed_bytes(self) -> float:
        """Of a token and kv head."""
        layouts = [layer.record_layout(self._dtype).bytes_per_token for layer in self._layers]
        return sum(layouts) / len(layouts)

    def effective_bytes(self, num_tokens: int) -> float:
        """The same, of a sequence with its head and tail."""
        return sequence_bytes(self._layers, self._dtype, num_tokens) / num_tokens / self._num_heads

    def copies(self, layer: int, keys: Tensor, values: Tensor) -> Copies:
        geometry, spec = self._geometry, self._layers[layer]
        rotates = self.kv_format.rotates_values
        stored_keys = keys.to(self._dtype).float()
        stored_values = (rotate(values) if rotates else values).to(self._dtype).float()
        num_sealed = geometry.num_sealed_blocks(np.arange(keys.shape[1]))
        head, size = geometry.num_head_tokens, geometry.block_size
        ends = np.where(num_sealed > 0, head + num_sealed * size, 0)
        sealed_keys, sealed_values = stored_keys.clone(), stored_values.clone()
        body = slice(head, head + int(num_sealed[-1]) * size)
        if num_sealed[-1]:
            blocks = stored_keys[:, body].unflatten(1, (-1, size))
            sealed_keys[:, body] = read_keys(spec, blocks).flatten(1, 2)
            sealed_values[:, body] = self._read_values(stored_values[:, body])
        if rotates:
            stored_values, sealed_values = rotate(stored_values), rotate(sealed_values)
        return Copies(
            open_keys=stored_keys,
            sealed_keys=sealed_keys,
            open_values=stored_values,
            sealed_values=sealed_values,
            key_ends=ends,
            value_ends=ends,
        )

    def _read_values(self, values: Tensor) -> Tensor:
        bits, clip = self.kv_format.value_bits, self.kv_format.value_clip
        assert bits is not None
        if bits == 8 or self.kv_format.rotates_values:
            return symmetric(values, bits, clip)
        return affine(values, -1, bits, clip, torch.tensor(float((1 << bits) - 1)))


def read_keys(spec: LayerSpec, blocks: Tensor) -> Tensor:
    """Keys [H, n, B, D] of whole blocks, quantized and read again."""
    kv_format, bits = spec.kv_format, spec.kv_format.key_bits
    assert bits is not None
    if kv_format.has_token_keys:
        return symmetric(blocks, 8, 1.0)
    shape = blocks.shape[0], 1, 1, 1, blocks.shape[-1]
    clip = torch.full(shape, kv_format.key_clip)
    top = torch.full(shape, float((1 << bits) - 1))
    if spec.wide_channels is not None:
        wide = torch.from_numpy(spec.wide_channels).view(shape[0], 1, 1, 1, -1)
        clip.scatter_(-1, wide, kv_format.wide_key_clip)
        top.scatter_(-1, wide, float((1 << bits + 2) - 1))
    groups = blocks.unflatten(2, (kv_format.num_key_groups, -1)).clone()  # [H, n, G, tokens, D]
    if spec.feedback is None:
        return affine(groups, 3, bits, clip, top).flatten(2, 3)
    feedback, read = torch.from_numpy(spec.feedback), torch.empty_like(groups)
    for channel in range(groups.shape[-1]):
        one = slice(channel, channel + 1)
        read[..., one] = affine(groups[..., one], 3, bits, clip[..., one], top[..., one])
        error = (groups[..., one] - read[..., one]).clamp(-FP16_MAX, FP16_MAX)
        rows = feedback[:, channel, channel + 1 :].view(shape[0], 1, 1, 1, -1)
        groups[..., channel + 1 :] -= error * rows
    return read.flatten(2, 3)
