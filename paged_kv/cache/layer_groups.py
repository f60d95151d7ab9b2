"""Which layers share a block table, and where their records lie. Knows sizes, never tensors.

Layers that keep the same tokens form a group, of as many layers as in any other group, so that one
pool serves all: a block belongs to one group, and record j of a block is that of the group's layer
number j, whatever group that is. Models with many layers of one kind have several groups of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from ..blocks.retention import Retention, longest_reach_first
from ..blocks.sink_window import SinkWindow
from ..errors import OutOfBlocksError
from ..validation import is_finite, require
from .layer_spec import LayerSpec, cache_geometry

MOST_GROUPS: Final = 8  # each costs a step a table


@dataclass(frozen=True)
class LayerGroups:
    """Of L layers in G groups, whose records are those of S slots of a block."""

    retentions: tuple[Retention, ...]  # [G]
    group_of_layer: tuple[int, ...]  # [L]
    slot_of_layer: tuple[int, ...]  # [L]
    slot_bytes: tuple[int, ...]  # [S] of one block

    @property
    def block_bytes(self) -> int:
        """Of one block, which holds the records of one group's layers."""
        return sum(self.slot_bytes)

    def layers_of(self, group: int) -> list[int]:
        return [layer for layer, its in enumerate(self.group_of_layer) if its == group]


def find_groups(layers: Sequence[LayerSpec], dtype: torch.dtype) -> LayerGroups:
    """The groups of these layers, the one that reaches farthest first."""
    geometry = cache_geometry(layers, dtype)
    sizes = [layer.num_kv_heads * layer.record_layout(dtype).record_bytes for layer in layers]
    kinds = longest_reach_first(tuple({layer.retention: None for layer in layers}))
    members = [[n for n, layer in enumerate(layers) if layer.retention == kind] for kind in kinds]
    size = group_size([len(each) for each in members])
    retentions: list[Retention] = []
    group_of, slot_of = [0] * len(layers), [0] * len(layers)
    slots: list[tuple[int, bool]] = []  # bytes, and whether they are those of small blocks
    is_small = [geometry.seals and layer.kv_format.is_native for layer in layers]
    for kind, its in zip(kinds, members, strict=True):
        # Large records beside large ones of other groups, and small blocks beside their like.
        in_order = sorted(its, key=lambda n: (is_small[n], -sizes[n]))
        for start in range(0, len(its), size):
            free = list(range(len(slots)))
            for layer in in_order[start : start + size]:
                slot = fitting_slot(slots, free, sizes[layer], is_small=is_small[layer])
                group_of[layer], slot_of[layer] = len(retentions), slot
            retentions.append(kind)
    slot_bytes = tuple(num_bytes for num_bytes, _ in slots)
    return LayerGroups(tuple(retentions), tuple(group_of), tuple(slot_of), slot_bytes)


def group_size(counts: Sequence[int]) -> int:
    """Layers of a group, where there are so many of each kind: as many as the rarest kind has, so
    that none of its places is empty, or more where that would make too many groups."""
    if len(counts) == 1:
        return counts[0]
    size = min(counts)
    while sum(-(-count // size) for count in counts) > max(MOST_GROUPS, len(counts)):
        size += 1
    return size


def fitting_slot(
    slots: list[tuple[int, bool]], free: list[int], num_bytes: int, *, is_small: bool
) -> int:
    """A free slot for a record of so many bytes, which may grow for it; or else a new one.

    Small blocks lie behind each other without gaps: their slot is exactly as large as they.
    """
    for slot in free:
        its_bytes, its_small = slots[slot]
        if its_small == is_small and (its_bytes == num_bytes or not is_small):
            slots[slot] = max(its_bytes, num_bytes), is_small
            free.remove(slot)
            return slot
    slots.append((num_bytes, is_small))
    return len(slots) - 1


def block_bytes(layers: Sequence[LayerSpec], dtype: torch.dtype) -> int:
    """Bytes of one block, which holds the records of one group of layers."""
    return find_groups(layers, dtype).block_bytes


def token_bytes(layers: Sequence[LayerSpec], dtype: torch.dtype) -> float:
    """Bytes that one sealed token takes over all layers (native: one token)."""
    groups = find_groups(layers, dtype)
    block_size = cache_geometry(layers, dtype).block_size
    return len(groups.retentions) * groups.block_bytes / block_size


def sequence_bytes(layers: Sequence[LayerSpec], dtype: torch.dtype, num_tokens: int) -> int:
    """Bytes of all blocks that a sequence of `num_tokens` holds between steps: head, body, tail."""
    geometry, groups = cache_geometry(layers, dtype), find_groups(layers, dtype)
    held = (each.blocks_held(geometry, num_tokens) for each in groups.retentions)
    return sum(held) * groups.block_bytes


def max_blocks(
    layers: Sequence[LayerSpec],
    dtype: torch.dtype,
    num_tokens: int,
    sink_window: SinkWindow | None = None,
) -> int:
    """The most blocks that a sequence holds as it grows to `num_tokens`, one a step."""
    geometry, groups = cache_geometry(layers, dtype), find_groups(layers, dtype)
    return sum(each.max_blocks(geometry, num_tokens, sink_window) for each in groups.retentions)


def num_blocks_for(memory_bytes: int, layers: Sequence[LayerSpec], dtype: torch.dtype) -> int:
    """Blocks that fit in `memory_bytes`; raises `OutOfBlocksError` when not even one does."""
    size = block_bytes(layers, dtype)  # or it raises
    require("memory_bytes", memory_bytes, is_finite(memory_bytes), "a number of bytes")
    if memory_bytes < size:
        raise OutOfBlocksError(f"{memory_bytes} bytes hold no block; one takes {size} bytes")
    return int(memory_bytes // size)
