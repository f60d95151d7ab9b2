"""paged_kv inside vLLM beside vLLM's own caches: memory, throughput and latency of the same engine.

    python bench/bench_vllm.py --model FOLDER --json FILE

Needs an environment with vLLM, such as the one that `make test-vllm` makes. Each contestant is an
engine in a process of its own, started once for each case; all of a case live side by side and
take turns, one round each that does not count, then medians of `--rounds`. Requests are greedy and
have exact lengths; prompts are stretches of a text, each begun at another place, so that no two
share a prefix.

Cases:

- memory: what vLLM's log says a pool of `--pool` MiB holds at 4096 tokens a request, and how many
  such requests decode side by side before one is preempted;
- equal batch: 32 requests of 128 + 64 tokens, memory for all, so that only speed differs;
- equal memory: 32 requests of 256 + 96 tokens in the same pool, more than vLLM's own cache holds;
- repeated prompts: 32 requests of 300 + 48 tokens in that pool, asked again, prefix cache on;
- budget, only if `--cases` names it: what `paged-kv bench throughput` serves by the same options,
  in a pool that holds `--native-sequences` of their mean length in vLLM's own cache;
- planning: what `AttentionMetadataBuilder.build` takes of a decode step of 64 and 256 requests.

Seconds to the first token and between tokens are medians over all requests, from the moment when
all are handed in. Pages held are the most at any step.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from report import Row, add_arguments, write_report

from paged_kv.benchmarks.workloads import describe, mean_tokens
from paged_kv.entrypoints.bench_options import add_workload, workload_of

ROOT = Path(__file__).resolve().parent.parent
DEMO_MODEL = ROOT / "paged_kv" / "demo_model"
TEXT = ROOT / "paged_kv" / "models" / "calibration.txt"
LONGEST = 4096  # tokens of a request, or what the model can do
ROUNDS = 3
OWN = "vLLM auto"
FORMATS = ("native", "int8", "int4", "int3", "int2", "int2-long")
FIGURES = {  # of a round: what is reported, its unit, and whether more is better
    "throughput": ("tokens/s", True),
    "first token": ("s", False),
    "between tokens": ("ms", False),
    "decoding side by side": ("requests", True),
    "peak pages": ("MiB", False),
    "preemptions": ("requests", False),
}


@dataclass(frozen=True)
class Case:
    """Requests that every contestant is asked for."""

    name: str
    prompts: list[list[int]]
    num_new: int | list[int]  # of each request, where they differ
    pool: int  # bytes
    options: dict[str, Any]  # of the engine
    is_repeated: bool = False  # asked once more, and only the second time counts


class Engine:
    """The engine of one contestant, inside its own process."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        began = time.perf_counter()
        from vllm import LLM

        imported = time.perf_counter()
        self.engine = LLM(model, **options).llm_engine
        core = self.engine.engine_core.engine_core
        self.scheduler, self.pool = core.scheduler, core.scheduler.kv_cache_manager.block_pool
        config = core.scheduler.kv_cache_config
        self.page_bytes = sum(one.size for one in config.kv_cache_tensors) / config.num_blocks
        self.builder = core.model_executor.driver_worker.worker.model_runner.attn_groups[0][
            0
        ].get_metadata_builder()
        self.num_rounds = 0
        self.start = {
            # what the log says as "KV cache size"
            "tokens": core.vllm_config.cache_config.kv_cache_size_tokens,
            "imports": imported - began,
            "start-up": time.perf_counter() - imported,
        }

    def run(self, prompts: list[list[int]], num_new: int | list[int]) -> dict[str, float]:
        """All requests at once, to their end."""
        from vllm import SamplingParams

        self.num_rounds += 1
        counts = num_new if isinstance(num_new, list) else [num_new] * len(prompts)
        began = time.perf_counter()
        for number, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
            name = f"{self.num_rounds}-{number}"
            params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
            self.engine.add_request(name, {"prompt_token_ids": prompt}, params)
        times: dict[str, list[float]] = {}
        most_decoding = most_held = most_running = 0
        area = last = 0.0
        preempted: set[str] = set()
        with timed(self.builder, "build") as builds:
            while self.engine.has_unfinished_requests():
                outputs = self.engine.step()
                now = time.perf_counter() - began
                for output in outputs:
                    times.setdefault(output.request_id, []).append(now)
                running = self.scheduler.running
                decoding = sum(one.num_computed_tokens >= one.num_prompt_tokens for one in running)
                most_decoding = max(most_decoding, decoding)
                # Of those that ran: who has just ended is counted too.
                ran = len(running) + sum(output.finished for output in outputs)
                most_running, area, last = max(most_running, ran), area + ran * (now - last), now
                held = self.pool.num_gpu_blocks - 1 - self.pool.get_num_free_blocks()
                most_held = max(most_held, held)
                preempted |= {one.request_id for one in running if one.num_preemptions}
        seconds = time.perf_counter() - began
        gaps = [b - a for some in times.values() for a, b in pairwise(some)]
        return {
            "throughput": sum(counts) / seconds,
            "first token": median(some[0] for some in times.values()),
            "between tokens": 1000 * median(gaps) if gaps else 0.0,
            "between tokens, p99": 1000 * quantile(gaps, 0.99),
            "side by side, mean": area / seconds,
            "decoding side by side": most_decoding,
            "running side by side": most_running,
            "peak pages": most_held * self.page_bytes / 2**20,
            "preemptions": len(preempted),
            "planning": 1e6 * median(builds),
        }


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))] if values else 0.0


@contextmanager
def timed(owner: Any, name: str) -> Iterator[list[float]]:
    """The seconds of each call of a method."""
    seconds: list[float] = []
    method = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        result = method(*arguments, **options)
        seconds.append(time.perf_counter() - began)
        return result

    setattr(owner, name, call)
    try:
        yield seconds
    finally:
        setattr(owner, name, method)


def serve(connection: Connection, model: str, options: dict[str, Any]) -> None:
    """A contestant's process: an engine that answers until it is told to end."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        engine = Engine(model, options)
    except Exception as error:
        connection.send(RuntimeError(str(error).strip().splitlines()[0]))
        return
    connection.send(engine.start)
    while (asked := connection.recv()) is not None:
        connection.send(engine.run(*asked))


class Contestant:
    """A process, and what its rounds gave."""

    def __init__(self, name: str, model: str, options: dict[str, Any]) -> None:
        self.name = name
        self.rounds: list[dict[str, float]] = []
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, model, options))
        self.process.start()
        theirs.close()
        self.start = self.answer()

    def answer(self) -> dict[str, float]:
        answer = self.connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def run(self, case: Case) -> None:
        for _ in range(1 + case.is_repeated):
            self.connection.send((case.prompts, case.num_new))
            answer = self.answer()
        self.rounds.append(answer)

    def figure(self, metric: str) -> float:
        return median(one[metric] for one in self.rounds[1:] or self.rounds)

    def close(self) -> None:
        if self.process.is_alive():
            self.connection.send(None)
        self.process.join()


def longest(model: str) -> int:
    config = json.loads((Path(model) / "config.json").read_text())
    return min(LONGEST, int(config["max_position_embeddings"]))


def engine_options(name: str, case: Case, dtype: str) -> dict[str, Any]:
    """What makes contestants differ: `vLLM auto`, `vLLM fp8`, or a format of ours."""
    options = {
        "dtype": dtype,
        "kv_cache_memory_bytes": case.pool,
        "enforce_eager": True,
        "enable_prefix_caching": case.is_repeated,
        **case.options,
    }
    if name.startswith("vLLM "):
        return {**options, "kv_cache_dtype": name.removeprefix("vLLM ")}
    config = {"paged_kv": {"format": name}}
    return {**options, "attention_backend": "CUSTOM", "additional_config": config}


def run_case(
    case: Case, names: list[str], model: str, dtype: str, rounds: int
) -> dict[str, Contestant]:
    """All contestants, in turn; one that cannot be started is said and left out."""
    contestants: dict[str, Contestant] = {}
    try:
        for name in names:
            try:
                contestants[name] = Contestant(name, model, engine_options(name, case, dtype))
            except Exception as error:
                print(f"{name} is left out of {case.name}: {error}")
        for turn in range(rounds + (rounds > 1)):
            for contestant in contestants.values():
                contestant.run(case)
                print(case.name, turn, contestant.name, contestant.rounds[-1], flush=True)
    finally:
        for contestant in contestants.values():
            contestant.close()
    return contestants


def rows_of(case: Case, contestants: dict[str, Contestant], figures: dict[str, Any]) -> list[Row]:
    first = next(iter(contestants))  # vLLM's own cache, where it could be started
    own = contestants[first]
    rows = []
    for name, contestant in contestants.items():
        for metric, (unit, is_more_better) in figures.items():
            value, baseline = (
                one.start[metric] if metric in one.start else one.figure(metric)
                for one in (contestant, own)
            )
            better, worse = (value, baseline) if is_more_better else (baseline, value)
            rows.append(
                Row(
                    case=f"{case.name}, {name}",
                    metric=metric,
                    value=value,
                    unit=unit,
                    baseline=None if name == first else first,
                    baseline_value=None if name == first else baseline,
                    ratio=None if name == first or not worse else better / worse,
                )
            )
    return rows


def text_of(model: str) -> list[int]:
    from transformers import AutoTokenizer

    token_ids: list[int] = AutoTokenizer.from_pretrained(model)(TEXT.read_text(encoding="utf-8"))[
        "input_ids"
    ]
    return token_ids


def prompts_of(text: list[int], count: int, length: int) -> list[list[int]]:
    """Stretches of a text, each from a place of its own."""
    text = text * (2 + length // len(text))
    starts = random.Random(count).sample(range(len(text) - length), count)
    return [text[start : start + length] for start in starts]


def cases_of(model: str, pool: int, num: int) -> list[tuple[Case, dict[str, Any]]]:
    """With what each reports; `num` requests where a run is not short, or few."""
    memory = {"tokens": ("tokens", True), "start-up": ("s", False), "imports": ("s", False)}
    memory |= {name: FIGURES[name] for name in ("decoding side by side", "peak pages")}
    ample = 768 << 20
    long, text = longest(model) - 64, text_of(model)

    def case(
        name: str, count: int, length: int, new: int, size: int, repeated: bool = False, **more: Any
    ) -> Case:
        options = {"max_model_len": 1024, **more}
        return Case(name, prompts_of(text, count, length), new, size, options, repeated)

    found = [
        (case("memory", num // 4, long, 64, pool, max_model_len=long + 64), memory),
        (case("equal batch", num, 128, 64, ample), FIGURES),
        (case("equal memory", num, 256, 96, pool), FIGURES),
        (case("repeated prompts", num, 300, 48, pool, repeated=True), FIGURES),
    ]
    for count in (2 * num, 8 * num):
        options = {"max_num_seqs": count, "max_num_batched_tokens": 64 * count}
        planned = case(f"planning {count}", count, 32, 16, ample, **options)
        found.append((planned, {"planning": ("us", False)}))
    return found


BUDGET_FIGURES = {
    **FIGURES,
    "between tokens, p99": ("ms", False),
    "running side by side": ("requests", True),
    "side by side, mean": ("requests", True),
}


def budget_case(arguments: argparse.Namespace) -> tuple[Case, dict[str, Any]]:
    """What `paged-kv bench throughput --native-sequences` measures with these options."""
    config = json.loads((Path(arguments.model) / "config.json").read_text())
    most = int(config["max_position_embeddings"])
    name, workload = workload_of(arguments, config["vocab_size"], most, None)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    num_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    element_bytes = 4 if arguments.dtype == "float32" else 2
    page = 2 * 16 * config["num_hidden_layers"] * num_heads * head_dim * element_bytes
    pages = arguments.native_sequences * -(-round(mean_tokens(workload)) // 16)
    longest = max(len(item.prompt) + item.num_outputs for item in workload)
    pages = max(pages, 8 * (longest // 128 + 2))  # vLLM's own are of 128 tokens on a CPU
    print(f"{name}\n{describe(workload)}; {pages * page / 2**20:.1f} MiB")
    case = Case(
        "budget",
        [item.prompt for item in workload],
        [item.num_outputs for item in workload],
        (pages + 1) * page,  # one that vLLM never uses
        {"max_model_len": longest, "max_num_seqs": 128},
    )
    return case, BUDGET_FIGURES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(DEMO_MODEL), help="a folder")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--pool", type=int, default=160, help="MiB of the cases with equal memory")
    parser.add_argument("--formats", nargs="*", default=list(FORMATS))
    parser.add_argument("--peers", nargs="*", default=["fp8"], help="other kv_cache_dtypes of vLLM")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="that count")
    parser.add_argument("--cases", nargs="*", help="by the first word of their names")
    parser.add_argument("--native-sequences", type=int, default=8, help="the pool of budget (8)")
    add_workload(parser, has_arrivals=False)  # of budget
    add_arguments(parser)
    arguments = parser.parse_args()
    num, rounds = (4, 1) if arguments.quick else (32, arguments.rounds)
    names = [OWN, *(f"vLLM {peer}" for peer in arguments.peers), *arguments.formats]
    rows: list[Row] = []
    cases = cases_of(arguments.model, arguments.pool << 20, num)
    if "budget" in (arguments.cases or ()):
        cases.append(budget_case(arguments))
    for case, figures in cases:
        if arguments.cases and case.name.split()[0] not in arguments.cases:
            continue
        once = 1 if case.name == "memory" else rounds
        contestants = run_case(case, names, arguments.model, arguments.dtype, once)
        rows += rows_of(case, contestants, figures)
        write_report("vllm", rows, arguments.json)  # as far as it got


if __name__ == "__main__":
    main()
