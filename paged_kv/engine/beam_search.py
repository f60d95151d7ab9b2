"""Beam search: the likeliest continuations of prompts, on beams that share blocks.

Knows the engine's model, cache and manager, never its requests. A prompt is computed once and its
beams are forks of it: what they have in common is stored once, and a fork copies at most one block.
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
import torch
from torch import Tensor

from ..blocks.block_manager import BlockManager
from ..blocks.geometry import BlockGeometry, IntArray
from ..blocks.step_plan import StepPlan
from ..blocks.token_chain import TokenChain
from ..errors import (
    InvalidStepError,
    NonFiniteLogitsError,
    OutOfBlocksError,
    PagedKVError,
)
from ..validation import is_integer, require
from .engine import Engine
from .sampler import find_unusable_rows
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
    `max_tokens`, `stop_token_ids`, `ignore_eos` and `cache_salt` are those of `SamplingParams`.
    """

    num_beams: int = 4
    num_return: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    max_tokens: int | None = 128
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    cache_salt: str | None = None

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


@dataclass(eq=False, kw_only=True)
class PromptSearch:
    """The beams of one prompt, best first, and the best `num_beams` hypotheses, best first.

    Before the prompt is computed it is the only beam; a search that is over has none.
    """

    params: BeamSearchParams
    prompt: TokenChain
    max_tokens: int
    end_token_ids: frozenset[int]
    max_blocks: int
    seq_ids: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=lambda: [0.0])
    num_generated: int = 0
    hypotheses: list[Hypothesis] = field(default_factory=list)
    error: PagedKVError | None = None

    def advance(self, candidates: Sequence[Candidate], manager: BlockManager) -> list[Candidate]:
        """Account for one more token. Returns the beams that go on; none when the search is over.

        `candidates` are as `find_candidates` gives them. Those among the best `num_beams` that end
        become hypotheses; others that end are dropped.
        """
        if not candidates:
            self._fail()
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
                self._finish(candidate, "stop" if is_end else "length", manager)
        if not going_on or not self._can_improve(going_on[0].log_probability):
            return []
        return going_on[:num_beams]

    def _fail(self) -> None:
        self.hypotheses.clear()
        self.error = NonFiniteLogitsError(
            f"after {len(self.prompt.token_ids)} prompt and {self.num_generated} output tokens: "
            "the model's logits are not finite"
        )

    def _finish(self, candidate: Candidate, reason: str, manager: BlockManager) -> None:
        seq_id = self.seq_ids[candidate.beam]
        stored = manager.token_ids[seq_id, len(self.prompt.token_ids) : manager.num_tokens[seq_id]]
        hypothesis = Hypothesis(
            token_ids=[*stored.tolist(), candidate.token_id],
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


def search_beams(
    engine: Engine, prompts: Sequence[Sequence[int]], params: BeamSearchParams
) -> list[BeamOutput]:
    """Continue every prompt by beam search, as many at a time as seq_ids and blocks surely suffice.

    Raises before anything is computed: `InvalidStepError` while the engine has requests,
    `InvalidRequestError` for a prompt that cannot be served, `OutOfBlocksError` where the beams of
    one prompt might not fit. Whatever happens, no block is held afterwards.
    """
    if engine.has_unfinished:
        raise InvalidStepError("beam search needs the engine to itself; requests are unfinished")
    searches = [check_prompt(engine, prompt, params) for prompt in prompts]
    run = BeamSearchRun(engine, searches)
    try:
        while run.waiting or run.running:
            run.step()
    finally:
        for seq_id in engine.manager.living_seq_ids.tolist():
            engine.manager.remove_sequence(seq_id)
    return [
        BeamOutput(hypotheses=search.hypotheses[: params.num_return], error=search.error)
        for search in searches
    ]


def check_prompt(engine: Engine, prompt: Sequence[int], params: BeamSearchParams) -> PromptSearch:
    """The search of a prompt before it starts; raises where it cannot be served."""
    request = engine.check_request("", prompt, params.request_params())
    manager, num_beams = engine.manager, params.num_beams
    if num_beams > manager.max_num_seqs:
        raise OutOfBlocksError(f"{num_beams} beams exceed max_num_seqs ({manager.max_num_seqs})")
    num_prompt_tokens, max_tokens = request.num_prompt_tokens, request.max_tokens
    max_blocks = max_blocks_of_beams(manager.geometry, num_prompt_tokens, max_tokens, num_beams)
    if max_blocks > manager.num_blocks:
        raise OutOfBlocksError(
            f"{num_beams} beams of {num_prompt_tokens} prompt tokens and max_tokens={max_tokens} "
            f"may need {max_blocks} blocks; the pool has {manager.num_blocks}"
        )
    ends = frozenset() if params.ignore_eos else engine.end_token_ids
    return PromptSearch(
        params=params,
        prompt=manager.chain_tokens(request.prompt_token_ids, request.extra_keys),
        max_tokens=max_tokens,
        end_token_ids=frozenset(params.stop_token_ids) | ends,
        max_blocks=max_blocks,
    )


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


class BeamSearchRun:
    """Steps over many searches: those whose prompts are computed, then the others that have begun.

    A step computes one token of every beam, and chunks of prompts within the token budget.
    """

    def __init__(self, engine: Engine, searches: Sequence[PromptSearch]) -> None:
        self.engine = engine
        self.manager = engine.manager
        self.waiting = list(searches)
        self.running: list[PromptSearch] = []

    @torch.inference_mode()
    def step(self) -> None:
        """Compute one step; every search whose beams are computed chooses how they go on."""
        self._admit()
        plan = self._reserve()
        ends = plan.context_lens + plan.num_scheduled_tokens
        rows = np.flatnonzero(ends == self.manager.num_tokens[plan.seq_ids])
        ready_seq_ids = set(plan.seq_ids[rows].tolist())
        ready = [search for search in self.running if search.seq_ids[0] in ready_seq_ids]
        try:
            logits = self._run_model(plan, rows)
            candidates = find_candidates(logits, ready)
        except BaseException:
            self.manager.rollback(plan)
            raise
        self.manager.commit(plan)
        seq_ids: list[int] = []
        token_ids: list[int] = []
        for search, found in zip(ready, candidates, strict=True):
            going_on = search.advance(found, self.manager)
            self._replace_beams(search, going_on)
            seq_ids += search.seq_ids
            token_ids += [candidate.token_id for candidate in going_on]
        self.manager.append_tokens(seq_ids, token_ids)
        self.running = [search for search in self.running if search.seq_ids]

    def _admit(self) -> None:
        """Start searches, in order, while seq_ids and blocks suffice for all their beams.

        A prompt whose next blocks another one is about to store waits to share them.
        """
        manager = self.manager
        num_blocks = manager.num_blocks - sum(search.max_blocks for search in self.running)
        num_seqs = manager.max_num_seqs - sum(s.params.num_beams for s in self.running)
        for search in self.waiting.copy():
            num_blocks -= search.max_blocks
            num_seqs -= search.params.num_beams
            if num_blocks < 0 or num_seqs < 0:
                break
            if self.running and manager.find_prefix(search.prompt).is_pending:
                continue
            self.waiting.remove(search)
            self.running.append(search)
            search.seq_ids = [manager.add_sequence(search.prompt)]

    def _reserve(self) -> StepPlan:
        """Plan as large a step as there are blocks for: large chunks may need more at once."""
        budget = self.engine.scheduler.token_budget
        while True:
            plan = self.manager.reserve(*self._share_budget(budget))
            if plan is not None:
                return plan
            assert budget > 1, "single tokens always fit; searches start only where they do"
            budget //= 2

    def _share_budget(self, budget: int) -> tuple[IntArray, IntArray]:
        """SeqIds and new tokens: one of every beam, and of prompts what the budget leaves."""
        manager = self.manager
        seq_ids = np.array([seq_id for search in self.running for seq_id in search.seq_ids])
        num_new = manager.num_tokens[seq_ids] - manager.num_computed_tokens[seq_ids]
        num_beams = sum(len(search.seq_ids) for search in self.running if search.num_generated)
        budget_left = max(budget, num_beams) - (np.cumsum(num_new) - num_new)
        num_new = np.minimum(num_new, budget_left)
        return seq_ids[num_new > 0], num_new[num_new > 0]

    def _run_model(self, plan: StepPlan, rows: IntArray) -> Tensor:
        """Logits [M, V] in float32 of the last token of the sequences `rows` of the plan."""
        token_ids = self.manager.token_ids[plan.seq_ids[plan.token_rows], plan.positions]
        logit_tokens = plan.query_start_loc[1:][rows] - 1
        logits, _ = self.engine.runner.run(plan, token_ids.astype(np.int64), logit_tokens)
        return logits

    def _replace_beams(self, search: PromptSearch, going_on: Sequence[Candidate]) -> None:
        """Make a search's sequences those of the beams that go on, with new tokens not yet known.

        Beams that go on several times are forked, those that do not are removed.
        """
        parents = [candidate.beam for candidate in going_on]
        for beam, seq_id in enumerate(search.seq_ids):
            if beam not in parents:
                self.manager.remove_sequence(seq_id)
        search.seq_ids = [
            self.manager.fork(search.seq_ids[parent])
            if parent in parents[:index]
            else search.seq_ids[parent]
            for index, parent in enumerate(parents)
        ]
        search.log_probabilities = [candidate.log_probability for candidate in going_on]


def find_candidates(logits: Tensor, searches: Sequence[PromptSearch]) -> list[list[Candidate]]:
    """What may follow the beams of each search, best first; nothing where logits are unusable.

    `logits` [M, V] in float32 are those of all beams, search by search. Of each beam there are as
    many candidates that `num_beams` of them do not end, where the vocabulary has so many.
    """
    if not searches:
        return []
    so_far = [number for search in searches for number in search.log_probabilities]
    beams = torch.tensor(so_far, dtype=torch.float32, device=logits.device)
    totals = logits.log_softmax(-1) + beams[:, None]
    count = max(search.params.num_beams + len(search.end_token_ids) for search in searches)
    best = totals.topk(min(count, totals.shape[-1]))
    values, token_ids = best.values.tolist(), best.indices.tolist()
    is_unusable = find_unusable_rows(logits)
    found: list[list[Candidate]] = []
    start = 0
    for search in searches:
        end = start + len(search.log_probabilities)
        candidates = [
            Candidate(row - start, token_id, total)
            for row in range(start, end)
            for total, token_id in zip(values[row], token_ids[row], strict=True)
            if total > -math.inf
        ]
        candidates.sort(key=lambda candidate: -candidate.log_probability)
        found.append([] if is_unusable[start:end].any() else candidates)
        start = end
    return found
