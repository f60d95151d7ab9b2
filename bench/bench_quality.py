"""Perplexity and divergence of every KV format, teacher-forced on a book the model never saw.

    python bench/bench_quality.py --book austen-persuasion.txt --json bench/results/quality.json

One token a step, as in decoding, over 1024-token windows that start with BOS. The controls switch
off what the 2-bit format owes its quality to: the head in full precision, the tail, clipping.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from report import Row, add_arguments, write_report
from training.train_demo_model import read_book
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from paged_kv.blocks.geometry import IntArray
from paged_kv.cache.formats import INT2, INT4, INT8, NATIVE, KVFormat
from paged_kv.engine.evaluate import Quality, compare_formats
from paged_kv.entrypoints.demo import MODEL_FOLDER
from paged_kv.models.huggingface import PagedModel

WINDOW = 1024
CASES: dict[str, KVFormat] = {
    "native": NATIVE,
    "int8": INT8,
    "int4": INT4,
    "int2": INT2,
    "int2, group 32": INT2.with_options(key_group_size=32),
    "int2, group 64": INT2.with_options(key_group_size=64),
    "int2, no clip": INT2.with_options(key_clip=1.0, value_clip=1.0),
    "int2, no head": INT2.with_options(num_sink_tokens=0),
    "int2, no tail": INT2.with_options(min_tail_tokens=0),
    "int2, no head, tail or clip": INT2.with_options(
        key_clip=1.0, value_clip=1.0, num_sink_tokens=0, min_tail_tokens=0
    ),
}


def token_windows(text: str, tokenizer: PreTrainedTokenizerBase, count: int | None) -> IntArray:
    """Consecutive windows of the text, each opened by BOS: [W, WINDOW]."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    body = WINDOW - 1
    num_windows = min(len(ids) // body, count or len(ids))
    windows = np.array(ids[: num_windows * body]).reshape(num_windows, body)
    return np.insert(windows, 0, tokenizer.bos_token_id, axis=1)


def rows_of(case: str, quality: Quality, native: Quality) -> list[Row]:
    loss_in_percent = 100 * (quality.perplexity / native.perplexity - 1)
    return [
        Row(
            case=case,
            metric="perplexity",
            value=quality.perplexity,
            unit="",
            baseline="native",
            baseline_value=native.perplexity,
            ratio=native.perplexity / quality.perplexity,
        ),
        Row(case=case, metric="perplexity above native", value=loss_in_percent, unit="%"),
        Row(case=case, metric="KL from native", value=1000 * quality.divergence, unit="mnat"),
        Row(case=case, metric="top-1 agreement", value=100 * quality.agreement, unit="%"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--book", type=Path, required=True, help="plain text, not trained on")
    parser.add_argument("--windows", type=int, help="how many windows (default: the whole book)")
    parser.add_argument("--tokens-per-step", type=int, default=1)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    add_arguments(parser)
    arguments = parser.parse_args()
    count = 2 if arguments.quick else arguments.windows
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    windows = token_windows(read_book(arguments.book), tokenizer, count)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32")
    names = ["native", *(case for case in arguments.cases if case != "native")]
    results = compare_formats(
        PagedModel(model),
        [CASES[name] for name in names],
        windows,
        tokens_per_step=arguments.tokens_per_step,
    )
    rows = [
        row
        for name, quality in zip(names, results, strict=True)
        for row in rows_of(f"{name}, {len(windows)} windows", quality, results[0])
    ]
    write_report("quality", rows, arguments.json)


if __name__ == "__main__":
    main()
