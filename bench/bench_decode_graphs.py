"""Decode steps of a whole model on a GPU: captured as graphs beside one launch after the other.

    python bench/bench_decode_graphs.py --json bench/results/graphs.json

A Llama of random weights in the shape of one billion parameters, requests of one length, greedy,
nobody ends: what a step takes from its schedule to its tokens, in the median, and what the graphs
took of the device's memory. Both engines decode in turns. On a CPU nothing is captured, and only
--quick makes sense: it shows that all of it runs.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple, cast

import torch
from report import Row, add_arguments, failure_row, kept_rows, write_report
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from paged_kv import LLM, SamplingParams

DEVICE: Final = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS: Final = 5
WARM_STEPS: Final = 12  # more than it takes to capture a step, with a sealed block and without


class Case(NamedTuple):
    kv_format: str
    batch: int
    num_prompt_tokens: int
    num_steps: int  # of a round

    @property
    def name(self) -> str:
        return f"{self.kv_format}, {self.batch} sequences of {self.num_prompt_tokens}"


CASES: Final = [
    Case(kv_format, batch, 1000, 100)
    for batch in (1, 8, 64)
    for kv_format in ("native", "int8", "int4", "int2")
]
QUICK_CASES: Final = [Case("native", 2, 20, 4), Case("int8", 2, 60, 4)]


def make_model(is_quick: bool) -> PreTrainedModel:
    """In the shape of Llama 3.2 1B, but for its vocabulary."""
    sizes = (64, 128, 2, 2, 1, 32) if is_quick else (2048, 8192, 16, 32, 8, 64)
    hidden, intermediate, layers, heads, kv_heads, head_dim = sizes
    config = LlamaConfig(
        vocab_size=1000 if is_quick else 32000,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = cast(Any, LlamaForCausalLM)(config)
    return cast(PreTrainedModel, model.to(torch.bfloat16).eval())


class Decoding:
    """An engine whose requests all decode."""

    def __init__(self, model: PreTrainedModel, case: Case, *, enforce_eager: bool) -> None:
        length = case.num_prompt_tokens + WARM_STEPS + ROUNDS * case.num_steps + 8
        self.llm = LLM(
            model,
            kv_format=case.kv_format,
            kv_memory="48GiB" if DEVICE.type == "cuda" else "64MiB",
            max_num_seqs=case.batch,
            max_model_len=length,
            prefix_caching=False,
            enforce_eager=enforce_eager,
        )
        params = SamplingParams(max_tokens=length - case.num_prompt_tokens, ignore_eos=True)
        for number in range(case.batch):
            prompt = [(7 * number + place) % 997 for place in range(case.num_prompt_tokens)]
            self.llm.engine.add_request(str(number), prompt, params)
        while len(self.llm.engine.step()) < case.batch:  # until all decode
            pass
        self.run(WARM_STEPS)
        self.seconds: list[float] = []

    def run(self, num_steps: int) -> float:
        """Seconds of a step."""
        start = time.perf_counter()
        for _ in range(num_steps):
            self.llm.engine.step()
        return (time.perf_counter() - start) / num_steps


def rows_of(case: Case, model: PreTrainedModel) -> list[Row]:
    with ExitStack() as stack:
        graphs, eager = (Decoding(model, case, enforce_eager=flag) for flag in (False, True))
        for decoding in (graphs, eager):
            stack.callback(decoding.llm.close)
        for _ in range(ROUNDS):
            for decoding in (graphs, eager):
                decoding.seconds.append(decoding.run(case.num_steps))
        captured, launched = median(graphs.seconds), median(eager.seconds)
        num_bytes = graphs.llm.memory_stats().decode_graphs
    print(f"{case.name}: {captured * 1e6:.0f} us, eager {launched * 1e6:.0f} us", flush=True)
    return [
        Row(
            case=case.name,
            metric="a decode step",
            value=captured * 1e6,
            unit="us",
            baseline="enforce_eager",
            baseline_value=launched * 1e6,
            ratio=launched / captured,
        ),
        Row(case=case.name, metric="output", value=case.batch / captured, unit="tokens/s"),
        Row(case=case.name, metric="memory of graphs", value=num_bytes / 2**20, unit="MiB"),
    ]


def run(is_quick: bool, json_file: Path | None) -> None:
    rows = kept_rows(json_file)
    known = {row.case for row in rows}
    model = make_model(is_quick)
    for case in QUICK_CASES if is_quick else CASES:
        if case.name in known:
            continue
        try:
            rows += rows_of(case, model)
        except (RuntimeError, MemoryError) as error:  # the other cases are to be measured too
            rows.append(failure_row(case.name, error))
            print(f"{case.name}: {error}", flush=True)
        write_report("decode steps as graphs", rows, json_file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    arguments = parser.parse_args()
    run(arguments.quick, arguments.json)


if __name__ == "__main__":
    main()
