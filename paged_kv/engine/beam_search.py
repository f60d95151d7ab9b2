"""Beam search: the likeliest continuations of a prompt, on beams that share blocks.

Knows tokens and their likelihoods, never logits, blocks or the engine. A prompt is computed once,
by a request that then goes on as several sequences, one for each beam: what they have in common is
stored once. Beams advance in lockstep: one whose likeliest tokens are known waits for the others.
What goes on, what is finished and when a search ends is as in transformers' `generate`.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Final, Literal, NamedTuple

import numpy as np

from ..blocks.block_manager import BlockManager
from ..blocks.geometry import BlockGeometry
from ..errors import OutOfBlocksError, PagedKVError
from ..scheduler.request import Branching, Request
from ..scheduler.step import Branches
from ..validation import is_integer, require
from .sampler import Shortlist
from .sampling_params import SamplingParams

MAX_LENGTH_PENALTY: Final = 16.0  # powers of any length stay finite


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """How to search; the fields mean what they mean to transformers' `generate`.

    `num_beams` continuations of a prompt grow side by side, and the `num_return` best finished ones
    are returned. A finished one scores the sum of its log-probabilities divided by its length, the
    end token included, to the power of `length_penalty`. Once `num_beams` have finished, the search
    ends if `early_stopping`; if not, it ends when the best beam scores no better at its present
    length than the worst of them; with "never" when it could not score better at any length
    (estimated at the greatest where `length_penalty` is positive). One beam is greedy search.
    `max_tokens`, `stop_token_ids`, `ignore_eos`, `cache_salt` and `adapter` are those of
    `SamplingParams`.
    """

    num_beams: int = 4
    num_return: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    max_tokens: int | None = 128
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    cache_salt: str | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        for name in ("num_beams", "num_return"):
            value = getattr(self, name)
            require(name, value, is_integer(value) and value >= 1, "an integer of at least 1")
        is_few = self.num_return <= self.num_beams
        require("num_return", self.num_return, is_few, f"at most num_beams ({self.num_beams})")
        is_number = isinstance(self.length_penalty, Real)
        limit = MAX_LENGTH_PENALTY
        require(
            "length_penalty",
            self.length_penalty,
            is_number and -limit <= self.length_penalty <= limit,
            f"a number from -{limit:g} to {limit:g}",
        )
        is_known = isinstance(self.early_stopping, bool) or self.early_stopping == "never"
        require("early_stopping", self.early_stopping, is_known, 'True, False or "never"')
        self.request_params()

    def request_params(self) -> SamplingParams:
        """What a request of one beam would be checked by; raises `ConfigError`."""
        return SamplingParams(
            max_tokens=self.max_tokens,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            cache_salt=self.cache_salt,
            adapter=self.adapter,
        )

    def score(self, log_probability: float, length: int) -> float:
        return log_probability / math.pow(length, self.length_penalty)


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """A finished continuation. `finish_reason`: "stop" or "length"."""

    token_ids: list[int]
    score: float
    finish_reason: str


@dataclass(frozen=True, kw_only=True)
class BeamOutput:
    """Of one prompt: its `num_return` best continuations, best first, or why there are none.

    There are fewer where the vocabulary does not allow as many.
    """

    hypotheses: list[Hypothesis]
    error: PagedKVError | None = None


class Candidate(NamedTuple):
    """A beam with one more token."""

    beam: int  # index among the beams
    token_id: int
    log_probability: float  # of all tokens after the prompt


@dataclass(eq=False)
class Beam:
    """A continuation that is not finished, and what may follow it, once that is known."""

    token_ids: list[int]
    log_probability: float
    shortlist: Shortlist | None = None


@dataclass(eq=False, kw_only=True)
class BeamSearch:
    """The beams of one prompt, best first, and the best `num_beams` hypotheses, best first.

    While it runs, `request.seq_ids` are the sequences of its beams, in their order; before the
    prompt is computed, that of the prompt. A search that is over has no beams.
    """

    params: BeamSearchParams
    request: Request
    max_tokens: int
    end_token_ids: frozenset[int]
    beams: list[Beam] = field(default_factory=lambda: [Beam([], 0.0)])
    num_generated: int = 0
    hypotheses: list[Hypothesis] = field(default_factory=list)
    error: PagedKVError | None = None
    is_done: bool = False  # over, and reported

    def restart(self) -> None:
        """Back to where no scheduler knows it: it finds everything once more."""
        self.beams, self.num_generated, self.error = [Beam([], 0.0)], 0, None
        self.hypotheses.clear()
        self.request.restart()

    def fail(self, error: PagedKVError) -> None:
        """It is over, with this error."""
        self.beams, self.error = [], error
        self.hypotheses.clear()

    @property
    def is_over(self) -> bool:
        return not self.beams

    @property
    def num_candidates(self) -> int:
        """Tokens of a beam to look at: so many that `num_beams` of them do not end it."""
        return self.params.num_beams + len(self.end_token_ids)

    @property
    def output(self) -> BeamOutput:
        """What was found, when it is over."""
        return BeamOutput(hypotheses=self.hypotheses[: self.params.num_return], error=self.error)

    def advance(self) -> Branches | None:
        """How the sequences go on, once every shortlist is known; None before, and at the end.

        A search that was preempted, of which only the prompt is computed again, restores its beams.
        """
        request = self.request
        if request.num_tokens < request.num_prompt_tokens + self.num_generated:
            for beam in self.beams:
                beam.shortlist = None
            parents = [0] * len(self.beams)
        elif any(beam.shortlist is None for beam in self.beams):
            return None
        else:
            going_on = self._account_for(self._find_candidates())
            parents = [candidate.beam for candidate in going_on]
            self.beams = [
                Beam([*self.beams[c.beam].token_ids, c.token_id], c.log_probability)
                for c in going_on
            ]
            if self.is_over:
                return None
            return Branches(request, parents, [beam.token_ids[-1:] for beam in self.beams])
        return Branches(request, parents, [beam.token_ids for beam in self.beams])

    def _find_candidates(self) -> list[Candidate]:
        """What may follow the beams, best first; nothing where logits are unusable."""
        candidates: list[Candidate] = []
        for index, beam in enumerate(self.beams):
            shortlist = beam.shortlist
            assert shortlist is not None
            if shortlist.error is not None:
                self.error = type(shortlist.error)(
                    f"after {self.request.num_prompt_tokens} prompt and {self.num_generated} "
                    f"output tokens: {shortlist.error}"
                )
                return []
            # In the precision of the logits, as in transformers: ties are the same.
            totals = np.array(shortlist.log_probabilities, dtype=np.float32)
            totals += np.float32(beam.log_probability)
            candidates += [
                Candidate(index, token_id, total)
                for token_id, total in zip(shortlist.token_ids, totals.tolist(), strict=True)
                if total > -math.inf
            ]
        candidates.sort(key=lambda candidate: -candidate.log_probability)
        return candidates

    def _account_for(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Account for one more token. Returns the beams that go on; none when the search is over.

        Candidates among the best `num_beams` that end become hypotheses; others that end are
        dropped.
        """
        if not candidates:
            self.hypotheses.clear()
            return []
        num_beams = self.params.num_beams
        self.num_generated += 1
        is_at_limit = self.num_generated == self.max_tokens
        going_on: list[Candidate] = []
        for rank, candidate in enumerate(candidates):
            is_end = candidate.token_id in self.end_token_ids
            if not is_end and not is_at_limit:
                going_on.append(candidate)
            elif rank < num_beams:
                self._finish(candidate, "stop" if is_end else "length")
        if not going_on or not self._can_improve(going_on[0].log_probability):
            return []
        return going_on[:num_beams]

    def _finish(self, candidate: Candidate, reason: str) -> None:
        hypothesis = Hypothesis(
            token_ids=[*self.beams[candidate.beam].token_ids, candidate.token_id],
            score=self.params.score(candidate.log_probability, self.num_generated),
            finish_reason=reason,
        )
        insort(self.hypotheses, hypothesis, key=lambda h: -h.score)
        del self.hypotheses[self.params.num_beams :]

    def _can_improve(self, log_probability: float) -> bool:
        """Whether a beam, the best, may still come before a hypothesis."""
        params = self.params
        if len(self.hypotheses) < params.num_beams:
            return True
        if params.early_stopping is True or params.num_beams == 1:
            return False
        waits_for_longest = params.early_stopping == "never" and params.length_penalty > 0
        length = self.max_tokens if waits_for_longest else self.num_generated
        return params.score(log_probability, length) > self.hypotheses[-1].score


def find_branching(manager: BlockManager, request: Request, num_beams: int) -> Branching:
    """What the beams of a request may take at once; raises `OutOfBlocksError` if that is too much.

    Groups of layers that keep less are counted as if they kept all.
    """
    num_prompt_tokens, max_tokens = request.num_prompt_tokens, request.max_tokens
    assert max_tokens is not None, "only windowed requests have no end"
    if num_beams > manager.max_num_seqs:
        raise OutOfBlocksError(f"{num_beams} beams exceed max_num_seqs ({manager.max_num_seqs})")
    geometry, num_groups = manager.geometry, len(manager.groups)
    max_blocks = max_blocks_of_beams(geometry, num_prompt_tokens, max_tokens, num_beams)
    max_blocks *= num_groups
    if max_blocks > manager.num_blocks:
        raise OutOfBlocksError(
            f"{num_beams} beams of {num_prompt_tokens} prompt tokens and max_tokens={max_tokens} "
            f"may need {max_blocks} blocks; the pool has {manager.num_blocks}"
        )
    return Branching(max_seqs=num_beams, max_blocks=max_blocks)


def max_blocks_of_beams(
    geometry: BlockGeometry, num_prompt_tokens: int, max_tokens: int, num_beams: int
) -> int:
    """The most blocks that the beams of one prompt hold at once, growing one token a step.

    Complete blocks of the prompt are common to all beams. Those of its tail cease to be when each
    beam seals them.
    """
    start, end = num_prompt_tokens, num_prompt_tokens + max_tokens - 1  # the last is never stored
    num_sealed, num_sealed_at_end = map(int, geometry.num_sealed_blocks(np.array([start, end])))
    num_complete = start // geometry.open_block_size
    if num_sealed_at_end == num_sealed:
        num_shared = num_complete - num_sealed * (geometry.open_blocks_per_block - 1)
    else:
        num_shared = min(num_complete, geometry.num_head_blocks) + num_sealed
    num_own = geometry.max_blocks(end, start) - num_shared
    return max(geometry.max_blocks(start), num_shared + num_beams * num_own)
