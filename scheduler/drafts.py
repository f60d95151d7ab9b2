"""Guesses of what comes next: how many of them a step tries. Knows counts, never who guesses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from reprlib import repr as short_repr
from types import MappingProxyType
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from paged_kv.blocks.block_manager import BlockManager
from paged_kv.blocks.geometry import IntArray
from paged_kv.blocks.sequences import integer_array
from paged_kv.blocks.step_plan import StepPlan
from paged_kv.blocks.token_chain import TokenIds, as_token_ids
from paged_kv.errors import InvalidStepError

from .running import RunningRequests

Drafts = Mapping[str, Sequence[int] | TokenIds]  # by request id, what may follow its tokens
NO_DRAFTS: Final[Drafts] = MappingProxyType({})


class TakenTokens(NamedTuple):
    """Tokens that sequences get, those of one after another: one each, or `counts` [M]."""

    seq_ids: IntArray  # [M]
    token_ids: TokenIds
    counts: IntArray | None = None

    def only(self, is_kept: NDArray[np.bool_]) -> TakenTokens:
        """Of the sequences for which it holds [M]."""
        if self.counts is None:
            return TakenTokens(self.seq_ids[is_kept], self.token_ids[is_kept])
        token_ids = self.token_ids[np.repeat(is_kept, self.counts)]
        return TakenTokens(self.seq_ids[is_kept], token_ids, self.counts[is_kept])

    def and_one_each(self, seq_ids: IntArray, token_ids: Sequence[int]) -> TakenTokens:
        """And these of other sequences."""
        counts = self.counts
        if counts is not None:
            counts = np.concatenate([counts, np.ones_like(seq_ids)])
        return TakenTokens(
            np.concatenate([self.seq_ids, seq_ids]),
            np.concatenate([self.token_ids, as_token_ids(token_ids)]),
            counts,
        )


def checked_drafts(drafts: Drafts) -> Drafts:
    """The same as arrays; raises `InvalidStepError` or `InvalidRequestError` for what are none."""
    if not isinstance(drafts, Mapping):
        raise InvalidStepError(f"drafts must be tokens by request id, got {short_repr(drafts)}")
    return {name: as_token_ids(token_ids) for name, token_ids in drafts.items()}


def count_drafts(
    drafts: Drafts,
    seq_ids: IntArray,
    num_new: IntArray,
    manager: BlockManager,
    running: RunningRequests,
    budget: int,
) -> IntArray | None:
    """How many of its drafts each of N sequences tries beside its new tokens; None: nobody any.

    Those that sample now do, the best rank first, with what a step's budget leaves: as many as can
    be stored and leave room for the token that is sampled after them. None goes beyond the next
    seal, so that every token sees what it would see without drafts.
    """
    if not drafts:
        return None
    geometry, requests = manager.geometry, running.by_seq_id[seq_ids].tolist()
    wanted: IntArray = np.array([len(drafts.get(r.request_id, ())) for r in requests], np.int64)
    known, stored = manager.num_tokens[seq_ids], manager.num_computed_tokens[seq_ids]
    does_sample = stored + manager.num_evicted_tokens[seq_ids] + num_new == known
    wanted[~does_sample | running.is_branch[seq_ids]] = 0
    room = np.minimum(running.max_tokens[seq_ids] - known - 1, geometry.block_size)
    windowed = manager.tables.windowed_rows(seq_ids)
    beside = np.full(len(seq_ids), manager.max_model_len) - known - 1
    storable = manager.tables.num_storable(seq_ids[windowed])
    beside[windowed] = storable - stored[windowed] - num_new[windowed]
    if geometry.seals:
        never_sealed = geometry.num_head_tokens + geometry.min_tail_tokens
        next_seals = (manager.num_sealed[seq_ids] + 1) * geometry.block_size + never_sealed
        beside = np.minimum(beside, next_seals - 1 - stored - num_new)
    counts = np.clip(np.minimum(wanted, np.minimum(room, beside)), 0, None)
    before = np.cumsum(counts) - counts
    counts = np.clip(budget - int(num_new.sum()) - before, 0, counts)
    return counts if counts.any() else None


def tokens_to_compute(
    plan: StepPlan, manager: BlockManager, running: RunningRequests, drafts: Drafts
) -> TokenIds:
    """[T] a step's tokens: known ones, and of each sequence its first drafts."""
    seq_ids, positions, is_draft = plan.seq_ids[plan.token_rows], plan.positions, plan.is_draft
    if is_draft is None or plan.num_draft_tokens is None:
        return manager.token_ids[seq_ids, positions]
    token_ids: TokenIds = np.zeros(plan.num_tokens, dtype=np.int32)
    token_ids[~is_draft] = manager.token_ids[seq_ids[~is_draft], positions[~is_draft]]
    requests = running.by_seq_id[plan.seq_ids].tolist()
    tried = [
        drafts[request.request_id][:count]
        for request, count in zip(requests, plan.num_draft_tokens.tolist(), strict=True)
        if count
    ]
    token_ids[is_draft] = np.concatenate(tried)
    return token_ids


def checked_acceptance(num_accepted: ArrayLike | None, num_drafts: IntArray) -> IntArray:
    """[M] the drafts of each that are right; raises `InvalidStepError` where it has not so many."""
    if num_accepted is None:
        return np.zeros(len(num_drafts), dtype=np.int64)
    accepted = integer_array("num_accepted", num_accepted)
    is_right = accepted.shape == num_drafts.shape
    if not is_right or ((accepted < 0) | (accepted > num_drafts)).any():
        raise InvalidStepError(
            f"num_accepted must be from 0 to {num_drafts.tolist()}, got {accepted.tolist()}"
        )
    return accepted
