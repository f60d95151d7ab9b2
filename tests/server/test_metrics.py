"""What Prometheus is told, and `GET /statistics`: of requests that ran, and while they run."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from paged_kv import LLM, AsyncLLM, PromptLookup, SamplingParams
from paged_kv.entrypoints.async_request import RequestTimes
from paged_kv.entrypoints.demo import MODEL_FOLDER
from paged_kv.entrypoints.server.figures import Figures
from paged_kv.entrypoints.server.metrics import Metrics, token_bounds
from paged_kv.entrypoints.server.observation import Observation
from paged_kv.entrypoints.server_view import Reading, ServerView, histograms_of

NAME = 'a "model"\\with\nall'
PROMPT = [9 + n % 50 for n in range(200)]
# What dashboards for vLLM ask for.
QUERIED = {
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:e2e_request_latency_seconds_count",
    "vllm:e2e_request_latency_seconds_sum",
    "vllm:generation_tokens_total",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:inter_token_latency_seconds_count",
    "vllm:inter_token_latency_seconds_sum",
    "vllm:iteration_tokens_total_bucket",
    "vllm:kv_cache_usage_perc",
    "vllm:num_preemptions_total",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:prefix_cache_hits_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prompt_tokens_total",
    "vllm:request_decode_time_seconds_sum",
    "vllm:request_generation_tokens_bucket",
    "vllm:request_inference_time_seconds_bucket",
    "vllm:request_max_num_generation_tokens_sum",
    "vllm:request_params_max_tokens_bucket",
    "vllm:request_params_n_bucket",
    "vllm:request_prefill_time_seconds_sum",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_queue_time_seconds_sum",
    "vllm:request_success_total",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:time_to_first_token_seconds_count",
    "vllm:time_to_first_token_seconds_sum",
}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    settings = {"kv_format": "int8", "num_blocks": 200, "calibration": None}
    with LLM(MODEL_FOLDER, speculation=PromptLookup(), **settings) as made:
        yield made


class Scrape:
    """One answer of `GET /metrics`."""

    def __init__(self, metrics: Metrics) -> None:
        self.samples = [
            sample
            for family in text_string_to_metric_families(metrics.exposition().decode())
            for sample in family.samples
        ]

    def names(self) -> set[str]:
        return {sample.name for sample in self.samples}

    def __call__(self, name: str, **labels: str) -> float:
        (value,) = [
            s.value for s in self.samples if s.name == name and labels.items() <= s.labels.items()
        ]
        return value


@dataclass(eq=False)
class Request:
    """What metrics see of a request."""

    times: RequestTimes
    params: SamplingParams = field(default_factory=lambda: SamplingParams(max_tokens=9))
    prompt_token_ids: list[int] = field(default_factory=lambda: [1] * 7)
    num_cached_tokens: int = 3
    num_tokens: list[int] = field(default_factory=lambda: [5])


class Watched:
    """Metrics of requests that are given by hand."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.metrics = Metrics(llm, Figures(llm, "m"))

    def tokens(self, request: Request, now: float, count: int = 1) -> None:
        times = request.times
        times.num_output_tokens += count
        times.first_token = times.first_token or now
        times.last_token = now
        self.metrics.tokens_came(request, count, now)

    def end(self, request: Request, now: float, reason: str = "stop") -> None:
        request.times.ended = now
        self.metrics.request_ended(request, reason, now)

    def step(self) -> None:
        self.metrics.step_done(self.llm)

    def sum_of(self, name: str) -> tuple[float, float]:
        scrape = Scrape(self.metrics)
        return scrape(f"{name}_count"), round(scrape(f"{name}_sum"), 9)


def test_times_are_between_the_moments_that_vllm_means(llm):
    watched = Watched(llm)
    request = Request(RequestTimes(arrived=10.0, queued=10.5, started=11.0))
    for now, count in ((13.0, 1), (14.0, 1), (16.0, 3)):
        watched.tokens(request, now, count)
        watched.step()
    watched.end(request, 17.0)
    expected = {
        "vllm:time_to_first_token_seconds": (1, 3.0),
        "vllm:inter_token_latency_seconds": (2, 3.0),
        "vllm:e2e_request_latency_seconds": (1, 7.0),
        "vllm:request_queue_time_seconds": (1, 0.5),
        "vllm:request_prefill_time_seconds": (1, 2.0),
        "vllm:request_decode_time_seconds": (1, 3.0),
        "vllm:request_inference_time_seconds": (1, 5.0),
        "vllm:request_time_per_output_token_seconds": (1, 0.75),
        "vllm:request_prompt_tokens": (1, 7),
        "vllm:request_generation_tokens": (1, 5),
        "vllm:request_max_num_generation_tokens": (1, 5),
        "vllm:request_params_max_tokens": (1, 9),
        "vllm:request_params_n": (1, 1),
    }
    assert {name: watched.sum_of(name) for name in expected} == expected
    scrape = Scrape(watched.metrics)
    assert scrape("vllm:prompt_tokens_total") == 7
    assert scrape("vllm:prompt_tokens_cached_total") == 3
    assert scrape("vllm:prompt_tokens_by_source_total", source="local_compute") == 4
    assert scrape("vllm:prompt_tokens_by_source_total", source="local_cache_hit") == 3
    assert scrape("vllm:generation_tokens_total") == 5
    assert scrape("vllm:request_success_total", finished_reason="stop") == 1
    assert scrape("vllm:request_success_total", finished_reason="error") == 0
    assert not watched.metrics._last_tokens


def test_samples_of_a_step_have_the_latency_of_the_step(llm):
    watched = Watched(llm)
    request = Request(RequestTimes(arrived=1.0, started=1.0), SamplingParams(n=2, max_tokens=2))
    request.num_tokens = [2, 1]
    for now in (2.0, 2.001):
        watched.tokens(request, now)
    watched.step()
    for now in (3.0, 3.001):
        watched.tokens(request, now)
    assert watched.sum_of("vllm:inter_token_latency_seconds") == (2, 2.0)
    assert watched.sum_of("vllm:time_to_first_token_seconds") == (1, 1.0)
    watched.metrics.request_ended(request, "length", 3.0)
    assert watched.sum_of("vllm:e2e_request_latency_seconds") == (0, 0)
    watched.end(request, 3.0, "length")
    assert watched.sum_of("vllm:e2e_request_latency_seconds") == (1, 2.0)
    assert watched.sum_of("vllm:request_generation_tokens") == (2, 3)
    assert watched.sum_of("vllm:request_max_num_generation_tokens") == (1, 2)
    assert Scrape(watched.metrics)("vllm:request_success_total", finished_reason="length") == 2


def test_a_request_that_never_started_has_an_end_and_nothing_else(llm):
    watched = Watched(llm)
    watched.end(Request(RequestTimes(arrived=1.0, queued=2.0)), 4.0, "abort")
    assert watched.sum_of("vllm:e2e_request_latency_seconds") == (1, 3.0)
    for name in ("request_queue_time", "request_prefill_time", "request_decode_time"):
        assert watched.sum_of(f"vllm:{name}_seconds") == (0, 0)


def test_bounds_of_lengths_are_1_2_5():
    assert token_bounds(100) == [1, 2, 5, 10, 20, 50, 100]
    assert token_bounds(4096)[-2:] == [1000, 2000]


async def use(llm: LLM, observation: Observation) -> None:
    """Two alike, one after the other; two samples; one that is aborted, one that is too late."""
    async with AsyncLLM(llm, listener=observation) as engine:
        for _ in range(2):
            await engine.generate(PROMPT, SamplingParams(max_tokens=6, ignore_eos=True))
        await engine.generate(PROMPT[:50], SamplingParams(max_tokens=3, n=2, temperature=1.0))
        async with await engine.submit(PROMPT[:9], SamplingParams(max_tokens=200)) as request:
            async for _ in request:
                break
        late = await engine.submit(PROMPT[:9], SamplingParams(max_tokens=300), timeout=0.01)
        async with late as request:
            async for _ in request:
                pass


def test_a_scrape_tells_of_requests_that_ran(llm):
    llm.reset_prefix_cache()
    before = llm.statistics()
    observation = Observation(llm, NAME)
    asyncio.run(use(llm, observation))
    scrape, figures = Scrape(observation.metrics), observation.statistics()
    assert scrape.names() >= QUERIED
    assert {s.labels["model_name"] for s in scrape.samples if "model_name" in s.labels} == {NAME}
    assert {s.labels["engine"] for s in scrape.samples if s.name.startswith("vllm:")} == {"0"}
    ended = {
        reason: scrape("vllm:request_success_total", finished_reason=reason)
        for reason in ("stop", "length", "abort", "error")
    }
    assert ended["abort"] == ended["error"] == 1
    assert ended["stop"] + ended["length"] == 4
    assert scrape("vllm:e2e_request_latency_seconds_count") == 5
    assert scrape("vllm:prompt_tokens_total") in (200 * 2 + 50 + 9, 200 * 2 + 50 + 18)
    hits = scrape("vllm:prefix_cache_hits_total") - before.num_hit_tokens
    assert scrape("vllm:prompt_tokens_cached_total") == hits > 128
    queried = scrape("vllm:prefix_cache_queries_total") - before.num_query_tokens
    assert queried in (200 * 2 + 50 + 9, 200 * 2 + 50 + 18)
    assert scrape("vllm:generation_tokens_total") == figures["tokens"]["generated"] >= 12 + 2
    steps = llm.statistics().num_steps - before.num_steps
    assert scrape("vllm:iteration_tokens_total_count") == steps
    assert 0 < scrape("paged_kv:step_seconds_count") < steps
    scheduled = llm.statistics().num_scheduled_tokens - before.num_scheduled_tokens
    assert scrape("vllm:iteration_tokens_total_sum") == scheduled
    assert scrape("vllm:num_requests_running") == scrape("vllm:num_requests_waiting") == 0
    assert scrape("vllm:kv_cache_usage_perc") == 0
    assert scrape("vllm:spec_decode_num_draft_tokens_total") == figures["drafts"]["tried"]
    assert scrape("vllm:cache_config_info", block_size="64", num_gpu_blocks="200") == 1
    assert scrape("process_resident_memory_bytes") > 1e6
    view = ServerView("here")
    view.show(Reading(1.0, figures, histograms_of(observation.exposition().decode())))
    console = Console(file=io.StringIO(), width=200)
    console.print(view.frame(200))
    assert console.file.getvalue().count("p50") == 3


def test_figures_add_up_when_nothing_runs_any_more(llm):
    observation = Observation(llm, NAME)
    asyncio.run(use(llm, observation))
    figures = observation.statistics()
    blocks, sizes = figures["blocks"], figures["bytes"]
    assert blocks["head"] == blocks["body"] == blocks["tail"] == 0
    assert blocks["cached"] == blocks["findable"] > 0
    assert blocks["cached"] + blocks["free"] == blocks["total"] == 200
    assert sizes["used"] == sizes["wasted"] == 0
    assert figures["requests"]["ended"] == {**figures["requests"]["ended"], "abort": 1, "error": 1}
    kinds = ("used", "wasted", "cached", "free")
    scrape = Scrape(observation.metrics)
    assert sum(scrape("paged_kv:kv_bytes", kind=kind) for kind in kinds) == sizes["total"]


def check_sums(figures: dict[str, Any]) -> None:
    blocks, sizes = figures["blocks"], figures["bytes"]
    kinds = ("head", "body", "tail", "cached", "free")
    assert sum(blocks[kind] for kind in kinds) == blocks["total"]
    assert sizes["used"] + sizes["wasted"] == sizes["allocated"]
    assert sizes["head"] + sizes["body"] + sizes["tail"] == sizes["allocated"]
    assert 0 <= blocks["usage"] <= 1


def test_any_thread_may_ask_while_the_engine_steps(llm, monkeypatch):
    monkeypatch.setattr("paged_kv.entrypoints.server.figures.SAMPLE_SECONDS", 0.0)
    observation = Observation(llm, NAME)
    faults: list[BaseException] = []
    seen: list[dict[str, Any]] = []
    is_over = threading.Event()

    def ask() -> None:
        try:
            while not is_over.is_set():
                seen.append(observation.statistics())
                check_sums(seen[-1])
                observation.exposition()
                time.sleep(0.001)
        except BaseException as error:
            faults.append(error)

    async def serve() -> None:
        async with AsyncLLM(llm, listener=observation) as engine:
            params = SamplingParams(max_tokens=16, ignore_eos=True)
            await asyncio.gather(*(engine.generate(PROMPT[n:], params) for n in range(8)))

    thread = threading.Thread(target=ask)
    thread.start()
    asyncio.run(serve())
    is_over.set()
    thread.join()
    assert not faults
    assert max(figures["requests"]["running"] for figures in seen) > 1
    assert max(figures["blocks"]["body"] for figures in seen) > 0
    assert max(figures["tokens"]["generated_per_second"] for figures in seen) > 0


def test_the_rate_is_of_the_last_seconds(llm, monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    figures = Figures(llm, "m")
    request = SimpleNamespace(prompt_token_ids=[1] * 40, times=RequestTimes(arrived=now))
    for _ in range(20):
        now += 0.5
        request.times.num_output_tokens += 10
        figures.tokens_came(request, 10, now)
        figures.step_done(llm)
    tokens = figures.snapshot()["tokens"]
    assert (tokens["prompt"], tokens["generated"]) == (40, 200)
    assert (tokens["prompt_per_second"], tokens["generated_per_second"]) == (0, 20)
    now += 60
    assert figures.snapshot()["tokens"]["generated_per_second"] == 0


def test_a_listener_that_fails_keeps_the_others_from_nothing(llm, monkeypatch, caplog):
    observation = Observation(llm, "m")

    def fail(*arguments: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(observation.figures, "tokens_came", fail)
    asyncio.run(use(llm, observation))
    assert Scrape(observation.metrics)("vllm:generation_tokens_total") > 0
    assert "what watches the engine failed" in caplog.text


def test_steps_of_other_threads_do_not_come_between(llm):
    """What a step changes is read while nobody steps, whoever else uses the `LLM`."""
    observation = Observation(llm, "m")
    is_told, told = [], threading.Event()
    observation.figures.step_done = lambda llm: is_told.append(told.set())
    with llm.requests.at_rest():
        thread = threading.Thread(target=observation.step_done, args=(llm,))
        thread.start()
        assert not told.wait(0.05)
    thread.join()
    assert is_told


def test_a_block_store_is_told_of(tmp_path):
    with LLM(MODEL_FOLDER, kv_format="native", num_blocks=200, block_store=tmp_path) as llm:
        for _ in range(2):
            llm.generate([PROMPT], SamplingParams(max_tokens=2))
            llm.engine.tier.flush()
            llm.reset_prefix_cache()
        llm.engine.tier._counts.add(num_refused=3, num_dropped=4, num_failed=5)
        figures = Figures(llm, "m")
        told, scrape = figures.snapshot()["block_store"], Scrape(Metrics(llm, figures))
    entries = {
        kind: scrape("paged_kv:block_store_entries_total", kind=kind)
        for kind in ("stored", "found", "refused", "dropped")
    }
    assert entries == {"stored": 12, "found": 12, "refused": 3, "dropped": 4}
    assert entries == {kind: told[kind] for kind in entries}
    num_bytes = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert scrape("paged_kv:block_store_written_bytes_total") == num_bytes == told["found_bytes"]
    assert scrape("paged_kv:block_store_read_bytes_total") == num_bytes == told["stored_bytes"]
    assert scrape("paged_kv:block_store_errors_total") == told["failed"] == 5
