"""What a step computes, copies and starts, as data. Knows requests and plans, decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from paged_kv.blocks.geometry import BlockIds, IntArray, ragged_arange
from paged_kv.blocks.sequences import NO_ROWS
from paged_kv.blocks.step_plan import StepPlan
from paged_kv.blocks.token_chain import TokenIds, as_token_ids
from paged_kv.errors import InvalidStepError

from .drafts import TakenTokens
from .request import Request


class BlockCopy(NamedTuple):
    """Blocks of a request to copy between the pool and host memory, before the step writes."""

    request_id: str
    device_block_ids: BlockIds
    host_block_ids: BlockIds


class Arrival(NamedTuple):
    """Records of a request that was begun elsewhere, for these blocks of each group of layers."""

    request_id: str
    block_ids: Sequence[BlockIds]
    records: object


class Fork(NamedTuple):
    """`child` goes on from the tokens that `parent` has before this step's sample."""

    parent: Request
    child: Request
    token_id: int


class Branches(NamedTuple):
    """The sequences with which a branching request goes on, instead of those that it has.

    Each continues one of them, `parents[i]` among its `seq_ids`, with `token_ids[i]`.
    """

    request: Request
    parents: Sequence[int]
    token_ids: Sequence[Sequence[int]]

    def check(self, max_model_len: int) -> None:
        """Raise `InvalidStepError` or `InvalidRequestError` for what cannot be done."""
        request, branching = self.request, self.request.branching
        name, num_seqs = request.request_id, len(request.seq_ids)
        if branching is None or not num_seqs:
            raise InvalidStepError(f"request {name!r} does not run, or does not branch")
        if not 1 <= len(self.parents) <= branching.max_seqs:
            raise InvalidStepError(
                f"request {name!r} may have 1 to {branching.max_seqs} sequences, got "
                f"{len(self.parents)}"
            )
        if not all(0 <= parent < num_seqs for parent in self.parents):
            raise InvalidStepError(
                f"request {name!r} has {num_seqs} sequences, got parents {list(self.parents)}"
            )
        if len(self.token_ids) != len(self.parents) or not all(map(len, self.token_ids)):
            raise InvalidStepError(f"request {name!r} needs tokens for each of its sequences")
        for token_ids in self.token_ids:
            length = request.num_tokens + len(as_token_ids(list(token_ids)))
            if length > max_model_len:
                raise InvalidStepError(
                    f"request {name!r} would have {length} tokens; max_model_len is {max_model_len}"
                )


@dataclass(frozen=True, kw_only=True)
class ScheduledStep:
    """What to compute: the plan's T tokens, and the M sequences that then sample a token.

    Behind its last token each of these may try drafts, D in all: the token that is sampled by one
    counts if the draft itself was sampled by the token before. The copies come first: out of the
    pool, then into it, also what arrives, even if the step is cancelled later.
    """

    plan: StepPlan
    token_ids: IntArray  # [T]
    sampled_seq_ids: IntArray  # [M]
    sampled_token_index: IntArray  # [M] place among the T of each one's last token, drafts aside
    preempted: list[Request]
    swap_outs: list[BlockCopy] = field(default_factory=list)
    swap_ins: list[BlockCopy] = field(default_factory=list)
    arrivals: list[Arrival] = field(default_factory=list)
    requests_by_seq_id: NDArray[np.object_] = field(repr=False)

    @cached_property
    def requests(self) -> list[Request]:
        """[N] The plan's requests; to be read before the step ends."""
        requests: list[Request] = self.requests_by_seq_id[self.plan.seq_ids].tolist()
        return requests

    @property
    def adapters(self) -> list[tuple[str, ...]]:
        """[N] Of each sequence, the names of those that its tokens are computed with."""
        return [request.adapters for request in self.requests]

    @cached_property
    def sampled_requests(self) -> list[Request]:
        """[M] The requests that sample; to be read before the step ends."""
        requests: list[Request] = self.requests_by_seq_id[self.sampled_seq_ids].tolist()
        return requests

    @cached_property
    def num_drafts(self) -> IntArray:
        """[M] Drafts that each sequence tries, the D behind its place in `sampled_token_index`."""
        plan = self.plan
        if plan.num_draft_tokens is None:
            return np.zeros(len(self.sampled_seq_ids), dtype=np.int64)
        return plan.num_draft_tokens[plan.token_rows[self.sampled_token_index]]

    @cached_property
    def draft_token_index(self) -> IntArray:
        """[D] places of the drafts among the T, those of one sequence after another."""
        is_draft = self.plan.is_draft
        return NO_ROWS if is_draft is None else is_draft.nonzero()[0]

    def kept_tokens(self, num_accepted: IntArray) -> IntArray | None:
        """[N] tokens that stay where so many drafts [M] are right; None where all do."""
        plan = self.plan
        if plan.num_draft_tokens is None:
            return None
        kept = plan.num_scheduled_tokens - plan.num_draft_tokens
        kept[plan.token_rows[self.sampled_token_index]] += num_accepted
        return kept

    def taken_tokens(self, sampled_token_ids: TokenIds, num_accepted: IntArray) -> TakenTokens:
        """The tokens that sequences get: so many of their drafts [M], then what they sampled."""
        if not num_accepted.any():
            return TakenTokens(self.sampled_seq_ids, sampled_token_ids)
        counts = num_accepted + 1
        token_ids: TokenIds = np.zeros(counts.sum(), dtype=np.int32)
        last = np.cumsum(counts) - 1
        is_sampled = np.zeros(len(token_ids), dtype=np.bool_)
        is_sampled[last] = True
        token_ids[last] = sampled_token_ids
        rows, offsets = ragged_arange(num_accepted)
        token_ids[~is_sampled] = self.token_ids[self.sampled_token_index[rows] + 1 + offsets]
        return TakenTokens(self.sampled_seq_ids, token_ids, counts)
