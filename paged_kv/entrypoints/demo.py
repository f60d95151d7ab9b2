"""The demonstration: one small trained model, 32 requests at once, every KV format, one table.

Needs nothing but the package: the model is package data. Knows an `LLM` and what it reports.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Final

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from ..cache.formats import FORMATS
from ..engine.evaluate import Quality, compare_formats
from ..engine.sampling_params import SamplingParams
from ..models.calibration import usual_calibration
from ..models.huggingface import PagedModel
from ..models.loading import DEMO_MODEL, load_model, load_tokenizer
from ..units import format_memory
from ..validation import require_count
from .llm import LLM
from .outputs import RequestOutput

MODEL_FOLDER: Final = DEMO_MODEL
SUBJECTS: Final = (
    "The captain",
    "Her sister",
    "The old gentleman",
    "Mr. Weston",
    "The doctor",
    "A young lady",
    "The little boy",
    "Father Brown",
)
OPENINGS: Final = (
    "{} had not expected so early a visit, and",
    "{} looked out at the sea for some time, and then said:",
    "It was a fine morning in October when {} came into the room, and",
    "Nobody in the house could have told why {} was silent that evening;",
)
NUM_SHOWN: Final = 3
NUM_CHARACTERS_SHOWN: Final = 400
TOKENS_PER_TEACHER_STEP: Final = 4
NUM_TURNS: Final = 3
MOST_TOKENS: Final = 960  # of the model's 1024 places
CAPTION: Final = (
    "tokens/s: median of three turns; the model is so small that most of a step is neither "
    "attention nor cache, so it does not say which format is faster on a model of yours. "
    "peak KV: most memory of blocks in use, heads and tails in full precision included. "
    "B/token: bytes of a sealed token over all layers. ratio: native / this format. KL and top-1 "
    "agreement: next-token distributions against native, teacher-forced."
)


@dataclass(frozen=True)
class FormatRun:
    """What one format did with all prompts."""

    outputs: list[RequestOutput]
    tokens_per_second: float
    peak_bytes: int
    bytes_per_token: float


def demo_prompts() -> list[str]:
    """32 different openings."""
    names = [[name, name[0].lower() + name[1:]] for name in SUBJECTS]
    return [
        opening.format(name if opening.startswith("{}") or name.startswith("Mr") else lower)
        for opening in OPENINGS
        for name, lower in names
    ]


def run_formats(
    params: Sequence[SamplingParams], show: Callable[[str], None]
) -> dict[str, FormatRun]:
    """Decode all prompts at once in every format, in turns; the first turn warms and is short."""
    model, tokenizer = load_model(MODEL_FOLDER, None), load_tokenizer(MODEL_FOLDER)
    rates: dict[str, list[float]] = {name: [] for name in FORMATS}
    runs = {}
    with ExitStack() as stack:
        llms = {
            name: stack.enter_context(
                LLM(model, tokenizer=tokenizer, kv_format=name, max_num_seqs=len(params),
                    prefix_caching=False)
            )
            for name in FORMATS
        }  # fmt: skip
        for llm in llms.values():
            llm.generate(demo_prompts(), SamplingParams(max_tokens=2), show_progress=False)
        for turn in range(NUM_TURNS):
            show(f"turn {turn + 1} of {NUM_TURNS}")
            for name, llm in llms.items():
                started = time.perf_counter()
                outputs = llm.generate(demo_prompts(), params)
                seconds = time.perf_counter() - started
                rates[name].append(sum(len(output.token_ids) for output in outputs) / seconds)
                show(f"  {name}: {seconds:.1f} s")
                runs[name] = FormatRun(
                    outputs=outputs,
                    tokens_per_second=median(rates[name]),
                    peak_bytes=llm.engine.manager.pool.peak_allocated
                    * llm.engine.cache.block_bytes,
                    bytes_per_token=llm.bytes_per_token(),
                )
    return runs


def compare_on(outputs: Sequence[RequestOutput]) -> list[Quality]:
    """Every format teacher-forced on the native run's own tokens, the first being native."""
    sequences = [output.prompt_token_ids + output.token_ids for output in outputs]
    length = min(map(len, sequences))
    windows = np.array([sequence[:length] for sequence in sequences])
    model = PagedModel(load_model(MODEL_FOLDER, None))
    known = usual_calibration(model, load_tokenizer(MODEL_FOLDER))  # as an LLM has it
    return compare_formats(
        model,
        list(FORMATS.values()),
        windows,
        calibration=known.layers,
        tokens_per_step=TOKENS_PER_TEACHER_STEP,
    )


def run_demo(max_tokens: int, console: Console) -> None:
    """Decode the prompts in every format, then print the table and a few continuations.

    Raises `ConfigError` for more tokens than the model knows places of.
    """
    require_count("--max-tokens", max_tokens, most=MOST_TOKENS)
    params = [
        SamplingParams(
            temperature=0.7, top_p=0.9, seed=seed, max_tokens=max_tokens, ignore_eos=True
        )
        for seed in range(len(demo_prompts()))
    ]
    console.print(f"{len(params)} requests of {max_tokens} tokens, on {where()}")
    runs = run_formats(params, console.print)
    console.print("comparing the formats on the native run's text, teacher-forced")
    qualities = dict(zip(FORMATS, compare_on(runs["native"].outputs), strict=True))
    console.print(results_table(runs, qualities))
    for output in runs["int2"].outputs[:: len(params) // NUM_SHOWN][:NUM_SHOWN]:
        text = textwrap.shorten(output.text, NUM_CHARACTERS_SHOWN, placeholder=" ...")
        console.print(Panel(f"[bold]{output.prompt}[/] {escape(text)}", title="int2"))


def where() -> str:
    """What everything runs on."""
    threads = torch.get_num_threads()
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"{threads} thread{'s' * (threads > 1)} of a CPU ({capability}), torch {torch.__version__}"
    )


def results_table(runs: dict[str, FormatRun], qualities: dict[str, Quality]) -> Table:
    """One row a format."""
    native = runs["native"]
    table = Table(title="32 requests at once on quantized paged blocks", caption=CAPTION)
    table.add_column("KV format", no_wrap=True)
    for heading in ("tokens/s", "peak KV", "ratio", "B/token", "ratio", "KL mnat", "top-1"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, run in runs.items():
        quality = qualities[name]
        table.add_row(
            name,
            f"{run.tokens_per_second:.0f}",
            format_memory(run.peak_bytes),
            f"{native.peak_bytes / run.peak_bytes:.2f}x",
            f"{run.bytes_per_token:.0f}",
            f"{native.bytes_per_token / run.bytes_per_token:.2f}x",
            f"{1000 * quality.divergence:.3f}",
            f"{100 * quality.agreement:.1f} %",
        )
    return table
