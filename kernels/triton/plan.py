"""Arrange a step's query rows for Triton's kernels: tiles of rows, splits of context, partials.

Knows lengths and counts of heads, nothing of formats: a step is planned once for all its layers.
Nothing here depends on the lengths of contexts, which kernels read on the device: a captured graph
can be replayed on other lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..step_inputs import StepInputs
from .launch import TileRows

FEW_ROWS: Final = 32  # query rows of a kv head that decoding and verifying have
MAX_SPLITS: Final = 64
PROGRAMS_PER_PROCESSOR: Final = 4
ASSUMED_PROCESSORS: Final = 4  # of a CPU that interprets kernels


@dataclass(frozen=True)
class RowGroup:
    """Sequences whose query rows are cut alike."""

    tile_rows: int
    is_prefill: bool  # many rows: queries are the left operand of products
    num_splits: int  # of each context
    tiles: Tensor  # [tiles, 2] sequence, first row
    places: Tensor  # [tokens, 3] token, first tile of its sequence, place among its new tokens


class TritonPlan:
    """What the layers of a step share; made when the first layer asks for it.

    `slots` are made of the step's stored tokens unless they are given.
    """

    def __init__(self, step: StepInputs, slots: Tensor | None = None) -> None:
        self.step = step
        self._groups: dict[tuple[int, int, TileRows], list[RowGroup]] = {}
        self._partials: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self._slots = slots

    @property
    def slots(self) -> Tensor:
        """[T] where in open blocks each new token is stored; -1: nowhere."""
        if self._slots is None:
            step = self.step
            self._slots = torch.full_like(step.cache_positions, -1)
            self._slots[step.stored_tokens] = step.stored_slots
        return self._slots

    def groups(
        self, num_kv_heads: int, query_group_size: int, tile_rows: TileRows
    ) -> list[RowGroup]:
        key = num_kv_heads, query_group_size, tile_rows
        if key not in self._groups:
            self._groups[key] = plan_rows(self.step, *key)
        return self._groups[key]

    def partials(self, *shape: int) -> tuple[Tensor, Tensor]:
        """Uninitialized outputs [parts, rows, value_dim] and exponents and sums [parts, 2, rows].

        All layers of one shape write to the same: they run one after the other.
        """
        if shape not in self._partials:
            parts, rows, _ = shape
            new = torch.empty(0, dtype=torch.float32, device=self.step.device).new_empty
            self._partials[shape] = new(shape), new(parts, 2, rows)
        return self._partials[shape]


class Cut(NamedTuple):
    """What query rows are cut by."""

    query_group_size: int
    num_kv_heads: int
    tile_rows: TileRows
    num_programs: int  # that are wanted
    device: torch.device


def plan_rows(
    step: StepInputs, num_kv_heads: int, query_group_size: int, tile_rows: TileRows
) -> list[RowGroup]:
    """The sequences with few new tokens, and those with many."""
    num_programs = PROGRAMS_PER_PROCESSOR * num_processors(step.device)
    cut = Cut(query_group_size, num_kv_heads, tile_rows, num_programs, step.device)
    num_seqs = len(step.query_lens)
    if num_seqs and (step.query_lens == 1).all():
        return plan_decode(num_seqs, cut)
    return plan_lens(step.query_lens, cut)


@lru_cache(maxsize=1024)
def plan_decode(num_seqs: int, cut: Cut) -> list[RowGroup]:
    """Of one new token each: nothing is sent to the device for it but once."""
    return plan_lens(np.ones(num_seqs, dtype=np.int64), cut)


def plan_lens(query_lens: NDArray[np.int64], cut: Cut) -> list[RowGroup]:
    """Groups of sequences with so many new tokens each."""
    num_rows = query_lens * cut.query_group_size
    is_few = num_rows <= FEW_ROWS
    groups = []
    for chosen in (is_few, ~is_few):
        sequences = np.flatnonzero(chosen & (num_rows > 0))
        if len(sequences):
            groups.append(plan_group(query_lens, sequences, num_rows[sequences], cut))
    return groups


def plan_group(
    query_lens: NDArray[np.int64],
    sequences: NDArray[np.int64],
    num_rows: NDArray[np.int64],
    cut: Cut,
) -> RowGroup:
    """Tiles for the query rows of sequences [N], which have `num_rows` [N] for each kv head."""
    most, sizes = int(num_rows.max()), cut.tile_rows
    is_prefill = most > FEW_ROWS
    tile_rows = sizes.large
    if not is_prefill:
        tile_rows = next((rows for rows in sizes.small if most <= rows), sizes.small[-1])
    counts = -(-num_rows // tile_rows)
    first_tiles = np.cumsum(counts) - counts
    tiles = np.stack(
        [np.repeat(sequences, counts), (np.arange(counts.sum()) - np.repeat(first_tiles, counts))],
        axis=1,
    )
    tiles[:, 1] *= tile_rows
    starts = (np.cumsum(query_lens) - query_lens)[sequences]
    num_tokens = query_lens[sequences]
    first_of_group = np.cumsum(num_tokens) - num_tokens
    indices = np.arange(num_tokens.sum()) - np.repeat(first_of_group, num_tokens)
    places = np.stack(
        [np.repeat(starts, num_tokens) + indices, np.repeat(first_tiles, num_tokens), indices],
        axis=1,
    )
    num_splits = -(-cut.num_programs // (len(tiles) * cut.num_kv_heads))
    return RowGroup(
        tile_rows=tile_rows,
        is_prefill=is_prefill,
        num_splits=min(1 << (num_splits - 1).bit_length(), MAX_SPLITS),
        tiles=sent(tiles, cut.device),
        places=sent(places, cut.device),
    )


def sent(numbers: NDArray[np.int64], device: torch.device) -> Tensor:
    """On the device; a GPU's stream waits for it, the host does not."""
    tensor = torch.from_numpy(numbers)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU."""
    if device.type != "cuda":
        return ASSUMED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
