"""The step: schedule, run, sample, update. Knows requests of token ids, never text or tokenizers.

One direction: nothing that a step decides later reaches back into what it decided before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from time import perf_counter
from typing import Any, Final

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..blocks.sink_window import SinkWindow
from ..cache.decode_tables import Drawn
from ..change import Change
from ..errors import InvalidRequestError, PagedKVError, StepFailedError
from ..scheduler.drafts import NO_DRAFTS, Drafts
from ..scheduler.scheduler import Scheduler
from ..scheduler.step import Fork, ScheduledStep
from .beam_search import BeamSearch, BeamSearchParams
from .block_tier import NoBlockTier
from .flight import Flight
from .handover import Handover, HandoverDesk
from .intake import NO_DEFAULTS, Intake
from .live_request import (
    BeamShortlist,
    GivenTokens,
    LiveRequest,
    SearchUpdate,
    SequenceUpdate,
    TokenDraw,
    draws_of,
    leaders_of,
    samples_left,
    searches_of,
    shortlists_of,
    with_following,
)
from .model_runner import ModelRunner
from .prefill_pace import PrefillPace
from .prompt_look import looks_of
from .sampler import Sampling, sampling_arrays
from .sampling_params import SamplingParams
from .speculation import Speculation
from .turns import Turns


class Engine(Turns):
    """Decodes many requests and beam searches at once on one model, one cache and one pool."""

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        end_token_ids: Sequence[int],
        sink_window: SinkWindow | None = None,
        defaults: Mapping[str, Any] = NO_DEFAULTS,
        tokenizer: PreTrainedTokenizerBase | None = None,
        speculation: Speculation | None = None,
        max_slowdown: float | None = None,
    ) -> None:
        super().__init__()
        self.runner = runner
        self.speculation = speculation
        self.pace: Final = None if max_slowdown is None else PrefillPace(scheduler, max_slowdown)
        self.model: Final = runner.model
        self.cache: Final = runner.cache
        self.scheduler = scheduler
        self.manager: Final = scheduler.manager
        ends = frozenset(t for t in end_token_ids if 0 <= t < self.model.vocab_size)
        self._desk = HandoverDesk(self.model, self.cache, self.manager)
        self.intake: Final = Intake(
            self.model, scheduler, ends, sink_window, defaults, tokenizer, self._desk
        )
        self.num_steps: int = 0
        self._live: dict[str, LiveRequest] = {}
        self._searches: dict[str, BeamSearch] = {}
        self._aborted: deque[str] = deque()  # ids whose requests are still to be taken out
        self._ended: list[str] = []  # ids, as `take_ended` tells them
        self._last_names: list[str] = []  # of the step that was launched last
        self._flight: Flight | None = None  # a step that the next one finds under way
        self._change = Change("engine")
        self.tier: NoBlockTier = NoBlockTier()  # where blocks outlive the engine, if anywhere

    @property
    def has_unfinished(self) -> bool:
        return bool(self._live or self._searches)

    # -- turns ----------------------------------------------------------------------------------

    def _mend(self) -> None:
        """Undo what was cut off: a step that was not updated, or else everything but the tokens."""
        if self._change.is_unfinished or not self.scheduler.is_whole:
            self._recover()
        elif self.scheduler.step is not None and self._flight is None:
            self.scheduler.cancel(self.scheduler.step)

    def _recover(self) -> None:
        """Start from an empty pool: every request computes the tokens that it has once more."""
        self._change.is_unfinished = True
        self._flight = None
        self.scheduler.recover()
        self.tier.reset()
        for request_id in self._aborted:
            self._searches.pop(request_id, None)
            if request_id in self._live:
                self._live[request_id].finish_reason = "abort"
        for live in list(self._live.values()):
            if live.finish_reason is None:
                live.finish_reason = "error" if live.error is not None else live.end
            if live.finish_reason is None:
                live.restart()
                self.scheduler.add(live.request)
            else:
                del self._live[live.request_id]
        for request_id, search in list(self._searches.items()):
            if search.is_done:
                del self._searches[request_id]
            else:
                search.restart()
                self.scheduler.add(search.request)
        self._change.is_unfinished = False

    # -- requests -------------------------------------------------------------------------------

    def add_request(
        self,
        request_ids: str | Sequence[str],
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        given: GivenTokens | None = None,
        handover: Handover | None = None,
    ) -> list[LiveRequest]:
        """Queue a request; raises `InvalidRequestError` and queues nothing if it cannot be served.

        One id for each of its samples; what becomes of them is returned. `max_tokens` beyond the
        model's length is cut to what is left after the prompt; None is what the pool holds too.
        Stop strings are text: not looked at. Of another engine's request the samples of `given` go
        on, each behind these tokens as if they had been drawn here. A `Departure` ends it with its
        first token; a `PrefilledPrompt`, of this very prompt, is what it goes on from.
        """
        if given is not None and handover is not None:
            raise InvalidRequestError("given: a prompt that is handed over has its own first token")
        params = self.intake.completed(params)
        ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        indices = samples_left(params.num_samples, given)
        if len(ids) != len(indices) or len(set(ids)) != len(ids):
            raise InvalidRequestError(f"{len(indices)} samples need as many ids, got {ids}")
        with self._turn():
            for request_id in ids:
                self._check_id(request_id)
            named = dict(zip(indices, ids, strict=True))
            samples = self.intake.samples(
                named, prompt_token_ids, params, priority, given, handover
            )
            if samples[0].finish_reason is not None:  # by the token that its prompt brings
                self._ended += ids
                return samples
            is_forked = given is None and not self.model.keeps_states  # states do not fork
            leaders = leaders_of(samples) if is_forked else samples
            with self._change:
                for leader in leaders:
                    self.scheduler.add(leader.request)
                self._live |= {live.request_id: live for live in samples}
        return samples

    def add_search(
        self, request_id: str, prompt_token_ids: Sequence[int], params: BeamSearchParams
    ) -> BeamSearch:
        """Queue a beam search; raises as `Intake.search` does, and queues nothing then."""
        with self._turn():
            self._check_id(request_id)
            search = self.intake.search(request_id, prompt_token_ids, params)
            with self._change:
                self.scheduler.add(search.request)
                self._searches[request_id] = search
        return search

    def _check_id(self, request_id: str) -> None:
        if request_id in self._live or request_id in self._searches:
            raise InvalidRequestError(f"request id {request_id!r} is already in use")

    def abort(self, request_id: str) -> bool:
        """End a request or a search and free its blocks; False when it is not known, or over.

        Any thread may call it. In the middle of a step it takes effect when the step ends.
        """
        is_known = request_id in self._live or request_id in self._searches
        is_known = is_known and request_id not in self._aborted
        self.abort_all([request_id])
        return is_known

    def abort_all(self, request_ids: Iterable[str]) -> None:
        """End these requests and searches, as far as they are not over; as `abort` does."""
        self._aborted.extend(request_ids)
        if not self._is_inside:  # else the turn takes them out when it ends
            with self._turn():
                pass

    def _take_out_aborted(self) -> None:
        while self._aborted:
            with self._change:
                self._take_out(self._aborted[0])
            self._aborted.popleft()

    def _take_out(self, request_id: str) -> None:
        """End what is known by this id, if anything is."""
        search = self._searches.pop(request_id, None)
        if search is not None:
            self.scheduler.finish(search.request)
        live = self._live.get(request_id)
        if live is None:
            return
        live.finish_reason = "abort"
        self._ended.append(request_id)
        if live.leader is not None:  # it has not started
            live.leader.siblings.remove(live)
        elif live.request.has_arrived:  # or the step that would have started it left it out
            self.scheduler.finish(live.request)
        if live.siblings:  # another one computes the prompt
            (leader,), live.siblings = leaders_of(live.siblings), []
            leader.leader = None
            self.scheduler.add(leader.request)
        del self._live[request_id]

    def pause(self, request_id: str) -> None:
        """Give a request no more tokens until `resume`; unknown ones, and searches, go on."""
        with self._turn():
            live = self._live.get(request_id)
            if live is not None and live.leader is None:
                self.scheduler.pause(live.request)

    def resume(self, request_id: str) -> None:
        """Go on with a request that was paused."""
        with self._turn():
            live = self._live.get(request_id)
            if live is not None:
                self.scheduler.resume(live.request)

    # -- steps ----------------------------------------------------------------------------------

    def step(self) -> list[SequenceUpdate | SearchUpdate]:
        """Compute one step for as many requests as fit.

        Reports those that got a token or failed, and the searches that are over. An exception
        leaves every request where it was, to go on in the next step; what was given to it by then,
        its `LiveRequest` tells.
        """
        with self._turn():
            self._last_names = []
            return self._step()

    def take_ended(self) -> list[str]:
        """Ids of requests that no step has ended since the last call: aborted, or `fail_step`."""
        ended, self._ended = self._ended, []
        return ended

    def fail_step(self, error: Exception) -> int:
        """End the requests of the step that has just failed with this error; how many there are.

        None where it failed before it was known which they are.
        """
        with self._turn():
            names = dict.fromkeys(self._last_names)
            self._last_names = []
            leaders = [self._live[name] for name in names if name in self._live]
            lives = [live for leader in leaders for live in (leader, *leader.siblings)]
            searches = [self._searches[name] for name in names if name in self._searches]
            with self._change:
                for live in lives:
                    self._end_with(live, StepFailedError(f"the step failed: {error!r}"), error)
                    self._ended.append(live.request_id)
                for search in searches:
                    search.fail(StepFailedError(f"the step failed: {error!r}"))
                    self._end_search(search)
        return len(lives) + len(searches)

    @torch.inference_mode()
    def _step(self) -> list[SequenceUpdate | SearchUpdate]:
        flight, self._flight = self._flight, None
        if flight is None:
            scheduled = self._schedule()
            if scheduled is None:
                return []
            if scheduled.swap_outs or scheduled.swap_ins or scheduled.arrivals:
                with self._change:  # blocks that are copied in part are nobody's
                    self._copy_blocks(scheduled)
            flight = self._launch(scheduled)
        if not self._may_step_ahead(flight):
            return self._land(flight)
        updates = self._step_ahead(flight)
        if self._flight is not None and not self._live:  # nobody comes to wait for it
            flight, self._flight = self._flight, None
            self._land(flight)
        return updates

    def _schedule(self) -> ScheduledStep | None:
        """The next step; None where there is none, or all wait for what is looked for."""
        with self._change:
            self.tier.bring_in()
        scheduled = self.scheduler.schedule(self._drafts())
        if scheduled is None and self.tier.wait():
            with self._change:
                self.tier.bring_in()
            scheduled = self.scheduler.schedule(self._drafts())
        return scheduled

    def _copy_blocks(self, scheduled: ScheduledStep) -> None:
        self.runner.copy_swapped(scheduled.swap_outs, scheduled.swap_ins)
        if scheduled.arrivals:
            self.runner.write_arrived(scheduled.arrivals)

    def _drafts(self) -> Drafts:
        return self.speculation.drafts_for(self._live.values()) if self.speculation else NO_DRAFTS

    def _launch(self, scheduled: ScheduledStep, drawn: Drawn | None = None) -> Flight:
        """Begin a step: the device may still be computing it when this returns.

        Last tokens that the host does not know are `drawn`.
        """
        began = perf_counter()
        self._last_names = [request.request_id for request in scheduled.requests]
        draws = draws_of(scheduled, self._live)
        shortlists = shortlists_of(scheduled, self._searches)
        looks, places = looks_of(scheduled, self._live)
        all_draws = with_following(draws)
        logits, inputs = self.runner.run(
            scheduled.plan,
            scheduled.token_ids,
            places,
            sampling_arrays(all_draws, shortlists, looks),
            drawn,
            scheduled.adapters,
        )
        sampling = Sampling(logits, inputs, all_draws, shortlists, looks)
        return Flight(scheduled, draws, shortlists, sampling, looks, began)

    def _land(self, flight: Flight) -> list[SequenceUpdate | SearchUpdate]:
        """Wait for a step and do what follows from it."""
        self._wait_for(flight)
        for look in flight.looks:
            look.tell()
        with self._change:
            updates = self._update(flight.scheduled, flight.draws, flight.shortlists)
            self.tier.copy()
            self.tier.write()
        return updates

    def _wait_for(self, flight: Flight) -> None:
        flight.sampling.settle()
        if self.pace is not None:
            self.pace.note(flight.scheduled, flight.began)

    # -- steps ahead ----------------------------------------------------------------------------

    def _may_step_ahead(self, flight: Flight) -> bool:
        """Whether the next step can begin before it is known what this one draws."""
        return (
            self.runner.runs_ahead
            and self.speculation is None  # which wants to know all tokens
            and not self._searches
            and flight.is_simple
            and self.scheduler.may_advance(flight.scheduled)
        )

    def _step_ahead(self, flight: Flight) -> list[SequenceUpdate | SearchUpdate]:
        """Schedule and begin the step after this one, then wait for this one.

        Who turns out to be over has a token computed in vain. What is not finite comes too late
        to tell who has shared it: all begins again from the tokens that are known.
        """
        sampled_seq_ids, following = flight.scheduled.sampled_seq_ids, None
        with self._change:
            for request in self.scheduler.advance(flight.scheduled):
                self.scheduler.finish(request)
            self.num_steps += 1
            goes_on = flight.goes_on
            self.tier.copy()
            self.tier.bring_in()
            scheduled = self.scheduler.schedule()
            if scheduled is not None:
                self._copy_blocks(scheduled)
                drawn = flight.drawn_for(scheduled.plan.seq_ids, self.manager.max_num_seqs)
                if self.runner.takes_drawn(
                    scheduled.plan, scheduled.sampled_token_index, scheduled.adapters
                ):
                    following = self._launch(scheduled, drawn)
            self._wait_for(flight)
            self.scheduler.settle(sampled_seq_ids[goes_on], flight.token_ids[goes_on])
            if scheduled is not None and following is None:
                flight.tell(scheduled, drawn.sources)
                following = self._launch(scheduled)
            updates: list[SequenceUpdate | SearchUpdate] = [
                update
                for draw in flight.draws
                if draw.is_wanted and not draw.is_tried_again
                for update in self._advance(draw)
            ]
            self._flight = following
        if not all(draw.is_finite for draw in flight.draws):
            self._recover()
        self.tier.write()
        return updates

    def _update(
        self,
        scheduled: ScheduledStep,
        draws: Sequence[TokenDraw],
        shortlists: Sequence[BeamShortlist],
    ) -> list[SequenceUpdate | SearchUpdate]:
        """Commit the step: requests get their tokens, siblings start, who is done is finished."""
        aborted = set(self._aborted)
        wanted = [d for d in draws if d.is_wanted and d.live.request_id not in aborted]
        token_ids = np.zeros(len(scheduled.sampled_seq_ids), dtype=np.int64)
        num_accepted = np.zeros_like(token_ids)
        is_spoilt = np.zeros(len(token_ids), dtype=np.bool_)
        forks: list[Fork] = []
        for draw in wanted:
            if draw.leader is None:
                taken = draw.accept()
                token_ids[draw.row], num_accepted[draw.row] = taken[-1].token_id, len(taken) - 1
            elif draw.error is None:
                forks.append(Fork(draw.leader.request, draw.live.request, draw.token_id))
        spoilt_rows = [draw.row for draw in draws if not draw.is_finite]
        spoilt_rows += [shortlist.row for shortlist in shortlists if not shortlist.is_finite]
        is_spoilt[spoilt_rows] = True
        searches = searches_of(shortlists, self._searches)
        branches = [b for b in (search.advance() for search in searches) if b is not None]
        self.scheduler.update(scheduled, token_ids, forks, branches, is_spoilt, num_accepted)
        self.num_steps += 1
        settled = [draw for draw in wanted if not draw.is_to_be_retried]
        for draw in settled:
            if draw.leader is not None:
                draw.live.leader = None
                draw.leader.siblings.remove(draw.live)
        updates: list[SequenceUpdate | SearchUpdate] = [
            update for draw in settled for update in self._advance(draw)
        ]
        updates += [self._end_search(search) for search in searches if search.is_over]
        if self.speculation is not None:
            self.speculation.learn(draws)
        return updates

    def _end_search(self, search: BeamSearch) -> SearchUpdate:
        name = search.request.request_id
        search.is_done = True
        self.scheduler.finish(search.request)
        del self._searches[name]
        return SearchUpdate(request_id=name, output=search.output)

    def _advance(self, draw: TokenDraw) -> list[SequenceUpdate]:
        """Give a request its tokens, or the reason why there is none; either may end it."""
        live = draw.live
        if draw.error is not None:
            self._end_with(live, draw.error, None)
            return [live.last_update()]
        updates = []
        if live.departure is not None:
            assert live.request.seq_id is not None
            self._desk.send(live.departure, live.request.seq_id)  # before it counts as over
        for each in draw.taken:
            live.take(each)
            live.finish_reason = live.end
            updates.append(live.last_update())
        if live.finish_reason is not None:
            self._finish(live)
        return updates

    def _end_with(
        self, live: LiveRequest, error: PagedKVError, cause: BaseException | None
    ) -> None:
        """End one request with an error; its last token in the scheduler is no choice."""
        live.error = type(error)(
            f"after {live.request.num_prompt_tokens} prompt and {len(live.token_ids)} output "
            f"tokens: {error}"
        )
        live.error.__cause__ = cause
        live.finish_reason = "error"
        self._finish(live)

    def _finish(self, live: LiveRequest) -> None:
        request = live.request
        if request.has_arrived and request.is_unfinished:  # or a sibling that never started
            self.scheduler.finish(request)
        del self._live[live.request_id]
