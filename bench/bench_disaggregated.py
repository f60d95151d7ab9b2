"""A prompt computed in one process and gone on with in another, beside computing it in place.

    python bench/bench_disaggregated.py --model FOLDER --json FILE

Two processes with a model each, on one machine, one of which waits while the other works. Of each
format: bytes that move, seconds from the prompt to its second token both ways, and of these what
comes behind the prefill: to send, check, place and decode. Tokens of both ways have to be the same,
or there is no report. Medians of `--rounds`, both ways in turns.
"""

from __future__ import annotations

import argparse
from contextlib import closing
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch
from report import Row, add_arguments, write_report

from paged_kv import LLM, PrefilledPrompt, SamplingParams
from paged_kv.entrypoints.demo import MODEL_FOLDER

LENGTHS = (500, 2000, 4000)
FORMATS = ("native", "int8", "int4", "int2")
NUM_TOKENS = 16  # that have to be the same


def new_llm(model: Path, kv_format: str, longest: int) -> LLM:
    return LLM(
        model,
        kv_format=kv_format,
        dtype=torch.bfloat16,
        prefix_caching=False,
        max_num_seqs=2,
        max_model_len=longest,
    )


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)


def prefill(connection: Connection, model: Path, kv_format: str, longest: int) -> None:
    """The other process: prompts come, and go back as bytes after the seconds that they took."""
    with new_llm(model, kv_format, longest) as llm:
        connection.send("ready")
        while (prompt := connection.recv()) is not None:
            began = perf_counter()
            data = llm.prefill(prompt, greedy(NUM_TOKENS))
            connection.send(perf_counter() - began)
            connection.send_bytes(data)


class Both:
    """One process of each kind."""

    def __init__(self, model: Path, kv_format: str, longest: int) -> None:
        context = get_context("spawn")
        self._connection, other = context.Pipe()
        arguments = (other, model, kv_format, longest)
        self._process = context.Process(target=prefill, args=arguments, daemon=True)
        self._process.start()
        self.llm = new_llm(model, kv_format, longest)
        assert self._connection.recv() == "ready"

    def close(self) -> None:
        self._connection.send(None)
        self._process.join()
        self.llm.close()

    def from_elsewhere(self, prompt: list[int]) -> tuple[bytes, float]:
        """A prompt as bytes, and how long it was computed."""
        self._connection.send(prompt)
        seconds = self._connection.recv()
        return self._connection.recv_bytes(), seconds

    def require_same(self, prompt: list[int]) -> None:
        data, _ = self.from_elsewhere(prompt)
        here = self.llm.generate(prompt, greedy(NUM_TOKENS))[0].token_ids
        there = self.llm.generate(PrefilledPrompt(data), greedy(NUM_TOKENS))[0].token_ids
        if here != there:
            raise SystemExit(f"{len(prompt)} tokens: {there} elsewhere, {here} in place")


def rows_of(both: Both, name: str, prompt: list[int], rounds: int) -> list[Row]:
    both.require_same(prompt)
    in_place, elsewhere, behind, num_bytes = [], [], [], 0
    for _ in range(rounds):
        began = perf_counter()
        both.llm.generate(prompt, greedy(2))
        in_place.append(perf_counter() - began)
        began = perf_counter()
        data, prefill_seconds = both.from_elsewhere(prompt)
        both.llm.generate(PrefilledPrompt(data), greedy(2))
        elsewhere.append(perf_counter() - began)
        behind.append(elsewhere[-1] - prefill_seconds)
        num_bytes = len(data)
    case, usual = f"{name}, {len(prompt)} tokens", median(in_place)
    return [
        Row(case=case, metric="moved", value=num_bytes / len(prompt), unit="bytes a token"),
        *(
            Row(
                case=case,
                metric=metric,
                value=median(seconds),
                unit="s",
                baseline="in place",
                baseline_value=usual,
                ratio=usual / median(seconds),
            )
            for metric, seconds in (
                ("to the second token", elsewhere),
                ("behind the prefill", behind),
            )
        ),
    ]


def beside_native(row: Row, rows: list[Row]) -> Row:
    """What moves, beside what native moves of as many tokens."""
    if row.metric != "moved":
        return row
    native_case = "native" + row.case[row.case.index(",") :]
    native = next(r.value for r in rows if (r.case, r.metric) == (native_case, "moved"))
    return replace(row, baseline="native", baseline_value=native, ratio=native / row.value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_arguments(parser)
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    lengths, rounds, formats = LENGTHS, asked.rounds, FORMATS
    if asked.quick:
        lengths, rounds, formats = (150,), 1, ("native", "int8")
    rows: list[Row] = []
    for name in formats:
        with closing(Both(asked.model, name, max(lengths) + NUM_TOKENS)) as both:
            for length in lengths:
                prompt = np.random.default_rng(0).integers(100, 2000, length).tolist()
                rows += rows_of(both, name, prompt, rounds)
    rows = [beside_native(row, rows) for row in rows]
    write_report("disaggregated", rows, asked.json)


if __name__ == "__main__":
    main()
