"""The step: schedule -> metadata -> model -> sample -> update. Knows requests of token ids.

One direction: nothing that a step decides later reaches back into what it decided before.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..blocks.block_manager import ENDLESS, BlockManager
from ..blocks.sink_window import SinkWindow
from ..cache.formats import resolve_format
from ..cache.kv_cache import PagedKVCache
from ..cache.layer_spec import cache_geometry, num_blocks_for
from ..errors import (
    InvalidRequestError,
    NonFiniteLogitsError,
    PagedKVError,
    PromptTooLongError,
)
from ..models.huggingface import PagedModel
from ..models.loading import end_token_ids, model_length, move_model
from ..scheduler.request import Request, RequestStatus
from ..scheduler.scheduler import Fork, ScheduledStep, Scheduler
from ..units import parse_memory
from .config import EngineConfig
from .sampler import find_unusable_rows, process_logits, sample, uniform_numbers
from .sampling_params import SamplingParams
from .text import Detokenizer

DEFAULT_KV_MEMORY: Final = 1 << 30
HOST_BYTES_PER_SECOND: Final = 1e10
FLOPS_PER_SECOND: Final = {"cpu": 1e11, "cuda": 1e14}


@dataclass(frozen=True, kw_only=True)
class SequenceUpdate:
    """What one step did for one request. `finish_reason`: "stop", "length" or "error"."""

    request_id: str
    token_id: int | None  # None with an error
    new_text: str
    finish_reason: str | None
    log_probability: float | None = None  # of the token, where the request asks for `best_of`
    error: PagedKVError | None = None


@dataclass(eq=False)
class LiveRequest:
    """A request with everything that its sampling and its text need.

    `siblings` are further samples of the same prompt: they start as forks when the prompt is
    computed, and until then only wait here.
    """

    request: Request
    params: SamplingParams
    seed: int
    sample_index: int
    end_token_ids: frozenset[int]
    detokenizer: Detokenizer
    siblings: list[LiveRequest] = field(default_factory=list)


class Engine:
    """Decodes many requests at once on one model, one cache and one pool."""

    def __init__(
        self,
        model: PagedModel,
        cache: PagedKVCache,
        manager: BlockManager,
        scheduler: Scheduler,
        tokenizer: PreTrainedTokenizerBase | None,
        end_token_ids: Sequence[int],
        sink_window: SinkWindow | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self.manager = manager
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self.sink_window = sink_window
        self.end_token_ids = frozenset(t for t in end_token_ids if 0 <= t < model.vocab_size)
        self._live: dict[str, LiveRequest] = {}
        self.num_steps = 0

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished

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
        left after the prompt.
        """
        ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        if len(ids) != params.num_samples or len(set(ids)) != len(ids):
            raise InvalidRequestError(f"{params.num_samples} samples need as many ids, got {ids}")
        seed = secrets.randbits(64) if params.seed is None else params.seed
        ends = frozenset() if params.ignore_eos else self.end_token_ids
        samples = []
        for sample_index, request_id in enumerate(ids):
            if request_id in self._live:
                raise InvalidRequestError(f"request id {request_id!r} is already in use")
            samples.append(
                LiveRequest(
                    request=self.check_request(
                        request_id, prompt_token_ids, params, priority=priority
                    ),
                    params=params,
                    seed=seed,
                    sample_index=sample_index,
                    end_token_ids=frozenset(params.stop_token_ids) | ends,
                    detokenizer=Detokenizer(self.tokenizer, prompt_token_ids, params.stop_strings),
                )
            )
        samples[0].siblings = samples[1:]
        self.scheduler.add(samples[0].request)
        self._live |= {entry.request.request_id: entry for entry in samples}

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
        self._check_prompt(prompt_token_ids, is_stream=sink_window is not None)
        self._check_in_vocabulary(params.stop_token_ids)
        if params.stop_strings and self.tokenizer is None:
            raise InvalidRequestError("stop strings need a tokenizer")
        room = ENDLESS
        if sink_window is None:
            room = self.manager.max_model_len - len(prompt_token_ids)
        request = Request(
            request_id=request_id,
            prompt_token_ids=prompt_token_ids,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            priority=priority,
            extra_keys=() if params.cache_salt is None else (params.cache_salt,),
            sink_window=sink_window,
        )
        self.scheduler.check(request)
        return request

    def _check_prompt(self, prompt_token_ids: Sequence[int], *, is_stream: bool) -> None:
        if not prompt_token_ids:
            raise InvalidRequestError("the prompt is empty")
        if not is_stream and len(prompt_token_ids) >= self.manager.max_model_len:
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
        """End a request and free its blocks; False when it is not known or already over."""
        entry = self._live.pop(request_id, None)
        if entry is None:
            return False
        for other in self._live.values():
            if entry in other.siblings:  # it has not started
                other.siblings.remove(entry)
                return True
        self.scheduler.finish(entry.request)
        if entry.siblings:  # another one computes the prompt
            leader, *leader.siblings = entry.siblings
            entry.siblings = []
            self.scheduler.add(leader.request)
        return True

    @torch.inference_mode()
    def step(self) -> list[SequenceUpdate]:
        """Compute one step for as many requests as fit, and report those that got a token."""
        scheduled = self.scheduler.schedule()
        if scheduled is None:
            return []
        leaders = [self._live[request.request_id] for request in scheduled.sampled_requests]
        try:
            self._copy_swapped(scheduled)
            logits = self._run_model(scheduled)
            errors = self._prepare_logits(logits, leaders)
            siblings = [(row, s) for row, entry in enumerate(leaders) for s in entry.siblings]
            live = leaders + [sibling for _, sibling in siblings]
            if siblings:
                rows = [row for row, _ in siblings]
                errors += [errors[row] for row in rows]
                logits = torch.cat([logits, logits[rows]])
            token_ids = sample(logits, [entry.params for entry in live], self._uniforms(live))
            log_probabilities = self._log_probabilities(logits, live, token_ids)
        except BaseException:
            self.scheduler.cancel(scheduled)
            raise
        # Who was aborted meanwhile, or became a leader because its own was, is a sibling no more.
        is_here = [True] * len(leaders)
        is_here += [sibling in leaders[row].siblings for row, sibling in siblings]
        sampled, drawn = token_ids[: len(leaders)], token_ids[len(leaders) :].tolist()
        forks = [
            Fork(leaders[row].request, sibling.request, token_id)
            for (row, sibling), token_id in zip(siblings, drawn, strict=True)
            if sibling in leaders[row].siblings and errors[row] is None
        ]
        at_limit = set(self.scheduler.update(scheduled, sampled, forks))
        for row, _ in siblings:
            leaders[row].siblings = []
        self.num_steps += 1
        return [
            self._fail(entry, error)
            if error is not None
            else self._advance(entry, token_id, log_probability, entry.request in at_limit)
            for entry, error, token_id, log_probability, is_ours in zip(
                live, errors, token_ids.tolist(), log_probabilities, is_here, strict=True
            )
            if is_ours and entry.request.status is not RequestStatus.FINISHED
        ]

    def _copy_swapped(self, scheduled: ScheduledStep) -> None:
        """Copy blocks to and from the host; if that fails, the requests they belong to are lost."""
        try:
            for copy in scheduled.swap_outs:
                self.cache.swap_out(copy.device_block_ids, copy.host_block_ids)
            for copy in scheduled.swap_ins:
                self.cache.swap_in(copy.device_block_ids, copy.host_block_ids)
        except BaseException:
            for copy in (*scheduled.swap_outs, *scheduled.swap_ins):
                self.abort(copy.request_id)
            raise

    def _log_probabilities(
        self, logits: Tensor, live: list[LiveRequest], token_ids: NDArray[np.int64]
    ) -> list[float | None]:
        """Of the chosen tokens, for the requests that compare their samples by them."""
        return [
            float(logits[row].double().log_softmax(-1)[token_id])
            if entry.params.best_of is not None
            else None
            for row, (entry, token_id) in enumerate(zip(live, token_ids.tolist(), strict=True))
        ]

    def _run_model(self, scheduled: ScheduledStep) -> Tensor:
        """Logits [M, V] in float32 of the sequences that sample."""
        device = self.cache.device
        token_ids = torch.from_numpy(scheduled.token_ids).to(device)
        positions = torch.from_numpy(scheduled.plan.positions).to(device)
        logit_rows = torch.from_numpy(scheduled.sampled_token_index).to(device)
        step = self.cache.begin(scheduled.plan)
        return self.model.forward(token_ids, positions, logit_rows, self.cache, step).float()

    def _prepare_logits(self, logits: Tensor, live: list[LiveRequest]) -> list[PagedKVError | None]:
        """Apply each request's own rules to its row of logits [M, V], in place.

        Returns the error of each row from which nothing can be sampled; such rows become zeros.
        """
        errors: list[PagedKVError | None] = [
            NonFiniteLogitsError("the model's logits are not finite") if unusable else None
            for unusable in find_unusable_rows(logits)
        ]
        has_changed = False
        for row, entry in enumerate(live):
            params = entry.params
            if errors[row] is None and params.logits_processors:
                has_changed = True
                try:
                    logits[row] = process_logits(logits[row], entry.request.token_ids, params)
                except Exception as error:  # the caller's code: it ends this request alone
                    errors[row] = InvalidRequestError(f"a logits processor failed: {error!r}")
            if entry.request.num_output_tokens < params.min_tokens and entry.end_token_ids:
                has_changed = True
                logits[row, list(entry.end_token_ids)] = -torch.inf
        if has_changed:  # most steps change nothing and need no second look
            for row in np.flatnonzero(find_unusable_rows(logits)):
                errors[row] = errors[row] or NonFiniteLogitsError(
                    "logits processors and min_tokens leave no token to sample"
                )
        for row, row_error in enumerate(errors):
            if row_error is not None:
                logits[row] = 0.0
        return errors

    def _uniforms(self, live: list[LiveRequest]) -> NDArray[np.float64]:
        """The number that decides each row's token; where it is greedy none is looked at."""
        if all(entry.params.is_greedy for entry in live):
            return np.zeros(len(live))
        return uniform_numbers(
            [entry.seed for entry in live],
            [entry.sample_index for entry in live],
            [entry.request.num_output_tokens for entry in live],
        )

    def _advance(
        self,
        entry: LiveRequest,
        token_id: int,
        log_probability: float | None,
        is_at_limit: bool,
    ) -> SequenceUpdate:
        """Account for one sampled token: text, and whether it ends the request."""
        request = entry.request
        may_stop = request.num_output_tokens >= entry.params.min_tokens
        finish_reason = "length" if is_at_limit else None
        is_end = token_id in entry.end_token_ids and may_stop
        if is_end or entry.detokenizer.append(token_id, may_stop):
            finish_reason = "stop"
        if finish_reason is not None:
            entry.detokenizer.finish()
            self._finish(entry)
        return SequenceUpdate(
            request_id=request.request_id,
            token_id=token_id,
            new_text=entry.detokenizer.take_new_text(is_final=finish_reason is not None),
            finish_reason=finish_reason,
            log_probability=log_probability,
        )

    def _fail(self, entry: LiveRequest, error: PagedKVError) -> SequenceUpdate:
        """End one request from whose logits nothing can be sampled; its last token is no choice."""
        request = entry.request
        num_output = max(request.num_output_tokens - 1, 0)
        entry.detokenizer.finish()
        if not request.has_arrived:  # a sibling that never started
            del self._live[request.request_id]
        else:
            self._finish(entry)
        return SequenceUpdate(
            request_id=request.request_id,
            token_id=None,
            new_text=entry.detokenizer.take_new_text(is_final=True),
            finish_reason="error",
            error=type(error)(
                f"request {request.request_id!r}, after {request.num_prompt_tokens} prompt and "
                f"{num_output} output tokens: {error}"
            ),
        )

    def _finish(self, entry: LiveRequest) -> None:
        self.scheduler.finish(entry.request)
        del self._live[entry.request.request_id]


def build_engine(
    model: PagedModel,
    config: EngineConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    device: torch.device | str | None,
) -> Engine:
    """Size the pool and put the parts together; the model moves to `device` if one is given.

    Without `kv_memory` or `num_blocks` the pool is what `max_num_seqs` full-length sequences need,
    at most `DEFAULT_KV_MEMORY`.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    dtype = model.dtype
    max_model_len = model_length(model.model, config.max_model_len)
    kv_format, window = resolve_format(config.kv_format), config.sink_window
    if window is not None:
        _ = model.rotations  # or it raises
        if not kv_format.is_native:  # sinks are kept in the head
            num_sinks = max(kv_format.num_sink_tokens, window.num_sink_tokens)
            kv_format = kv_format.with_options(num_sink_tokens=num_sinks)
    layers = model.layers(kv_format)
    num_host_blocks = 0
    if config.swap_space:
        num_host_blocks = num_blocks_for(parse_memory(config.swap_space), layers, dtype)
    geometry = cache_geometry(layers, dtype)
    if config.num_blocks is not None:
        num_blocks = config.num_blocks
    elif config.kv_memory is not None:
        num_blocks = num_blocks_for(parse_memory(config.kv_memory), layers, dtype)
    else:
        longest = geometry.max_blocks(max_model_len)
        if window is not None:
            longest = max(longest, window.fitted(geometry).max_blocks(geometry))
        wanted = config.max_num_seqs * (longest + 1)
        num_blocks = min(wanted, num_blocks_for(DEFAULT_KV_MEMORY, layers, dtype))
    if device is not None:
        move_model(model.model, device)
    cache = PagedKVCache(
        layers,
        num_blocks=num_blocks,
        dtype=dtype,
        device=model.device,
        num_host_blocks=num_host_blocks,
    )
    manager = cache.new_manager(
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        prefix_caching=config.prefix_caching,
        model_fingerprint=model.fingerprint(),
    )
    scheduler = Scheduler(
        manager, token_budget=config.token_budget, swap_cost=swap_cost(model, cache)
    )
    if window is not None:
        manager.fitted_window(window)  # or it raises
    return Engine(model, cache, manager, scheduler, tokenizer, end_token_ids(model.model), window)


def swap_cost(model: PagedModel, cache: PagedKVCache) -> float:
    """Tokens that can be computed in the time in which one block is copied to or from the host.

    From two assumptions that hold within a factor of a few: see `HOST_BYTES_PER_SECOND` and
    `FLOPS_PER_SECOND`; two floating-point operations for each parameter and token.
    """
    device_type = cache.device.type if cache.device.type in FLOPS_PER_SECOND else "cpu"
    token_seconds = 2 * model.num_parameters / FLOPS_PER_SECOND[device_type]
    return cache.block_bytes / HOST_BYTES_PER_SECOND / token_seconds
