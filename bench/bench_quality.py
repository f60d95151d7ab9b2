"""What every KV format, and peers' caches, cost in quality on a real model: beside bytes a token.

    python bench/bench_quality.py --model FOLDER --books a.txt b.txt --json quality.json

Each case is emulated in one pass over a window, as decoding one token a step would read it (see
peers/parallel_pass.py); `--check` runs our formats through the library itself instead, one token a
step. Per case and book: Kullback-Leibler divergence from native with its standard error and its
99th percentile, first choices, perplexity; recall of 14 pairs hidden in contexts of 0.8K to 6K
tokens; bytes of a token and kv head, sealed and with what is in full precision. Results are kept
one by one in FILE.part; the same command goes on with them. `--tuning` takes windows that no report
takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from peers.own_formats import OwnFormat
from peers.parallel_pass import ParallelModel
from peers.quality_peers import PEERS, Peer
from quality_windows import book_windows, stretches
from report import Row, add_arguments, write_report
from training.train_demo_model import read_book
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from paged_kv.blocks.geometry import IntArray
from paged_kv.cache.formats import (
    FORMATS,
    INT2,
    INT2_LONG,
    INT4,
    INT8,
    INT8_TOKEN,
    NATIVE,
    KVFormat,
)
from paged_kv.cache.key_calibration import KeyCalibration
from paged_kv.cache.layer_spec import cache_geometry, usual_kv_dtype
from paged_kv.engine.evaluate import Quality, compare_formats
from paged_kv.engine.recall import RecallContext, recall_contexts
from paged_kv.entrypoints.demo import MODEL_FOLDER
from paged_kv.entrypoints.evaluation import from_json, to_json
from paged_kv.entrypoints.kept_results import KeptResults
from paged_kv.entrypoints.progress import WorkBar
from paged_kv.models.calibration import Calibration, usual_calibration
from paged_kv.models.huggingface import PagedModel
from paged_kv.models.loading import load_model

CHUNK = 256  # tokens whose logits are held at once
CONTROLS: dict[str, KVFormat] = {
    "int2, no clip": INT2.with_options(key_clip=1.0, value_clip=1.0),
    "int8/0": INT8.with_options(num_sink_tokens=0),
    "int8-token@64/0": INT8_TOKEN.with_options(block_size=64, num_sink_tokens=0),
    "int2, no head": INT2.with_options(num_sink_tokens=0),
    "int2, no tail": INT2.with_options(min_tail_tokens=0),
    "int2, no feedback": INT2.with_options(has_error_feedback=False),
    "int2, values not rotated": INT2.with_options(rotates_values=False),
    "int2, no wide channels": INT2.with_options(wide_key_share=0.0),
    "int2-long, an eighth wide": INT2_LONG.with_options(wide_key_share=0.125),
}
# With heads and tails, and what is sealed, in float16: of int8's error most is bfloat16's.
IN_FLOAT16: dict[str, KVFormat] = {"int8 in float16": INT8, "int4 in float16": INT4}
OURS = {name: kv_format for name, kv_format in FORMATS.items() if not kv_format.is_native}
Cases = dict[str, OwnFormat | Peer]


@dataclass(frozen=True)
class Book:
    name: str
    token_ids: Sequence[int]

    @property
    def digest(self) -> str:
        return sha256(np.array(self.token_ids).tobytes()).hexdigest()[:12]


class Measuring:
    """A model and the cases it is measured in; `kept` has what was measured before."""

    def __init__(
        self, model: PagedModel, cases: Cases, kept: KeptResults, calibration: Calibration | None
    ) -> None:
        self.fingerprint = model.fingerprint().hex()[:12]
        self.cases, self.kept, self.model, self.calibration = cases, kept, model, calibration
        self.head_dim = next(iter(model.layer_shapes.values()))[1]
        self._parallel: ParallelModel | None = None

    @property
    def parallel(self) -> ParallelModel:
        if self._parallel is None:
            self.model.close()
            self._parallel = ParallelModel(self.model.model)
        return self._parallel

    def key(self, case: str, book: Book, *what: object) -> str:
        digest = sha256(repr(self.cases.get(case, case)).encode())
        place = " ".join(map(str, (book.name, book.digest, *what)))
        return f"{case} | {place} | {self.fingerprint} {digest.hexdigest()[:12]}"

    def window(self, book: Book, index: int, token_ids: IntArray) -> None:
        """Measure every case on one window, except those that were."""
        place = len(token_ids), index
        missing = [n for n in ("native", *self.cases) if self.key(n, book, *place) not in self.kept]
        if not missing:
            return
        native = self.parallel.hidden_states(token_ids[:-1], None)
        for name in missing:
            hidden = native
            if name in self.cases:
                hidden = self.parallel.hidden_states(token_ids[:-1], self.cases[name])
            quality = self.compare(native, hidden, token_ids[1:])
            self.kept.keep(self.key(name, book, *place), to_json(quality))

    def compare(self, native: torch.Tensor, hidden: torch.Tensor, targets: IntArray) -> Quality:
        parts = []
        for start in range(0, len(targets), CHUNK):
            rows = slice(start, start + CHUNK)
            reference, log_probs = (
                self.parallel.logits(states[:, rows]).log_softmax(-1)[None]
                for states in (native, hidden)
            )
            ahead = torch.from_numpy(targets[None, rows].astype(np.int64))
            parts.append(Quality.of(reference, log_probs, ahead))
        return Quality.joined(parts, axis=1)

    def recall(self, name: str, book: Book, context: RecallContext) -> None:
        """Count the answers of a context that a case finds, unless they were counted."""
        key = self.key(name, book, "recall", len(context.token_ids))
        if key in self.kept:
            return
        hidden = self.parallel.hidden_states(context.token_ids, self.cases.get(name))
        places = context.answer_places
        choices = np.full(len(context.token_ids), -1)
        logits = self.parallel.logits(hidden[:, torch.from_numpy(places - 1)])
        choices[places] = logits.argmax(-1).numpy()
        self.kept.keep(key, context.num_recalled(choices))

    def through_library(self, book: Book, index: int, token_ids: IntArray) -> None:
        """The same as `window` by the library's own cache, one token a step."""
        ours = {n: case for n, case in self.cases.items() if isinstance(case, OwnFormat)}
        place = len(token_ids), index, "decoded"
        names = ["native", *ours]
        if all(self.key(name, book, *place) in self.kept for name in names):
            return
        known = None if self.calibration is None else self.calibration.layers
        formats = [NATIVE, *(case.kv_format for case in ours.values())]
        found = compare_formats(self.model, formats, token_ids[None], calibration=known)
        for name, quality in zip(names, found, strict=True):
            self.kept.keep(self.key(name, book, *place), to_json(quality))


def make_cases(
    model: PagedModel, chosen: Sequence[str] | None, calibration: Calibration | None
) -> Cases:
    """Our formats, controls, peers, and peers with a head and a tail as ours have."""
    known: Sequence[KeyCalibration] | None = None
    if calibration is not None:
        known = calibration.layers
    layers = model.layers(INT2)
    head = cache_geometry(layers, usual_kv_dtype(layers, model.dtype)).num_head_tokens
    with_head_and_tail = (peer.with_head_and_tail(head) for peer in PEERS.values())
    peers = {**PEERS, **{peer.name: peer for peer in with_head_and_tail}}
    formats = {**OURS, **IN_FLOAT16, **CONTROLS}
    names = list(chosen or (*OURS, *IN_FLOAT16, *peers))
    unknown = set(names) - {*formats, *peers}
    if unknown:
        known_names = ", ".join((*formats, *peers))
        raise SystemExit(f"no case {', '.join(sorted(unknown))}; there are {known_names}")
    return {
        name: OwnFormat(
            name,
            model.layers(formats[name], known),
            torch.float16 if name in IN_FLOAT16 else model.dtype,
        )
        if name in formats
        else peers[name]
        for name in names
    }


def quality_rows(case: str, quality: Quality, native: Quality) -> list[Row]:
    loss_in_percent = 100 * (quality.perplexity / native.perplexity - 1)
    perplexity = Row(
        case=case,
        metric="perplexity",
        value=quality.perplexity,
        unit="",
        baseline="native",
        baseline_value=native.perplexity,
        ratio=native.perplexity / quality.perplexity,
    )
    more = (
        ("perplexity above native", loss_in_percent, "%"),
        ("KL from native", 1000 * quality.divergence, "mnat"),
        ("KL, standard error", 1000 * quality.standard_error, "mnat"),
        ("KL, 99th percentile", 1000 * quality.worst_percent, "mnat"),
        ("top-1 agreement", 100 * quality.agreement, "%"),
    )
    return [perplexity, *(Row(case=case, metric=m, value=v, unit=u) for m, v, u in more)]


def byte_rows(
    name: str, case: OwnFormat | Peer, head_dim: int, lengths: Sequence[int]
) -> list[Row]:
    if isinstance(case, OwnFormat):
        sealed, effective = case.sealed_bytes, [case.effective_bytes(n) for n in lengths]
    else:
        sealed = case.sealed_bytes(head_dim)
        effective = [case.effective_bytes(head_dim, n) for n in lengths]
    unit = "B"
    rows = [Row(case=name, metric="bytes of a token and kv head", value=sealed, unit=unit)]
    rows += [
        Row(case=name, metric=f"the same, of {n} tokens with head and tail", value=b, unit=unit)
        for n, b in zip(lengths, effective, strict=True)
    ]
    return rows


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured: windows by book and length, and contexts of the first book."""

    books: list[Book]
    windows: dict[tuple[str, int], IntArray]
    contexts: list[RecallContext]
    is_decoded: bool

    def measure(self, measuring: Measuring) -> None:
        names = ["native", *measuring.cases]
        total = sum(map(len, self.windows.values())) + len(self.contexts) * len(names)
        run = measuring.through_library if self.is_decoded else measuring.window
        with WorkBar("measured", total) as bar:
            for book in self.books:
                for (name, _), windows in self.windows.items():
                    for index, window in enumerate(windows if name == book.name else ()):
                        run(book, index, window)
                        bar.advance()
            for name in names:
                for context in self.contexts:
                    measuring.recall(name, self.books[0], context)
                    bar.advance()

    def rows(self, measuring: Measuring) -> list[Row]:
        rows, lengths = [], sorted({length for _, length in self.windows})
        for name in ("native", *measuring.cases):
            for book in self.books:
                for length in lengths:
                    mine, native = (
                        self.quality(measuring, case, book, length) for case in (name, "native")
                    )
                    place = f"{name}, {book.name}, {len(mine.losses)} x {length} tokens"
                    rows += quality_rows(place, mine, native)
            rows += self.recall_rows(measuring, name)
            if name in measuring.cases:
                rows += byte_rows(name, measuring.cases[name], measuring.head_dim, lengths)
        return rows

    def quality(self, measuring: Measuring, case: str, book: Book, length: int) -> Quality:
        suffix = ("decoded",) if self.is_decoded else ()
        count = len(self.windows[book.name, length])
        keys = [measuring.key(case, book, length, index, *suffix) for index in range(count)]
        return Quality.joined([from_json(measuring.kept[key]) for key in keys])

    def recall_rows(self, measuring: Measuring, name: str) -> list[Row]:
        if not self.contexts:
            return []
        counts = [
            measuring.kept[measuring.key(name, self.books[0], "recall", len(c.token_ids))]
            for c in self.contexts
        ]
        unit = f"of {sum(len(context.answers) for context in self.contexts)}"
        return [Row(case=name, metric="pairs recalled", value=sum(counts), unit=unit)]


def make_plan(
    books: list[Book], tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace, most: int
) -> Plan:
    windows = {
        (book.name, length): book_windows(
            book.token_ids,
            length,
            tokenizer.bos_token_id,
            tuning=arguments.tuning,
            count=arguments.windows,
        )
        for book in books
        for length in arguments.lengths
    }
    contexts: list[RecallContext] = []
    if not arguments.no_recall and not arguments.check:
        filler = stretches(books[0].token_ids, tuning=arguments.tuning)[0]
        contexts = recall_contexts(tokenizer, filler, max_length=most)
    return Plan(books=books, windows=windows, contexts=contexts, is_decoded=arguments.check)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--books", type=Path, nargs="+", default=[], help="plain text")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--windows", type=int, help="of each length and book (all)")
    parser.add_argument("--tuning", action="store_true", help="windows that no report takes")
    parser.add_argument("--cases", nargs="*", help="which (our formats and all peers)")
    parser.add_argument("--check", action="store_true", help="our formats in the library itself")
    parser.add_argument("--no-recall", action="store_true")
    parser.add_argument("--no-calibration", action="store_true")
    parser.add_argument("--threads", type=int, help="of the CPU")
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.lengths, arguments.windows, arguments.no_recall = [512], 1, True
    if not arguments.books:
        parser.error("give --books")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return arguments


def main() -> None:
    arguments = parse_arguments()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, model_max_length=1 << 30)
    books = [
        Book(path.stem, tokenizer.encode(read_book(path), add_special_tokens=False))
        for path in arguments.books
    ]
    model = PagedModel(load_model(arguments.model, torch.float32))
    most = model.model.config.max_position_embeddings
    arguments.lengths = [length for length in arguments.lengths if length <= most]
    plan = make_plan(books, tokenizer, arguments, most)
    calibration = None if arguments.no_calibration else usual_calibration(model, tokenizer)
    kept = KeptResults(arguments.json)
    measuring = Measuring(model, make_cases(model, arguments.cases, calibration), kept, calibration)
    plan.measure(measuring)
    write_report("quality", plan.rows(measuring), arguments.json)


if __name__ == "__main__":
    main()
