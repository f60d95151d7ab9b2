"""Greedy continuations of book passages, in full precision and quantized, side by side to read.

    python bench/bench_continuations.py --model FOLDER --books a.txt b.txt --json FILE

Ten prompts of 500 to 3000 tokens of each book. They come from second halves of the stretches that
nothing is tuned on, so a report on a few windows of 2048 tokens a book has not seen them either.
Writes how long the continuations agree as JSON and the texts themselves beside it, as Markdown.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_windows import STRETCH, stretches
from report import COMMIT, Row, add_arguments, write_report
from training.train_demo_model import read_book

from paged_kv.engine.sampling_params import SamplingParams
from paged_kv.entrypoints.demo import MODEL_FOLDER
from paged_kv.entrypoints.llm import LLM
from paged_kv.entrypoints.outputs import RequestOutput
from paged_kv.models.loading import load_tokenizer

SHORTEST, LONGEST, OF_A_BOOK = 500, 3000, 10  # tokens of a prompt; prompts
SHOWN = 300  # characters of a prompt's end
REFERENCE = "native"


@dataclass(frozen=True)
class Passage:
    book: str
    start: int  # its first token, counted in the book
    token_ids: list[int]  # opened by BOS where there is one


def lengths(count: int) -> list[int]:
    """From the shortest to the longest, short and long in turn, so that neighbours are modest."""
    rising = np.linspace(SHORTEST, LONGEST, count).round().astype(int).tolist()
    return [rising[i // 2] if i % 2 == 0 else rising[-1 - i // 2] for i in range(count)]


def passages(book: str, token_ids: list[int], count: int, bos: int | None) -> list[Passage]:
    """Spread over the book's second halves of stretches; of two in one, neither sees the other."""
    whole = [part for part in stretches(token_ids, tuning=False) if len(part) == STRETCH]
    if 2 * len(whole) < count:
        raise SystemExit(f"{book} has {len(whole)} whole stretches, too few for {count} prompts")
    found, filled = [], dict.fromkeys(range(len(whole)), STRETCH // 2)
    for number, length in enumerate(lengths(count)):
        index = number * len(whole) // count
        start = filled[index]
        filled[index] += length
        body = list(whole[index][start : start + length - (bos is not None)])
        place = STRETCH * (2 * index + 1) + start
        found.append(Passage(book, place, [*([] if bos is None else [bos]), *body]))
    return found


def continued(
    model: Path, kv_format: str, prompts: list[Passage], num_tokens: int
) -> list[RequestOutput]:
    longest = max(len(prompt.token_ids) for prompt in prompts) + num_tokens
    with LLM(model, kv_format=kv_format, max_model_len=longest, dtype=torch.float32) as llm:
        return llm.generate(
            [prompt.token_ids for prompt in prompts], SamplingParams(max_tokens=num_tokens)
        )


def num_agreeing(one: list[int], other: list[int]) -> int:
    """Tokens before the first one that differs."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def repeated_share(token_ids: list[int]) -> float:
    """Of its runs of four tokens, how many have come before: greedy decoding likes to go round."""
    runs = [tuple(token_ids[i : i + 4]) for i in range(len(token_ids) - 3)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def quoted(text: str) -> str:
    """One paragraph of Markdown in which nothing is a mark."""
    line = " ".join(text.split())
    return "".join(f"\\{c}" if c in "\\`*_<>#[]|" else c for c in line)


def markdown(
    model: str, tokenizer: Any, prompts: list[Passage], found: dict[str, list[RequestOutput]]
) -> str:
    """Every prompt's end and what each format makes of it."""
    lines = [
        "# Continuations\n",
        f"{model}, float32, greedy; {', '.join(found)}. Written by `bench/bench_continuations.py` "
        f"at {COMMIT}.\nOf a prompt only the last words are shown.",
    ]
    for index, prompt in enumerate(prompts):
        end = tokenizer.decode(prompt.token_ids, skip_special_tokens=True)[-SHOWN:]
        lines.append(
            f"\n## {index + 1}. {prompt.book}, {len(prompt.token_ids)} tokens from "
            f"{prompt.start} on\n\n... {quoted(end.partition(' ')[2])}"
        )
        reference = found[REFERENCE][index]
        for name, outputs in found.items():
            output = outputs[index]
            same = num_agreeing(reference.token_ids, output.token_ids)
            is_same = same == len(reference.token_ids) == len(output.token_ids)
            beside = "" if name == REFERENCE else f" (the same for {same} tokens)"
            beside = " (the same)" if name != REFERENCE and is_same else beside
            lines.append(f"\n**{name}**{beside}: {quoted(output.text)}")
    return "\n".join(lines) + "\n"


def agreement_rows(prompts: list[Passage], found: dict[str, list[RequestOutput]]) -> list[Row]:
    rows = []
    for name, outputs in found.items():
        share = 100 * float(np.mean([repeated_share(output.token_ids) for output in outputs]))
        rows.append(Row(case=name, metric="runs of 4 tokens repeated", value=share, unit="%"))
        if name == REFERENCE:
            continue
        pairs = [
            (mine.token_ids, theirs.token_ids)
            for mine, theirs in zip(found[REFERENCE], outputs, strict=True)
        ]
        for number, (prompt, pair) in enumerate(zip(prompts, pairs, strict=True), 1):
            case = f"{name}, {number}. {prompt.book}, {len(prompt.token_ids)} tokens"
            same = num_agreeing(*pair)
            rows.append(Row(case=case, metric="tokens as native", value=same, unit="tokens"))
        whole = sum(mine == theirs for mine, theirs in pairs)
        unit = f"of {len(pairs)}"
        rows.append(Row(case=name, metric="continuations as native", value=whole, unit=unit))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--name", default="SmolLM2-135M-Instruct", help="of the model, to print")
    parser.add_argument("--books", type=Path, nargs="+", required=True, help="plain text")
    parser.add_argument("--formats", nargs="+", default=["int2"], help="beside native")
    parser.add_argument("--prompts", type=int, default=OF_A_BOOK, help="of each book")
    parser.add_argument("--tokens", type=int, default=64, help="new ones of each prompt")
    parser.add_argument("--threads", type=int, help="of the CPU")
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.prompts, arguments.tokens = 1, 8
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    tokenizer = load_tokenizer(arguments.model)
    prompts = [
        passage
        for book in arguments.books
        for passage in passages(
            book.stem,
            tokenizer.encode(read_book(book), add_special_tokens=False, verbose=False),
            arguments.prompts,
            tokenizer.bos_token_id,
        )
    ]
    found = {
        name: continued(arguments.model, name, prompts, arguments.tokens)
        for name in (REFERENCE, *arguments.formats)
    }
    write_report("continuations", agreement_rows(prompts, found), arguments.json)
    if arguments.json:
        text = markdown(arguments.name, tokenizer, prompts, found)
        arguments.json.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
