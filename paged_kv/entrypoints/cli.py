"""The command line: `paged-kv generate | eval | calibrate | demo | info`.

Knows arguments, standard input and output; never blocks, nor what is in a line or a result.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from ..blocks.sink_window import SinkWindow
from ..cache.formats import FORMATS
from ..engine.sampling_params import SamplingParams
from ..errors import InvalidRequestError, PagedKVError
from ..units import format_memory, parse_memory
from .batch_job import BatchJob, warn
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

if TYPE_CHECKING:
    from .llm import LLM


def count_or_none(text: str) -> int | None:
    return None if text == "none" else int(text)


SAMPLING_OPTIONS: Final[dict[str, tuple[Callable[[str], Any], str]]] = {
    "temperature": (float, "0 is greedy (the model's generation config, or 0)"),
    "top_k": (int, "keep the k most likely tokens"),
    "top_p": (float, "keep the smallest set of at least this probability"),
    "min_p": (float, "keep tokens at least this fraction as likely as the likeliest"),
    "typical_p": (float, "keep the most typical tokens of this probability"),
    "repetition_penalty": (float, "above 1: fewer tokens that were there before"),
    "frequency_penalty": (
        float,
        "above 0: fewer tokens that were generated before, by their count",
    ),
    "presence_penalty": (float, "above 0: fewer tokens that were generated before"),
    "no_repeat_ngram_size": (int, "no sequence of so many tokens comes twice"),
    "seed": (int, "make sampling reproducible"),
    "max_tokens": (count_or_none, "most tokens to generate; none: as many as fit"),
    "min_tokens": (int, "fewest tokens to generate"),
    "n": (int, "continuations of each prompt"),
    "best_of": (int, "sample so many and keep the n likeliest"),
    "logprobs": (int, "with each token so many likeliest ones, in JSON"),
}
# What a result depends on, beside its request, ...
DECISIVE_OPTIONS: Final = (
    *("model", "kv_format", "dtype", "kv_dtype", "calibration", "max_model_len"),
    *("generation_config", "window", "sinks"),
    *(*SAMPLING_OPTIONS, "stop", "ignore_eos"),
)
# ... and where nothing else ends it.
POOL_OPTIONS: Final = ("kv_memory", "num_blocks", "max_num_seqs")
DTYPES: Final = ("float32", "bfloat16", "float16")
EXIT_BROKEN_PIPE: Final = 128 + 13  # what a shell says of a process that SIGPIPE ended
CONTEXT_LENGTHS: Final = (1024, 4096, 32768)


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


def emit(text: str, encoding: str | None = None) -> None:
    """Write to standard output at once; JSON in its own encoding, whatever the terminal's is."""
    stream = sys.stdout
    if stream is None:  # it was closed before we began
        raise BrokenPipeError
    try:
        with explained("write", "standard output"):
            if hasattr(stream, "buffer"):
                stream.buffer.write(text.encode(encoding or stream.encoding, "replace"))
            else:
                stream.write(text)
            stream.flush()
    except (BrokenPipeError, PagedKVError):
        # What is still in the buffer must not fail a second time when Python ends.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="paged-kv",
        description="Decode language models on quantized, paged KV blocks.",
    )
    parser.add_argument("--version", action="version", version=f"paged-kv {version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_generate(commands.add_parser("generate", help="continue prompts", description=GENERATE))
    add_evaluate(commands.add_parser("eval", help="what formats change", description=EVALUATE))
    add_calibrate(commands.add_parser("calibrate", help="learn a model's keys", description=LEARN))
    add_demo(commands.add_parser("demo", help="see every KV format at work", description=DEMO))
    add_info(commands.add_parser("info", help="what a model's tokens cost", description=INFO))
    return parser


def version() -> str:
    try:
        return metadata.version("paged-kv")
    except metadata.PackageNotFoundError:
        return "(a checkout that is not installed)"


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
INFO: Final = """What each token of a model costs in every KV format, and how many tokens fit in a
given memory. Reads the model's configuration only, not its weights."""


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
    memory = parser.add_argument_group("memory")
    memory.add_argument("--kv-format", default="int8", help=f"{', '.join(FORMATS)} (default: int8)")
    memory.add_argument("--kv-memory", metavar="SIZE", help="pool size, for example 2GiB")
    memory.add_argument("--num-blocks", type=int, help="pool size in blocks, instead")
    memory.add_argument("--max-num-seqs", type=int, default=64, help="sequences at once (64)")
    memory.add_argument("--token-budget", type=int, default=1024, help="tokens a step (1024)")
    memory.add_argument("--max-model-len", type=int, help="longest sequence (the model's)")
    memory.add_argument(
        "--no-prefix-caching", action="store_true", help="share no blocks between prompts"
    )
    memory.add_argument("--swap-space", metavar="SIZE", help="host memory for preempted sequences")
    memory.add_argument(
        "--window",
        type=int,
        metavar="TOKENS",
        help="keep only the newest tokens, for ever",
    )
    memory.add_argument(
        "--sinks", type=int, metavar="TOKENS", help="and so many first ones (4), with --window"
    )
    memory.add_argument("--dtype", choices=DTYPES)
    memory.add_argument("--kv-dtype", choices=DTYPES, help="of what is not quantized of a sequence")
    memory.add_argument(
        "--calibration",
        default="usual",
        metavar="FILE",
        help="of `paged-kv calibrate`; none: do without (on the library's own text)",
    )
    memory.add_argument("--device", help="cpu or cuda (default: where the model loads)")
    memory.add_argument("--threads", type=int, help="CPU threads (torch's default)")
    sampling = parser.add_argument_group("sampling")
    defaults = SamplingParams()
    for name, (kind, text) in SAMPLING_OPTIONS.items():
        default = getattr(defaults, name)
        sampling.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=default,
            help=text if default is None else f"{text} ({default})",
        )
    sampling.add_argument("--stop", action="append", default=[], help="end before this text")
    sampling.add_argument(
        "--generation-config",
        choices=("auto", "none"),
        default="auto",
        help="what the model's says of options that are not given: apply it or not (auto)",
    )
    sampling.add_argument("--ignore-eos", action="store_true", help="go on past end-of-sequence")


def add_demo(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run_demo_command)
    parser.add_argument("--max-tokens", type=int, default=384, help="tokens of each request (384)")


def add_info(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run_info)
    parser.add_argument("model", nargs="?", help="model folder or hub name (the demo model)")
    parser.add_argument("--memory", default="8GiB", help="memory for K/V (8GiB)")


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


def sampling_params(arguments: argparse.Namespace) -> SamplingParams:
    chosen = {name: getattr(arguments, name) for name in SAMPLING_OPTIONS}
    stop = tuple(arguments.stop) or None
    return SamplingParams(stop=stop, ignore_eos=arguments.ignore_eos, **chosen)


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


def load_llm(arguments: argparse.Namespace) -> LLM:
    import torch

    from ..models.loading import quiet_loading
    from .demo import MODEL_FOLDER
    from .llm import LLM

    quiet_loading()
    return LLM(
        MODEL_FOLDER if arguments.model is None else arguments.model,
        kv_format=arguments.kv_format,
        kv_memory=arguments.kv_memory,
        num_blocks=arguments.num_blocks,
        max_num_seqs=arguments.max_num_seqs,
        token_budget=arguments.token_budget,
        max_model_len=arguments.max_model_len,
        prefix_caching=not arguments.no_prefix_caching,
        swap_space=arguments.swap_space or 0,
        num_threads=arguments.threads,
        sink_window=sink_window(arguments),
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        kv_dtype=getattr(torch, arguments.kv_dtype) if arguments.kv_dtype else None,
        calibration=None if arguments.calibration == "none" else arguments.calibration,
        generation_config=None if arguments.generation_config == "none" else "auto",
        device=arguments.device,
    )


def sink_window(arguments: argparse.Namespace) -> SinkWindow | None:
    if arguments.window is None:
        if arguments.sinks is not None:
            raise InvalidRequestError(f"--sinks {arguments.sinks} needs --window")
        return None
    sinks = SinkWindow.num_sink_tokens if arguments.sinks is None else arguments.sinks
    return SinkWindow(sinks, arguments.window)


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

    from ..models.loading import quiet_loading
    from .demo import run_demo

    quiet_loading()
    run_demo(arguments.max_tokens, Console())
    return 0


def run_info(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from ..models.cost import format_costs, probe_layers
    from .demo import MODEL_FOLDER

    memory_bytes = parse_memory(arguments.memory)
    layers, dtype = probe_layers(MODEL_FOLDER if arguments.model is None else arguments.model)
    costs = format_costs(layers, dtype, CONTEXT_LENGTHS)
    heads = sorted({layer.num_kv_heads for layer in layers})
    table = Table(
        title=f"{len(layers)} layers, kv heads {heads}, {str(dtype).removeprefix('torch.')}, "
        f"{format_memory(memory_bytes)} for K/V",
        caption="bytes: a sealed token over all layers. at N: how many times smaller than native a "
        "sequence of N tokens is, head and tail in full precision included.",
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
            cost.kv_format.name,
            f"{cost.bytes_per_token:.0f}",
            f"{native.bytes_per_token / cost.bytes_per_token:.2f}x",
            *(f"{native.effective[n] / cost.effective[n]:.2f}x" for n in CONTEXT_LENGTHS),
            f"{cost.tokens_in(memory_bytes):,}",
        )
    with explained("write", "standard output"):
        Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
