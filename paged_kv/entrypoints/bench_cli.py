"""The command `paged-kv bench`.

Knows its arguments, and shows and writes what comes of them; never how anything is measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..cache.formats import FORMATS
from ..cache.layer_formats import resolve_formats
from ..errors import ConfigError
from ..validation import require_count
from .bench_options import REPEATS, add_workload, check_workload, workload_of
from .llm_options import add_memory, load_llm
from .progress import WorkBar
from .quality_cli import add_measuring, evaluate, set_threads
from .result_file import explained, require_writable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..benchmarks.report import Row
    from ..benchmarks.workloads import Workload
    from ..engine.engine import Engine

    Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]

PLOT_SUFFIXES: Final = (".png", ".svg")
BENCH: Final = """Measure on this machine, in turns, beside the first of --formats or another
baseline. Every figure is a row: case, metric, value, and how many times better than the baseline.
--json writes rows with the command, the device, versions and the commit, --plot draws them, and
--quick shows in seconds that it works. docs/benchmarks.md says how to read them."""
THROUGHPUT: Final = """Serve requests that are all there from the start: output tokens a second, how
many sequences run at once and what they hold, by format, in pools of the same --kv-memory."""
LATENCY: Final = """Serve requests that arrive in time: seconds to the first token and between
tokens, and how many requests keep --max-ttft and --max-itl (goodput)."""
MEMORY: Final = """What one sequence of each length holds in each format, measured and by the
arithmetic of the format, and the most while it is stored."""
QUALITY: Final = """What formats change in what a model says, as `paged-kv eval` measures it."""
ATTENTION: Final = """The attention of the CPU's kernels over blocks in each format, beside torch's
over contiguous K/V, and storing and sealing beside torch's operations. Takes no model."""
MANAGER: Final = """What a step of block manager and scheduler takes, with hundreds to thousands of
sequences; admission, freeing and forking; what their tables hold. Takes no model."""
COMMANDS: Final = {
    "throughput": THROUGHPUT,
    "latency": LATENCY,
    "memory": MEMORY,
    "quality": QUALITY,
    "attention": ATTENTION,
    "manager": MANAGER,
}
SHOWN: Final = {  # what pictures show
    "throughput": ("output tokens", "sequences at once", "peak KV"),
    "latency": ("time to first token", "between tokens", "goodput"),
    "memory": ("held (",),
    "quality": ("KL mnat", "top-1", "B/token"),
    "attention": ("decode us", "prefill us", "append us", "seal us"),
    "manager": ("schedule + update", "manager, ", "admission"),
}
SERVED: Final = ("native", "int8", "int2")
QUICK_LENGTHS, LENGTHS = (96, 160), (512, 1024, 2048, 4096, 8192)


def add_bench(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="WHAT", dest="what")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=first_clause(text), description=text)
        command.set_defaults(run=run_bench, generation_config="none")
        OPTIONS[name](command)
        output = command.add_argument_group("output")
        output.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
        output.add_argument("--plot", type=Path, metavar="FILE", help="draw them (.png, .svg)")
        output.add_argument("--quick", action="store_true", help="a small run: that it works")


def first_clause(text: str) -> str:
    clause = " ".join(text.split()).partition(":")[0].partition(",")[0]
    return clause[0].lower() + clause[1:]


def add_model(parser: argparse.ArgumentParser, formats: Sequence[str]) -> None:
    parser.add_argument("--model", help="folder, hub name or .gguf (default: the demo model)")
    parser.add_argument(
        "--formats",
        nargs="+",
        default=list(formats),
        metavar="FORMAT",
        help=f"of {', '.join(FORMATS)} ({' '.join(formats)}); the first is the baseline",
    )


def add_serving(parser: argparse.ArgumentParser, *, has_arrivals: bool) -> None:
    add_model(parser, SERVED)
    add_workload(parser, has_arrivals=has_arrivals)
    add_memory(parser, has_format=False)
    parser.add_argument(
        "--native-sequences",
        type=int,
        metavar="N",
        help="in place of --kv-memory: what N requests of mean length hold in the first format",
    )


def add_held(parser: argparse.ArgumentParser) -> None:
    add_model(parser, ("native", "int8", "int4", "int3", "int2"))
    parser.add_argument(
        "--lengths", type=int, nargs="+", metavar="TOKENS", help=f"({' '.join(map(str, LENGTHS))})"
    )
    add_memory(parser, has_format=False)


def add_quality(parser: argparse.ArgumentParser) -> None:
    add_model(parser, ("int8", "int4", "int3", "int2"))
    add_measuring(parser)
    parser.add_argument("--calibration", default="usual", metavar="FILE", help="none: without")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int, help="CPU threads (torch's default)")


def add_attention(parser: argparse.ArgumentParser) -> None:
    for name, parts in (("formats", "native int8"), ("cases", "16x2048 ragged")):
        help_text = f"parts of their names: {parts} (all)"
        parser.add_argument(f"--{name}", nargs="+", metavar="NAME", help=help_text)
    parser.add_argument("--patience", type=float, help="seconds to wait for undisturbed samples")
    parser.add_argument("--threads", type=int, help="CPU threads (torch's default)")


def add_nothing(parser: argparse.ArgumentParser) -> None:
    """It has no options of its own."""


OPTIONS: Final[dict[str, Callable[[argparse.ArgumentParser], None]]] = {
    "throughput": lambda parser: add_serving(parser, has_arrivals=False),
    "latency": lambda parser: add_serving(parser, has_arrivals=True),
    "memory": add_held,
    "quality": add_quality,
    "attention": add_attention,
    "manager": add_nothing,
}


def run_bench(arguments: argparse.Namespace) -> int:
    from ..benchmarks.held import BOUND
    from ..benchmarks.plot import draw, require_plot
    from ..benchmarks.report import command_of, report_of, write_json

    if arguments.plot is not None:
        require_plot()
        if arguments.plot.suffix not in PLOT_SUFFIXES:
            raise ConfigError(f"--plot must end in .png or .svg, got {str(arguments.plot)!r}")
    for path in (arguments.json, arguments.plot):
        if path is not None:
            require_writable(path)
    if getattr(arguments, "threads", None) is not None:
        require_count("--threads", arguments.threads)
    rows = ROWS[arguments.what](arguments)
    report = report_of(arguments.what, rows, command_of(arguments.words))
    show(report)
    if arguments.json is not None:
        write_json(report, arguments.json)
    if arguments.plot is not None:
        draw(report, arguments.plot, SHOWN[arguments.what], BOUND)
    return 0


def show(report: dict[str, Any]) -> None:
    """A table of the rows, and what they are made by."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{report['benchmark']}, {report['device']}", title_justify="left")
    for heading in ("case", "metric"):
        table.add_column(heading, overflow="fold")
    for heading in ("value", "unit", "times better", "than"):
        table.add_column(
            heading, justify="right" if heading in ("value", "times better") else "left"
        )
    for row in report["rows"]:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}x"
        named = (escape(row["case"]), escape(row["metric"]))
        figures = (f"{row['value']:.5g}", row["unit"], ratio, row["baseline"] or "")
        table.add_row(*named, *figures)
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    with explained("write", "standard output"):
        console = Console(highlight=False)
        console.print(table)
        console.print(f"commit {report['commit']}; {versions}", soft_wrap=True)
        console.print(escape(f"again: {report['command']}"), soft_wrap=True)


# -- on models ----------------------------------------------------------------------------------


def load(arguments: argparse.Namespace) -> Loaded:
    """The model once, for the `LLM`s of all formats, which are resolved first."""
    import torch

    from ..models.loading import load_model, load_tokenizer
    from .demo import MODEL_FOLDER

    for name in arguments.formats:
        resolve_formats(name)
    name = MODEL_FOLDER if arguments.model is None else arguments.model
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    return load_model(name, dtype), load_tokenizer(name)


def open_engines(
    arguments: argparse.Namespace, loaded: Loaded, stack: ExitStack
) -> dict[str, Engine]:
    """An engine for each format, with a pool of its own; all on the same weights."""
    engines = {}
    for name in dict.fromkeys(arguments.formats):
        of_format = argparse.Namespace(**{**vars(arguments), "kv_format": name})
        engines[name] = stack.enter_context(load_llm(of_format, loaded)).engine
    return engines


def serving_rows(arguments: argparse.Namespace) -> list[Row]:
    from ..benchmarks import serving
    from ..benchmarks.workloads import describe
    from ..models.length_limit import model_length

    check_workload(arguments)
    model, tokenizer = loaded = load(arguments)
    longest = model_length(model, arguments.max_model_len)
    num_vocab = int(model.config.get_text_config().vocab_size)
    name, workload = workload_of(arguments, num_vocab, longest, tokenizer.encode)
    print(f"{name}\n{describe(workload)}")
    if arguments.native_sequences is not None:
        arguments.kv_memory = budget_of(arguments, model, workload)
        print(f"{arguments.kv_memory / 2**20:.1f} MiB of K/V for each format")
    limits = serving.Limits(
        *(None if ms is None else ms / 1000 for ms in (arguments.max_ttft, arguments.max_itl))
    )
    repeats = arguments.repeats or (1 if arguments.quick else REPEATS)
    with ExitStack() as stack:
        engines = open_engines(arguments, loaded, stack)
        total = repeats * len(engines) * len(workload)
        bar = stack.enter_context(WorkBar("requests", total))
        runs = serving.take_turns(engines, workload, repeats, bar.advance)
    figures = (*serving.RATES, *serving.TIMES, *serving.goodput(limits), *serving.HELD)
    return serving.rows_of(arguments.workload, runs, figures)


def budget_of(arguments: argparse.Namespace, model: PreTrainedModel, workload: Workload) -> int:
    """Bytes that so many requests of mean length hold in the first format."""
    import torch

    from ..benchmarks.workloads import mean_tokens
    from ..cache.layer_groups import sequence_bytes
    from ..cache.layer_spec import usual_kv_dtype
    from ..models.routes import choose_route

    attached = choose_route(model)
    try:
        layers = attached.layers(resolve_formats(arguments.formats[0]))
    finally:
        attached.close()
    chosen = getattr(torch, arguments.kv_dtype) if arguments.kv_dtype else None
    dtype = chosen or usual_kv_dtype(layers, model.dtype)
    num_tokens = round(mean_tokens(workload))
    num_sequences: int = arguments.native_sequences
    return num_sequences * sequence_bytes(layers, dtype, num_tokens)


def memory_rows(arguments: argparse.Namespace) -> list[Row]:
    from ..benchmarks.held import held_rows
    from ..models.length_limit import model_length

    for length in arguments.lengths or ():
        require_count("--lengths", length)
    loaded = load(arguments)
    longest = model_length(loaded[0], arguments.max_model_len) - 2
    wanted = arguments.lengths or (QUICK_LENGTHS if arguments.quick else LENGTHS)
    lengths = [length for length in wanted if length <= longest]
    if arguments.lengths and lengths != wanted:
        raise ConfigError(f"--lengths may be at most {longest} for this model, got {max(wanted)}")
    with ExitStack() as stack:
        engines = open_engines(arguments, loaded, stack)
        bar = stack.enter_context(WorkBar("sequences", len(engines) * len(lengths)))
        return held_rows(engines, lengths, bar.advance)


def quality_rows(arguments: argparse.Namespace) -> list[Row]:
    from ..benchmarks.report import Row
    from .demo import MODEL_FOLDER
    from .evaluation import HEADINGS

    if arguments.model is None:
        arguments.model = MODEL_FOLDER
    if arguments.quick:
        arguments.windows, arguments.length, arguments.no_recall = 1, 160, True
    evaluation = evaluate(arguments, arguments.json)
    units = dict(zip(HEADINGS, ("mnat", "mnat", "mnat", "%", "", "pairs", "B", "B"), strict=True))
    found = evaluation.rows()
    rows = []
    for row in found:
        for heading, unit in units.items():
            if heading == "recall" and arguments.no_recall:
                continue
            native = found[0][heading] if row is not found[0] else None
            is_size = heading in ("B/token", "held", "ppl") and native is not None
            rows.append(
                Row(
                    case=row["format"],
                    metric=heading,
                    value=row[heading],
                    unit=unit,
                    baseline=found[0]["format"] if is_size else None,
                    baseline_value=native if is_size else None,
                    ratio=native / row[heading] if is_size else None,
                )
            )
    return rows


# -- without a model ------------------------------------------------------------------------------


def attention_rows(arguments: argparse.Namespace) -> list[Row]:
    from ..benchmarks.attention import Bench, chosen
    from ..benchmarks.attention_cases import CASES, QUICK_CASES
    from ..benchmarks.paged_cases import FORMATS
    from ..benchmarks.turns import Sampling

    cases = QUICK_CASES if arguments.quick else CASES
    names = chosen("--cases", cases, arguments.cases)
    labels = chosen("--formats", FORMATS, arguments.formats)
    if arguments.patience is not None and not arguments.patience > 0:
        raise ConfigError(f"--patience must be above 0 seconds, got {arguments.patience:g}")
    set_threads(arguments.threads)
    num_wanted, patience = (3, 0.5) if arguments.quick else (15, 30.0)
    bench = Bench(
        labels=labels,
        sampling=Sampling(num_wanted, arguments.patience or patience),
        tell=lambda *_: None,
    )
    rows = []
    with WorkBar("cases", len(names)) as bar:
        for name in names:
            rows += bench.rows(name, cases[name])
            bar.advance()
    return rows


def manager_rows(arguments: argparse.Namespace) -> list[Row]:
    from ..benchmarks.manager import manager_rows, sizes_of

    with WorkBar("tables", len(sizes_of(arguments.quick)) + 1) as bar:
        return manager_rows(arguments.quick, advance=bar.advance)


ROWS: Final[dict[str, Callable[[argparse.Namespace], list[Row]]]] = {
    "throughput": serving_rows,
    "latency": serving_rows,
    "memory": memory_rows,
    "quality": quality_rows,
    "attention": attention_rows,
    "manager": manager_rows,
}
