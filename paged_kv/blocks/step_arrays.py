"""A step as kernels want it: each token's place in blocks, as numpy arrays. Knows no torch.

Made from a plan and a replica of the tables, or from the lengths and the block table of another
engine's step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..code_cache import compiled
from .geometry import (
    OPEN_BLOCK_SIZE,
    PER_BLOCK,
    BlockGeometry,
    BlockIds,
    IntArray,
    ragged_arange,
)
from .step_plan import StepPlan
from .table_replica import TableReplica


class _Tokens(NamedTuple):
    """N sequences and their T new tokens."""

    query_start_loc: IntArray  # [N + 1]
    query_lens: IntArray  # [N]
    context_lens: IntArray  # [N]
    rows: IntArray  # [T] index among the N
    cache_positions: IntArray  # [T]


class _Seals(NamedTuple):
    """S blocks that the step seals."""

    rows: IntArray  # [S] index among the N
    first_places: IntArray  # [S] in the block table
    block_ids: IntArray  # [S]


@dataclass(frozen=True, eq=False, kw_only=True)
class StepArrays:
    """N sequences, T new tokens, S blocks to seal; all int64.

    A new token is either stored in an open block or is one of the tokens of a sealed block.
    """

    query_start_loc: IntArray  # [N + 1]
    query_lens: IntArray  # [N]
    context_lens: IntArray  # [N] tokens stored before the step
    num_sealed: IntArray  # [N] body blocks before the step
    block_table: IntArray  # [N, W] see `BlockTables`
    cache_positions: IntArray  # [T] place of each new token among its sequence's stored ones
    stored_tokens: IntArray  # [W_s] new tokens that go to open blocks, in order ...
    stored_slots: IntArray  # [W_s] ... and where: block_id * open_block_size + row
    seal_block_ids: IntArray  # [S]
    seal_sources: IntArray  # [S, block_size] open slot of each token, or ~index of a new one

    @classmethod
    def from_plan(
        cls, geometry: BlockGeometry, plan: StepPlan, replica: TableReplica
    ) -> StepArrays:
        """The arrays of a plan that `replica` was told; they stay as they are from then on."""
        num_sealed, block_table = replica.rows(plan)
        tokens = _Tokens(
            plan.query_start_loc,
            plan.num_scheduled_tokens,
            plan.context_lens,
            plan.token_rows,
            plan.cache_positions,
        )
        seals = None
        if len(plan.seal_block_ids):
            changed, offsets = ragged_arange(plan.block_counts[:, 0])
            rows = plan.changed_rows[changed]
            places = geometry.body_places(num_sealed[rows] + offsets)
            seals = _Seals(rows, places, plan.seal_block_ids.astype(np.int64))
        return cls._of(geometry, tokens, num_sealed, block_table, seals)

    @classmethod
    def from_block_table(
        cls,
        geometry: BlockGeometry,
        query_start_loc: IntArray,
        seq_lens: IntArray,
        block_table: BlockIds | IntArray,
        min_sealed: IntArray | None = None,
    ) -> StepArrays:
        """The arrays of a step whose block table [N, W] has places for all `seq_lens` tokens.

        What is sealed follows from the lengths (`BlockGeometry.num_sealed_blocks`), and a block is
        sealed into the first of its own places. Before the step, `min_sealed` [N] blocks are at
        the least: a shared prefix is sealed to its end, which a lone sequence of that length would
        keep open.
        """
        query_lens = np.diff(query_start_loc)
        context_lens = seq_lens - query_lens
        rows = np.repeat(np.arange(len(query_lens)), query_lens)
        positions = np.arange(len(rows)) + (context_lens - query_start_loc[:-1])[rows]
        tokens = _Tokens(query_start_loc, query_lens, context_lens, rows, positions)
        num_sealed = geometry.num_sealed_blocks(context_lens)
        if min_sealed is not None:
            num_sealed = np.maximum(num_sealed, min_sealed)
        new_sealed = np.maximum(geometry.num_sealed_blocks(seq_lens), num_sealed) - num_sealed
        seals = None
        if new_sealed.any():
            rows, offsets = ragged_arange(new_sealed)
            places = geometry.body_places(num_sealed[rows] + offsets)
            seals = _Seals(rows, places, block_table[rows, places].astype(np.int64))
        return cls._of(geometry, tokens, num_sealed, block_table.astype(np.int64), seals)

    @classmethod
    def _of(
        cls,
        geometry: BlockGeometry,
        tokens: _Tokens,
        num_sealed: IntArray,
        block_table: IntArray,
        seals: _Seals | None,
    ) -> StepArrays:
        positions, rows = tokens.cache_positions, tokens.rows
        if seals is None:
            stored = np.arange(len(positions))
            seal_block_ids = np.empty(0, dtype=np.int64)
            seal_sources = np.empty((0, geometry.block_size), dtype=np.int64)
        else:
            stored = _stored_tokens(geometry, tokens, seals)
            positions, rows = positions[stored], rows[stored]
            seal_block_ids = seals.block_ids
            seal_sources = _seal_sources(geometry, tokens, seals, block_table)
        places, offsets = np.divmod(positions, geometry.open_block_size)
        return cls(
            query_start_loc=tokens.query_start_loc,
            query_lens=tokens.query_lens,
            context_lens=tokens.context_lens,
            num_sealed=num_sealed,
            block_table=block_table,
            cache_positions=tokens.cache_positions,
            stored_tokens=stored,
            stored_slots=block_table[rows, places] * geometry.open_block_size + offsets,
            seal_block_ids=seal_block_ids,
            seal_sources=seal_sources,
        )


def _stored_tokens(geometry: BlockGeometry, tokens: _Tokens, seals: _Seals) -> IntArray:
    """Index of each new token that no sealed block takes."""
    seal_ends = np.zeros(len(tokens.query_lens), dtype=np.int64)  # in tokens
    # Of several blocks of a sequence the last one stays: they are in order.
    seal_ends[seals.rows] = seals.first_places * geometry.open_block_size + geometry.block_size
    positions = tokens.cache_positions
    is_stored = positions >= seal_ends[tokens.rows]
    is_stored |= positions < geometry.num_head_tokens
    return np.flatnonzero(is_stored)


def _seal_sources(
    geometry: BlockGeometry, tokens: _Tokens, seals: _Seals, block_table: IntArray
) -> IntArray:
    """[S, block_size] where each token to be sealed is now."""
    return find_sources(
        seals.rows,
        seals.first_places,
        tokens.context_lens,
        tokens.query_start_loc,
        block_table,
        geometry.sizes,
    )


@compiled
def find_sources(
    rows: IntArray,  # [S]
    first_places: IntArray,  # [S]
    context_lens: IntArray,  # [N]
    query_start_loc: IntArray,  # [N + 1]
    block_table: IntArray,  # [N, W]
    sizes: IntArray,
) -> IntArray:
    """[S, block_size] open slots, or ~index where a token is new."""
    size, per_block = sizes[OPEN_BLOCK_SIZE], sizes[PER_BLOCK]
    sources = np.empty((len(rows), per_block * size), dtype=np.int64)
    for seal in range(len(rows)):
        row = rows[seal]
        for index in range(per_block):
            place = first_places[seal] + index
            first_new = min(max(context_lens[row] - place * size, 0), size)  # of the open block
            for offset in range(first_new):
                sources[seal, index * size + offset] = block_table[row, place] * size + offset
            new_token = query_start_loc[row] + place * size - context_lens[row]
            for offset in range(first_new, size):
                sources[seal, index * size + offset] = ~(new_token + offset)
    return sources
