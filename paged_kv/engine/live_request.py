"""Requests as the engine follows them, and what it draws for them. Knows tokens, never logits.

What a request was given stands in its `LiveRequest` alone: whoever was kept from an update by an
exception finds it there, and the engine goes on from there.
"""

from __future__ import annotations

import reprlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Final, NamedTuple

import numpy as np

from ..errors import InvalidRequestError, PagedKVError
from ..scheduler.request import Request, RequestStatus
from ..scheduler.step import ScheduledStep
from .beam_search import Beam, BeamOutput, BeamSearch
from .draft_length import DraftLength
from .handover import Departure
from .sampler import Draw, Shortlist, uniform_numbers
from .sampling_params import SamplingParams
from .token_logprob import TokenLogprob
from .token_rules import TokenRules

GivenTokens = Mapping[int, Sequence[int]]  # of samples that go on, by the index of each
NOT_KNOWN: Final = float("nan")  # log-probabilities of what was drawn elsewhere


class SequenceUpdate(NamedTuple):
    """What one step did for one request. `finish_reason`: "stop", "length" or "error"."""

    request_id: str
    token_id: int | None  # None with an error
    finish_reason: str | None
    log_probability: float | None = None  # of the token, where the request asks for it
    error: PagedKVError | None = None


class SearchUpdate(NamedTuple):
    """A beam search is over."""

    request_id: str
    output: BeamOutput


@dataclass(eq=False, kw_only=True)
class LiveRequest:
    """A request with everything that its sampling needs, and what it was given so far.

    `siblings` are further samples of the same prompt: they start as forks when the prompt is
    computed by this one, their `leader`, and until then only wait here. With a `departure` it ends
    with its first token.
    """

    request: Request
    params: SamplingParams
    seed: int
    sample_index: int
    end_token_ids: frozenset[int]
    rules: TokenRules
    departure: Departure | None = None
    leader: LiveRequest | None = None
    siblings: list[LiveRequest] = field(default_factory=list)
    token_ids: array[int] = field(default_factory=lambda: array("i"))
    log_probabilities: array[float] = field(default_factory=lambda: array("d"))  # where wanted
    likeliest: list[Sequence[tuple[int, float]]] = field(default_factory=list)  # with `logprobs`
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)  # where wanted
    draft_length: DraftLength = field(default_factory=DraftLength)
    finish_reason: str | None = None  # of a `SequenceUpdate`, or "abort"
    error: PagedKVError | None = None
    given: InitVar[Sequence[int]] = ()  # tokens that another engine has drawn

    def __post_init__(self, given: Sequence[int]) -> None:
        if given:
            self.token_ids.extend(given)
            self.request.restart(given)
        if self.params.is_scored:
            self.log_probabilities.extend([NOT_KNOWN] * len(given))
        if self.params.logprobs is not None:
            self.likeliest.extend([()] * len(given))
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None] * self.request.num_prompt_tokens

    @property
    def request_id(self) -> str:
        return self.request.request_id

    def take(self, draw: Draw) -> None:
        """One more token; it counts from the last of these lines on, and from no other."""
        if draw.log_probability is not None:
            self.log_probabilities.append(draw.log_probability)
        if self.params.logprobs is not None:
            self.likeliest.append(draw.likeliest)
        self.token_ids.append(draw.token_id)

    @property
    def is_unfinished(self) -> bool:
        return self.finish_reason is None

    @property
    def end(self) -> str | None:
        """How its tokens end it: "stop", "length", or not at all."""
        num_tokens = len(self.token_ids)
        return self.end_with(self.token_ids[-1], num_tokens) if num_tokens else None

    def end_with(self, token_id: int, num_tokens: int) -> str | None:
        """How this token would end it, were it the last of so many."""
        if token_id in self.end_token_ids and num_tokens >= self.params.least_tokens:
            return "stop"
        is_last = num_tokens == self.request.max_tokens or self.departure is not None
        return "length" if is_last else None

    @property
    def may_try_drafts(self) -> bool:
        """Whether it decodes, and each of its tokens is drawn as if the drafts before it held."""
        return not self.siblings and not self.rules.needs_tokens and self.request.is_decoding

    def restart(self) -> None:
        """Back to where no scheduler knows it, with the tokens that it was given."""
        self.leader, self.siblings = None, []
        del self.log_probabilities[len(self.token_ids) :]
        del self.likeliest[len(self.token_ids) :]
        self.request.restart(self.token_ids.tolist())

    def last_update(self) -> SequenceUpdate:
        """Its last token, or why there is none."""
        has_token = self.error is None
        return SequenceUpdate(
            request_id=self.request_id,
            token_id=self.token_ids[-1] if has_token else None,
            finish_reason=self.finish_reason,
            log_probability=self.log_probabilities[-1]
            if has_token and self.log_probabilities
            else None,
            error=self.error,
        )


@dataclass(eq=False, kw_only=True, slots=True)
class TokenDraw(Draw):
    """The next token of a request; the first one of a sibling is drawn from its leader's row.

    Where a request tries `drafts`, `following` are the draws behind each of them, of which
    `num_accepted` turn out to count.
    """

    live: LiveRequest
    leader: LiveRequest | None = None
    num_ahead: int = 0  # drafts that it comes behind
    drafts: Sequence[int] = ()
    following: Sequence[TokenDraw] = ()
    num_accepted: int = 0

    def accept(self) -> list[TokenDraw]:
        """This draw and those behind it that count: as far as each draft is what was drawn.

        What cannot be drawn behind a draft is left to the next step, as is all behind an end.
        """
        taken, num_before = [self], len(self.live.token_ids)
        for draft, following in zip(self.drafts, self.following, strict=True):
            token_id = taken[-1].token_id
            is_right = token_id == draft and taken[-1].error is None and following.error is None
            if not is_right or self.live.end_with(token_id, num_before + len(taken)):
                break
            taken.append(following)
        self.num_accepted = len(taken) - 1
        return taken

    @property
    def taken(self) -> Sequence[TokenDraw]:
        """The draws that count, once they are accepted."""
        return [self, *self.following[: self.num_accepted]]

    @property
    def is_wanted(self) -> bool:
        """Whether its request still waits for it: it may be over, or have lost its leader."""
        return self.live.is_unfinished and self.live.leader is self.leader

    @property
    def is_to_be_retried(self) -> bool:
        """Whether the scheduler started the request again instead of taking what was drawn."""
        drawn_from = self.live if self.leader is None else self.leader
        return drawn_from.request.status is RequestStatus.PREEMPTED

    @property
    def is_tried_again(self) -> bool:
        """Whether nothing was drawn because of what others computed; it is tried no third time."""
        if self.is_finite or not self.live.request.may_be_retried:
            return False
        self.live.request.is_retried = True
        return True


@dataclass(eq=False, kw_only=True, slots=True)
class BeamShortlist(Shortlist):
    """What a beam may go on with."""

    search: BeamSearch
    beam: Beam


def leaders_of(samples: Sequence[LiveRequest]) -> Sequence[LiveRequest]:
    """Of samples of one prompt the first, which computes it: the others wait for that."""
    leader, *leader.siblings = samples
    for sibling in leader.siblings:
        sibling.leader = leader
    return [leader]


def samples_left(num_samples: int, given: GivenTokens | None) -> list[int]:
    """The indices of samples to compute: all, or those that go on with what they were given."""
    if given is None:
        return list(range(num_samples))
    if not isinstance(given, Mapping) or not given or not set(given) <= set(range(num_samples)):
        shown = reprlib.repr(list(given) if isinstance(given, Mapping) else given)
        raise InvalidRequestError(f"given: tokens of the samples below {num_samples}, got {shown}")
    return sorted(given)


def draws_of(scheduled: ScheduledStep, lives: Mapping[str, LiveRequest]) -> list[TokenDraw]:
    """The tokens to draw: of every request whose tokens are computed, then of siblings."""
    draws: list[TokenDraw] = []
    first_draws: list[TokenDraw] = []
    for row, request in enumerate(scheduled.sampled_requests):
        live = lives.get(request.request_id)
        if live is None:  # a beam search
            continue
        draw = draw_of(live, row, request.num_output_tokens)
        draws.append(draw)
        first_draws += [
            TokenDraw(row=row, params=live.params, live=each, leader=live, is_warped=draw.is_warped)
            for each in live.siblings
        ]
    draws += first_draws
    add_following(draws, scheduled)
    random = [each for each in with_following(draws) if not each.params.is_greedy]
    if random:
        uniforms = uniform_numbers(
            [draw.live.seed for draw in random],
            [draw.live.sample_index for draw in random],
            [draw.live.request.num_output_tokens + draw.num_ahead for draw in random],
        )
        for draw, uniform in zip(random, uniforms.tolist(), strict=True):
            draw.uniform = uniform
    return draws


def draw_of(live: LiveRequest, row: int, num_output: int, num_ahead: int = 0) -> TokenDraw:
    """The draw of a request's token after so many, and so many drafts, from a row of logits."""
    prompt = live.request.prompt_token_ids
    rules = live.rules.of_row(num_output + num_ahead, prompt, live.token_ids)
    return TokenDraw(
        row=row,
        params=live.params,
        live=live,
        rules=rules,
        is_warped=bool(rules.warpers),
        num_ahead=num_ahead,
    )


def add_following(draws: Sequence[TokenDraw], scheduled: ScheduledStep) -> None:
    """Give draws those behind the drafts of their requests, whose rows come after all others."""
    if scheduled.plan.num_draft_tokens is None:
        return
    num_drafts = scheduled.num_drafts
    ends, first_row = np.cumsum(num_drafts).tolist(), len(num_drafts)
    tokens = scheduled.token_ids[scheduled.draft_token_index].tolist()
    for draw in draws:
        count = int(num_drafts[draw.row]) if draw.leader is None else 0
        if count:
            start, num_output = ends[draw.row] - count, draw.live.request.num_output_tokens
            draw.drafts = tokens[start : start + count]
            draw.following = [
                draw_of(draw.live, first_row + start + place, num_output, place + 1)
                for place in range(count)
            ]


def with_following(draws: Sequence[TokenDraw]) -> Sequence[TokenDraw]:
    """All draws, also those behind drafts."""
    following = [each for draw in draws for each in draw.following]
    return [*draws, *following] if following else draws


def shortlists_of(
    scheduled: ScheduledStep, searches: Mapping[str, BeamSearch]
) -> list[BeamShortlist]:
    """Of every beam whose tokens are computed."""
    if not searches:
        return []
    shortlists = []
    seq_ids = scheduled.sampled_seq_ids.tolist()
    for row, request in enumerate(scheduled.sampled_requests):
        search = searches.get(request.request_id)
        if search is not None:
            beam = search.beams[request.seq_ids.index(seq_ids[row])]
            count = search.num_candidates
            shortlists.append(BeamShortlist(row=row, count=count, search=search, beam=beam))
    return shortlists


def searches_of(
    shortlists: Sequence[BeamShortlist], living: Mapping[str, BeamSearch]
) -> list[BeamSearch]:
    """Give beams their shortlists; the searches that these belong to, but aborted ones."""
    searches: dict[str, BeamSearch] = {}
    for shortlist in shortlists:
        name = shortlist.search.request.request_id
        if living.get(name) is shortlist.search:
            shortlist.beam.shortlist = shortlist
            searches[name] = shortlist.search
    return list(searches.values())
