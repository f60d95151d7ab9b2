"""Continuous batching: which sequences compute how many tokens in the next step.

Knows token counts and block counts, never tensors or text. There are no prefill and decode phases:
each sequence's computed tokens catch up with its tokens, and a step hands out a token budget.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from paged_kv.blocks.block_manager import BlockManager
from paged_kv.blocks.geometry import IntArray
from paged_kv.blocks.step_plan import StepPlan
from paged_kv.blocks.token_chain import as_token_ids
from paged_kv.errors import (
    InvalidRequestError,
    InvalidStepError,
)
from paged_kv.validation import is_finite, require, require_count, require_instance

from .admission import Room, find_admissible
from .budget import cut_to_budget, step_budget
from .drafts import (
    NO_DRAFTS,
    Drafts,
    TakenTokens,
    checked_acceptance,
    checked_drafts,
    count_drafts,
    tokens_to_compute,
)
from .request import Request, RequestStatus
from .roster import Roster
from .running import seq_ids_of
from .step import Branches, Fork, ScheduledStep


class Scheduler(Roster):
    """Shares a `BlockManager`'s pool among requests, best rank first.

    A step computes at most `token_budget` tokens. Those who need a single one get it first: whoever
    decodes has its token in every step. What is left goes to prompts by rank, in chunks of at most
    `max_prefill_tokens` of one request. Where decodes use the budget up, all take turns.

    Ranks go by priority and arrival, and a level of priority is worth `AGING_STEPS` (500) steps of
    waiting: of two that arrive together the one of the lower priority waits for the other, but only
    for those better ones that arrive in the next 500 steps. So nobody waits for ever.

    A request is admitted when its whole prompt fits and leaves room for what others generate in the
    next `steps_ahead` steps, and a fraction `watermark` of the pool: with less they preempt each
    other and compute again, with more the pool stands empty. One that does not fit may be passed by
    later ones that do, a limited number of times. A request whose next blocks a running one is
    about to share waits for them. A branching request keeps room for all its sequences; of these
    the ones that have nothing to compute, while others catch up, are left out of a step.

    When blocks run out, the running request of the worst rank is preempted, the newest of the
    lowest priority, and nobody is admitted in that step. It is swapped to host blocks if these have
    room and moving its blocks there and back costs less than computing its tokens again: a block
    moved costs as much as `swap_cost` computed tokens. Otherwise it is recomputed, as a branching
    one always is.
    """

    def __init__(
        self,
        manager: BlockManager,
        *,
        token_budget: int,
        max_prefill_tokens: int | None = None,
        watermark: float = 0.01,
        steps_ahead: int = 48,
        swap_cost: float = 1.0,
    ) -> None:
        require_instance("manager", manager, BlockManager)
        is_fraction = is_finite(watermark) and 0 <= watermark < 1
        require("watermark", watermark, is_fraction, "at least 0 and below 1")
        is_cost = is_finite(swap_cost) and swap_cost >= 0
        require("swap_cost", swap_cost, is_cost, "a number that is not negative")
        self.token_budget: int = require_count("token_budget", token_budget)
        if max_prefill_tokens is not None:
            max_prefill_tokens = require_count("max_prefill_tokens", max_prefill_tokens)
        self.max_prefill_tokens = max_prefill_tokens
        self.most_beside_decodes: int | None = None  # tokens of prompts, set between steps
        super().__init__(manager, swap_cost=swap_cost)
        self.steps_ahead: int = require_count("steps_ahead", steps_ahead, least=0)
        self._watermark_blocks = int(watermark * manager.num_blocks)

    # -- steps ----------------------------------------------------------------------------------

    def schedule(self, drafts: Drafts = NO_DRAFTS) -> ScheduledStep | None:
        """Plan the next step and reserve its blocks; None when none is left that may compute.

        Requests that sample in it try their `drafts`, as far as budget and blocks are left. Raises
        `OutOfBlocksError` where sequences that the scheduler does not know leave no room.
        """
        if self._step is not None:
            raise InvalidStepError("update or cancel the step before")
        drafts = checked_drafts(drafts)
        with self._change:
            preempted: list[Request] = []
            seq_ids, num_new = self._choose(preempted)
            plan = self._reserve_drafts(seq_ids, num_new, drafts)
            if plan is None and len(seq_ids):
                plan = self._reserve(seq_ids, num_new, preempted)
            if plan is not None:
                self._num_steps += 1
                self._num_scheduled += plan.num_tokens
                if len(plan.seq_ids) < len(self._running):
                    self._running.had_a_turn(plan.seq_ids)
                self._step = self._describe(plan, preempted, drafts)
        if self._step is None and not all(r.stands_still for r in self._requests.values()):
            raise self._held_by_others()
        return self._step

    def _choose(self, preempted: list[Request]) -> tuple[IntArray, IntArray]:
        """Sequences of the next step and how many tokens each computes, admitted ones included."""
        seq_ids, num_new, num_left = self._share_budget(self.token_budget)
        while True:
            if len(self.waiting) and self.manager.num_free_seqs:
                seq_ids, num_new = self._admit(seq_ids, num_new, num_left)
            if len(seq_ids) or not self._running.paused:
                return seq_ids, num_new
            if all(request.stands_still for request in self.waiting):
                return seq_ids, num_new
            preempted.append(self._running.worst)  # paused, and others wait for what it holds
            self._preempt(self._running.worst)

    def _reserve_drafts(
        self, seq_ids: IntArray, num_new: IntArray, drafts: Drafts
    ) -> StepPlan | None:
        """Reserve a step that tries drafts; None where there are none, or nobody else has to go."""
        manager, running, budget = self.manager, self._running, self.token_budget
        num_drafts = count_drafts(drafts, seq_ids, num_new, manager, running, budget)
        if num_drafts is None:
            return None
        return manager.reserve(seq_ids, num_new + num_drafts, num_drafts)

    def _reserve(
        self, seq_ids: IntArray, num_new: IntArray, preempted: list[Request]
    ) -> StepPlan | None:
        """Reserve the step's blocks, preempting whom it takes; None if nobody is left to make room.

        Requests are checked on arrival: alone in the pool, each has room for one token.
        """
        plan = self.manager.reserve(seq_ids, num_new)
        budget = self.token_budget
        while plan is None:
            worst = self._running.worst
            if len(self._running) > len(worst.seq_ids):
                preempted.append(worst)
                self._preempt(worst)
            elif num_new.sum() > 1:  # a smaller step always fits
                budget = int(num_new.sum()) // 2
            else:
                return None
            seq_ids, num_new, _ = self._share_budget(budget)
            plan = self.manager.reserve(seq_ids, num_new)
        return plan

    def _describe(self, plan: StepPlan, preempted: list[Request], drafts: Drafts) -> ScheduledStep:
        seq_ids, certain = plan.seq_ids, plan.num_scheduled_tokens
        if plan.num_draft_tokens is not None:
            certain = certain - plan.num_draft_tokens
        ends = plan.context_lens + certain
        if plan.num_evicted_tokens is not None:
            ends = ends + plan.num_evicted_tokens
        sampled = (ends == self.manager.num_tokens[seq_ids]).nonzero()[0]
        do_all_sample = len(sampled) == len(seq_ids)
        # The same array where all sample: the manager knows that its seq_ids are distinct.
        sampled_seq_ids = seq_ids if do_all_sample else seq_ids[sampled]
        swap_outs, self._swap_outs = self._swap_outs, []
        swap_ins, self._swap_ins = self._swap_ins, []
        arrivals, self._arrivals = self._arrivals, []
        if plan.is_decode and do_all_sample:
            token_ids = self.manager.last_token_ids[seq_ids]
        else:
            token_ids = tokens_to_compute(plan, self.manager, self._running, drafts)
        return ScheduledStep(
            plan=plan,
            token_ids=token_ids.astype(np.int64),
            sampled_seq_ids=sampled_seq_ids,
            sampled_token_index=(plan.query_start_loc[:-1] + certain)[sampled] - 1,
            preempted=preempted,
            swap_outs=swap_outs,
            swap_ins=swap_ins,
            arrivals=arrivals,
            requests_by_seq_id=self._running.by_seq_id,
        )

    def _share_budget(self, budget: int) -> tuple[IntArray, IntArray, int]:
        """Running sequences that compute tokens, best rank first, how many, and what is left."""
        seq_ids = self._running.active_seq_ids
        num_new = self.manager.num_computable(seq_ids)
        if self._running.branching:
            seq_ids, num_new = seq_ids[num_new > 0], num_new[num_new > 0]
        if self.max_prefill_tokens is not None:
            num_new = np.minimum(num_new, self.max_prefill_tokens)
        limit = step_budget(num_new, budget, self.most_beside_decodes)
        if int(num_new.sum()) > limit:
            cut = cut_to_budget(num_new, limit, budget)
            if cut is None:
                cut = self._running.whose_turn(seq_ids, budget).astype(np.int64)
            seq_ids, num_new = seq_ids[cut > 0], cut[cut > 0]
        return seq_ids, num_new, limit - int(num_new.sum())

    def _admit(
        self, seq_ids: IntArray, num_new: IntArray, num_left: int
    ) -> tuple[IntArray, IntArray]:
        """Add waiting requests while sequences, budget and blocks for their whole prompts last."""
        if self._lack.persists(self._num_free_seqs, self.manager.num_free_blocks):
            return seq_ids, num_new
        room = self._room_beside(seq_ids, num_new, num_left)
        if room.blocks_now < 0 or room.is_used_up:
            return seq_ids, num_new
        if self._lack.persists(room.num_seqs, room.blocks_later):
            return seq_ids, num_new
        admitted: list[Request] = []
        counts: list[int] = []
        for request, num_tokens in find_admissible(self.waiting, room, self._lack, self.manager):
            self._start(request)
            admitted.append(request)
            counts.append(num_tokens)
        if not admitted:
            return seq_ids, num_new
        admitted_seq_ids = seq_ids_of(admitted)
        self._running.enter(admitted_seq_ids)
        return np.concatenate([seq_ids, admitted_seq_ids]), np.concatenate([num_new, counts])

    @property
    def _num_free_seqs(self) -> int:
        """Sequences that may start: the others are kept for requests that branch."""
        return self.manager.num_free_seqs - self._running.num_kept

    def _room_beside(self, seq_ids: IntArray, num_new: IntArray, num_left: int) -> Room:
        """What is left beside running sequences that compute so many tokens in this step."""
        manager, running = self.manager, self._running.seq_ids
        blocks_later = manager.num_free_blocks
        if self._running.branching:
            running = running[~self._running.is_branch[running]]
        for request in self._running.branching:
            assert request.branching is not None
            held = np.unique(np.concatenate([manager.all_block_ids(n) for n in request.seq_ids]))
            blocks_later -= max(request.branching.max_blocks - len(held), 0)
        to_compute = manager.blocks_needed(seq_ids, num_new)
        to_catch_up = manager.blocks_needed(running, manager.num_computable(running))
        return Room(
            num_tokens=num_left,
            most_tokens=self.max_prefill_tokens or self.token_budget,
            steps_ahead=self.steps_ahead,
            num_seqs=self._num_free_seqs,
            blocks_now=manager.num_free_blocks - int(to_compute.sum()),
            blocks_later=blocks_later
            - int(to_catch_up.sum())
            - self._growth_ahead(running)
            - self._watermark_blocks,
            is_empty=not len(self._running),
        )

    def _growth_ahead(self, seq_ids: IntArray) -> int:
        """Blocks that the decodes of these take at most at once in the next `steps_ahead` steps.

        What those who reach their limit until then give back is deducted.
        """
        manager, geometry = self.manager, self.manager.geometry
        seq_ids = np.delete(seq_ids, manager.tables.windowed_rows(seq_ids))  # these evict
        steps_left = self._running.max_tokens[seq_ids] - manager.num_tokens[seq_ids]
        in_order = np.argsort(steps_left)
        seq_ids, steps_left = seq_ids[in_order], steps_left[in_order]
        ends = steps_left < self.steps_ahead
        held, tables_growing = manager.num_held(seq_ids)
        given_back = np.cumsum(held * ends) - held * ends  # by those that end before
        num_growing = np.cumsum(tables_growing[::-1])[::-1]  # with those that end later
        grown = num_growing * np.minimum(steps_left, self.steps_ahead) / geometry.block_size
        if geometry.seals and self.steps_ahead:  # tails are longer at one time than at another
            grown += num_growing * geometry.open_blocks_per_block / 8
        return int((grown - given_back).max(initial=0))

    def update(
        self,
        step: ScheduledStep,
        sampled_token_ids: ArrayLike,
        forks: Sequence[Fork] = (),
        branches: Sequence[Branches] = (),
        is_spoilt: NDArray[np.bool_] | None = None,
        num_accepted: ArrayLike | None = None,
    ) -> list[Request]:
        """The step is done: commit its blocks and append the sampled tokens [M].

        They come after the first `num_accepted` [M] of the drafts that each has tried, which are
        right; without it none is. Each of `forks` starts a new request from a sampled one, with a
        token of its own; it shares the parent's blocks, or waits where no sequence is free. A
        branching request gets its tokens by `branches` alone, in whatever step: what it sampled is
        not looked at. What the model computed for those that `is_spoilt` [M] is not finite: nobody
        finds their blocks any more, and requests that share them and have not sampled since start
        again, as does, once, one that is spoilt itself and began with blocks of others (its status
        tells). Returns the requests that have reached their `max_tokens`; the caller finishes them,
        and any other it wants to stop.
        """
        self._require_step(step)
        tokens = as_token_ids(sampled_token_ids)
        if tokens.shape != step.sampled_seq_ids.shape:
            raise InvalidStepError(
                f"{len(step.sampled_seq_ids)} sequences sample a token, got tokens of shape "
                f"{tokens.shape}"
            )
        accepted = checked_acceptance(num_accepted, step.num_drafts)
        self._check_forks(step, forks, accepted)
        self._check_branches(branches)
        with self._change:
            taken, kept = step.taken_tokens(tokens, accepted), step.kept_tokens(accepted)
            if is_spoilt is None or not is_spoilt.any():
                self.manager.commit(step.plan, kept)
                starting_again = []
            else:
                starting_again = self._commit_spoilt(step, taken.seq_ids[is_spoilt], kept)
                taken = taken.only(~np.isin(taken.seq_ids, seq_ids_of(starting_again)))
            if self._running.branching:
                taken = taken.only(~self._running.is_branch[taken.seq_ids])
            self._num_drafts += int(step.num_drafts.sum())
            self._num_accepted += int(accepted.sum())
            at_limit = self._append(taken, forks)
            for branch in branches:
                self._branch(branch)
            self._end_step()
            for request in starting_again:
                if request.status is RequestStatus.RUNNING:
                    self._preempt(request, may_swap=False)
        return [request for request in at_limit if request.status is not RequestStatus.FINISHED]

    def _commit_spoilt(
        self, step: ScheduledStep, spoilt_seq_ids: IntArray, kept: IntArray | None
    ) -> list[Request]:
        """Commit a step with sequences whose results are not finite; the requests to start again.

        They are those that share blocks with these: of others that sampled it is known that all
        they share is finite, of those that did not it is not. And the spoilt ones themselves that
        began with blocks of others, because the fault may lie there; but only once.
        """
        spoilt_ids = np.concatenate([self.manager.block_ids(n) for n in spoilt_seq_ids.tolist()])
        unseen = np.setdiff1d(self._running.seq_ids, step.sampled_seq_ids)
        suspect = [
            n for n in unseen.tolist() if np.isin(self.manager.block_ids(n), spoilt_ids).any()
        ]
        withdrawn = np.concatenate([spoilt_seq_ids, np.array(suspect, dtype=np.int64)])
        self.manager.commit(step.plan, kept, spoilt_seq_ids=withdrawn)
        by_seq_id = self._running.by_seq_id
        retried = [r for r in by_seq_id[spoilt_seq_ids].tolist() if r.may_be_retried]
        for request in retried:
            request.is_retried = True
        return list(dict.fromkeys([*by_seq_id[suspect].tolist(), *retried]))

    def _append(self, taken: TakenTokens, forks: Sequence[Fork]) -> list[Request]:
        """Sequences get their tokens and forks start; the requests that have all their tokens."""
        started = [fork for fork in forks if self._fork(fork)]
        if started:
            forked_seq_ids = seq_ids_of([fork.child for fork in started])
            self._running.enter(forked_seq_ids)
            taken = taken.and_one_each(forked_seq_ids, [fork.token_id for fork in started])
        self.manager.append_tokens(*taken)
        waiting = [fork.child for fork in forks if fork.child.waits_at_limit]
        return self._at_limit(taken.seq_ids) + waiting

    def _at_limit(self, seq_ids: IntArray) -> list[Request]:
        is_at_limit = self.manager.num_tokens[seq_ids] >= self._running.max_tokens[seq_ids]
        requests: list[Request] = self._running.by_seq_id[seq_ids[is_at_limit]].tolist()
        return requests

    def may_advance(self, step: ScheduledStep) -> bool:
        """Whether the step after this one can be scheduled before its tokens are known.

        All that run sample in it, and what they compute in the next step is sure to fit: what is
        preempted would take its tokens along.
        """
        running, num_free = self._running, self.manager.num_free_blocks
        most_new = 2 * len(running) * len(self.manager.groups)  # an open and a sealed block of each
        return (
            len(step.sampled_seq_ids) == len(running)
            and step.plan.num_draft_tokens is None
            and not (running.branching or running.paused)
            and num_free >= most_new
        )

    def advance(self, step: ScheduledStep) -> list[Request]:
        """As `update`, but the tokens are not known yet: `settle` tells them.

        For a step that `may_advance`; before the one after it, which may be scheduled, ends.
        """
        self._require_step(step)
        with self._change:
            self.manager.commit(step.plan)
            self.manager.append_tokens(step.sampled_seq_ids, None)
            at_limit = self._at_limit(step.sampled_seq_ids)
            self._end_step()
        return [request for request in at_limit if request.status is not RequestStatus.FINISHED]

    def settle(self, seq_ids: IntArray, token_ids: ArrayLike) -> None:
        """The tokens [M] of sequences that run and got them by `advance`."""
        tokens = as_token_ids(token_ids)
        with self._change:
            self.manager.settle_tokens(seq_ids, tokens)

    def _check_forks(
        self, step: ScheduledStep, forks: Sequence[Fork], num_accepted: IntArray
    ) -> None:
        """Raise before anything has changed."""
        if not forks:
            return
        sampled = dict(zip(step.sampled_seq_ids.tolist(), num_accepted.tolist(), strict=True))
        for parent, child, _ in forks:
            if parent.seq_id not in sampled:
                raise InvalidStepError(f"request {parent.request_id!r} does not sample now")
            if sampled[parent.seq_id]:
                raise InvalidStepError(f"request {parent.request_id!r} goes on from drafts now")
            self.check(child)
        if len({fork.child.request_id for fork in forks}) < len(forks):
            raise InvalidRequestError("two forks have the same request id")

    def _check_branches(self, branches: Sequence[Branches]) -> None:
        """Raise before anything has changed."""
        for branch in branches:
            branch.check(self.manager.max_model_len)
        if len({branch.request.request_id for branch in branches}) < len(branches):
            raise InvalidStepError("a request branches once in a step")

    def _fork(self, fork: Fork) -> bool:
        """Start a fork's child; False where it has to wait until a sequence ends."""
        parent, child = fork.parent, fork.child
        assert parent.seq_id is not None
        self._register(child)
        if self._num_free_seqs:
            self._running.begin(child, self.manager.fork(parent.seq_id))
            return True
        chain = self.manager.chain_of(parent.seq_id)
        child.tokens = chain.with_tokens(np.append(chain.token_ids, np.int32(fork.token_id)))
        self._wait(child)
        return False

    def _branch(self, branches: Branches) -> None:
        """Replace a request's sequences: those that go on several times are forked."""
        request, parents, token_ids = branches
        before, request.seq_ids = request.seq_ids, []
        for index, seq_id in enumerate(before):
            if index not in parents:
                self.manager.remove_sequence(seq_id)
                self._running.leave(seq_id)
                self._lack.changed()
        forked: list[int] = []
        for index, parent in enumerate(parents):
            if parent in parents[:index]:
                forked.append(self.manager.fork(before[parent]))
                self._running.begin(request, forked[-1])
            else:
                request.seq_ids.append(before[parent])
        if forked:
            self._running.enter(forked)
        self.manager.append_tokens(
            request.seq_ids,
            [token_id for tokens in token_ids for token_id in tokens],
            [len(tokens) for tokens in token_ids],
        )

    def cancel(self, step: ScheduledStep) -> None:
        """The step failed: its tokens count as not computed. Admissions and preemptions stay."""
        self._require_step(step)
        with self._change:
            self.manager.rollback(step.plan)
            self._end_step()

    def _require_step(self, step: ScheduledStep) -> None:
        if step is None or step is not self._step:
            raise InvalidStepError("this step is not the one that was scheduled last")
        if step.plan.is_over:
            raise InvalidStepError(
                "the manager committed or rolled back this step behind the scheduler's back: "
                "recover() comes first"
            )

    def _end_step(self) -> None:
        self._step = None
        for request in self._ending:
            self._stop_running(request)
        self._ending.clear()
