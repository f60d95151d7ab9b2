"""Windowed sequences far beyond a model's trained length: perplexity, memory, time a token.

    python bench/bench_windowed.py --books a.txt b.txt --json bench/results/windowed.json

The books are one text, teacher-forced: a step computes several tokens, of which each sees exactly
its own sinks and window. Beside sequences with sinks: dense attention within the trained length,
windows without sinks, and windows that are computed anew (`recomputed`, the costly ideal). Then
one sequence generates, one token a step, and each step is timed (also in CPU time, which other
programs on the machine disturb less).
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from report import Row, add_arguments, write_report
from training.train_demo_model import read_book
from training.train_sink_adapter import apply_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from paged_kv.blocks.sink_window import SinkWindow
from paged_kv.cache.formats import FORMATS, KVFormat
from paged_kv.cache.key_calibration import KeyCalibration
from paged_kv.cache.kv_cache import PagedKVCache
from paged_kv.cache.layer_spec import cache_geometry, usual_kv_dtype
from paged_kv.engine.model_runner import ModelRunner
from paged_kv.engine.sampling_params import SamplingParams
from paged_kv.entrypoints.demo import MODEL_FOLDER
from paged_kv.entrypoints.llm import LLM
from paged_kv.models.huggingface import PagedModel

WINDOWED = {
    "sinks + window, native": ("native", True),
    "sinks + window, int8": ("int8", True),
    "sinks + window, int4": ("int4", True),
    "sinks + window, int2": ("int2", True),
    "window only, native": ("native", False),
}
BIN_TOKENS = 2048  # of a stretch
RECOMPUTE_STRIDE = 64  # tokens that a recomputed window predicts
Losses = NDArray[np.float64]


def kept_sinks(kv_format: KVFormat, window: SinkWindow) -> KVFormat:
    """A format whose head holds the window's sinks."""
    if kv_format.is_native:
        return kv_format
    return kv_format.with_options(
        num_sink_tokens=max(kv_format.num_sink_tokens, window.num_sink_tokens)
    )


@torch.inference_mode()
def windowed(
    model: PagedModel,
    kv_format: KVFormat,
    window: SinkWindow,
    token_ids: NDArray[np.int64],
    tokens_per_step: int,
    calibration: Sequence[KeyCalibration] | None = None,
) -> tuple[Losses, NDArray[np.int64]]:
    """Loss of each next token of a windowed sequence, and the bytes it holds after each step.

    Open blocks have the precision that `LLM` would give them.
    """
    kv_format = kept_sinks(kv_format, window)
    layers = model.layers(kv_format, calibration)
    dtype = usual_kv_dtype(layers, model.dtype)
    geometry = cache_geometry(layers, dtype)
    # Twice what the sequence holds: a step may take new blocks before its old ones are freed.
    num_blocks = 2 * geometry.max_blocks(window.fitted(geometry).max_stored(geometry))
    cache = PagedKVCache(layers, num_blocks=num_blocks, dtype=dtype)
    runner = ModelRunner(model, cache)
    manager = cache.new_manager(max_num_seqs=1, max_model_len=1024)
    seq_id = np.array([manager.add_sequence(manager.chain_tokens((), sink_window=window))])
    losses, held, done = [], [], 0
    manager.append_tokens(seq_id, token_ids[:-1], [len(token_ids) - 1])
    while done < len(token_ids) - 1:
        count = min(tokens_per_step, int(manager.num_computable(seq_id)[0]))
        plan = manager.reserve(seq_id, [count])
        assert plan is not None
        rows = np.arange(count)
        logits, _ = runner.run(plan, token_ids[done : done + count], rows)
        manager.commit(plan)
        targets = torch.from_numpy(token_ids[done + 1 : done + count + 1])
        losses.append(-logits.double().log_softmax(-1)[rows, targets].numpy())
        held.append(manager.pool.num_allocated * cache.block_bytes)
        done += count
    return np.concatenate(losses), np.array(held)


@torch.inference_mode()
def dense(model: PreTrainedModel, token_ids: NDArray[np.int64], length: int, bos: int) -> Losses:
    """Loss of each token within windows of the trained length, each opened by BOS."""
    losses = []
    for start in range(0, len(token_ids) - length, length - 1):
        window = torch.from_numpy(np.insert(token_ids[start : start + length - 1], 0, bos))[None]
        losses.append(window_losses(model, window, length - 1))
    return np.concatenate(losses)


@torch.inference_mode()
def recomputed(
    model: PreTrainedModel, token_ids: NDArray[np.int64], length: int, bos: int
) -> Losses:
    """Loss of each token after the newest `length` before it, computed anew for every stride."""
    losses = []
    for start in range(length, len(token_ids) - RECOMPUTE_STRIDE, RECOMPUTE_STRIDE):
        end = start + RECOMPUTE_STRIDE
        window = torch.from_numpy(np.insert(token_ids[end - length + 1 : end], 0, bos))[None]
        losses.append(window_losses(model, window, RECOMPUTE_STRIDE))
    return np.concatenate(losses)


def window_losses(model: PreTrainedModel, window: torch.Tensor, num_last: int) -> Losses:
    """Of the last tokens of a window [1, L]."""
    logits = model(input_ids=window, use_cache=False, logits_to_keep=num_last + 1).logits[0, :-1]
    picked = logits.double().log_softmax(-1).gather(-1, window[0, -num_last:, None])
    result: Losses = -picked[:, 0].numpy()
    return result


def quality_rows(
    name: str, losses: Losses, reference: tuple[str, float], first: int = 0
) -> list[Row]:
    """Perplexity of all tokens, and the mean loss of stretches of them, `first` being the first."""
    perplexity = math.exp(losses.mean())
    rows = [
        Row(
            case=name,
            metric="perplexity",
            value=perplexity,
            unit="",
            baseline=reference[0],
            baseline_value=reference[1],
            ratio=reference[1] / perplexity,
        )
    ]
    for start in range(0, len(losses), BIN_TOKENS):
        case, mean = f"{name}, at {first + start}", losses[start : start + BIN_TOKENS].mean()
        rows.append(Row(case=case, metric="log-perplexity", value=float(mean), unit="nat"))
    return rows


def generation_rows(model: PreTrainedModel, window: SinkWindow, num_tokens: int) -> list[Row]:
    """A windowed sequence generates `num_tokens`, one a step: milliseconds and memory in tenths."""
    rows = []
    for name in ("native", "int8"):
        with LLM(model, kv_format=name, sink_window=window, max_num_seqs=1) as llm:
            params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=1.0, seed=0)
            clocks, held = [(time.perf_counter(), time.process_time())], []
            for _ in llm.stream([[0]], params):
                clocks.append((time.perf_counter(), time.process_time()))
                held.append(llm.memory_stats().allocated if len(clocks) % 7 == 0 else 0)
        case = f"generate {num_tokens}, {name}, tenth"
        spent = 1000 * np.diff(np.array(clocks), axis=0)
        for metric, times in zip(("time a token", "CPU time a token"), spent.T, strict=True):
            medians = [float(np.median(part)) for part in np.array_split(times, 10)]
            rows += [
                Row(
                    case=f"{case} {place + 1}", metric=metric, value=median, unit="ms",
                    baseline="second tenth", baseline_value=medians[1],
                    ratio=medians[1] / median,
                )
                for place, median in enumerate(medians)
            ]  # fmt: skip
        rows += [
            Row(
                case=f"{case} {place + 1}",
                metric="KV memory, most",
                value=int(part.max()),
                unit="B",
            )
            for place, part in enumerate(np.array_split(np.array(held), 10))
        ]
        print(f"{case}s: {[row.value for row in rows[-30:-20]]} ms", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--books", type=Path, nargs="+", default=[], help="plain text")
    parser.add_argument("--tokens", type=int, default=110_000, help="of the text (110,000)")
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--window", type=int, default=1020)
    parser.add_argument("--tokens-per-step", type=int, default=64)
    parser.add_argument("--generate", type=int, default=100_000, help="tokens to generate, 0: none")
    parser.add_argument("--adapter", type=Path, help="changes from train_sink_adapter.py")
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.tokens, arguments.generate = 4000, 400
    rows: list[Row] = []
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32")
    if arguments.adapter:
        apply_adapter(model, arguments.adapter)
    if arguments.books:
        rows += text_rows(model, arguments)
    if arguments.generate:
        window = SinkWindow(arguments.sinks, arguments.window)
        rows += generation_rows(model, window, arguments.generate)
    write_report("windowed", rows, arguments.json)


def text_rows(model: PreTrainedModel, arguments: argparse.Namespace) -> list[Row]:
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    bos, length = tokenizer.bos_token_id, model.config.max_position_embeddings
    text = "\n\n".join(read_book(book) for book in arguments.books)
    ids = np.array(tokenizer.encode(text, add_special_tokens=False)[: arguments.tokens - 1])
    if len(ids) < arguments.tokens - 1:
        raise SystemExit(f"{len(ids)} tokens of text, {arguments.tokens} asked for")
    within = dense(model, ids, length, bos)
    reference = f"dense within {length}", math.exp(within.mean())
    rows = quality_rows(reference[0], within, reference)
    anew = recomputed(model, ids[: min(len(ids), 20_000)], length, bos)
    rows += quality_rows("window recomputed, first part", anew, reference, first=length)
    token_ids = np.insert(ids, 0, bos)
    for name, (format_name, has_sinks) in WINDOWED.items():
        sinks = arguments.sinks if has_sinks else 0
        window = SinkWindow(sinks, arguments.window + arguments.sinks - sinks)
        paged = PagedModel(model)
        losses, held = windowed(
            paged, FORMATS[format_name], window, token_ids, arguments.tokens_per_step
        )
        paged.close()
        rows += quality_rows(name, losses, reference)
        beyond = slice(8 * length, len(within))  # the same text, which is not equally hard
        if len(within) > beyond.start:
            same_text = f"{reference[0]}, the same text", math.exp(within[beyond].mean())
            rows += quality_rows(f"{name}, beyond {8 * length}", losses[beyond], same_text)[:1]
        for start in range(0, len(held), BIN_TOKENS // arguments.tokens_per_step):
            most = float(held[start : start + BIN_TOKENS // arguments.tokens_per_step].max()) / 1024
            position = start * arguments.tokens_per_step
            rows.append(
                Row(case=f"{name}, at {position}", metric="KV memory", value=most, unit="KiB")
            )
        print(f"{name}: {math.exp(losses.mean()):.3f}", flush=True)
    return rows


if __name__ == "__main__":
    main()
