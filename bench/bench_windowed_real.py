"""Streams on a real model: what sinks are worth, and what quantizing the window costs.

    python bench/bench_windowed_real.py --model FOLDER --books a.txt b.txt --json FILE

One text of the books' stretches that settings are not tuned on, as many tokens of each book, is
teacher-forced through one windowed sequence of the library: sinks and window in native, int8 and
int2, and a native window of as many tokens without sinks. A step computes `--tokens-per-step`
tokens; each sees exactly its own sinks and window, and in quantized formats those of its own step
in full precision. `--decoded` computes the beginning again, one token a step, to tell what that
changes. Every format rounds sinks up to whole open blocks of its own; 32 are whole in all of them,
so that all see the same tokens. Results are kept one by one in FILE.part; the same command goes on
with them.
"""

from __future__ import annotations

import argparse
import math
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_windowed import windowed
from numpy.typing import NDArray
from quality_windows import stretches
from report import Row, add_arguments, write_report
from training.train_demo_model import read_book
from transformers import AutoTokenizer

from paged_kv.blocks.sink_window import SinkWindow
from paged_kv.cache.formats import FORMATS
from paged_kv.entrypoints.demo import MODEL_FOLDER
from paged_kv.entrypoints.kept_results import KeptResults
from paged_kv.models.calibration import usual_calibration
from paged_kv.models.huggingface import PagedModel
from paged_kv.models.loading import load_model

REFERENCE = "sinks + window, native"
WINDOW_ONLY = "window only, native"
CASES = {
    REFERENCE: ("native", True),
    "sinks + window, int8": ("int8", True),
    "sinks + window, int2": ("int2", True),
    WINDOW_ONLY: ("native", False),
}
LOSS, HELD = "log-perplexity", "K/V held, most"
MIB = 1 << 20


def stream_of(books: list[Path], tokenizer: Any, num_tokens: int) -> NDArray[np.int64]:
    """BOS, where there is one, and equally many tokens of each book, none that tunes anything."""
    share = num_tokens // len(books)
    parts = [[] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]]
    for book in books:
        ids = tokenizer.encode(read_book(book), add_special_tokens=False)
        to_report = [token for part in stretches(ids, tuning=False) for token in part]
        if len(to_report) < share:
            raise SystemExit(f"{book.name} has {len(to_report)} tokens to report, not {share}")
        parts.append(to_report[:share])
    return np.concatenate([np.array(part, dtype=np.int64) for part in parts])


class Streams:
    """One text through a model, case by case; `kept` has what was measured before."""

    def __init__(self, arguments: argparse.Namespace, token_ids: NDArray[np.int64]) -> None:
        self.arguments, self.token_ids = arguments, token_ids
        self.model = PagedModel(load_model(arguments.model, torch.float32))
        self.calibration = usual_calibration(self.model, arguments.tokenizer).layers
        self.kept = KeptResults(arguments.json)

    def measured(self, name: str, num_tokens: int, tokens_per_step: int) -> dict[str, list[float]]:
        """Mean loss and most bytes held of each stretch of `--stretch` tokens, and seconds."""
        format_name, has_sinks = CASES[name]
        kv_format, sinks = FORMATS[format_name], self.arguments.sinks if has_sinks else 0
        window = SinkWindow(sinks, self.arguments.sinks + self.arguments.window - sinks)
        token_ids = self.token_ids[: num_tokens + 1]
        settings = kv_format, window, tokens_per_step, self.arguments.stretch
        text = token_ids.tobytes() + self.model.fingerprint()
        key = f"{name} | {sha256(repr(settings).encode() + text).hexdigest()[:16]}"
        if key not in self.kept:
            known = self.calibration if kv_format.wants_calibration else None
            start = time.perf_counter()
            losses, held = windowed(
                self.model, kv_format, window, token_ids, tokens_per_step, known
            )
            seconds = time.perf_counter() - start
            edges = range(0, len(losses), self.arguments.stretch)
            after = np.linspace(0, len(losses), len(held), endpoint=False)  # where a step begins
            by_stretch = np.minimum(after // self.arguments.stretch, len(edges) - 1)
            result = {
                "losses": [float(losses[e : e + self.arguments.stretch].mean()) for e in edges],
                "held": [int(held[by_stretch == i].max()) for i in range(len(edges))],
                "perplexity": [math.exp(losses.mean())],
                "seconds": [seconds],
            }
            self.kept.keep(key, result)
            print(f"{name}: {result['perplexity'][0]:.3f} in {seconds:.0f} s", flush=True)
        found: dict[str, list[float]] = self.kept[key]
        return found

    def rows(self) -> list[Row]:
        count, chunk = len(self.token_ids) - 1, self.arguments.tokens_per_step
        rows, reference = [], self.measured(REFERENCE, count, chunk)
        for name in CASES:
            found = self.measured(name, count, chunk)
            case = f"{name}, {count} tokens, {chunk} a step"
            rows.append(self.perplexity_row(case, found, reference))
            per_second = count / found["seconds"][0]
            rows.append(Row(case=case, metric="speed", value=per_second, unit="tokens/s"))
            for index, (loss, held) in enumerate(zip(found["losses"], found["held"], strict=True)):
                place = f"{name}, at {index * self.arguments.stretch}"
                mine = reference["losses"][index]
                rows += [
                    Row(
                        case=place, metric=LOSS, value=loss, unit="nat",
                        baseline=REFERENCE, baseline_value=mine, ratio=mine / loss,
                    ),
                    Row(case=place, metric=HELD, value=held / MIB, unit="MiB"),
                ]  # fmt: skip
        return rows + self.decoded_rows()

    def decoded_rows(self) -> list[Row]:
        """The beginning of the text in quantized formats: some tokens a step, and one."""
        rows, count = [], self.arguments.decoded
        for name, (format_name, _) in CASES.items():
            if not count or FORMATS[format_name].is_native:
                continue
            for chunk in (self.arguments.tokens_per_step, 1):
                case = f"{name}, first {count} tokens, {chunk} a step"
                reference = self.measured(REFERENCE, count, self.arguments.tokens_per_step)
                found = self.measured(name, count, chunk)
                rows.append(self.perplexity_row(case, found, reference))
        return rows

    @staticmethod
    def perplexity_row(
        case: str, found: dict[str, list[float]], reference: dict[str, list[float]]
    ) -> Row:
        (perplexity,), (beside,) = found["perplexity"], reference["perplexity"]
        return Row(
            case=case,
            metric="perplexity",
            value=perplexity,
            unit="",
            baseline=REFERENCE,
            baseline_value=beside,
            ratio=beside / perplexity,
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--books", type=Path, nargs="+", default=[], help="plain text")
    parser.add_argument("--tokens", type=int, default=40_000, help="of the text (40,000)")
    parser.add_argument("--sinks", type=int, default=32)
    parser.add_argument("--window", type=int, default=992)
    parser.add_argument("--tokens-per-step", type=int, default=64)
    parser.add_argument("--stretch", type=int, default=2000, help="tokens of a point (2000)")
    parser.add_argument("--decoded", type=int, default=2000, help="tokens, one a step; 0: none")
    parser.add_argument("--threads", type=int, help="of the CPU")
    add_arguments(parser)
    arguments = parser.parse_args()
    if not arguments.books:
        parser.error("give --books")
    if arguments.quick:
        arguments.tokens, arguments.decoded = 2000, 200
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return arguments


def main() -> None:
    arguments = parse_arguments()
    arguments.tokenizer = AutoTokenizer.from_pretrained(arguments.model, model_max_length=1 << 30)
    streams = Streams(arguments, stream_of(arguments.books, arguments.tokenizer, arguments.tokens))
    write_report("windowed_real", streams.rows(), arguments.json)


if __name__ == "__main__":
    main()
