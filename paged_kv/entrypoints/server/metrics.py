"""What Prometheus scrapes: vLLM's metrics under vLLM's names where they mean the same, and ours.

Knows requests' times and an engine's figures, never who scrapes. `docs/observability.md` says of
each of vLLM's names what it means here, and which there are not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..async_request import Feed
from ..llm import LLM
from .figures import FINISH_REASONS, Figures

ENGINE: Final = "0"  # there is one
LABELS: Final = ("model_name", "engine")
# The bounds are vLLM's, so that its dashboards' heat maps line up.
FIRST_TOKEN_SECONDS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_SECONDS: Final = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_SECONDS: Final = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
STEP_TOKENS: Final = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
SAMPLES: Final = (1, 2, 5, 10, 20)
STEP_SECONDS: Final = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 20.0),
)


class LastTokens(NamedTuple):
    """When a request got tokens last, in which step, and when in a step before."""

    step: int
    seconds: float
    seconds_before: float | None


def token_bounds(most: int) -> list[int]:
    """1, 2, 5, 10, 20 ... up to `most`."""
    powers = range(len(str(most)))
    return [n for power in powers for n in (10**power, 2 * 10**power, 5 * 10**power) if n <= most]


class Metrics:
    """A registry of its own, told as a listener of an `AsyncLLM` what becomes of requests."""

    def __init__(self, llm: LLM, figures: Figures) -> None:
        self.registry: Final = CollectorRegistry()
        self._model_name = figures.model_name
        self._last_tokens: dict[Feed, LastTokens] = {}
        self._num_calls = 0  # of `step_done`
        self._step_ended = time.monotonic()
        self._has_more = False  # requests were left after the last step
        counts = llm.statistics()
        self._num_steps, self._num_scheduled = counts.num_steps, counts.num_scheduled_tokens
        ProcessCollector(registry=self.registry)
        self.registry.register(FiguresCollector(llm, figures))
        self._add_counters()
        self._add_histograms(token_bounds(llm.max_model_len))

    def exposition(self) -> bytes:
        """The answer to a scrape, of `prometheus_client.CONTENT_TYPE_LATEST`; for any thread."""
        return generate_latest(self.registry)

    def _add_counters(self) -> None:
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts, cached or not.")
        self._cached_tokens = self._counter("prompt_tokens_cached", "Of them, found in the cache.")
        self._generated_tokens = self._counter("generation_tokens", "Tokens that were generated.")
        sources = Counter(
            "vllm:prompt_tokens_by_source",
            "Tokens of prompts by where they are from.",
            (*LABELS, "source"),
            registry=self.registry,
        )
        self._computed_tokens = sources.labels(self._model_name, ENGINE, "local_compute")
        self._hit_tokens = sources.labels(self._model_name, ENGINE, "local_cache_hit")
        ended = Counter(
            "vllm:request_success",
            "Samples of requests that are over, by the reason.",
            (*LABELS, "finished_reason"),
            registry=self.registry,
        )
        self._ended = {
            reason: ended.labels(self._model_name, ENGINE, reason) for reason in FINISH_REASONS
        }

    def _add_histograms(self, lengths: list[int]) -> None:
        histogram, seconds = self._histogram, REQUEST_SECONDS
        self._first_token = histogram(
            "vllm:time_to_first_token_seconds", FIRST_TOKEN_SECONDS, "From arrival on."
        )
        self._next_token = histogram(
            "vllm:inter_token_latency_seconds", TOKEN_SECONDS, "Between steps with tokens."
        )
        self._per_token = histogram(
            "vllm:request_time_per_output_token_seconds", TOKEN_SECONDS, "Mean of a request."
        )
        self._latency = histogram(
            "vllm:e2e_request_latency_seconds", seconds, "From arrival to the end."
        )
        self._queued = histogram(
            "vllm:request_queue_time_seconds", seconds, "From being queued to the first step."
        )
        self._prefill = histogram(
            "vllm:request_prefill_time_seconds", seconds, "From the first step to a token."
        )
        self._decode = histogram(
            "vllm:request_decode_time_seconds", seconds, "From the first token to the last."
        )
        self._inference = histogram(
            "vllm:request_inference_time_seconds", seconds, "From the first step to the last token."
        )
        self._prompt_lengths = histogram(
            "vllm:request_prompt_tokens", lengths, "Tokens of a request's prompt."
        )
        self._output_lengths = histogram(
            "vllm:request_generation_tokens", lengths, "Tokens that a sample was given."
        )
        self._longest_sample = histogram(
            "vllm:request_max_num_generation_tokens", lengths, "Of a request's longest sample."
        )
        self._max_tokens = histogram(
            "vllm:request_params_max_tokens", lengths, "What a request has as its limit."
        )
        self._num_samples = histogram("vllm:request_params_n", SAMPLES, "Samples of a request.")
        self._step_tokens = histogram(
            "vllm:iteration_tokens_total", STEP_TOKENS, "Tokens that a step computes."
        )
        self._step_seconds = histogram(
            "paged_kv:step_seconds", STEP_SECONDS, "From one step's end to the next one's."
        )

    def _counter(self, name: str, text: str) -> Counter:
        counter = Counter(f"vllm:{name}", text, LABELS, registry=self.registry)
        return counter.labels(self._model_name, ENGINE)

    def _histogram(self, name: str, bounds: Sequence[float], text: str) -> Histogram:
        histogram = Histogram(name, text, LABELS, buckets=bounds, registry=self.registry)
        return histogram.labels(self._model_name, ENGINE)

    # -- on the engine's thread -----------------------------------------------------------------

    def tokens_came(self, request: Feed, num_tokens: int, now: float) -> None:
        self._generated_tokens.inc(num_tokens)
        last = self._last_tokens.get(request)
        if last is None:
            self._begin(request, now)
            last = LastTokens(self._num_calls, now, None)
        elif last.step != self._num_calls:
            last = LastTokens(self._num_calls, now, last.seconds)
        # The same step gives several samples their tokens, a moment after each other.
        self._last_tokens[request] = last
        if last.seconds_before is not None:
            self._next_token.observe(last.seconds - last.seconds_before)

    def _begin(self, request: Feed, now: float) -> None:
        """A request gets its first token."""
        num_tokens, num_cached = len(request.prompt_token_ids), request.num_cached_tokens
        self._first_token.observe(now - request.times.arrived)
        self._prompt_tokens.inc(num_tokens)
        self._cached_tokens.inc(num_cached)
        self._hit_tokens.inc(num_cached)
        self._computed_tokens.inc(num_tokens - num_cached)

    def request_ended(self, request: Feed, finish_reason: str, now: float) -> None:
        self._ended[finish_reason].inc()
        times, params = request.times, request.params
        if times.ended is None:  # other samples go on
            return
        self._last_tokens.pop(request, None)
        self._latency.observe(now - times.arrived)
        self._prompt_lengths.observe(len(request.prompt_token_ids))
        self._longest_sample.observe(max(request.num_tokens))
        for num_tokens in request.num_tokens:
            self._output_lengths.observe(num_tokens)
        self._num_samples.observe(params.n)
        if params.max_tokens is not None:
            self._max_tokens.observe(params.max_tokens)
        if times.started is None:
            return
        if times.queued is not None:
            self._queued.observe(times.started - times.queued)
        if times.first_token is None or times.last_token is None:
            return
        self._prefill.observe(times.first_token - times.started)
        self._inference.observe(times.last_token - times.started)
        decode_seconds = times.last_token - times.first_token
        self._decode.observe(decode_seconds)
        num_later = times.num_output_tokens - params.num_samples
        if num_later > 0:
            self._per_token.observe(decode_seconds * params.num_samples / num_later)

    def step_done(self, llm: LLM) -> None:
        now, counts = time.monotonic(), llm.statistics()
        num_steps = counts.num_steps - self._num_steps  # usually one; none if it had nothing to do
        for _ in range(num_steps):
            self._step_tokens.observe(
                (counts.num_scheduled_tokens - self._num_scheduled) / num_steps
            )
            if self._has_more:
                self._step_seconds.observe((now - self._step_ended) / num_steps)
        self._num_calls += 1
        self._num_steps, self._num_scheduled = counts.num_steps, counts.num_scheduled_tokens
        self._step_ended, self._has_more = now, llm.engine.has_unfinished


class FiguresCollector(Collector):
    """What an engine's figures are at the moment of a scrape."""

    def __init__(self, llm: LLM, figures: Figures) -> None:
        self._llm = llm
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        figures = self._figures.snapshot()
        requests, blocks, cache = figures["requests"], figures["blocks"], figures["prefix_cache"]
        gauge, counter = self._gauge, self._counter
        yield gauge("vllm:num_requests_running", requests["running"], "Requests that run.")
        yield gauge("vllm:num_requests_waiting", requests["waiting"], "Requests that wait.")
        yield gauge("vllm:kv_cache_usage_perc", blocks["usage"], "Blocks in use, of 1.")
        yield counter("vllm:prefix_cache_queries", cache["query_tokens"], "Tokens looked up.")
        yield counter("vllm:prefix_cache_hits", cache["hit_tokens"], "Of them, found.")
        yield counter("vllm:num_preemptions", figures["preemptions"], "Requests that made room.")
        if self._llm.engine.speculation is not None:
            drafts = figures["drafts"]
            yield counter("vllm:spec_decode_num_draft_tokens", drafts["tried"], "Tokens tried.")
            yield counter(
                "vllm:spec_decode_num_accepted_tokens", drafts["accepted"], "Of them, right ones."
            )
        yield self._cache_config(figures)
        yield gauge(
            "paged_kv:num_requests_swapped", requests["swapped"], "Of those that wait, in swap."
        )
        yield gauge("paged_kv:findable_blocks", blocks["findable"], "Blocks that can be hit.")
        yield self._by_kind(
            "paged_kv:blocks", blocks, ("head", "body", "tail", "cached", "free"), "Blocks by use."
        )
        sizes = figures["bytes"]
        free = {**sizes, "free": sizes["free"] - sizes["cached"]}
        kinds = ("used", "wasted", "cached", "free", "decode_graphs", "recurrent_states")
        yield self._by_kind("paged_kv:kv_bytes", free, kinds, "Bytes over all layers, by use.")
        if "block_store" in figures:
            yield from self._store(figures["block_store"])

    def _store(self, store: dict[str, int]) -> Iterator[Metric]:
        """Of a block store."""
        entries = CounterMetricFamily(
            "paged_kv:block_store_entries",
            "Entries of the block store, by what became of them.",
            labels=(*LABELS, "kind"),
        )
        for kind in ("stored", "found", "refused", "dropped"):
            entries.add_metric((self._figures.model_name, ENGINE, kind), store[kind])
        yield entries
        yield self._counter(
            "paged_kv:block_store_written_bytes", store["stored_bytes"], "Written to the store."
        )
        yield self._counter(
            "paged_kv:block_store_read_bytes", store["found_bytes"], "Of it brought into the pool."
        )
        yield self._counter(
            "paged_kv:block_store_errors", store["failed"], "Exceptions that the store raised."
        )

    def _gauge(self, name: str, value: float, text: str) -> Metric:
        family = GaugeMetricFamily(name, text, labels=LABELS)
        family.add_metric((self._figures.model_name, ENGINE), value)
        return family

    def _counter(self, name: str, value: float, text: str) -> Metric:
        family = CounterMetricFamily(name, text, labels=LABELS)
        family.add_metric((self._figures.model_name, ENGINE), value)
        return family

    def _by_kind(self, name: str, of: dict[str, float], kinds: Sequence[str], text: str) -> Metric:
        family = GaugeMetricFamily(name, text, labels=(*LABELS, "kind"))
        for kind in kinds:
            family.add_metric((self._figures.model_name, ENGINE, kind), of[kind])
        return family

    def _cache_config(self, figures: dict[str, Any]) -> Metric:
        blocks, cache = figures["blocks"], self._llm.engine.manager.prefix_cache
        labels = {
            "engine": ENGINE,
            "block_size": str(blocks["tokens_per_block"]),
            "num_gpu_blocks": str(blocks["total"]),
            "cache_dtype": figures["kv_format"],
            "enable_prefix_caching": str(cache is not None),
        }
        family = GaugeMetricFamily("vllm:cache_config_info", "How it is kept.", labels=list(labels))
        family.add_metric(list(labels.values()), 1)
        return family
