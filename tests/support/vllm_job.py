"""One engine of vLLM in a process of its own; our own engine beside it.

vLLM walks the modules that are loaded when an engine is made and trips over llvmlite's, which our
kernels have loaded by then. Its import takes eight seconds, and longer than most jobs: one process
imports it once, computes nothing, and forks for each job.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import paged_kv

ROOT = Path(__file__).parents[2]
MODEL = str(Path(paged_kv.__file__).parent / "demo_model")
NUM_NEW = 64
MEMORY = 64 << 20
CLOSE = 1e-3  # in a logarithm of a probability
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 1024,
    "kv_cache_memory_bytes": MEMORY,
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "max_num_batched_tokens": 4096,
}

Tokens = list[list[int]]


@dataclass
class Answer:
    """What an engine did with the prompts of a job."""

    rounds: list[Tokens]  # of every completion, in the prompts' order
    gaps: list[list[list[float]]] = field(default_factory=list)  # from a token to the second best
    num_lost: int = 0  # pages that nobody holds at the end and that are not free
    num_hit_tokens: int = 0  # of the last round
    preempted: dict[str, list[int]] = field(default_factory=dict)  # tokens made, by prompt index
    peak_bytes: int = 0  # of pages that requests held, the most after any step
    peak_running: int = 0  # requests that made tokens in the same step
    log_probs: list[float] = field(default_factory=list)  # of each prompt's tokens, the mean
    capacity: int = 0  # "KV cache size" in vLLM's log
    concurrency: float = 0.0


def environment(**changes: str) -> dict[str, str]:
    """One thread and one process for each engine, nothing from the network."""
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    settings |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    settings["VLLM_NO_USAGE_STATS"] = "1"
    return {**os.environ, **settings, **changes}


def vllm_answer(
    prompts: Tokens,
    *,
    model: str = MODEL,
    rounds: int = 1,
    kv_format: str | None = None,
    params: dict[str, Any] | None = None,
    aborted: dict[int, int] | None = None,
    **options: Any,
) -> Answer:
    """Of vLLM, on our blocks if a format is named; no page is lost on the way.

    `aborted` maps indices of prompts to the number of tokens after which nobody wants more.
    """
    if kv_format is not None:
        paged = {"format": kv_format, **options.pop("paged_kv", {})}
        options |= {"attention_backend": "CUSTOM", "additional_config": {"paged_kv": paged}}
    job = {
        "model": model,
        "prompts": prompts,
        "rounds": rounds,
        "params": params or {},
        "aborted": aborted or {},
        "options": {**OPTIONS, **options},
        "is_ours": kv_format is not None,
    }
    with TemporaryDirectory() as folder:
        order = {"job": job, "answer": f"{folder}/answer.json", "log": f"{folder}/log"}
        process = forking_process()
        assert process.stdin is not None
        assert process.stdout is not None
        print(json.dumps(order), file=process.stdin, flush=True)
        status = process.stdout.readline()
        assert status == "0\n", Path(order["log"]).read_text()[-4000:]
        answer = Answer(**json.loads(Path(order["answer"]).read_text()))
    assert answer.num_lost == 0
    return answer


@cache
def forking_process() -> subprocess.Popen[str]:
    """It ends with its standard input, and so with the process that asks it for engines."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.vllm_job"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env=environment(),
        text=True,
    )


def first_difference(answer: Answer, expected: list[Tokens]) -> tuple[int, int, int] | None:
    """Round, completion and place, but not where the engines' rounding can have decided.

    Codes of few bits make of the last bit of a float a step of 1e-4 in the logits.
    """
    assert [len(some) for some in answer.rounds] == [len(some) for some in expected]
    for turn, some in enumerate(expected):
        for number, tokens in enumerate(some):
            pairs = zip(answer.rounds[turn][number], tokens, strict=True)
            place = next((i for i, (mine, its) in enumerate(pairs) if mine != its), None)
            is_close = place is None or answer.gaps[turn][number][place] <= CLOSE  # not of NaN
            if not is_close:
                return turn, number, place
    return None


def own_rounds(
    prompts: Tokens, kv_format: str, *, model: str = MODEL, rounds: int = 1, **options: Any
) -> list[Tokens]:
    """Of our own engine with the same settings."""
    import torch

    settings = {"token_budget": 4096, "prefix_caching": False, "max_model_len": 1024, **options}
    params = paged_kv.SamplingParams(temperature=0.0, max_tokens=NUM_NEW, ignore_eos=True)
    with paged_kv.LLM(
        model, kv_format=kv_format, calibration=None, dtype=torch.float32, kv_memory=MEMORY,
        **settings,
    ) as llm:  # fmt: skip
        outputs = [llm.generate(prompts, params) for _ in range(rounds)]
    return [[list(one.completions[0].token_ids) for one in some] for some in outputs]


# -- in the job's process ------------------------------------------------------------------------


def run(job: dict[str, Any]) -> Answer:
    from vllm import LLM, SamplingParams

    llm = LLM(job["model"], **job["options"])
    core = llm.llm_engine.engine_core.engine_core
    scheduler, pool = core.scheduler, core.scheduler.kv_cache_manager.block_pool
    groups = scheduler.kv_cache_config.kv_cache_groups
    is_ours = all(type(group.kv_cache_spec).__name__.startswith("PagedKV") for group in groups)
    assert is_ours == job["is_ours"], "vLLM did not take the cache that it was asked to take"
    answer = Answer([])
    watch_preemptions(scheduler, answer)
    params = SamplingParams(
        **{
            "temperature": 0,
            "max_tokens": NUM_NEW,
            "ignore_eos": True,
            "logprobs": 2,
            **job["params"],
        }
    )
    aborted = {int(index): count for index, count in job["aborted"].items()}
    for _ in range(job["rounds"]):
        one_round(llm.llm_engine, scheduler, job["prompts"], params, aborted, answer)
    answer.num_lost = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
    answer.capacity = core.vllm_config.cache_config.kv_cache_size_tokens
    answer.concurrency = core.vllm_config.cache_config.kv_cache_max_concurrency
    return answer


def watch_preemptions(scheduler: Any, answer: Answer) -> None:
    preempt = scheduler._preempt_request

    def watched(request: Any, *arguments: Any, **options: Any) -> None:
        index = request.request_id.split("-")[0]
        answer.preempted.setdefault(index, []).append(request.num_output_tokens)
        preempt(request, *arguments, **options)

    scheduler._preempt_request = watched


def one_round(
    engine: Any,
    scheduler: Any,
    prompts: Tokens,
    params: Any,
    aborted: dict[int, int],
    answer: Answer,
) -> None:
    """All prompts at once, to their end, as `LLM.generate` goes about it."""
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
    pool, config = scheduler.kv_cache_manager.block_pool, scheduler.kv_cache_config
    page_bytes = max(
        len(group.layer_names) * group.kv_cache_spec.page_size_bytes
        for group in config.kv_cache_groups
    )
    last: dict[int, Any] = {}
    completions: dict[tuple[int, int], Any] = {}
    while engine.has_unfinished_requests():
        outputs = engine.step()
        answer.peak_running = max(answer.peak_running, len(outputs))
        num_held = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        answer.peak_bytes = max(answer.peak_bytes, num_held * page_bytes)
        for output in outputs:
            index = int(output.request_id)
            last[index] = output
            completions |= {(index, one.index): one for one in output.outputs}
            if len(output.outputs[0].token_ids) >= aborted.get(index, params.max_tokens + 1):
                engine.abort_request([output.request_id])
    whole = [completions[key] for key in sorted(completions)]
    answer.rounds.append([list(one.token_ids) for one in whole])
    answer.gaps.append([[gap(best) for best in one.logprobs or ()] for one in whole])
    answer.num_hit_tokens = sum(output.num_cached_tokens or 0 for output in last.values())
    if params.prompt_logprobs is not None:
        for output in last.values():
            given = [next(iter(some.values())).logprob for some in output.prompt_logprobs[1:]]
            answer.log_probs.append(sum(given) / len(given))


def gap(best: dict[int, Any]) -> float:
    first, second = sorted((one.logprob for one in best.values()), reverse=True)[:2]
    return float(first - second)


def serve() -> None:
    """A line for each order's exit status, once its process has ended."""
    statuses = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed on import is no status
    with suppress(ImportError):  # the job says so
        import vllm.entrypoints.llm  # noqa: F401
    for line in sys.stdin:
        process = os.fork()
        if not process:
            statuses.close()
            do(**json.loads(line))
            return
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        print(status, file=statuses, flush=True)


def do(job: dict[str, Any], answer: str, log: str) -> None:
    """In a forked process: whatever it prints is in the log."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(file, stream)
    Path(answer).write_text(json.dumps(asdict(run(job))))


if __name__ == "__main__":
    serve()
