"""A decode step made on the device, of block tables and lengths. Knows sequences as rows of tables.

So that a captured graph can be replayed: what the host sends of a step is a few numbers for each of
its rows, in tensors that stay where they are, and everything else is made of them here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..step_inputs import StepInputs
from .groups import DecodeInputs, DecodeRows, Tables
from .plan import TritonPlan


@triton.jit
def make_decode_inputs(rows, table, drawn, made, TABLES: tl.constexpr):
    """One row: grid (B,). `table` [max_num_seqs, WIDTH] is of all sequences, by seq_id."""
    OPEN_BLOCK_SIZE: tl.constexpr = TABLES.OPEN_BLOCK_SIZE
    row = tl.program_id(0)
    draw = tl.load(rows.sources + row)
    drawn_id = tl.load(drawn + draw, mask=draw >= 0, other=0)
    token_id = tl.load(rows.token_ids + row)
    tl.store(made.token_ids + row, tl.where(draw >= 0, drawn_id, token_id))
    seq_id = tl.load(rows.seq_ids + row)
    is_there = seq_id >= 0
    context_len = tl.load(rows.context_lens + row)
    own = table + seq_id * TABLES.WIDTH
    step = tl.arange(0, TABLES.TILE)
    num_places = tl.where(is_there, tl.cdiv(context_len + 1, OPEN_BLOCK_SIZE), 0)
    for first in range(0, num_places, TABLES.TILE):
        place = first + step
        exists = place < num_places
        ids = tl.load(own + place, mask=exists, other=0).to(tl.int64)
        tl.store(made.block_table + row * TABLES.WIDTH + place, ids, mask=exists)
    is_stored = is_there
    if rows.seal_block_ids is not None:
        seals = tl.load(rows.seal_block_ids + row) >= 0
        body_start = tl.load(rows.num_sealed + row) * TABLES.BLOCK_SIZE + TABLES.NUM_HEAD_TOKENS
        is_stored = is_stored & ((context_len >= body_start + TABLES.BLOCK_SIZE) | (not seals))
        if seals:
            sources = made.seal_sources + row * TABLES.BLOCK_SIZE
            find_sources(sources, own, body_start, context_len, -1 - row, TABLES)
    block = tl.load(own + context_len // OPEN_BLOCK_SIZE, mask=is_stored, other=0).to(tl.int64)
    slot = block * OPEN_BLOCK_SIZE + context_len % OPEN_BLOCK_SIZE
    tl.store(made.slots + row, tl.where(is_stored, slot, -1))


@triton.jit
def find_sources(sources, table, start, context_len, new_token, TABLES: tl.constexpr):
    """Where the tokens of a block are that starts at token `start` of a sequence."""
    OPEN_BLOCK_SIZE: tl.constexpr = TABLES.OPEN_BLOCK_SIZE
    for first in range(0, TABLES.BLOCK_SIZE, TABLES.TILE):
        index = first + tl.arange(0, TABLES.TILE)
        exists = index < TABLES.BLOCK_SIZE
        position = start + index
        is_old = position < context_len
        block = tl.load(table + position // OPEN_BLOCK_SIZE, mask=exists & is_old, other=0)
        slot = block.to(tl.int64) * OPEN_BLOCK_SIZE + position % OPEN_BLOCK_SIZE
        tl.store(sources + index, tl.where(is_old, slot, new_token), mask=exists)


@dataclass(frozen=True, eq=False)
class DecodeStep:
    """B sequences with one new token each; empty rows attend to their own token alone.

    All its tensors stay where they are: `refresh` makes another step of the same size of it.
    """

    plan: TritonPlan
    token_ids: Tensor  # [B]
    rows: DecodeRows
    table: Tensor  # [max_num_seqs, WIDTH] int32
    drawn: Tensor  # [max_num_seqs] tokens
    sizes: Tables

    @classmethod
    def empty(
        cls,
        rows: DecodeRows,
        table: Tensor,
        drawn: Tensor,
        block_table: Tensor,
        sizes: Tables,
        *,
        num_sink_tokens: Tensor | None = None,
        window_sizes: Tensor | None = None,
    ) -> DecodeStep:
        """Nothing is known of it before `refresh`; `block_table` [B, WIDTH] is for it to write."""
        num_rows, new = len(rows.seq_ids), rows.seq_ids.new_empty
        seals = rows.seal_block_ids is not None
        ones = np.ones(num_rows, dtype=np.int64)
        numbers = torch.arange(num_rows + 1, device=table.device)
        step = StepInputs(
            query_lens=ones,
            context_lens_host=0 * ones,  # the device alone knows them
            context_lens=rows.context_lens,
            query_start_loc=numbers,
            cache_positions=rows.context_lens,
            block_table=block_table,
            num_sealed=rows.num_sealed,
            stored_tokens=numbers[:num_rows],
            stored_slots=new(num_rows),
            seal_block_ids=new(0) if rows.seal_block_ids is None else rows.seal_block_ids,
            seal_sources=new(num_rows if seals else 0, sizes.BLOCK_SIZE),
            block_size=sizes.BLOCK_SIZE,
            open_block_size=sizes.OPEN_BLOCK_SIZE,
            num_head_tokens=sizes.NUM_HEAD_TOKENS,
            num_sink_tokens=num_sink_tokens,
            window_sizes=window_sizes,
        )
        plan = TritonPlan(step, slots=step.stored_slots)
        return cls(plan, new(num_rows), rows, table, drawn, sizes)

    def refresh(self) -> None:
        """Make the inputs of the step that `rows`, `table` and `drawn` tell of now."""
        step = self.plan.step
        seal_sources = None if self.rows.seal_block_ids is None else step.seal_sources
        make_decode_inputs[len(step.stored_slots),](
            self.rows,
            self.table,
            self.drawn,
            DecodeInputs(self.token_ids, step.block_table, step.stored_slots, seal_sources),
            TABLES=self.sizes,
            num_warps=1,
        )
