"""Continuous batching end to end, beside transformers on the same model and the same requests.

    python bench/bench_throughput.py --json bench/results/throughput.json --profile

Model: a Llama made in memory, 10,980,608 parameters in fp32 (6 layers, hidden size 256, 8 query and
4 kv heads of 64, MLP of 960, vocabulary of 8192, embeddings not tied), seeded random weights of
standard deviation 0.1: wide enough that outputs do not repeat themselves. A row tells how close the
two best logits of any step came. There is no end-of-sequence token, so all lengths are exact.

Requests: 32, greedy, all there from the start. Prompts of 16 to 512 random tokens, outputs of 16 to
256, both log-uniform and seeded. Only requested output tokens count.

Ours: `LLM` in each format, up to 32 sequences a step, the default `token_budget` of 1024 tokens a
step, no prefix cache (rounds repeat the same prompts). transformers, every contestant on an
unpatched copy of the model with SDPA attention:

- sequential: `generate` for one request after the other;
- static batches of 8: `generate` on left-padded batches in the order of arrival, each until its
  longest output is complete; what is surplus is cut and not counted;
- static batches of 8, 16 and 32 sorted by output length, which nobody knows beforehand; the fastest
  of the three is the baseline `best static batch, foreknowledge`;
- its continuous batching (`paged|sdpa`, which attends from each token to the tokens of all requests
  of the batch and masks what is foreign), without block sharing, the pool large enough for all
  requests, 16 requests and 512 tokens a step. Tried before: 8 to 32 requests lie within the noise
  of this machine (15 %), 16 among the fastest at one thread, 4 are slower; 128 to 1024 tokens,
  blocks of 256, the other scheduler and torch.compile gain nothing that can be told from noise.
  Its cache cannot be made on a CPU without psutil; without psutil it is left out;
- its `QuantizedCache` with the quanto backend in 4 bits, other settings as they come, in static
  batches of 8 sorted by output length. Left out where optimum-quanto is not installed.

Neither needs another torch: `pip install --no-deps --target DIR optimum-quanto psutil`, then
`PYTHONPATH=DIR`; quanto compiles a small extension with ninja and g++ when it first runs.

Each thread count has a new process, with OMP_NUM_THREADS set, and with a malloc that keeps what was
freed: otherwise page faults take more than half of the time of a dense cache of 32 sequences.
Contestants take turns after one run each that does not count; medians of three rounds. The tokens
of native and of every fp32 contestant are compared with those of sequential `generate`. Memory is
the peak of blocks in use beside keys and values of the largest padded batch, without what
`torch.cat` holds twice.

`--profile` adds one run of native at one thread under timers: each part's own time, what it calls
and is listed as well taken off, averaged over all steps, those with prompts included.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import torch
from report import Row, add_arguments, write_report
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.utils.import_utils import is_optimum_quanto_available

import paged_kv.engine.engine
import paged_kv.models.huggingface
from paged_kv import LLM
from paged_kv.benchmarks.serving import wanted
from paged_kv.benchmarks.workloads import WorkItem, Workload
from paged_kv.cache.formats import FORMATS

THREAD_COUNTS: tuple[int, ...] = (1, 2)
NUM_REQUESTS, NUM_QUICK_REQUESTS = 32, 8
PROMPT_LENGTHS = (16, 512)
OUTPUT_LENGTHS, QUICK_OUTPUT_LENGTHS = (16, 256), (8, 32)
NUM_ROUNDS = 3
VOCAB_SIZE = 8192
STATIC_BATCH = 8
SORTED_BATCHES = (8, 16, 32)
PEER_BLOCK_SIZE = 32
PEER_REQUESTS = 16  # of a step of transformers' continuous batching
PEER_TOKENS = 512  # of such a step
FOREKNOWLEDGE = "best static batch, foreknowledge"
CONTINUOUS = "transformers continuous batching"
STATIC = f"static batches of {STATIC_BATCH}"
SEQUENTIAL = "sequential generate"
MALLOC_SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 26),
    "MALLOC_ARENA_MAX": "1",  # the others of glibc's arenas cannot hold large tensors
}


Outputs = list[list[int]]


@dataclass
class Contestant:
    """Something that continues all requests. `must_equal`: its tokens must be the sequential's."""

    name: str
    run: Callable[[Workload], Outputs]
    must_equal: bool = True
    outputs: Outputs = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def median_seconds(self) -> float:
        return float(np.median(self.seconds))


def make_model(device: torch.device) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=960,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = cast(Any, LlamaForCausalLM)(config).eval()
    model.set_attn_implementation("sdpa")
    return cast(PreTrainedModel, model.to(device))


def make_tasks(is_quick: bool) -> Workload:
    rng = np.random.default_rng(0)
    count = NUM_QUICK_REQUESTS if is_quick else NUM_REQUESTS
    prompt_lens = log_uniform(rng, PROMPT_LENGTHS, count)
    output_lens = log_uniform(rng, QUICK_OUTPUT_LENGTHS if is_quick else OUTPUT_LENGTHS, count)
    return [
        WorkItem(0.0, rng.integers(1, VOCAB_SIZE, size=prompt_len).tolist(), output_len)
        for prompt_len, output_len in zip(prompt_lens, output_lens, strict=True)
    ]


def log_uniform(rng: np.random.Generator, limits: tuple[int, int], count: int) -> list[int]:
    low, high = np.log(limits)
    return [round(value) for value in np.exp(rng.uniform(low, high, size=count)).tolist()]


def our_contestant(llm: LLM, name: str) -> Contestant:
    """All requests at once, as many as the LLM takes."""

    def run(tasks: Workload) -> Outputs:
        outputs = llm.generate(
            [t.prompt for t in tasks], list(map(wanted, tasks)), show_progress=False
        )
        return [output.token_ids for output in outputs]

    return Contestant(name, run, must_equal=name == "native")


def static_contestant(
    model: PreTrainedModel, name: str, batch_size: int, *, is_sorted: bool = False, bits: int = 0
) -> Contestant:
    """`generate` on left-padded batches; with `bits` on a quantized cache."""

    def run(tasks: Workload) -> Outputs:
        outputs: Outputs = [[] for _ in tasks]
        for batch in batches(tasks, batch_size, is_sorted):
            for index, tokens in zip(
                batch, generate_batch(model, [tasks[i] for i in batch], bits), strict=True
            ):
                outputs[index] = tokens
        return outputs

    return Contestant(name, run, must_equal=not bits)


def batches(tasks: Workload, batch_size: int, is_sorted: bool) -> list[list[int]]:
    """Indices of the requests of each batch: in the order of arrival, or longest output first."""
    order = list(range(len(tasks)))
    if is_sorted:
        order.sort(key=lambda index: -tasks[index].num_outputs)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def generate_batch(model: PreTrainedModel, batch: Workload, bits: int) -> Outputs:
    """Pad on the left, run until the longest output is complete, cut what is surplus."""
    width = max(len(task.prompt) for task in batch)
    token_ids = torch.zeros(len(batch), width, dtype=torch.int64)
    mask = torch.zeros_like(token_ids)
    for row, task in enumerate(batch):
        token_ids[row, width - len(task.prompt) :] = torch.tensor(task.prompt)
        mask[row, width - len(task.prompt) :] = 1
    cache: dict[str, Any] = {}
    if bits:
        config = {"backend": "quanto", "nbits": bits}
        cache = {"cache_implementation": "quantized", "cache_config": config}
    generated = cast(Any, model).generate(
        token_ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max(task.num_outputs for task in batch),
        do_sample=False,
        **cache,
    )
    rows = generated[:, width:].tolist()
    return [row[: task.num_outputs] for row, task in zip(rows, batch, strict=True)]


def continuous_contestant(model: PreTrainedModel, tasks: Workload, stack: ExitStack) -> Contestant:
    """transformers' continuous batching; its thread runs, mostly asleep, until the stack closes."""
    greedy = cast(Any, GenerationConfig)(do_sample=False, eos_token_id=-1, pad_token_id=0)
    manager = cast(Any, model).init_continuous_batching(
        generation_config=greedy,
        continuous_batching_config=ContinuousBatchingConfig(
            block_size=PEER_BLOCK_SIZE,
            num_blocks=sum(
                (len(task.prompt) + task.num_outputs) // PEER_BLOCK_SIZE + 2 for task in tasks
            ),
            max_batch_tokens=PEER_TOKENS,
            max_requests_per_batch=PEER_REQUESTS,
            allow_block_sharing=False,
        ),
    )
    manager.start()
    stack.callback(manager.stop, block=True)

    def run(tasks: Workload) -> Outputs:
        request_ids = [
            manager.add_request(task.prompt, max_new_tokens=task.num_outputs) for task in tasks
        ]
        outputs: dict[str, list[int]] = {}
        while len(outputs) < len(tasks):
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError(f"{CONTINUOUS}: {manager.background_thread_status.fatal_error}")
            if result is not None and result.error is not None:
                raise RuntimeError(f"{CONTINUOUS}: {result.error}")
            if result is not None and result.is_finished():
                outputs[result.request_id] = list(result.generated_tokens)
        return [outputs[request_id] for request_id in request_ids]

    return Contestant(CONTINUOUS, run)


def make_peers(model: PreTrainedModel, tasks: Workload, stack: ExitStack) -> list[Contestant]:
    """transformers in every way that is installed, each on its own copy of the model."""
    peers = [
        static_contestant(copy.deepcopy(model), SEQUENTIAL, 1),
        static_contestant(copy.deepcopy(model), STATIC, STATIC_BATCH),
    ]
    for size in sorted_sizes(tasks):
        name = sorted_name(size)
        peers.append(static_contestant(copy.deepcopy(model), name, size, is_sorted=True))
    if model.device.type == "cpu" and find_spec("psutil") is None:
        print(f"without {CONTINUOUS}: on a CPU it needs psutil")
    else:
        peers.append(continuous_contestant(copy.deepcopy(model), tasks, stack))
    if not is_optimum_quanto_available():
        print("without QuantizedCache: optimum-quanto is not installed")
    else:
        name = f"QuantizedCache, quanto {version('optimum-quanto')}, 4-bit"
        own = copy.deepcopy(model)
        peers.append(static_contestant(own, name, STATIC_BATCH, is_sorted=True, bits=4))
    return peers


def sorted_sizes(tasks: Workload) -> list[int]:
    return [size for size in SORTED_BATCHES if size <= len(tasks)]


def sorted_name(batch_size: int) -> str:
    return f"static batches of {batch_size}, sorted"


def make_llms(model: PreTrainedModel, tasks: Workload, stack: ExitStack) -> dict[str, LLM]:
    """Ours, in every format; pools for all requests at the length of the longest."""
    max_model_len = PROMPT_LENGTHS[1] + OUTPUT_LENGTHS[1]
    return {
        name: stack.enter_context(
            LLM(
                copy.deepcopy(model),
                kv_format=name,
                max_num_seqs=len(tasks),
                max_model_len=max_model_len,
                prefix_caching=False,
            )
        )
        for name in FORMATS
    }


def run_timed(
    contestant: Contestant, tasks: Workload, device: torch.device
) -> tuple[Outputs, float]:
    synchronize(device)
    start = time.perf_counter()
    outputs = contestant.run(tasks)
    synchronize(device)
    return outputs, time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compete(
    contestants: list[Contestant], tasks: Workload, num_rounds: int, device: torch.device
) -> None:
    """A run each that only gives the tokens to compare, then rounds in turn, all times printed."""
    for round_index in range(-1, num_rounds):
        for contestant in contestants:
            outputs, seconds = run_timed(contestant, tasks, device)
            what = f"round {round_index + 1}" if round_index >= 0 else "warm-up"
            print(f"  {what:8} {contestant.name:44} {seconds:8.2f} s", flush=True)
            if round_index >= 0:
                contestant.seconds.append(seconds)
            else:
                contestant.outputs = outputs


def best_sorted_size(peers: list[Contestant], tasks: Workload) -> int:
    """The batch size with which static batching with foreknowledge was fastest."""
    seconds = {peer.name: peer.median_seconds for peer in peers}
    return min(sorted_sizes(tasks), key=lambda size: seconds[sorted_name(size)])


def baselines_of(peers: list[Contestant], tasks: Workload) -> dict[str, Contestant]:
    """What ours is compared with, by the names that the rows carry."""
    by_name = {peer.name: peer for peer in peers}
    found = {FOREKNOWLEDGE: by_name[sorted_name(best_sorted_size(peers, tasks))]}
    sorted_names = {sorted_name(size) for size in SORTED_BATCHES}
    return found | {name: peer for name, peer in by_name.items() if name not in sorted_names}


def speed_rows(
    label: str, ours: list[Contestant], peers: list[Contestant], tasks: Workload
) -> list[Row]:
    num_tokens = sum(task.num_outputs for task in tasks)
    rows = [
        Row(
            case=f"{label}, {peer.name}",
            metric="output tokens/s",
            value=num_tokens / peer.median_seconds,
            unit="tokens/s",
        )
        for peer in peers
    ]
    for baseline, peer in baselines_of(peers, tasks).items():
        for contestant in ours:
            row = Row(
                case=f"{label}, {contestant.name}",
                metric="output tokens/s",
                value=num_tokens / contestant.median_seconds,
                unit="tokens/s",
                baseline=baseline,
                baseline_value=num_tokens / peer.median_seconds,
                ratio=peer.median_seconds / contestant.median_seconds,
            )
            rows.append(row)
    return rows


def equality_rows(label: str, contestants: list[Contestant], expected: Outputs) -> list[Row]:
    """Requests of which any token differs from the sequential run's."""
    return [
        Row(
            case=f"{label}, {contestant.name}",
            metric="requests that differ",
            value=sum(a != b for a, b in zip(contestant.outputs, expected, strict=True)),
            unit="requests",
        )
        for contestant in contestants
        if contestant.must_equal and contestant.name != SEQUENTIAL
    ]


@torch.inference_mode()
def margin_row(label: str, model: PreTrainedModel, tasks: Workload, outputs: Outputs) -> Row:
    """How near the second best token ever came to the best: rounding errors must stay below."""
    margins = []
    for task, tokens in zip(tasks, outputs, strict=True):
        token_ids = torch.tensor([task.prompt + tokens], device=model.device)
        logits = model(token_ids).logits[0, len(task.prompt) - 1 : -1]
        best = logits.topk(2).values
        margins.append(float(((best[:, 0] - best[:, 1]) / logits.std(-1)).min()))
    return Row(
        case=label,
        metric="smallest margin of a best logit",
        value=1e6 * min(margins),
        unit="1e-6 std dev",
    )


def memory_rows(
    label: str, llms: dict[str, LLM], peers: list[Contestant], tasks: Workload
) -> list[Row]:
    best = best_sorted_size(peers, tasks)
    token_bytes = llms["native"].bytes_per_token()
    rows = []
    for baseline, size in ((FOREKNOWLEDGE, best), ("all in one batch", len(tasks))):
        dense = dense_tokens(tasks, size) * token_bytes / 2**20
        for name, llm in llms.items():
            engine = llm.engine
            peak = engine.manager.pool.peak_allocated * engine.cache.block_bytes / 2**20
            row = Row(
                case=f"{label}, {name}",
                metric="peak KV memory",
                value=peak,
                unit="MiB",
                baseline=f"dense cache, {baseline}",
                baseline_value=dense,
                ratio=dense / peak,
            )
            rows.append(row)
    return rows


def dense_tokens(tasks: Workload, batch_size: int) -> int:
    """Tokens, padding included, that the largest batch holds; its last ones are never stored."""
    return max(
        len(batch)
        * (max(len(tasks[i].prompt) for i in batch) + max(tasks[i].num_outputs for i in batch) - 1)
        for batch in batches(tasks, batch_size, is_sorted=True)
    )


class PartTimer:
    """Each part's own seconds: while one part calls another, only the inner one's clock runs."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._running:
            part = self._running[-1]
            self.seconds[part] = self.seconds.get(part, 0.0) + now - self._since
        self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._charge()
        self._running.append(name)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            with self.part(name):
                return function(*arguments, **named)

        return timed


def profile_rows(label: str, llm: LLM, tasks: Workload) -> list[Row]:
    """Where the time of a step goes, from the engine's parts under timers."""
    engine, timer = llm.engine, PartTimer()
    places = [
        (torch.nn.functional, "linear", "model: GEMMs"),
        (paged_kv.models.huggingface, "paged_attention", "attention and storing K/V"),
        (engine.model, "forward", "model: all else"),
        (engine.scheduler, "schedule", "scheduler and bookkeeping"),
        (engine.scheduler, "update", "scheduler and bookkeeping"),
        (engine.cache, "begin", "index arrays of the step"),
        (paged_kv.engine.engine, "sample", "sampling"),
    ]
    steps_before = engine.num_steps
    with ExitStack() as stack:
        for owner, attribute, part in places:
            timed = timer.wrap(part, getattr(owner, attribute))
            stack.enter_context(patch.object(owner, attribute, timed))
        stack.enter_context(timer.part("other Python"))
        our_contestant(llm, "native").run(tasks)
    num_steps = engine.num_steps - steps_before
    total = sum(timer.seconds.values())
    rows = []
    for part, seconds in sorted(timer.seconds.items(), key=lambda item: -item[1]):
        milliseconds, percent = 1e3 * seconds / num_steps, 100 * seconds / total
        case = f"{label}, native, profile of {num_steps} steps"
        rows.append(Row(case=case, metric=part, value=percent, unit="%"))
        rows.append(Row(case=case, metric=part, value=milliseconds, unit="ms/step"))
    return rows


def measure(label: str, arguments: argparse.Namespace) -> list[Row]:
    """Everything that one process measures."""
    device = torch.device(arguments.device)
    model = make_model(device)
    tasks = make_tasks(arguments.quick)
    num_prompt, num_output = sum(len(t.prompt) for t in tasks), sum(t.num_outputs for t in tasks)
    print(
        f"{label}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(tasks)} "
        f"requests, {num_prompt} prompt tokens, {num_output} output tokens"
    )
    with ExitStack() as stack:
        peers = make_peers(model, tasks, stack)
        llms = make_llms(model, tasks, stack)
        ours = [our_contestant(llm, name) for name, llm in llms.items()]
        compete(ours + peers, tasks, 1 if arguments.quick else NUM_ROUNDS, device)
        expected = next(peer.outputs for peer in peers if peer.name == SEQUENTIAL)
        rows = speed_rows(label, ours, peers, tasks)
        rows += equality_rows(label, ours + peers, expected)
        rows.append(margin_row(label, model, tasks, expected))
        rows += memory_rows(label, llms, peers, tasks)
        if arguments.profile and arguments.threads == 1:
            rows += profile_rows(label, llms["native"], tasks)
    return rows


def measure_in_child(num_threads: int, arguments: argparse.Namespace) -> list[Row]:
    """`measure` in a process of its own: what is set here is read when a process starts."""
    environment = {**os.environ, **MALLOC_SETTINGS, "OMP_NUM_THREADS": str(num_threads)}
    with tempfile.TemporaryDirectory() as folder:
        rows_file = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--rows-file", str(rows_file)]
        command += ["--device", arguments.device, "--threads", str(num_threads)]
        command += ["--quick"] * arguments.quick + ["--profile"] * arguments.profile
        subprocess.run(command, env=environment, check=True)
        return [Row(**row) for row in json.loads(rows_file.read_text())]


def be_child(arguments: argparse.Namespace) -> None:
    num_threads = arguments.threads
    torch.set_num_threads(num_threads)
    label = f"{num_threads} thread{'s' if num_threads > 1 else ''}"
    if arguments.device != "cpu":
        label = arguments.device
    rows = measure(label, arguments)
    arguments.rows_file.write_text(json.dumps([asdict(row) for row in rows]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: 1, then 2; GPU: 1)")
    parser.add_argument("--profile", action="store_true", help="also profile native at one thread")
    parser.add_argument("--rows-file", type=Path, help=argparse.SUPPRESS)
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.rows_file is not None:
        be_child(arguments)
        return
    thread_counts = THREAD_COUNTS if arguments.device == "cpu" else (1,)
    if arguments.threads is not None:
        thread_counts = (arguments.threads,)
    rows = [row for count in thread_counts for row in measure_in_child(count, arguments)]
    write_report("throughput", rows, arguments.json)


if __name__ == "__main__":
    main()
