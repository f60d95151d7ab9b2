"""Turn what a step is asked for into its plan, group by group. Knows ids, never their contents.

Finding what a step needs changes nothing; making its plan takes blocks that were allocated for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .block_pool import BlockPool
from .block_tables import BlockTables
from .geometry import NO_BLOCKS, BlockIds
from .growth import COPIED, NO_NEEDS, Growth, count_needs, place_blocks
from .step_plan import PlanSource, StepPlan
from .step_request import StepRequest


class PlanOrigin(NamedTuple):
    """Whose plan it is, and what for."""

    source: PlanSource
    number: int
    request: StepRequest


def find_growth(tables: BlockTables, request: StepRequest, pool: BlockPool) -> Growth:
    """Whose blocks a step changes in a group of layers, and what they need."""
    before, after = request.before, request.after
    if tables.group:
        before = tables.num_stored[request.seq_ids]
        after = before + request.num_new_tokens
    rows = (after > tables.capacity[request.seq_ids]).nonzero()[0]
    if not len(rows):
        return Growth(before, rows, rows, rows, NO_NEEDS)
    changed = request.seq_ids[rows]
    certain = after = after[rows]
    if request.num_draft_tokens is not None:
        certain = after - request.num_draft_tokens[rows]
    needs = count_needs(changed, after, certain, tables, pool.ref_counts)
    return Growth(before, rows, changed, after, needs)


def make_plan(
    origin: PlanOrigin,
    groups: Sequence[BlockTables],
    growths: Sequence[Growth],
    new_ids: BlockIds,
    pool: BlockPool,
) -> StepPlan:
    """The plan of a step that takes these blocks, those of one group behind another's."""
    parts: list[StepPlan] = []
    start = 0
    for tables, growth in zip(groups, growths, strict=True):
        end = start + growth.needs.num_new_blocks
        parts.append(make_part(origin, tables, growth, new_ids[start:end], pool))
        start = end
    parts[0].others = tuple(parts[1:])
    return parts[0]


def make_part(
    origin: PlanOrigin, tables: BlockTables, growth: Growth, new_ids: BlockIds, pool: BlockPool
) -> StepPlan:
    """One group's plan. New blocks get their places: nobody reads there before the commit."""
    request, needs, changed = origin.request, growth.needs, growth.changed
    seq_ids, open_end = request.seq_ids, needs.num_sealed + needs.num_opened
    freed_ids = copy_sources = NO_BLOCKS
    if len(changed):
        freed_ids = place_blocks(
            changed,
            growth.before[growth.rows],
            tables.num_sealed[changed],
            needs.counts,
            new_ids[needs.num_sealed : open_end],
            tables.ids,
            tables.geometry.sizes,
        )
    if needs.num_copied:
        copy_sources = tables.last_ids(changed[needs.counts[:, COPIED] > 0])
        pool.leave(copy_sources)
    num_evicted = num_sinks = window_sizes = None
    if len(tables.windowed_rows(seq_ids)):
        num_sinks = tables.state["num_sink_tokens"][seq_ids]
        window_sizes = tables.state["window_size"][seq_ids]
    if window_sizes is not None or not tables.retention.keeps_all:
        num_evicted = tables.state["num_evicted_tokens"][seq_ids]
    return StepPlan(
        source=origin.source,
        number=origin.number,
        seq_ids=seq_ids,
        num_scheduled_tokens=request.num_new_tokens,
        num_draft_tokens=request.num_draft_tokens,
        context_lens=growth.before,
        num_evicted_tokens=num_evicted,
        num_sink_tokens=num_sinks,
        window_sizes=window_sizes,
        changed_rows=growth.rows,
        block_counts=needs.counts,
        new_block_ids=new_ids,
        seal_block_ids=new_ids[: needs.num_sealed],
        copy_sources=copy_sources,
        copy_targets=new_ids[open_end:],
        freed_block_ids=freed_ids,
        table_update=tables.take_update(),
    )
