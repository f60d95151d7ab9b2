"""The command line: `paged-kv generate`, `serve`, `bench` and so on.

Knows arguments, standard input and output; never blocks, nor what is in a line or a result.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from ..cache.layer_formats import formats_name, resolve_formats
from ..engine.sampling_params import SamplingParams
from ..errors import InvalidRequestError, PagedKVError
from ..units import format_memory, parse_memory
from ..version import __version__
from .batch_job import BatchJob, warn
from .bench_cli import BENCH, add_bench
from .chat_cli import CHAT, add_chat
from .llm_options import SAMPLING_OPTIONS, add_memory, add_sampling, load_llm, sampling_params
from .quality_cli import EVALUATE, LEARN, add_calibrate, add_evaluate
from .request_lines import Line, encode_json, fingerprint, json_lines, prepare, text_lines
from .result_file import (
    Job,
    OrderedSink,
    Result,
    ResultFile,
    ResultSink,
    StreamSink,
    explained,
    part_of,
)
from .server.serve_cli import SERVE, add_serve
from .terminal import emit
from .top_cli import TOP, add_top

if TYPE_CHECKING:
    from rich.table import Table

    from ..models.cost import KindCost
    from .llm import LLM


# What a result depends on, beside its request, ...
DECISIVE_OPTIONS: Final = (
    *("model", "kv_format", "dtype", "kv_dtype", "calibration", "max_model_len"),
    *("generation_config", "window", "sinks"),
    *(*SAMPLING_OPTIONS, "stop", "ignore_eos"),
)
# ... and where nothing else ends it.
POOL_OPTIONS: Final = ("kv_memory", "num_blocks", "max_num_seqs")
EXIT_BROKEN_PIPE: Final = 128 + 13  # what a shell says of a process that SIGPIPE ended
CONTEXT_LENGTHS: Final = (1024, 4096, 32768)
HELD_LENGTHS: Final = (1024, 8192, 32768, 131072)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        try:
            return run_command(arguments)
        finally:
            if sys.stdout is not None:
                emit("")  # and what help or a table left in the buffer
    except BrokenPipeError:  # whoever read the output has enough
        return EXIT_BROKEN_PIPE
    except PagedKVError as error:
        warn(str(error))
        return 2


def run_command(arguments: Sequence[str] | None) -> int:
    parsed = build_parser().parse_args(arguments)
    parsed.words = ["paged-kv", *(sys.argv[1:] if arguments is None else arguments)]
    try:
        exit_code: int = parsed.run(parsed)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("paged_kv"):
            raise
        warn(f"it needs {error.name}: pip install 'paged-kv[models]'")
        return 2
    return exit_code


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="paged-kv",
        description="Decode language models on quantized, paged KV blocks.",
    )
    parser.add_argument("--version", action="version", version=f"paged-kv {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_generate(commands.add_parser("generate", help="continue prompts", description=GENERATE))
    chat = commands.add_parser("chat", help="talk with a model", description=CHAT)
    add_chat(chat)
    add_memory(chat)
    add_sampling(chat)
    server = commands.add_parser("serve", help="a model over HTTP", description=SERVE)
    add_serve(server)
    add_memory(server)
    add_evaluate(commands.add_parser("eval", help="what formats change", description=EVALUATE))
    add_calibrate(commands.add_parser("calibrate", help="learn a model's keys", description=LEARN))
    add_bench(commands.add_parser("bench", help="measure on this machine", description=BENCH))
    add_top(commands.add_parser("top", help="a live view of a server", description=TOP))
    add_demo(commands.add_parser("demo", help="see every KV format at work", description=DEMO))
    add_info(commands.add_parser("info", help="what a model's tokens cost", description=INFO))
    return parser


GENERATE: Final = """Continue prompts: those given as arguments, else one for each line of standard
input, else of a JSONL file. Each JSONL line is an object with "prompt" (text or token ids) or
"messages" (a chat), and optionally "id" and any sampling option; the output has one JSON line for
each, in the same order, with "text" or with "error"; it has "completions" where n is above 1.

With --output each result is kept in FILE.part as soon as it is finished; all together replace FILE
at the end. However a job was interrupted, the same command with --resume goes on with it; without a
FILE.part, so when a job is done too, it starts anew. Its tokens are those of an undisturbed job in
float32 and the native format; in others they depend a little on what is computed in one step.
SIGINT and SIGTERM drop the requests that are being computed; a second one ends at once."""
DEMO: Final = """Decode 32 requests at once on a small trained model that comes with the package, in
every KV format, and print tokens/s, KV memory and how far each format strays from native."""
INFO: Final = """What each token of a model costs in every KV format, how many tokens fit in a given
memory, and what sequences hold in layers that keep all and in those that see a window. Reads the
model's configuration only, not its weights."""


def add_generate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run_generate)
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="text to continue")
    parser.add_argument("--model", help="folder, hub name or .gguf (default: the demo model)")
    parser.add_argument("--input", metavar="FILE", help="JSONL requests; - is standard input")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write JSON lines to this file")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the job that FILE.part keeps, if any"
    )
    parser.add_argument("--chat", action="store_true", help="each prompt is a user's chat message")
    add_memory(parser)
    add_sampling(parser)


def add_demo(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run_demo_command)
    parser.add_argument("--max-tokens", type=int, default=384, help="tokens of each request (384)")


def add_info(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run_info)
    parser.add_argument("model", nargs="?", help="model folder or hub name (the demo model)")
    parser.add_argument("--memory", default="8GiB", help="memory for K/V (8GiB)")
    parser.add_argument("--kv-format", help="another one, by layer: int2,0=int8,-1=native")


# -- generate -----------------------------------------------------------------------------------


def run_generate(arguments: argparse.Namespace) -> int:
    params = sampling_params(arguments)
    lines = read_request_lines(arguments)
    is_conversation = len(lines) == 1 and not arguments.input and not arguments.output
    if is_conversation and params.num_samples == 1:
        with load_llm(arguments) as llm:
            return print_stream(llm, lines[0], params)
    with open_sink(arguments, lines) as sink, load_llm(arguments) as llm:
        return BatchJob(lines, params, sink).run(llm)


def read_request_lines(arguments: argparse.Namespace) -> list[Line]:
    if arguments.prompts and arguments.input:
        raise InvalidRequestError("give prompts as arguments or --input, not both")
    if arguments.chat and arguments.input:
        raise InvalidRequestError('with --input a chat is a line with "messages", not --chat')
    if arguments.resume and not arguments.output:
        raise InvalidRequestError("--resume goes on with an --output, and none is given")
    if arguments.input:
        with open_input(arguments.input) as source:
            lines = list(json_lines(source))
    else:
        lines = list(text_lines(plain_prompts(arguments), arguments.chat))
    if not lines:
        raise InvalidRequestError("no prompts: give arguments, standard input or --input")
    return lines


@contextmanager
def open_input(name: str) -> Iterator[Iterable[bytes]]:
    """Lines of a file or of standard input, as bytes: what a bad line spoils is that line."""
    if name == "-":
        yield standard_input()
        return
    with explained("read", name), Path(name).open("rb") as source:
        yield source


def standard_input() -> Iterable[bytes]:
    if sys.stdin is None:
        return []
    if hasattr(sys.stdin, "buffer"):
        return cast("Iterable[bytes]", sys.stdin.buffer)
    return (line.encode("utf-8", "surrogatepass") for line in sys.stdin)


def plain_prompts(arguments: argparse.Namespace) -> Iterable[bytes]:
    """Prompts from arguments or, without any, from lines of standard input."""
    if arguments.prompts:
        return [prompt.encode("utf-8", "surrogatepass") for prompt in arguments.prompts]
    if sys.stdin is None or sys.stdin.isatty():
        return []
    return [line.rstrip(b"\r\n") for line in standard_input() if line.strip()]


def open_sink(arguments: argparse.Namespace, lines: list[Line]) -> ResultSink:
    """Where results go. What cannot be written is refused here, before the model is loaded."""
    output: Path | None = arguments.output
    if output is None:
        return OrderedSink(print_json if arguments.input else print_text)
    if not arguments.prompts:
        refuse_input_as_output(arguments.input or "-", output)
    with explained("write", output):
        if output.exists() and not output.is_file():
            return StreamSink(output)
    file = ResultFile(output, job_of(arguments, lines), resume=arguments.resume)
    if arguments.resume:
        tried = f", {file.num_failed} that failed are tried again" if file.num_failed else ""
        warn(f"{file.num_done} of {len(lines)} are done in {str(file.part)!r}{tried}")
    return file


def refuse_input_as_output(source: str, output: Path) -> None:
    for path in (output, part_of(output)):
        try:
            of_input = os.fstat(sys.stdin.fileno()) if source == "-" else os.stat(source)
            is_same = path.is_file() and os.path.samestat(of_input, path.stat())
        except (OSError, ValueError, AttributeError):  # no such file, or no standard input
            continue
        if is_same:
            raise InvalidRequestError(f"--output {str(path)!r} is the input: it would be lost")


def job_of(arguments: argparse.Namespace, lines: list[Line]) -> Job:
    """What is asked for; memory, speed and company may be others when it is resumed."""
    names = list(DECISIVE_OPTIONS)
    if any(line.record.get("max_tokens", arguments.max_tokens) is None for line in lines):
        names += POOL_OPTIONS  # then as many as fit
    options = {name: getattr(arguments, name) for name in names}
    if options["model"] and Path(options["model"]).exists():
        options["model"] = os.path.realpath(options["model"])
    return {
        "requests": len(lines),
        "input": fingerprint(lines),
        "options": {name: ascii(value) for name, value in options.items()},
    }


def print_stream(llm: LLM, line: Line, params: SamplingParams) -> int:
    """One prompt: print its text as it comes."""
    token_ids, params = prepare(llm, line, params)
    for event in llm.stream([token_ids], params):
        if event.error is not None:
            raise event.error
        emit(event.text)
    emit("\n")
    return 0


def print_json(result: Result) -> None:
    emit(encode_json(result).decode() + "\n", "utf-8")


def print_text(result: Result) -> None:
    """What a person reads: prompt and continuation, a blank line between results."""
    if "error" not in result:
        for completion in result.get("completions", [result]):
            emit(f"{result.get('prompt', '')}{completion['text']}\n\n")


# -- demo and info ------------------------------------------------------------------------------


def run_demo_command(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from .demo import run_demo

    run_demo(arguments.max_tokens, Console())
    return 0


def run_info(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from ..models.cost import format_costs, kind_costs, probe_layers
    from .demo import MODEL_FOLDER

    memory_bytes = parse_memory(arguments.memory)
    layers, dtype = probe_layers(MODEL_FOLDER if arguments.model is None else arguments.model)
    others = [] if arguments.kv_format is None else [resolve_formats(arguments.kv_format)]
    costs = format_costs(layers, dtype, CONTEXT_LENGTHS, others)
    heads = sorted({layer.num_kv_heads for layer in layers})
    table = Table(
        title=f"{len(layers)} layers, kv heads {heads}, {str(dtype).removeprefix('torch.')}, "
        f"{format_memory(memory_bytes)} for K/V",
        caption="bytes: a sealed token over all layers. at N: how many times smaller than native a "
        "sequence of N tokens is, head and tail in full precision included. tokens: that fit, of "
        f"layers that let go of some in sequences of {CONTEXT_LENGTHS[-1]}.",
    )
    table.add_column("KV format")
    for heading in (
        "bytes",
        "smaller",
        *(f"at {n}" for n in CONTEXT_LENGTHS),
        "tokens",
    ):
        table.add_column(heading, justify="right")
    native = costs[0]
    for cost in costs:
        table.add_row(
            cost.name,
            f"{cost.bytes_per_token:.0f}",
            f"{native.bytes_per_token / cost.bytes_per_token:.2f}x",
            *(f"{native.effective[n] / cost.effective[n]:.2f}x" for n in CONTEXT_LENGTHS),
            f"{cost.tokens_in(memory_bytes):,}",
        )
    kv_format = resolve_formats(arguments.kv_format or "native")
    kinds = kind_costs(layers, dtype, HELD_LENGTHS, kv_format)
    held = held_table(f"in {formats_name(kv_format.of(len(layers)))}", kinds)
    with explained("write", "standard output"):
        Console().print(table, held)
    return 0


def short_memory(num_bytes: int) -> str:
    """Whole numbers without their fraction."""
    return format_memory(num_bytes).replace(".0 ", " ")


def held_table(title: str, kinds: Sequence[KindCost]) -> Table:
    """What sequences hold in every kind of layers, and in all of them."""
    from rich.table import Table

    table = Table(
        title=title,
        caption="bytes: a sealed token, empty places of groups included. at N: what a sequence of "
        "N tokens holds.",
    )
    table.add_column("layers keep", no_wrap=True)
    for heading in ("layers", "bytes", *(f"at {n // 1024}K" for n in HELD_LENGTHS)):
        table.add_column(heading, justify="right", no_wrap=True)
    for kind in kinds:
        table.add_row(
            str(kind.retention),
            str(kind.num_layers),
            f"{kind.bytes_per_token:.0f}",
            *(short_memory(kind.held[n]) for n in HELD_LENGTHS),
        )
    if len(kinds) > 1:
        table.add_row(
            "together",
            str(sum(kind.num_layers for kind in kinds)),
            f"{sum(kind.bytes_per_token for kind in kinds):.0f}",
            *(short_memory(sum(kind.held[n] for kind in kinds)) for n in HELD_LENGTHS),
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
