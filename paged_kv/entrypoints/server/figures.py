"""Live figures of an engine, as plain JSON, for whoever asks from any thread.

Knows counts, bytes and rates; never who asks, nor in which form they are told.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from threading import Lock
from typing import Any, Final, NamedTuple

from ...cache.layer_formats import formats_name
from ..async_request import Feed
from ..llm import LLM

SAMPLE_SECONDS: Final = 0.25  # memory is measured at most so often
RATE_SECONDS: Final = 5.0  # over which tokens a second are told
FINISH_REASONS: Final = ("stop", "length", "abort", "error")


class TokenCounts(NamedTuple):
    """Tokens since the start, at a `time.monotonic`."""

    seconds: float
    num_prompt: int
    num_generated: int


class Figures:
    """What an engine holds and has done, told to a listener of its `AsyncLLM`.

    The scheduler's counts can be read while it steps. What blocks are used for cannot: that is
    measured between two steps, a few times a second and whenever nothing is in use.
    """

    def __init__(self, llm: LLM, model_name: str) -> None:
        self.model_name = model_name
        self._llm = llm
        self._started = self._measured = time.monotonic()
        self._memory = llm.memory_stats()
        self._lock = Lock()  # of what follows
        self._num_prompt = self._num_generated = 0  # tokens
        self._num_ended = Counter(dict.fromkeys(FINISH_REASONS, 0))
        self._samples: deque[TokenCounts] = deque()

    # -- on the engine's thread -----------------------------------------------------------------

    def tokens_came(self, request: Feed, num_tokens: int, now: float) -> None:
        is_first = request.times.num_output_tokens == num_tokens
        with self._lock:
            self._num_generated += num_tokens
            self._num_prompt += len(request.prompt_token_ids) if is_first else 0

    def request_ended(self, request: Feed, finish_reason: str, now: float) -> None:
        with self._lock:
            self._num_ended[finish_reason] += 1

    def step_done(self, llm: LLM) -> None:
        """Measure, where it is time to. Nobody else steps the engine meanwhile."""
        now = time.monotonic()
        if now - self._measured < SAMPLE_SECONDS and llm.engine.manager.pool.num_allocated:
            return
        self._memory, self._measured = llm.memory_stats(), now
        with self._lock:
            self._samples.append(self._counts(now))
            self._forget_before(now - RATE_SECONDS)

    # -- on any thread --------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """The figures by name, all of them numbers or text; `docs/observability.md` lists them."""
        now, counts = time.monotonic(), self._llm.statistics()
        manager, bytes_by_kind = self._llm.engine.manager, vars(self._memory).copy()
        block_bytes = self._llm.engine.cache.block_bytes
        with self._lock:
            tokens, (prompt_rate, rate) = self._counts(now), self._rates(now)
            num_ended = dict(self._num_ended)
        return {
            "model": self.model_name,
            "kv_format": formats_name([layer.kv_format for layer in self._llm.engine.cache.layers]),
            "uptime_seconds": now - self._started,
            "requests": {
                "running": counts.num_running,
                "waiting": counts.num_waiting,
                "swapped": counts.num_swapped,
                "ended": num_ended,
            },
            "blocks": {
                "total": manager.num_blocks,
                **{k: bytes_by_kind[k] // block_bytes for k in ("head", "body", "tail", "cached")},
                "free": (bytes_by_kind["free"] - bytes_by_kind["cached"]) // block_bytes,
                "findable": counts.num_cached_blocks,
                "tokens_per_block": manager.geometry.block_size,
                "tokens_per_open_block": manager.geometry.open_block_size,
                "usage": 1 - counts.num_free_blocks / manager.num_blocks,
            },
            "bytes": bytes_by_kind,
            "prefix_cache": {
                "query_tokens": counts.num_query_tokens,
                "hit_tokens": counts.num_hit_tokens,
                "hit_rate": counts.num_hit_tokens / max(counts.num_query_tokens, 1),
            },
            "tokens": {
                "prompt": tokens.num_prompt,
                "generated": tokens.num_generated,
                "prompt_per_second": prompt_rate,
                "generated_per_second": rate,
            },
            "drafts": {"tried": counts.num_draft_tokens, "accepted": counts.num_accepted_tokens},
            "steps": counts.num_steps,
            "scheduled_tokens": counts.num_scheduled_tokens,
            "preemptions": counts.num_preemptions,
            **self._store(),
        }

    def _store(self) -> dict[str, Any]:
        """What has become of entries of a block store, where there is one."""
        store = self._llm.block_store_statistics()
        if store is None:
            return {}
        return {
            "block_store": {name.removeprefix("num_"): count for name, count in vars(store).items()}
        }

    def _counts(self, now: float) -> TokenCounts:
        return TokenCounts(now, self._num_prompt, self._num_generated)

    def _forget_before(self, seconds: float) -> None:
        while self._samples and self._samples[0].seconds < seconds:
            self._samples.popleft()

    def _rates(self, now: float) -> tuple[float, float]:
        """Tokens of prompts, and generated ones, a second since the oldest sample that is kept."""
        self._forget_before(now - RATE_SECONDS)
        if not self._samples or now - self._samples[0].seconds < SAMPLE_SECONDS:
            return 0.0, 0.0
        since = self._samples[0]
        seconds = now - since.seconds
        num_prompt = self._num_prompt - since.num_prompt
        return num_prompt / seconds, (self._num_generated - since.num_generated) / seconds
