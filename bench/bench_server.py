"""`paged-kv serve` under load, beside vLLM's server and beside the same engine without a server.

    python bench/bench_server.py --model FOLDER --vllm-python .venv-vllm/bin/python --json FILE

`vllm bench serve`, of the environment that `make test-vllm` makes, drives both servers. These are
processes that stay for all rounds, and so is an offline one, which decodes the same prompts by
`LLM.stream`. Rounds go in turns, the first of each does not count, and who is not asked does not
work. All have the same threads, precision and memory, and the same prompts, stretches of a text
that share no prefix; requests are greedy and run to their full length.

- saturated: all requests at once. Output tokens a second, from the first request to the last
  token. The load tool takes its share of the same processors, the offline process has them alone.
- Poisson: four times as many requests, which come at 80 % of the requests a second that this server
  did when saturated. Milliseconds to the first token and between tokens as a client sees them: of
  all gaps of all requests; and how long a request took at most, in medians.

Rows are medians of rounds. A request that fails, or ends early, ends the benchmark.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

import numpy as np
from bench_peers import Engine, Process
from bench_vllm import DEMO_MODEL, prompts_of, text_of
from report import ROOT, Row, add_arguments, write_report

OURS, PEER, OFFLINE = "ours", "vLLM", "offline"
SATURATED, POISSON = "saturated", "Poisson"
NAME = "model"  # what requests call it
LOAD_SHARE = 0.8  # of the requests a second that saturate a server
MOST_SECONDS = 600.0  # until a server answers: vLLM's compiles first
LONGEST = 1024  # tokens of a request
MEMORY = 1 << 30  # bytes of K/V
POISSON_TIMES = 4  # as many requests as a saturated round has
THROUGHPUT, RATE = "output tokens", "requests"
SPREAD, LONGEST_REQUEST = "between tokens, p99 in medians", "longest request in medians"
QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99}
UNITS = {  # and whether more is better
    THROUGHPUT: ("tokens/s", True),
    RATE: ("requests/s", True),
    **{f"first token, {name}": ("ms", False) for name in QUANTILES},
    **{f"between tokens, {name}": ("ms", False) for name in QUANTILES},
    SPREAD: ("medians", False),
    LONGEST_REQUEST: ("medians", False),
}


Figures = dict[str, dict[str, dict[str, float]]]  # by load, contestant and metric


@dataclass(frozen=True)
class Load:
    """The requests of a round."""

    prompts: Path  # a line of JSON each
    count: int
    num_new: int
    rate: float = float("inf")  # requests a second: a Poisson process, or all at once


class Server:
    """A process that serves a model at a port of its own, until the block ends."""

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> None:
        self.name = name
        self._log = log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._command = [*command, "--port", str(port)]
        self._environment = {**os.environ, **environment}

    def __enter__(self) -> Server:
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdout=log, stderr=log
            )
        deadline = time.monotonic() + MOST_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__(None, None, None)
                raise RuntimeError(f"{self.name} does not serve: {' '.join(self._command)}")
            time.sleep(0.2)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=10):
                return True
        except OSError:
            return False


def vllm_environment(num_threads: int) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": str(num_threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def our_command(arguments: argparse.Namespace) -> list[str]:
    return [sys.executable, "-m", "paged_kv"]


def vllm_command(arguments: argparse.Namespace) -> list[str]:
    return [arguments.vllm_python, "-m", "vllm.entrypoints.cli.main"]


def servers_of(arguments: argparse.Namespace) -> list[Server]:
    """With the same memory, lengths and threads; what they do in a step is their own default."""
    alike = {
        "max-num-seqs": 64,
        "max-model-len": LONGEST,
        "dtype": arguments.dtype,
        "served-model-name": NAME,
    }
    own = {"threads": arguments.threads, "kv-memory": MEMORY, "kv-format": arguments.kv_format}
    ours = [*our_command(arguments), "serve", arguments.model, *options_of(alike | own)]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {"OMP_NUM_THREADS": str(arguments.threads), "PYTHONPATH": paths}
    servers = [Server(OURS, [*ours, "--no-prefix-caching"], environment, arguments.log)]
    if not arguments.alone:
        peer = [*vllm_command(arguments), "serve", arguments.model]
        peer += options_of(alike | {"kv-cache-memory-bytes": MEMORY})
        peer.append("--no-enable-prefix-caching")
        servers.append(Server(PEER, peer, vllm_environment(arguments.threads), arguments.log))
    return servers


def options_of(values: Mapping[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


def drive(server: Server, load: Load, arguments: argparse.Namespace) -> dict[str, Any]:
    """What `vllm bench serve` says of a server."""
    with TemporaryDirectory() as folder:
        options = {
            "base-url": server.url,
            "model": NAME,
            "tokenizer": arguments.model,
            "dataset-name": "custom",
            "dataset-path": load.prompts,
            "custom-output-len": load.num_new,
            "num-prompts": load.count,
            "request-rate": load.rate,
            "seed": 0,
            "temperature": 0,
            "result-dir": folder,
            "result-filename": "result.json",
        }
        command = [*vllm_command(arguments), "bench", "serve", *options_of(options)]
        command += ["--skip-chat-template", "--disable-shuffle", "--ignore-eos", "--disable-tqdm"]
        command += ["--save-result", "--save-detailed"]
        environment = {**os.environ, **vllm_environment(1)}
        with arguments.log.open("a") as log:
            subprocess.run(command, env=environment, check=True, stdout=log, stderr=log)
        result: dict[str, Any] = json.loads(Path(folder, "result.json").read_text())
    return result


def figures(result: Mapping[str, Any], load: Load) -> dict[str, float]:
    """Of one round; raises where a request failed or was cut off."""
    if result["output_lens"] != [load.num_new] * load.count:
        failed = [error for error in result["errors"] if error]
        raise RuntimeError(f"requests ended early: {result['output_lens']}, {failed[:1]}")
    first = np.array(result["ttfts"])
    gaps = np.concatenate(result["itls"])
    seconds = np.array(result["latencies"])
    found = {THROUGHPUT: result["output_throughput"], RATE: result["request_throughput"]}
    for name, quantile in QUANTILES.items():
        found[f"first token, {name}"] = 1000 * float(np.quantile(first, quantile))
        found[f"between tokens, {name}"] = 1000 * float(np.quantile(gaps, quantile))
    found[SPREAD] = found["between tokens, p99"] / found["between tokens, median"]
    found[LONGEST_REQUEST] = float(seconds.max() / np.median(seconds))
    return found


class Offline:
    """The same engine in a process without a server, on the prompts of a saturated round."""

    name = OFFLINE

    def __init__(self, load: Load, texts: Sequence[str], arguments: argparse.Namespace) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        job = {
            "model": arguments.model,
            "precision": arguments.dtype,
            "kv": arguments.kv_format,
            "prompts": [tokenizer(text)["input_ids"] for text in texts],
            "num_new": [load.num_new] * load.count,
            "has_prefix_cache": False,
            "num_threads": arguments.threads,
            "longest": LONGEST,
        }
        engine = Engine(OFFLINE, "ours.py", sys.executable, arguments.dtype, arguments.kv_format)
        self._process = Process(engine, job, arguments.log)

    def run(self) -> dict[str, float]:
        self._process.run()
        times = self._process.rounds[-1]["times"]
        seconds = max(some[-1] for some in times)
        return {THROUGHPUT: sum(map(len, times)) / seconds, RATE: len(times) / seconds}

    def close(self) -> None:
        self._process.close()


def measure(
    load: Load, texts: Sequence[str], arguments: argparse.Namespace, rounds: int
) -> Figures:
    """Medians of each contestant under each kind of load."""
    saturated: dict[str, list[dict[str, float]]] = {}
    poisson: dict[str, list[dict[str, float]]] = {}
    with ExitStack() as stack:
        offline = stack.enter_context(closing(Offline(load, texts[: load.count], arguments)))
        servers = [stack.enter_context(server) for server in servers_of(arguments)]

        def run(server: Server, asked: Load, found: dict[str, list[dict[str, float]]]) -> None:
            result = figures(drive(server, asked, arguments), asked)
            found.setdefault(server.name, []).append(result)
            print(server.name, f"{asked.rate:.2f}", rounded(result), flush=True)

        for _ in range(rounds + 1):
            saturated.setdefault(OFFLINE, []).append(offline.run())
            print(OFFLINE, rounded(saturated[OFFLINE][-1]), flush=True)
            for server in servers:
                run(server, load, saturated)
        highest = {name: medians(each[1:]) for name, each in saturated.items()}
        for _ in range(rounds):
            for server in servers:
                rate = LOAD_SHARE * highest[server.name][RATE]
                run(server, replace(load, count=len(texts), rate=rate), poisson)
    return {SATURATED: highest, POISSON: {name: medians(each) for name, each in poisson.items()}}


def medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {metric: median(one[metric] for one in rounds) for metric in rounds[0]}


def rounded(found: Mapping[str, float]) -> dict[str, float]:
    return {metric: round(value, 2) for metric, value in found.items()}


def rows_of(found: Figures) -> list[Row]:
    """All figures; ours beside the other server's, and throughput beside what is offline."""
    rows = []
    for load, contestants in found.items():
        for name, values in contestants.items():
            for metric, value in values.items():
                other = PEER if name == OURS and PEER in contestants else None
                rows.append(row_of(f"{load}, {name}", metric, value, other, contestants))
        if OFFLINE in contestants:
            value = contestants[OURS][THROUGHPUT]
            case = f"{load}, {OURS} beside {OFFLINE}"
            rows.append(row_of(case, THROUGHPUT, value, OFFLINE, contestants))
    return rows


def row_of(
    case: str,
    metric: str,
    value: float,
    other: str | None,
    contestants: Mapping[str, Mapping[str, float]],
) -> Row:
    unit, is_more_better = UNITS[metric]
    if other is None:
        return Row(case=case, metric=metric, value=value, unit=unit)
    beside = contestants[other][metric]
    better, worse = (value, beside) if is_more_better else (beside, value)
    return Row(
        case=case,
        metric=metric,
        value=value,
        unit=unit,
        baseline=other,
        baseline_value=beside,
        ratio=better / worse,
    )


def texts_of(model: str, count: int, length: int) -> list[str]:
    """Stretches of a text, of about so many tokens, each from a place of its own."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return [tokenizer.decode(prompt) for prompt in prompts_of(text_of(model), count, length)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(DEMO_MODEL), help="a folder")
    parser.add_argument("--vllm-python", required=True, help="the Python of its environment")
    parser.add_argument("--alone", action="store_true", help="leave vLLM's server out")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--kv-format", default="native", help="of ours")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--requests", type=int, default=48, help="of a saturated round")
    parser.add_argument("--prompt-tokens", type=int, default=96)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="that count")
    parser.add_argument("--log", type=Path, default=os.devnull, help="where messages go")
    add_arguments(parser)
    arguments = parser.parse_args()
    count, num_new, rounds = arguments.requests, arguments.output_tokens, arguments.rounds
    if arguments.quick:
        count, num_new, rounds = 4, 8, 1
    texts = texts_of(arguments.model, POISSON_TIMES * count, arguments.prompt_tokens)
    with TemporaryDirectory() as folder:
        prompts = Path(folder, "prompts.jsonl")
        prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        found = measure(Load(prompts, count, num_new), texts, arguments, rounds)
    write_report("server", rows_of(found), arguments.json)


if __name__ == "__main__":
    main()
