"""How busy a scheduler is and what it has done. Counts only; decides nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SchedulerStatistics:
    """A snapshot. Counts of requests and blocks now; the rest since the scheduler was made."""

    num_running: int
    num_waiting: int
    num_swapped: int  # of those waiting, with their blocks in host memory
    num_free_blocks: int
    num_cached_blocks: int
    num_steps: int
    num_scheduled_tokens: int
    num_preemptions: int
    num_query_tokens: int  # of sequences that were looked up in the prefix cache when they started
    num_hit_tokens: int  # of these, found there
    num_draft_tokens: int  # that were tried before they were known
    num_accepted_tokens: int  # of these, right ones
