"""Throughput and latency of a real model on a CPU, beside the engines that people use there.

    python bench/bench_peers.py --model FOLDER --vllm PYTHON --openvino PYTHON --gguf FILE \
        --llama PYTHON --llama-gguf FOLDER --transformers PYTHON

Engines whose Python is not given are left out. Each runs in an environment of its own
(`bench/peers/engines/README.md`), as a process that stays for all rounds of a workload; rounds go
in turns and the first does not count. All get the same token ids, the same threads, all requests at
once, greedy, to their full length:

- short: 32 requests of 128 + 128 tokens;
- long: 16 of 1500 + 64;
- one: 1 of 4000 + 64;
- mixed: 64 whose lengths are drawn lognormally, about 250 + 60;
- shared: 32 that begin with the same 1000 tokens, + 100 of their own + 64.

Rows are medians of rounds: output tokens a second, seconds to the first token, milliseconds between
tokens, the cache held at most, the memory of the process, and how many requests have the tokens of
our native cache in float32. `ratio` compares ours with the best other engine of that precision.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from bench_vllm import text_of
from report import Row, add_arguments, write_report

ENGINES = Path(__file__).parent / "peers" / "engines"
ANSWER = "answer "
REFERENCE = "ours native float32"


@dataclass(frozen=True)
class Engine:
    """One engine with its settings, in the environment of `python`."""

    name: str
    script: str
    python: str
    precision: str
    kv: str
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        return self.script == "ours.py"


@dataclass(frozen=True)
class Workload:
    name: str
    prompts: list[list[int]]
    num_new: list[int]
    has_prefix_cache: bool = False


class Process:
    """An engine that waits for rounds."""

    def __init__(self, engine: Engine, job: dict[str, Any], log: Path) -> None:
        began = time.perf_counter()
        self._log = log.open("a")
        self._process = subprocess.Popen(
            [engine.python, str(ENGINES / engine.script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.rounds: list[dict[str, Any]] = []
        self._ask(json.dumps(job))
        self.start_seconds = time.perf_counter() - began  # with all imports

    def run(self) -> None:
        self.rounds.append(self._ask("round"))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        for said in self._process.stdout:
            if said.startswith(ANSWER):
                answer: dict[str, Any] = json.loads(said.removeprefix(ANSWER))
                return answer
        raise RuntimeError(f"an engine ended; its messages are in {self._log.name}")


def workloads(model: str, scale: float) -> list[Workload]:
    """Prompts of a text; `scale` below 1 asks for fewer and shorter requests."""
    tokens, draw = text_of(model) * 8, random.Random(0)

    def count(number: int) -> int:
        return max(int(number * scale), 2)

    def prompt(length: int) -> list[int]:
        start = draw.randrange(max(len(tokens) - length, 1))
        return tokens[start : start + length]

    def alike(name: str, requests: int, length: int, new: int) -> Workload:
        requests = count(requests) if requests > 1 else 1
        return Workload(
            name, [prompt(count(length)) for _ in range(requests)], [count(new)] * requests
        )

    lengths = (
        np.random.default_rng(0).lognormal([5.3, 3.9], [0.7, 0.6], (count(64), 2)).astype(int) + 1
    )
    opening, shared = prompt(count(1000)), count(32)
    return [
        alike("short", 32, 128, 128),
        alike("long", 16, 1500, 64),
        alike("one", 1, 4000, 64),
        Workload("mixed", [prompt(int(n)) for n in lengths[:, 0]], lengths[:, 1].tolist()),
        Workload(
            "shared",
            [opening + prompt(count(100)) for _ in range(shared)],
            [count(64)] * shared,
            has_prefix_cache=True,
        ),
    ]


def run_workload(
    workload: Workload, engines: Sequence[Engine], arguments: argparse.Namespace, rounds: int
) -> dict[str, Process]:
    """All engines in turns; the first round of each warms it."""
    longest = max(len(p) + n for p, n in zip(workload.prompts, workload.num_new, strict=True))
    processes: dict[str, Process] = {}
    log = Path(arguments.log)
    try:
        for engine in engines:
            job = {
                "model": arguments.model,
                "precision": engine.precision,
                "kv": engine.kv,
                "prompts": workload.prompts,
                "num_new": workload.num_new,
                "has_prefix_cache": workload.has_prefix_cache,
                "num_threads": arguments.threads,
                "longest": longest + 1,
                "extra": engine.extra,
            }
            processes[engine.name] = Process(engine, job, log)
        for _ in range(rounds + 1):
            for process in processes.values():
                process.run()
    finally:
        for process in processes.values():
            process.close()
    return processes


def figures(process: Process, reference: list[list[int]]) -> dict[str, float]:
    """Medians of the rounds that count."""
    rounds = process.rounds[1:]
    gaps = [np.concatenate([np.diff(times) for times in each["times"]]) for each in rounds]
    seconds = [max(times[-1] for times in each["times"]) for each in rounds]
    counts = [sum(map(len, each["tokens"])) for each in rounds]
    found = {
        "throughput": median(n / s for n, s in zip(counts, seconds, strict=True)),
        "first token": median(median(t[0] for t in each["times"]) for each in rounds),
        "between tokens, median": 1000 * median(float(np.median(gap)) for gap in gaps),
        "between tokens, 99 %": 1000 * median(float(np.quantile(gap, 0.99)) for gap in gaps),
        "memory": max(each["rss_bytes"] for each in rounds) / 2**20,
        "equal requests": sum(
            mine == its for mine, its in zip(rounds[-1]["tokens"], reference, strict=True)
        ),
        "start": process.start_seconds,
    }
    if rounds[-1]["kv_bytes"]:
        found["cache"] = max(each["kv_bytes"] for each in rounds) / 2**20
    return found


UNITS = {
    "throughput": ("tokens/s", True),
    "first token": ("s", False),
    "between tokens, median": ("ms", False),
    "between tokens, 99 %": ("ms", False),
    "cache": ("MiB", False),
    "memory": ("MiB", False),
    "equal requests": ("requests", True),
    "start": ("s", False),
}


def rows_of(
    workload: Workload, engines: Sequence[Engine], found: dict[str, dict[str, float]]
) -> list[Row]:
    """Each engine's figures; ours beside the best other engine of the same precision."""
    rows = []
    for engine in engines:
        others = [e.name for e in engines if not e.is_ours and e.precision == engine.precision]
        for metric, (unit, is_more_better) in UNITS.items():
            if metric not in found[engine.name]:
                continue
            value = found[engine.name][metric]
            rivals = {name: found[name][metric] for name in others if metric in found[name]}
            case = f"{workload.name}, {engine.name}"
            if not engine.is_ours or not rivals:
                rows.append(Row(case=case, metric=metric, value=value, unit=unit))
                continue
            best = (max if is_more_better else min)(rivals, key=lambda name: rivals[name])
            ratio = value / rivals[best] if is_more_better else rivals[best] / value
            rows.append(
                Row(
                    case=case,
                    metric=metric,
                    value=value,
                    unit=unit,
                    baseline=best,
                    baseline_value=rivals[best],
                    ratio=ratio,
                )
            )
    return rows


def engines_of(arguments: argparse.Namespace) -> list[Engine]:
    ours = [
        Engine(f"ours {kv} {precision}", "ours.py", sys.executable, precision, kv)
        for precision in ("float32", "bfloat16")
        for kv in ("native", "int8")
    ]
    peers = []
    for precision in ("float32", "bfloat16"):
        if arguments.vllm:
            name = f"vLLM {precision}"
            peers.append(Engine(name, "vllm_cpu.py", arguments.vllm, precision, "auto"))
        if arguments.openvino:
            extra = {"gguf": str(Path(arguments.gguf).resolve())}
            name = f"OpenVINO u8 {precision}"
            peers.append(
                Engine(name, "openvino_genai_cpu.py", arguments.openvino, precision, "u8", extra)
            )
        if arguments.llama:
            extra = {"gguf": str(Path(arguments.llama_gguf).resolve())}
            for kv in ("f16", "q8_0"):
                name = f"llama.cpp {kv} {precision}"
                peers.append(
                    Engine(name, "llama_cpp_cpu.py", arguments.llama, precision, kv, extra)
                )
        if arguments.transformers:
            for kv in ("padded", "batching"):
                name = f"transformers {kv} {precision}"
                peers.append(
                    Engine(name, "transformers_cpu.py", arguments.transformers, precision, kv)
                )
    return ours + peers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a folder")
    parser.add_argument("--vllm", help="the Python of its environment")
    parser.add_argument("--openvino", help="the Python of its environment")
    parser.add_argument("--gguf", help="the model for OpenVINO, which writes its own beside it")
    parser.add_argument("--llama", help="the Python of its environment")
    parser.add_argument("--llama-gguf", help="a folder with float32.gguf and bfloat16.gguf")
    parser.add_argument("--transformers", help="the Python of its environment")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workloads", nargs="*")
    parser.add_argument("--engines", nargs="*", help="by the beginning of their names")
    parser.add_argument("--log", default="/dev/null", help="where engines' messages go")
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.model is None:
        parser.error("--model is missing")
    engines = [
        engine
        for engine in engines_of(arguments)
        if not arguments.engines or engine.name.startswith(tuple(arguments.engines))
    ]
    rows: list[Row] = []
    for workload in workloads(arguments.model, 0.05 if arguments.quick else 1.0):
        if arguments.workloads and workload.name not in arguments.workloads:
            continue
        rounds = 1 if arguments.quick else arguments.rounds
        processes = run_workload(workload, engines, arguments, rounds)
        tokens = processes.get(REFERENCE, next(iter(processes.values()))).rounds[-1]["tokens"]
        found = {name: figures(process, tokens) for name, process in processes.items()}
        for name, values in found.items():
            print(workload.name, name, {k: round(v, 2) for k, v in values.items()}, flush=True)
        rows += rows_of(workload, engines, found)
        write_report("peers", rows, arguments.json)


if __name__ == "__main__":
    main()
