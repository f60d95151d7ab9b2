"""What a step computes, copies and starts, as data. Knows requests and plans, decides nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from paged_kv.blocks.geometry import BlockIds, IntArray
from paged_kv.blocks.step_plan import StepPlan

from .request import Request


class BlockCopy(NamedTuple):
    """Blocks of a request to copy between the pool and host memory, before the step writes."""

    request_id: str
    device_block_ids: BlockIds
    host_block_ids: BlockIds


class Fork(NamedTuple):
    """`child` goes on from the tokens that `parent` has before this step's sample."""

    parent: Request
    child: Request
    token_id: int


@dataclass(frozen=True, kw_only=True)
class ScheduledStep:
    """What to compute: the plan's T tokens, and the M sequences that then sample a token.

    The copies come first: out of the pool, then into it, even if the step is cancelled later.
    """

    plan: StepPlan
    token_ids: IntArray  # [T]
    sampled_seq_ids: IntArray  # [M]
    sampled_token_index: IntArray  # [M] place among the T of each one's last token
    preempted: list[Request]
    swap_outs: list[BlockCopy] = field(default_factory=list)
    swap_ins: list[BlockCopy] = field(default_factory=list)
    requests_by_seq_id: NDArray[np.object_] = field(repr=False)

    @cached_property
    def sampled_requests(self) -> list[Request]:
        """[M] The requests that sample; to be read before the step ends."""
        requests: list[Request] = self.requests_by_seq_id[self.sampled_seq_ids].tolist()
        return requests
