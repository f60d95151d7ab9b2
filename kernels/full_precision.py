"""How layers read a step that keep full precision in a cache whose other layers seal blocks.

Knows a step's numbers, never a layer's tensors. In such a layer block b is P small blocks, b * P
to b * P + P - 1, with P = block_size / open_block_size: an open block is the first of them, a
sealed one all of them, with its tokens in order. So kernels find small blocks that are all open,
and what others seal is moved together, see `eager.store.gather_blocks`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .step_inputs import StepInputs
from .stored_places import StoredPlaces


def in_full_precision(step: StepInputs) -> StepInputs:
    """The same step by small blocks; `seal_block_ids` are the first of each that is sealed.

    Of `seal_sources` [S, block_size] open slots are those of small blocks too.
    """
    num_small = step.block_size // step.open_block_size
    places = torch.arange(step.block_table.shape[1], device=step.device)
    indices = places - step.num_head_tokens // step.open_block_size
    is_sealed = (indices >= 0) & (indices < step.num_sealed[:, None] * num_small)
    parts = (indices % num_small) * is_sealed
    table = step.block_table.gather(1, places - parts) * num_small + parts
    sources = step.seal_sources
    return replace(
        step,
        block_table=table,
        num_sealed=torch.zeros_like(step.num_sealed),
        stored_slots=small_slots(step.stored_slots, step),
        seal_block_ids=step.seal_block_ids * num_small,
        seal_sources=torch.where(sources < 0, sources, small_slots(sources, step)),
        block_size=step.open_block_size,
        num_head_tokens=0,
    )


def small_slots(slots: Tensor, step: StepInputs) -> Tensor:
    """Slots of open blocks as slots of small ones."""
    size = step.open_block_size
    return slots // size * step.block_size + slots % size


def places_in_full_precision(places: StoredPlaces, open_block_size: int) -> StoredPlaces:
    """The same tokens by small blocks: all in open ones."""
    block_size = places.sealed_tokens.shape[1]
    offsets = torch.arange(block_size, device=places.sealed_ids.device)
    open_slots = places.open_slots // open_block_size * block_size
    open_slots += places.open_slots % open_block_size
    sealed_slots = places.sealed_ids[:, None] * block_size + offsets
    return StoredPlaces(
        open_rows=torch.cat([places.open_rows, places.sealed_rows.repeat_interleave(block_size)]),
        open_tokens=torch.cat([places.open_tokens, places.sealed_tokens.flatten()]),
        open_slots=torch.cat([open_slots, sealed_slots.flatten()]),
        sealed_rows=places.sealed_rows[:0],
        sealed_tokens=places.sealed_tokens[:0],
        sealed_ids=places.sealed_ids[:0],
    )
