"""Decoding with guesses of next tokens against plain decoding, on a real model, in turns.

    python bench/bench_speculation.py --model FOLDER --json FILE

Prompts that begin to repeat themselves (a passage, and its first words once more), continued
greedily, and passages that go on, drawn at temperature 1, where hardly a guess is right. One
`LLM` with prompt lookup and one without have the same model and take turns; prompts lie in the
prefix cache of both, so that steps decode. Tokens of both are compared.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from report import Row, add_arguments, write_report

from paged_kv.engine.prompt_lookup import PromptLookup
from paged_kv.engine.sampling_params import SamplingParams
from paged_kv.entrypoints.demo import MODEL_FOLDER
from paged_kv.entrypoints.llm import LLM
from paged_kv.models.calibration import TEXT
from paged_kv.models.loading import load_model, load_tokenizer

PASSAGE, AGAIN = 200, 20  # tokens
SIZES, QUICK_SIZES = (1, 4, 8), (2,)  # sequences
ROUNDS = 3
FORMATS = ("native", "int8")


class Case(NamedTuple):
    name: str
    prompts: list[list[int]]
    params: SamplingParams


def cases(token_ids: list[int], sizes: tuple[int, ...], num_tokens: int) -> list[Case]:
    """Each number of sequences with both kinds of prompts."""
    starts = range(0, len(token_ids) - PASSAGE, max(PASSAGE // 4, 1))
    passages = [token_ids[start : start + PASSAGE] for start in starts]
    greedy = SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=0)
    drawn = SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=1.0, seed=0)
    found = []
    for size in sizes:
        chosen = [passages[index % len(passages)] for index in range(size)]
        repeated = [[*passage, *passage[:AGAIN]] for passage in chosen]
        found.append(Case(f"repeating, {size} sequences", repeated, greedy))
        found.append(Case(f"going on, {size} sequences", chosen, drawn))
    return found


def measure(plain: LLM, guessing: LLM, case: Case, rounds: int) -> list[Row]:
    """Tokens a second of both, and what became of guesses."""
    llms, seconds, outputs = (plain, guessing), ([], []), []
    before = guessing.statistics()
    for turn in range(rounds + 1):  # the first warms, and computes the prompts
        for llm, times in zip(llms, seconds, strict=True):
            start = time.perf_counter()
            found = llm.generate(case.prompts, case.params, show_progress=False)
            if turn:
                times.append(time.perf_counter() - start)
            outputs.append([output.token_ids for output in found])
    after = guessing.statistics()
    num_tokens = sum(map(len, outputs[0]))
    rates = [num_tokens / median(times) for times in seconds]
    tried = after.num_draft_tokens - before.num_draft_tokens
    right = after.num_accepted_tokens - before.num_accepted_tokens
    num_same = sum(tokens == outputs[0] for tokens in outputs)
    return [
        Row(
            case=case.name,
            metric="decoded",
            value=rates[1],
            unit="tokens/s",
            baseline="without speculation",
            baseline_value=rates[0],
            ratio=rates[1] / rates[0],
        ),
        Row(case=case.name, metric="guesses that are right", value=right / max(tried, 1), unit=""),
        Row(
            case=case.name,
            metric="guesses a token",
            value=tried / ((rounds + 1) * num_tokens),
            unit="",
        ),
        Row(
            case=case.name,
            metric="runs with the same tokens",
            value=num_same,
            unit="",
            baseline="all runs",
            baseline_value=len(outputs),
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER, help="(the demo model)")
    parser.add_argument("--tokens", type=int, default=96, help="generated of each sequence (96)")
    add_arguments(parser)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.model)
    model = load_model(arguments.model, torch.float32)
    text = TEXT.read_text(encoding="utf-8")
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    sizes, rounds = (QUICK_SIZES, 1) if arguments.quick else (SIZES, ROUNDS)
    rows: list[Row] = []
    for kv_format in FORMATS:
        settings = {"kv_format": kv_format, "generation_config": None, "tokenizer": tokenizer}
        with (
            LLM(model, **settings) as plain,
            LLM(model, speculation=PromptLookup(), **settings) as guessing,
        ):
            for case in cases(token_ids, sizes, 16 if arguments.quick else arguments.tokens):
                named = case._replace(name=f"{kv_format}, {case.name}")
                rows += measure(plain, guessing, named, rounds)
    write_report("speculation", rows, arguments.json)


if __name__ == "__main__":
    main()
