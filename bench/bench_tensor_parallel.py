"""A model in several processes beside the same model in one: tokens a second, memory, starting.

    python bench/bench_tensor_parallel.py --model FOLDER --json FILE

Each number of processes has a process of its own that makes the `LLM` and stays there, and all take
turns with the same prompts. The cores are shared out among the processes of an `LLM`. SmolLM2-135M
has 3 kv heads, so that 3 processes compute it; 2 compute a model of its sizes with random weights,
8 heads and 4 kv heads. Memory is what a process has for itself (private), read when it has decoded.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from report import Row, add_arguments, write_report

from paged_kv.engine.sampling_params import SamplingParams
from paged_kv.entrypoints.demo import MODEL_FOLDER
from paged_kv.entrypoints.llm import LLM
from paged_kv.models.loading import load_tokenizer

SEQUENCES, PROMPT, TOKENS, ROUNDS = 16, 256, 64, 5
QUICK = (2, 32, 4, 1)
SIZES = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}


class Load(NamedTuple):
    """Prompts of random tokens, all computed anew, and how many tokens each is continued by."""

    sequences: int
    prompt: int
    tokens: int

    def prompts(self, seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        shape = (self.sequences, self.prompt)
        tokens: list[list[int]] = torch.randint(10, 1000, shape, generator=generator).tolist()
        return tokens


# -- the process of one `LLM` ---------------------------------------------------------------------


def private_bytes(process_id: int) -> int:
    """Memory of a process that no other one shares."""
    text = Path(f"/proc/{process_id}/smaps_rollup").read_text()
    return 1024 * sum(int(n) for n in re.findall(r"^Private_\w+:\s+(\d+) kB", text, re.MULTILINE))


def serve(folder: str, size: int, kv_format: str) -> None:
    """Make an `LLM`, and do one turn for each line that comes."""
    began = time.perf_counter()
    threads = max((os.cpu_count() or 1) // size, 1)
    with LLM(
        folder,
        tensor_parallel_size=size,
        kv_format=kv_format,
        num_threads=threads,
        prefix_caching=False,
        kv_memory="256MiB",
        max_num_seqs=SEQUENCES,
        generation_config=None,
    ) as llm:
        tell({"seconds": time.perf_counter() - began, "threads": threads})
        for line in sys.stdin:
            load, seed = Load(*json.loads(line)["load"]), json.loads(line)["seed"]
            prompts, seconds, outputs = load.prompts(seed), [], None
            for count in (1, load.tokens + 1):
                params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
                start = time.perf_counter()
                outputs = llm.generate(prompts, params, show_progress=False)
                seconds.append(time.perf_counter() - start)
            group = getattr(llm.engine.runner, "group", None)
            ids = [os.getpid(), *(group.process_ids if group is not None else ())]
            tell(
                {
                    "prefill": seconds[0],
                    "decode": seconds[1] - seconds[0],
                    "tokens": [each.token_ids for each in outputs or ()],
                    "private": [private_bytes(each) for each in ids],
                }
            )


def tell(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


# -- all of them, in turns ------------------------------------------------------------------------


def start(folder: Path, size: int, kv_format: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--serve", str(size), kv_format, "--model", str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"a process ended with {process.wait()}")
    found: dict[str, Any] = json.loads(line)
    return found


def turn(process: subprocess.Popen[str], load: Load, seed: int) -> dict[str, Any]:
    assert process.stdin is not None
    process.stdin.write(json.dumps({"load": load, "seed": seed}) + "\n")
    process.stdin.flush()
    return answer(process)


def measure(
    name: str, folder: Path, size: int, kv_format: str, load: Load, rounds: int
) -> list[Row]:
    """`size` processes beside one."""
    pair = [start(folder, each, kv_format) for each in (1, size)]
    try:
        began = [answer(process) for process in pair]
        turns = [[turn(process, load, seed) for process in pair] for seed in range(rounds + 1)]
    finally:
        for process in pair:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
    case = f"{name}, {kv_format}, {size} processes"
    baseline, rows = "one process", []
    for what, count in (("decode", load.sequences * load.tokens), ("prefill", None)):
        num_tokens = count or load.sequences * load.prompt
        one, many = (num_tokens / median(t[n][what] for t in turns[1:]) for n in (0, 1))
        rows.append(
            Row(
                case=case, metric=f"{what}, tokens a second", value=many, unit="tokens/s",
                baseline=baseline, baseline_value=one, ratio=many / one,
            )
        )  # fmt: skip
    same = sum(a == b for t in turns for a, b in zip(t[0]["tokens"], t[1]["tokens"], strict=True))
    rows.append(
        Row(
            case=case, metric="sequences with the same tokens", value=same, unit="",
            baseline="all", baseline_value=len(turns) * load.sequences,
        )
    )  # fmt: skip
    private = turns[-1][1]["private"]
    for metric, value, other in (
        ("private memory of rank 0", private[0], turns[-1][0]["private"][0]),
        ("private memory of another rank", max(private[1:]), turns[-1][0]["private"][0]),
    ):
        rows.append(
            Row(
                case=case, metric=metric, value=value / 2**20, unit="MiB",
                baseline=baseline, baseline_value=other / 2**20, ratio=other / value,
            )
        )  # fmt: skip
    rows.append(
        Row(
            case=case, metric="start", value=began[1]["seconds"], unit="s",
            baseline=baseline, baseline_value=began[0]["seconds"],
            ratio=began[0]["seconds"] / began[1]["seconds"],
        )
    )  # fmt: skip
    return rows


def save_of_its_sizes(model: Path, folder: Path) -> None:
    """A model of another one's sizes, but heads that two processes can share; random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model, **SIZES)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    load_tokenizer(model).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER, help="(the demo model)")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.serve:
        size, kv_format = arguments.serve
        serve(str(arguments.model), int(size), kv_format)
        return
    *numbers, rounds = QUICK if arguments.quick else (SEQUENCES, PROMPT, TOKENS, ROUNDS)
    load, formats = Load(*numbers), ("int8",) if arguments.quick else ("native", "int8")
    rows: list[Row] = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        save_of_its_sizes(arguments.model, folder)
        for kv_format in formats:
            rows += measure("of its sizes", folder, 2, kv_format, load, rounds)
        if not arguments.quick:
            rows += measure("the model", arguments.model, 3, "int8", load, rounds)
    write_report("tensor_parallel", rows, arguments.json)


if __name__ == "__main__":
    main()
