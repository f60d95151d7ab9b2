"""The step: schedule -> metadata -> model -> sample -> update. Knows requests of token ids.

One direction, one host-to-device copy of index arrays, one device-to-host copy of sampled tokens.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .block_manager import BlockManager
from .cache import PagedKVCache
from .errors import (
    InvalidRequestError,
    NonFiniteLogitsError,
    PagedKVError,
    PromptTooLongError,
)
from .model import PagedModel
from .sampler import find_unusable_rows, process_logits, sample, uniform_number
from .sampling import SamplingParams
from .scheduler.request import Request
from .scheduler.scheduler import ScheduledStep, Scheduler
from .text import Detokenizer


@dataclass(frozen=True, kw_only=True)
class SequenceUpdate:
    """What one step did for one request. `finish_reason`: "stop", "length" or "error"."""

    request_id: str
    token_id: int | None  # None with an error
    new_text: str
    finish_reason: str | None
    error: PagedKVError | None = None


@dataclass(eq=False)
class LiveRequest:
    """A request with everything that its sampling and its text need."""

    request: Request
    params: SamplingParams
    seed: int
    sample_index: int
    end_token_ids: frozenset[int]
    detokenizer: Detokenizer


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
    ) -> None:
        self.model = model
        self.cache = cache
        self.manager = manager
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self.end_token_ids = frozenset(t for t in end_token_ids if 0 <= t < model.vocab_size)
        self._live: dict[str, LiveRequest] = {}
        self.num_steps = 0

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        sample_index: int = 0,
    ) -> None:
        """Queue a request; raises `InvalidRequestError` and queues nothing if it cannot be served.

        `max_tokens` beyond the model's length is cut to what is left after the prompt.
        `sample_index` tells the independent samples of one prompt and seed apart.
        """
        request = self.check_request(request_id, prompt_token_ids, params, priority=priority)
        live = LiveRequest(
            request=request,
            params=params,
            seed=secrets.randbits(64) if params.seed is None else params.seed,
            sample_index=sample_index,
            end_token_ids=frozenset(params.stop_token_ids)
            | (frozenset() if params.ignore_eos else self.end_token_ids),
            detokenizer=Detokenizer(self.tokenizer, prompt_token_ids, params.stop_strings),
        )
        self.scheduler.add(request)
        self._live[request_id] = live

    def check_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
    ) -> Request:
        """The request as it would be queued; raises `InvalidRequestError` if it cannot be."""
        self._check_prompt(prompt_token_ids)
        self._check_in_vocabulary(params.stop_token_ids)
        if params.stop_strings and self.tokenizer is None:
            raise InvalidRequestError("stop strings need a tokenizer")
        room = self.manager.max_model_len - len(prompt_token_ids)
        request = Request(
            request_id=request_id,
            token_ids=list(prompt_token_ids),
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            priority=priority,
        )
        self.scheduler.check(request)
        return request

    def _check_prompt(self, prompt_token_ids: Sequence[int]) -> None:
        if not prompt_token_ids:
            raise InvalidRequestError("the prompt is empty")
        if len(prompt_token_ids) >= self.manager.max_model_len:
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
        self._live.pop(request_id, None)
        return self.scheduler.abort(request_id) is not None

    @torch.inference_mode()
    def step(self) -> list[SequenceUpdate]:
        """Compute one step for as many requests as fit, and report those that got a token."""
        scheduled = self.scheduler.schedule()
        if scheduled is None:
            return []
        try:
            logits = self._run_model(scheduled)
            live = [self._live[r.request_id] for r in scheduled.sampled_requests]
            failed, token_ids = self._sample(logits, live)
        except BaseException:
            self.scheduler.cancel(scheduled)
            raise
        at_limit = set(self.scheduler.update(scheduled, token_ids))
        self.num_steps += 1
        return [
            self._fail(entry) if has_failed else self._advance(entry, entry.request in at_limit)
            for entry, has_failed in zip(live, failed, strict=True)
        ]

    def _run_model(self, scheduled: ScheduledStep) -> Tensor:
        """Logits [M, V] in float32 of the sequences that sample."""
        device = self.cache.device
        token_ids = torch.from_numpy(scheduled.token_ids).to(device)
        positions = torch.from_numpy(scheduled.plan.positions).to(device)
        logit_rows = torch.from_numpy(scheduled.sampled_token_index).to(device)
        step = self.cache.begin(scheduled.plan)
        return self.model.forward(token_ids, positions, logit_rows, self.cache, step).float()

    def _sample(
        self, logits: Tensor, live: list[LiveRequest]
    ) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Which rows cannot be sampled from, and token ids [M]."""
        failed = find_unusable_rows(logits)
        uniforms = np.zeros(len(live))
        for row, entry in enumerate(live):
            num_output = entry.request.num_output_tokens
            if entry.params.logits_processors and not failed[row]:
                logits[row] = process_logits(logits[row], entry.request.token_ids, entry.params)
            if num_output < entry.params.min_tokens and entry.end_token_ids:
                logits[row, list(entry.end_token_ids)] = -torch.inf
            if not entry.params.is_greedy:
                uniforms[row] = uniform_number(entry.seed, entry.sample_index, num_output)
        failed |= find_unusable_rows(logits)
        logits[torch.from_numpy(failed).to(logits.device)] = 0.0
        return failed, sample(logits, [entry.params for entry in live], uniforms)

    def _advance(self, entry: LiveRequest, is_at_limit: bool) -> SequenceUpdate:
        """Account for one sampled token: text, and whether it ends the request."""
        request, token_id = entry.request, entry.request.token_ids[-1]
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
        )

    def _fail(self, entry: LiveRequest) -> SequenceUpdate:
        """End one request whose logits are unusable; its last token was never chosen."""
        num_output = entry.request.num_output_tokens - 1
        entry.detokenizer.finish()
        self._finish(entry)
        return SequenceUpdate(
            request_id=entry.request.request_id,
            token_id=None,
            new_text=entry.detokenizer.take_new_text(is_final=True),
            finish_reason="error",
            error=NonFiniteLogitsError(
                f"request {entry.request.request_id!r}: the model's logits are not finite after "
                f"{entry.request.num_prompt_tokens} prompt and {num_output} output tokens"
            ),
        )

    def _finish(self, entry: LiveRequest) -> None:
        self.scheduler.finish(entry.request)
        del self._live[entry.request.request_id]
