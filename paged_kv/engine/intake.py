"""Prompts and parameters to requests that can be served. Knows limits, never what runs."""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from ..blocks.sink_window import SinkWindow
from ..blocks.token_chain import ExtraKey, as_token_ids
from ..errors import InvalidRequestError, PromptTooLongError, UnsupportedModelError
from ..models.adapters import AdapterNames
from ..models.attached_model import AttachedModel
from ..scheduler.request import Request
from ..scheduler.scheduler import Scheduler
from .beam_search import BeamSearch, BeamSearchParams, find_branching, max_blocks_of_beams
from .grammar import GrammarCompiler
from .handover import Departure, Handover, HandoverDesk, PrefilledPrompt
from .live_request import GivenTokens, LiveRequest
from .sampling_params import SamplingParams
from .token_rules import TokenRules, rules_of

LOOKED_AT: Final = "looked at "  # how a key begins that one request has alone
NO_DEFAULTS: Final[Mapping[str, Any]] = MappingProxyType({})
# What only matters where tokens are drawn, which beam search does not.
LIMITS_OF_SAMPLES: Final = (
    *("temperature", "top_h", "top_k", "top_p", "min_p"),
    *("typical_p", "epsilon_cutoff", "eta_cutoff"),
)


class Intake:
    """Makes requests for one engine, or says why it cannot serve them; queues none.

    `ends` are the model's own end-of-sequence tokens; with a `sink_window` every request that
    brings none of its own is windowed by it. `defaults` are what the model's generation config
    says of `SamplingParams`; forms of outputs need the `tokenizer`.
    """

    def __init__(
        self,
        model: AttachedModel,
        scheduler: Scheduler,
        ends: frozenset[int],
        sink_window: SinkWindow | None,
        defaults: Mapping[str, Any] = NO_DEFAULTS,
        tokenizer: PreTrainedTokenizerBase | None = None,
        desk: HandoverDesk | None = None,
    ) -> None:
        self._model = model
        self._desk = desk
        self._scheduler = scheduler
        self._manager = scheduler.manager
        self._ends = ends
        self.sink_window = sink_window
        self.defaults = defaults
        self._grammars = GrammarCompiler(tokenizer, model.vocab_size, sorted(ends))

    def completed(self, params: SamplingParams) -> SamplingParams:
        """With what the model says of options that a request leaves open."""
        return params.completed(self.defaults)

    def end_token_ids(self, params: SamplingParams | BeamSearchParams) -> frozenset[int]:
        """Tokens that end a request."""
        ends = frozenset() if params.ignore_eos else self._ends
        return frozenset(params.stop_token_ids) | ends

    def max_prompt_tokens(self, params: SamplingParams | BeamSearchParams) -> int | None:
        """The longest prompt that leaves room for output; None where there is no limit."""
        if isinstance(params, SamplingParams) and (params.sink_window or self.sink_window):
            return None
        return self._manager.max_model_len - 1

    def request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        priority: int = 0,
        handover: Handover | None = None,
    ) -> Request:
        """The request as it would be queued; raises `InvalidRequestError` if it cannot be, and
        `TransferError` where what its prompt brings does not fit."""
        sink_window = params.sink_window or self.sink_window
        if sink_window is not None:
            _ = self._model.rotations  # or it raises
        if handover is not None:
            assert self._desk is not None
            self._desk.check(params, is_windowed=sink_window is not None)
        request = self._checked_request(request_id, prompt_token_ids, params, priority, sink_window)
        if isinstance(handover, PrefilledPrompt):
            assert self._desk is not None
            self._desk.take_in(handover, request)
        return request

    def samples(
        self,
        request_ids: Mapping[int, str],
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        priority: int,
        given: GivenTokens | None,
        handover: Handover | None,
    ) -> list[LiveRequest]:
        """The samples of a request, by the index and id of each, as `request` says; one may be over
        already. `given` is what they have of another engine."""
        seed = secrets.randbits(64) if params.seed is None else params.seed
        samples = []
        for sample_index, request_id in request_ids.items():
            request = self.request(request_id, prompt_token_ids, params, priority, handover)
            live = LiveRequest(
                request=request,
                params=params,
                seed=seed,
                sample_index=sample_index,
                end_token_ids=self.end_token_ids(params),
                rules=self.rules(request, params),
                token_ids=array("i", request.output_token_ids),
                departure=handover if isinstance(handover, Departure) else None,
                given=self.tokens_given(request, params, given, sample_index),
            )
            live.finish_reason = live.end
            samples.append(live)
        return samples

    def rules(self, request: Request, params: SamplingParams) -> TokenRules:
        """What the options of a request, which are complete, do to its logits.

        Raises `InvalidRequestError` for a form that its output cannot have.
        """
        length, form = request.num_prompt_tokens, params.structured_output
        return rules_of(
            params,
            sorted(self.end_token_ids(params)),
            sorted(self._ends),
            length,
            request.max_tokens,
            [] if form is None else [self._grammars.constrain(form, length)],
        )

    def tokens_given(
        self, request: Request, params: SamplingParams, given: GivenTokens | None, index: int
    ) -> Sequence[int]:
        """The tokens that this sample has already.

        Raises `InvalidRequestError` for some that a request cannot go on from.
        """
        if given is None:
            return ()
        token_ids = given[index]
        try:
            as_token_ids(token_ids)
            self._check_in_vocabulary(token_ids)
        except InvalidRequestError as error:
            raise InvalidRequestError(f"given: {error}") from None
        if request.max_tokens is not None and len(token_ids) >= request.max_tokens:
            raise InvalidRequestError(
                f"given: {len(token_ids)} tokens leave none of {request.max_tokens}"
            )
        ends = self.end_token_ids(params)
        if len(token_ids) >= max(params.least_tokens, 1) and token_ids[-1] in ends:
            raise InvalidRequestError(f"given: token {token_ids[-1]} has ended the request")
        return token_ids

    def search(
        self, request_id: str, prompt_token_ids: Sequence[int], params: BeamSearchParams
    ) -> BeamSearch:
        """The search as it would be queued; it is not windowed, whatever the engine's setting.

        Raises `InvalidRequestError` for a prompt that cannot be served, `OutOfBlocksError` where
        its beams might not fit.
        """
        if self._model.keeps_states:
            raise UnsupportedModelError(
                "beams fork, and the states of recurrent layers, which this model has, do not"
            )
        unfit = sorted(set(self.defaults).difference(LIMITS_OF_SAMPLES))
        if unfit:
            raise InvalidRequestError(
                f"the model's generation config sets {', '.join(unfit)}, which beam search does "
                "not apply: give the LLM generation_config=None"
            )
        request = self._checked_request(request_id, prompt_token_ids, params.request_params())
        if params.max_tokens is None:
            assert request.max_tokens is not None
            request.max_tokens = self._fitting_tokens(request, params.num_beams)
        request.branching = find_branching(self._manager, request, params.num_beams)
        assert request.max_tokens is not None
        return BeamSearch(
            params=params,
            request=request,
            max_tokens=request.max_tokens,
            end_token_ids=self.end_token_ids(params),
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
        self._check_tokens(params)
        max_tokens = params.max_tokens
        if sink_window is None:
            room = self._manager.max_model_len - len(prompt_token_ids)
            if max_tokens is None:
                max_tokens = max(min(room, self._longest - len(prompt_token_ids)), 1)
            max_tokens = min(max_tokens, room)
        adapters = self._model.adapters_for(params.adapter)
        request = Request(
            request_id=request_id,
            prompt_token_ids=prompt_token_ids,
            max_tokens=max_tokens,
            priority=priority,
            extra_keys=cache_keys(params, adapters),
            adapters=adapters,
            sink_window=sink_window,
        )
        self._scheduler.check(request)
        return request

    @cached_property
    def _longest(self) -> int:
        """Tokens of the longest sequence that the pool holds, the last of which is never stored."""
        manager = self._manager
        return most_that_fit(
            manager.max_model_len, lambda tokens: manager.max_blocks(tokens - 1), manager.num_blocks
        )

    def _fitting_tokens(self, request: Request, num_beams: int) -> int:
        """The most tokens that all beams of a prompt may get."""
        assert request.max_tokens is not None
        geometry, length = self._manager.geometry, request.num_prompt_tokens
        num_groups = len(self._manager.groups)
        return most_that_fit(
            request.max_tokens,
            lambda tokens: max_blocks_of_beams(geometry, length, tokens, num_beams),
            self._manager.num_blocks // num_groups,
        )

    def _check_prompt(self, prompt_token_ids: Sequence[int], *, is_windowed: bool) -> None:
        if not prompt_token_ids:
            raise InvalidRequestError("the prompt is empty")
        if not is_windowed and len(prompt_token_ids) >= self._manager.max_model_len:
            raise PromptTooLongError(
                f"a prompt of {len(prompt_token_ids)} tokens leaves no room for output within "
                f"the model length of {self._manager.max_model_len}"
            )
        self._check_in_vocabulary(prompt_token_ids)

    def _check_tokens(self, params: SamplingParams) -> None:
        """Raise `InvalidRequestError` for options about tokens that there are not."""
        forced = params.forced_eos_token_id
        named = {
            "stop_token_ids": params.stop_token_ids,
            "suppress_tokens": params.suppress_tokens or (),
            "begin_suppress_tokens": params.begin_suppress_tokens or (),
            "bad_words_ids": [t for word in params.bad_words_ids or () for t in word],
            "logit_bias": list(params.logit_bias),
            "forced_bos_token_id": [t for t in [params.forced_bos_token_id] if t is not None],
            "forced_eos_token_id": forced if isinstance(forced, Sequence) else [forced or 0],
        }
        for name, token_ids in named.items():
            try:
                self._check_in_vocabulary(token_ids)
            except InvalidRequestError as error:
                raise InvalidRequestError(f"{name}: {error}") from None
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(params, name)
            if count is not None and count > self._model.vocab_size:
                raise InvalidRequestError(
                    f"{name} {count} are more than the vocabulary of {self._model.vocab_size}"
                )

    def _check_in_vocabulary(self, token_ids: Sequence[int]) -> None:
        vocab_size = self._model.vocab_size
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                raise InvalidRequestError(
                    f"token id {token_id} is outside the vocabulary of {vocab_size}"
                )


def cache_keys(params: SamplingParams, adapters: AdapterNames) -> tuple[ExtraKey, ...]:
    """What must be equal for requests to share cached blocks.

    A prompt of which each token is looked at is computed as a whole: its key is nobody else's.
    Names of adapters are bytes, which no salt is.
    """
    keys: tuple[ExtraKey, ...] = tuple(name.encode(errors="surrogatepass") for name in adapters)
    keys = keys if params.cache_salt is None else (*keys, params.cache_salt)
    return keys if params.prompt_logprobs is None else (*keys, f"{LOOKED_AT}{secrets.token_hex()}")


def is_nobody_elses(keys: Sequence[ExtraKey]) -> bool:
    """Whether no other request can share the blocks of one with these keys."""
    return any(isinstance(key, str) and key.startswith(LOOKED_AT) for key in keys)


def most_that_fit(limit: int, blocks_of: Callable[[int], int], num_blocks: int) -> int:
    """The most tokens, from 1 to `limit`, that take no more than `num_blocks`; 1 if none do."""
    fits, too_many = 1, limit + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if blocks_of(middle) <= num_blocks:
            fits = middle
        else:
            too_many = middle
    return fits
