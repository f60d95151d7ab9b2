"""A layer's records of one sequence, out of their pool: which bytes are its own, what they say.

Knows bytes in host memory, never blocks of a pool or where the records travel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .formats import RecordLayout

METADATA_SECTIONS = ("key_scale", "key_zero", "value_scale", "value_zero")


@dataclass(frozen=True, kw_only=True)
class TravellingRecords:
    """Records [blocks, kv heads, record_bytes] in the order of their tokens: head, body, tail."""

    records: Tensor
    layout: RecordLayout
    dtype: torch.dtype  # of open blocks
    open_block_size: int
    num_head_blocks: int
    num_sealed: int
    num_tokens: int
    keys_are_channel_major: bool  # in open blocks

    def clear_the_rest(self) -> None:
        """Zero, in place, what the sequence has not filled: none but the last block has room."""
        head, body, tail = self._parts()
        body[..., sum(self.layout.section_bytes.values()) :] = 0
        for part in (head, tail):
            part[..., self.open_block_size * self.layout.token_bytes :] = 0
        num_filled = self.num_tokens % self.open_block_size
        if num_filled:
            for rows in self._open_rows(self.records[-1:]):
                rows[..., num_filled:, :] = 0

    def are_finite(self) -> bool:
        """Whether all that was said in floating-point numbers is a number, and no infinity."""
        return all(bool(torch.isfinite(numbers).all()) for numbers in self._numbers())

    def _parts(self) -> tuple[Tensor, ...]:
        """Head, body and tail."""
        body_end = self.num_head_blocks + self.num_sealed
        return self.records.tensor_split((self.num_head_blocks, body_end))

    def _numbers(self) -> Iterator[Tensor]:
        head, body, tail = self._parts()
        yield from self._open_rows(head)
        yield from self._open_rows(tail)
        if self.layout.kv_format.is_native:
            yield body.view(self.dtype)
        for section in METADATA_SECTIONS:
            size = self.layout.section_bytes.get(section)
            if size is not None and len(body):
                start = self.layout.offset(section)
                yield body[..., start : start + size].view(torch.float16)

    def _open_rows(self, records: Tensor) -> tuple[Tensor, Tensor]:
        """Views of open records' keys and values [blocks, kv heads, open_block_size, dim]."""
        size, key_dim = self.open_block_size, self.layout.key_dim
        key_end, end = size * key_dim * self.dtype.itemsize, size * self.layout.token_bytes
        shape = records.shape[:2]
        keys = records[..., :key_end].view(self.dtype)
        values = records[..., key_end:end].view(self.dtype)
        values = values.view(*shape, size, self.layout.value_dim)
        if self.keys_are_channel_major:
            return keys.view(*shape, key_dim, size).transpose(-1, -2), values
        return keys.view(*shape, size, key_dim), values
