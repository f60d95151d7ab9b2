"""The step: schedule, run, sample, update. Knows requests of token ids, never text or tokenizers.

One direction: nothing that a step decides later reaches back into what it decided before.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..blocks.sink_window import SinkWindow
from ..cache.step_staging import StagedArray
from ..errors import InvalidRequestError, PagedKVError, PromptTooLongError
from ..scheduler.request import Request, RequestStatus
from ..scheduler.scheduler import Scheduler
from ..scheduler.step import Fork, ScheduledStep
from .beam_search import Beam, BeamOutput, BeamSearch, BeamSearchParams, find_branching
from .model_runner import ModelRunner
from .sampler import Draw, Shortlist, sample, sampling_arrays, uniform_numbers
from .sampling_params import SamplingParams


class SequenceUpdate(NamedTuple):
    """What one step did for one request. `finish_reason`: "stop", "length" or "error"."""

    request_id: str
    token_id: int | None  # None with an error
    finish_reason: str | None
    log_probability: float | None = None  # of the token, where the request asks for `best_of`
    error: PagedKVError | None = None


class SearchUpdate(NamedTuple):
    """A beam search is over."""

    request_id: str
    output: BeamOutput


@dataclass(eq=False)
class LiveRequest:
    """A request with everything that its sampling needs.

    `siblings` are further samples of the same prompt: they start as forks when the prompt is
    computed, and until then only wait here.
    """

    request: Request
    params: SamplingParams
    seed: int
    sample_index: int
    end_token_ids: frozenset[int]
    siblings: list[LiveRequest] = field(default_factory=list)


@dataclass(eq=False, kw_only=True, slots=True)
class TokenDraw(Draw):
    """The next token of a request; the first one of a sibling is drawn from its leader's row."""

    live: LiveRequest
    leader: LiveRequest | None = None

    @property
    def is_wanted(self) -> bool:
        """Whether the request is still there, and what it was: it may be aborted in any step."""
        if self.leader is not None and self.live not in self.leader.siblings:
            return False
        return self.live.request.status is not RequestStatus.FINISHED


@dataclass(eq=False, kw_only=True, slots=True)
class BeamShortlist(Shortlist):
    """What a beam may go on with."""

    search: BeamSearch
    beam: Beam


class Engine:
    """Decodes many requests and beam searches at once on one model, one cache and one pool."""

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        end_token_ids: Sequence[int],
        sink_window: SinkWindow | None = None,
    ) -> None:
        self.runner = runner
        self.model = runner.model
        self.cache = runner.cache
        self.scheduler = scheduler
        self.manager = scheduler.manager
        self.sink_window = sink_window
        self.end_token_ids = frozenset(t for t in end_token_ids if 0 <= t < self.model.vocab_size)
        self._live: dict[str, LiveRequest] = {}
        self._searches: dict[str, BeamSearch] = {}
        self.num_steps = 0

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished

    # -- requests -------------------------------------------------------------------------------

    def add_request(
        self,
        request_ids: str | Sequence[str],
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
    ) -> None:
        """Queue a request; raises `InvalidRequestError` and queues nothing if it cannot be served.

        One id for each of its samples. `max_tokens` beyond the model's length is cut to what is
        left after the prompt. Stop strings are not looked at: they are text.
        """
        ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        if len(ids) != params.num_samples or len(set(ids)) != len(ids):
            raise InvalidRequestError(f"{params.num_samples} samples need as many ids, got {ids}")
        seed = secrets.randbits(64) if params.seed is None else params.seed
        ends = frozenset() if params.ignore_eos else self.end_token_ids
        samples = []
        for sample_index, request_id in enumerate(ids):
            self._check_id(request_id)
            samples.append(
                LiveRequest(
                    request=self.check_request(
                        request_id, prompt_token_ids, params, priority=priority
                    ),
                    params=params,
                    seed=seed,
                    sample_index=sample_index,
                    end_token_ids=frozenset(params.stop_token_ids) | ends,
                )
            )
        samples[0].siblings = samples[1:]
        self.scheduler.add(samples[0].request)
        self._live |= {live.request.request_id: live for live in samples}

    def add_search(
        self, request_id: str, prompt_token_ids: Sequence[int], params: BeamSearchParams
    ) -> None:
        """Queue a beam search; raises as `check_search` does, and queues nothing then."""
        self._check_id(request_id)
        search = self.check_search(request_id, prompt_token_ids, params)
        self.scheduler.add(search.request)
        self._searches[request_id] = search

    def check_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
    ) -> Request:
        """The request as it would be queued; raises `InvalidRequestError` if it cannot be."""
        sink_window = params.sink_window or self.sink_window
        if sink_window is not None:
            _ = self.model.rotations  # or it raises
        return self._checked_request(request_id, prompt_token_ids, params, priority, sink_window)

    def check_search(
        self, request_id: str, prompt_token_ids: Sequence[int], params: BeamSearchParams
    ) -> BeamSearch:
        """The search as it would be queued; it is not windowed, whatever the engine's setting.

        Raises `InvalidRequestError` for a prompt that cannot be served, `OutOfBlocksError` where
        its beams might not fit.
        """
        request = self._checked_request(request_id, prompt_token_ids, params.request_params())
        request.branching = find_branching(
            self.manager.geometry,
            request,
            params.num_beams,
            max_seqs=self.manager.max_num_seqs,
            num_blocks=self.manager.num_blocks,
        )
        assert request.max_tokens is not None
        ends = frozenset() if params.ignore_eos else self.end_token_ids
        return BeamSearch(
            params=params,
            request=request,
            max_tokens=request.max_tokens,
            end_token_ids=frozenset(params.stop_token_ids) | ends,
        )

    def _checked_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        priority: int = 0,
        sink_window: SinkWindow | None = None,
    ) -> Request:
        self._check_prompt(prompt_token_ids, is_windowed=sink_window is not None)
        self._check_in_vocabulary(params.stop_token_ids)
        max_tokens = params.max_tokens
        if sink_window is None:
            room = self.manager.max_model_len - len(prompt_token_ids)
            max_tokens = room if max_tokens is None else min(max_tokens, room)
        request = Request(
            request_id=request_id,
            prompt_token_ids=prompt_token_ids,
            max_tokens=max_tokens,
            priority=priority,
            extra_keys=() if params.cache_salt is None else (params.cache_salt,),
            sink_window=sink_window,
        )
        self.scheduler.check(request)
        return request

    def _check_id(self, request_id: str) -> None:
        if request_id in self._live or request_id in self._searches:
            raise InvalidRequestError(f"request id {request_id!r} is already in use")

    def _check_prompt(self, prompt_token_ids: Sequence[int], *, is_windowed: bool) -> None:
        if not prompt_token_ids:
            raise InvalidRequestError("the prompt is empty")
        if not is_windowed and len(prompt_token_ids) >= self.manager.max_model_len:
            raise PromptTooLongError(
                f"a prompt of {len(prompt_token_ids)} tokens leaves no room for output within "
                f"the model length of {self.manager.max_model_len}"
            )
        self._check_in_vocabulary(prompt_token_ids)

    def _check_in_vocabulary(self, token_ids: Sequence[int]) -> None:
        vocab_size = self.model.vocab_size
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                raise InvalidRequestError(
                    f"token id {token_id} is outside the vocabulary of {vocab_size}"
                )

    def abort(self, request_id: str) -> bool:
        """End a request or a search and free its blocks; False when it is not known, or over."""
        search = self._searches.pop(request_id, None)
        if search is not None:
            self.scheduler.finish(search.request)
            return True
        live = self._live.pop(request_id, None)
        if live is None:
            return False
        for other in self._live.values():
            if live in other.siblings:  # it has not started
                other.siblings.remove(live)
                return True
        self.scheduler.finish(live.request)
        if live.siblings:  # another one computes the prompt
            leader, *leader.siblings = live.siblings
            live.siblings = []
            self.scheduler.add(leader.request)
        return True

    # -- steps ----------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[SequenceUpdate | SearchUpdate]:
        """Compute one step for as many requests as fit.

        Reports those that got a token or failed, and the searches that are over.
        """
        scheduled = self.scheduler.schedule()
        if scheduled is None:
            return []
        try:
            draws, shortlists = self._draws_of(scheduled), self._shortlists_of(scheduled)
            logits, inputs = self._run_model(scheduled, sampling_arrays(draws, shortlists))
            sample(logits, inputs, draws, shortlists)
        except BaseException:
            self.scheduler.cancel(scheduled)
            raise
        return self._update(scheduled, draws, shortlists)

    def _draws_of(self, scheduled: ScheduledStep) -> list[TokenDraw]:
        """The tokens to draw: of every request whose tokens are computed, then of siblings."""
        draws: list[TokenDraw] = []
        first_draws: list[TokenDraw] = []
        for row, request in enumerate(scheduled.sampled_requests):
            live = self._live.get(request.request_id)
            if live is None:  # a beam search
                continue
            params = live.params
            has_few = params.min_tokens > 0 and request.num_output_tokens < params.min_tokens
            draws.append(
                TokenDraw(
                    row=row,
                    params=params,
                    live=live,
                    token_ids=request.token_ids if params.logits_processors else None,
                    forbidden_ids=list(live.end_token_ids) if has_few else (),
                )
            )
            first_draws += [
                TokenDraw(row=row, params=params, live=sibling, leader=live)
                for sibling in live.siblings
            ]
        draws += first_draws
        random = [draw for draw in draws if not draw.params.is_greedy]
        if random:
            uniforms = uniform_numbers(
                [draw.live.seed for draw in random],
                [draw.live.sample_index for draw in random],
                [draw.live.request.num_output_tokens for draw in random],
            )
            for draw, uniform in zip(random, uniforms.tolist(), strict=True):
                draw.uniform = uniform
        return draws

    def _shortlists_of(self, scheduled: ScheduledStep) -> list[BeamShortlist]:
        """Of every beam whose tokens are computed."""
        if not self._searches:
            return []
        shortlists = []
        seq_ids = scheduled.sampled_seq_ids.tolist()
        for row, request in enumerate(scheduled.sampled_requests):
            search = self._searches.get(request.request_id)
            if search is not None:
                beam = search.beams[request.seq_ids.index(seq_ids[row])]
                count = search.num_candidates
                shortlists.append(BeamShortlist(row=row, count=count, search=search, beam=beam))
        return shortlists

    def _run_model(
        self, scheduled: ScheduledStep, extra: dict[str, StagedArray]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [M, V] in float32 of the sequences that sample, and `extra` on the device."""
        try:
            self.runner.copy_swapped(scheduled.swap_outs, scheduled.swap_ins)
        except BaseException:  # the requests whose blocks these are are lost
            for copy in (*scheduled.swap_outs, *scheduled.swap_ins):
                self.abort(copy.request_id)
            raise
        return self.runner.run(
            scheduled.plan, scheduled.token_ids, scheduled.sampled_token_index, extra
        )

    def _update(
        self,
        scheduled: ScheduledStep,
        draws: Sequence[TokenDraw],
        shortlists: Sequence[BeamShortlist],
    ) -> list[SequenceUpdate | SearchUpdate]:
        """Commit the step: requests get their tokens, siblings start, who is done is finished."""
        token_ids = np.zeros(len(scheduled.sampled_seq_ids), dtype=np.int64)
        forks: list[Fork] = []
        wanted: list[TokenDraw] = []
        for draw in draws:
            if draw.leader is None:
                token_ids[draw.row] = draw.token_id
            elif draw.is_wanted and draw.error is None:
                forks.append(Fork(draw.leader.request, draw.live.request, draw.token_id))
            if draw.is_wanted:
                wanted.append(draw)
        searches = self._collect(shortlists)
        branches = [b for b in (search.advance() for search in searches) if b is not None]
        at_limit = set(self.scheduler.update(scheduled, token_ids, forks, branches))
        self.num_steps += 1
        for draw in draws:
            if draw.leader is not None:
                draw.leader.siblings = []
        updates: list[SequenceUpdate | SearchUpdate] = [
            self._fail(draw, draw.error)
            if draw.error is not None
            else self._advance(draw, draw.live.request in at_limit)
            for draw in wanted
            if draw.live.request.status is not RequestStatus.FINISHED
        ]
        updates += [self._end_search(search) for search in searches if search.is_over]
        return updates

    def _collect(self, shortlists: Sequence[BeamShortlist]) -> list[BeamSearch]:
        """Give beams their shortlists; the searches that these belong to, but aborted ones."""
        searches: dict[str, BeamSearch] = {}
        for shortlist in shortlists:
            name = shortlist.search.request.request_id
            if self._searches.get(name) is shortlist.search:
                shortlist.beam.shortlist = shortlist
                searches[name] = shortlist.search
        return list(searches.values())

    def _end_search(self, search: BeamSearch) -> SearchUpdate:
        name = search.request.request_id
        self.scheduler.finish(search.request)
        del self._searches[name]
        return SearchUpdate(request_id=name, output=search.output)

    def _advance(self, draw: TokenDraw, is_at_limit: bool) -> SequenceUpdate:
        """Account for one drawn token, which may end its request."""
        live, request = draw.live, draw.live.request
        finish_reason = "length" if is_at_limit else None
        is_end = draw.token_id in live.end_token_ids
        if is_end and request.num_output_tokens >= live.params.min_tokens:
            finish_reason = "stop"
        if finish_reason is not None:
            self._finish(live)
        return SequenceUpdate(
            request_id=request.request_id,
            token_id=draw.token_id,
            finish_reason=finish_reason,
            log_probability=draw.log_probability,
        )

    def _fail(self, draw: TokenDraw, error: PagedKVError) -> SequenceUpdate:
        """End one request from whose logits nothing can be drawn; its last token is no choice."""
        request = draw.live.request
        num_output = max(request.num_output_tokens - 1, 0)
        if not request.has_arrived:  # a sibling that never started
            del self._live[request.request_id]
        else:
            self._finish(draw.live)
        return SequenceUpdate(
            request_id=request.request_id,
            token_id=None,
            finish_reason="error",
            error=type(error)(
                f"request {request.request_id!r}, after {request.num_prompt_tokens} prompt and "
                f"{num_output} output tokens: {error}"
            ),
        )

    def _finish(self, live: LiveRequest) -> None:
        self.scheduler.finish(live.request)
        del self._live[live.request.request_id]
