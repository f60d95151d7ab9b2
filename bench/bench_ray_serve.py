"""Our own engine on Ray Serve: replicas that die under load, and what routing by prefix is worth.

    python bench/bench_ray_serve.py --json FILE

Needs Ray (`pip install 'paged-kv[ray,server]'`; `make test-ray` has an environment). All runs on
this machine, without a network, in a small cluster that is gone at the end.

- killed: requests over HTTP to two replicas, half of them streams; one replica is killed in their
  midst, and Ray Serve starts another. Lost is what has no answer of its full length, wrong is what
  is not the tokens of one `LLM` without Ray, greedy in the same format.
- routing: prompts that begin with one of several prefixes, in random order, to two replicas, by
  prefix and by turns. The hit rate is the share of prompt tokens that replicas found cached, as
  they say in `usage` of each answer. Once with a pool that holds all prefixes, once with one that
  holds about half of them beside what runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from report import ROOT, Row, add_arguments, write_report

from paged_kv import DEMO_MODEL, LLM, SamplingParams
from paged_kv.integrations.ray_serve import build_app

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # or a token is left in the home folder
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
APP = "paged_kv"
REPLICAS = "#replicas#"  # in the names of their actors
NUM_CPUS = 4  # that the cluster is told of
STORE_BYTES = 200 << 20
SECONDS = 600.0  # for what takes a moment
VOCABULARY = range(300, 2000)  # tokens of random prompts
# In float32 tokens do not hang on what else is in a batch, but for ties.
LLM_OPTIONS = {"kv_format": "native", "dtype": "float32", "num_threads": 1}


@dataclass(frozen=True)
class Ask:
    """A request, and whether it is streamed."""

    prompt: list[int]
    max_tokens: int
    is_stream: bool = False
    session: str | None = None

    @property
    def body(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": self.is_stream,
            **({"stream_options": {"include_usage": True}} if self.is_stream else {}),
        }


@dataclass
class Answer:
    """Its tokens, and why there are none or no more."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    fault: str | None = None


def asks_of(count: int, *, num_new: int, seed: int = 0) -> list[Ask]:
    """Random prompts, every second one a stream."""
    draw = random.Random(seed)
    return [
        Ask(draw.choices(VOCABULARY, k=draw.randrange(16, 160)), num_new, bool(index % 2))
        for index in range(count)
    ]


def shared_prefixes(
    num_prefixes: int, num_each: int, length: int, *, num_new: int, seed: int = 0
) -> list[Ask]:
    """So many prompts of each prefix in random order, which end differently."""
    draw = random.Random(seed)
    prefixes = [draw.choices(VOCABULARY, k=length) for _ in range(num_prefixes)]
    asks = [
        Ask(prefix + draw.choices(VOCABULARY, k=draw.randrange(8, 32)), num_new)
        for prefix in prefixes
        for _ in range(num_each)
    ]
    draw.shuffle(asks)
    return asks


# -- the cluster ----------------------------------------------------------------------------------


@contextmanager
def cluster() -> Iterator[str]:
    """Ray and Serve on this machine; the URL."""
    before = dict(os.environ)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ.update(ENVIRONMENT, PYTHONPATH=os.pathsep.join(paths))
    try:
        import ray

        ray.init(
            "local",
            num_cpus=NUM_CPUS,
            object_store_memory=STORE_BYTES,
            include_dashboard=False,
        )
        try:
            with serving() as url:
                yield url
        finally:
            ray.shutdown()
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def serving() -> Iterator[str]:
    """Ray Serve at a port of its own in the cluster that there is; the URL."""
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()


def deploy(**options: Any) -> None:
    """Our application in the place of the one before; returns when it serves."""
    from ray import serve

    serve.run(build_app({"num_replicas": 2, **LLM_OPTIONS, **options}), name=APP)


def replica_names() -> list[str]:
    """The actors that are replicas of ours."""
    from ray.util import list_named_actors

    found = list_named_actors(all_namespaces=True)
    return sorted(each["name"] for each in found if REPLICAS in each["name"])


def death_of(name: str) -> Callable[[], None]:
    """Call it, and the process of this replica is gone, without a word."""
    import ray

    return partial(ray.kill, ray.get_actor(name, namespace="serve"))


# -- clients --------------------------------------------------------------------------------------


async def answer_to(client: httpx.AsyncClient, ask: Ask) -> Answer:
    answer = Answer()
    headers = {"X-Session-Id": ask.session} if ask.session else {}
    try:
        if ask.is_stream:
            async with client.stream(
                "POST", "/v1/completions", json=ask.body, headers=headers
            ) as response:
                await read_stream(response, answer)
        else:
            response = await client.post("/v1/completions", json=ask.body, headers=headers)
            take(response.json(), answer)
        if response.status_code != 200:
            answer.fault = f"status {response.status_code}: {response.text[:200]}"
    except httpx.HTTPError as error:
        answer.fault = repr(error)
    return answer


async def read_stream(response: httpx.Response, answer: Answer) -> None:
    async for line in response.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            take(json.loads(line.removeprefix("data: ")), answer)


def take(part: Mapping[str, Any], answer: Answer) -> None:
    if "error" in part:
        answer.fault = str(part["error"])
        return
    for choice in part["choices"]:
        answer.token_ids += choice["token_ids"]
        answer.finish_reason = choice["finish_reason"] or answer.finish_reason
    if part.get("usage"):
        answer.num_prompt_tokens = part["usage"]["prompt_tokens"]
        answer.num_cached_tokens = part["usage"]["prompt_tokens_details"]["cached_tokens"]


async def send_all(
    url: str,
    asks: Sequence[Ask],
    num_at_once: int,
    on_answer: Callable[[int], None] = lambda _: None,
) -> list[Answer]:
    """The answers in order; `on_answer` is told how many there are by now."""
    places, answers = asyncio.Semaphore(num_at_once), [Answer() for _ in asks]
    num_done = 0

    async def one(index: int) -> None:
        nonlocal num_done
        async with places:
            answers[index] = await answer_to(client, asks[index])
        num_done += 1
        await asyncio.to_thread(on_answer, num_done)

    limits = httpx.Limits(max_connections=num_at_once)
    async with httpx.AsyncClient(
        base_url=url, timeout=SECONDS, limits=limits, trust_env=False
    ) as client:
        await asyncio.gather(*(one(index) for index in range(len(asks))))
    return answers


def statistics(url: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{url}/statistics", timeout=SECONDS, trust_env=False).json()
    return found


# -- what is measured -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """Of requests while replicas were killed."""

    num_requests: int
    num_lost: int
    num_wrong: int
    num_continued: int  # attempts that ended with a replica
    seconds: float
    faults: list[str]


def expected_tokens(model: str, asks: Sequence[Ask]) -> list[list[int]]:
    """What one engine of this process gives, without Ray."""
    with LLM(model, **LLM_OPTIONS) as llm:
        params = [
            SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=ask.max_tokens)
            for ask in asks
        ]
        outputs = llm.generate([ask.prompt for ask in asks], params)
    return [output.token_ids for output in outputs]


def disturbed(
    url: str,
    asks: Sequence[Ask],
    expected: Sequence[list[int]],
    *,
    at: int,
    disturb: Callable[[], None],
) -> Outcome:
    """Do something to the replicas when so many answers are there."""

    def on_answer(num_done: int) -> None:
        if num_done == at:
            disturb()

    start, before = time.monotonic(), statistics(url)["lost_attempts"]
    answers = asyncio.run(send_all(url, asks, 16, on_answer))
    is_lost = [
        answer.fault is not None or len(answer.token_ids) != ask.max_tokens
        for ask, answer in zip(asks, answers, strict=True)
    ]
    is_wrong = [
        not lost and answer.token_ids != tokens
        for lost, answer, tokens in zip(is_lost, answers, expected, strict=True)
    ]
    return Outcome(
        num_requests=len(asks),
        num_lost=sum(is_lost),
        num_wrong=sum(is_wrong),
        num_continued=statistics(url)["lost_attempts"] - before,
        seconds=time.monotonic() - start,
        faults=[answer.fault for answer in answers if answer.fault],
    )


def hit_rate(url: str, asks: Sequence[Ask], num_at_once: int) -> float:
    """The share of prompt tokens that was cached."""
    answers = asyncio.run(send_all(url, asks, num_at_once))
    faults = [answer.fault for answer in answers if answer.fault]
    if faults:
        raise RuntimeError(f"{len(faults)} requests failed: {faults[0]}")
    num_prompt_tokens = sum(answer.num_prompt_tokens for answer in answers)
    return sum(answer.num_cached_tokens for answer in answers) / num_prompt_tokens


def killed_rows(url: str, model: str, count: int) -> list[Row]:
    asks = asks_of(count, num_new=64)
    expected = expected_tokens(model, asks)
    deploy(model=model)
    outcome = disturbed(url, asks, expected, at=count // 3, disturb=death_of(replica_names()[0]))
    for fault in outcome.faults[:5]:
        print(fault)
    case = f"{count} requests, one of two replicas killed"
    return [
        Row(case=case, metric="lost", value=outcome.num_lost, unit="requests"),
        Row(case=case, metric="wrong", value=outcome.num_wrong, unit="requests"),
        Row(case=case, metric="continued elsewhere", value=outcome.num_continued, unit="requests"),
        Row(case=case, metric="all answered", value=outcome.seconds, unit="s"),
    ]


def routing_rows(url: str, model: str, num_prefixes: int, num_each: int) -> list[Row]:
    length, num_at_once = 400, 4
    asks = shared_prefixes(num_prefixes, num_each, length, num_new=4)
    blocks = length // 16  # of native's 16 tokens
    running = num_at_once * (blocks + 3)  # with a prompt's own end
    pools = {
        "all": num_prefixes * blocks + running + 3 * len(asks),
        "half": num_prefixes * blocks // 2 + running,
    }
    rows = []
    for holds, num_blocks in pools.items():
        rates = {}
        for policy in ("round_robin", "prefix"):
            release = f"{holds} {policy}"
            deploy(model=model, num_blocks=num_blocks, policy=policy, release=release)
            rates[policy] = hit_rate(url, asks, num_at_once)
        rows.append(
            Row(
                case=f"{num_prefixes} prefixes, {num_each} prompts of each, a pool for {holds}",
                metric="hit rate by prefix",
                value=rates["prefix"],
                unit="of prompt tokens",
                baseline="round robin",
                baseline_value=rates["round_robin"],
                ratio=rates["prefix"] / max(rates["round_robin"], 1e-9),
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--model", default=str(DEMO_MODEL), help="folder (the demo model)")
    arguments = parser.parse_args()
    model = str(Path(arguments.model).resolve())
    with cluster() as url:
        rows = killed_rows(url, model, 40 if arguments.quick else 500)
        prefixes, each = (4, 4) if arguments.quick else (24, 5)
        rows += routing_rows(url, model, prefixes, each)
    for row in rows:
        ratio = "" if row.ratio is None else f" ({row.ratio:.2f} x {row.baseline})"
        print(f"{row.case}: {row.metric} {row.value:.4g} {row.unit}{ratio}")
    write_report("ray_serve", rows, arguments.json)


if __name__ == "__main__":
    main()
