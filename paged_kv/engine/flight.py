"""A step on its way: launched, and nobody has waited for it. Knows what it draws, and for whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..blocks.geometry import IntArray
from ..cache.decode_tables import Drawn
from ..scheduler.step import ScheduledStep
from .live_request import BeamShortlist, TokenDraw
from .prompt_look import PromptLook
from .sampler import Sampling


@dataclass(eq=False)
class Flight:
    """A step and what is drawn of it."""

    scheduled: ScheduledStep
    draws: Sequence[TokenDraw]
    shortlists: Sequence[BeamShortlist]
    sampling: Sampling
    looks: Sequence[PromptLook] = ()
    began: float = 0.0  # a `perf_counter`

    @property
    def is_simple(self) -> bool:
        """Whether each sequence gets one token, which nothing on the host takes part in."""
        num_rows = len(self.scheduled.sampled_seq_ids)
        return (
            not self.shortlists
            and not self.looks
            and len(self.draws) == num_rows
            and not self.sampling.may_be_open
            and not any(
                draw.rules.needs_tokens or draw.live.departure is not None for draw in self.draws
            )
        )

    @cached_property
    def goes_on(self) -> NDArray[np.bool_]:
        """[M] which of the sequences still run: to be read before others may have their ids."""
        return np.array([bool(r.seq_ids) for r in self.scheduled.sampled_requests], dtype=np.bool_)

    @property
    def token_ids(self) -> IntArray:
        """[M] what was drawn, once it is settled."""
        return np.array([draw.token_id for draw in self.draws], dtype=np.int64)

    def drawn_for(self, seq_ids: IntArray, max_num_seqs: int) -> Drawn:
        """The last tokens of sequences of the next step, as far as they are drawn in this one."""
        places: IntArray = np.full(max_num_seqs, -1, dtype=np.int64)
        places[self.scheduled.sampled_seq_ids[self.goes_on]] = self.goes_on.nonzero()[0]
        return Drawn(places[seq_ids], self.sampling.token_ids)

    def tell(self, following: ScheduledStep, sources: IntArray) -> None:
        """Give the next step the tokens that were not known when it was scheduled."""
        is_ours = sources >= 0
        last = following.plan.query_start_loc[1:][is_ours] - 1
        following.token_ids[last] = self.token_ids[sources[is_ours]]
