"""The command line: `paged-kv generate | demo | info`. Knows arguments and files, never blocks."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO, cast

from ..blocks.sink_window import SinkWindow
from ..cache.formats import FORMATS
from ..engine.sampling_params import SamplingParams
from ..errors import InvalidRequestError, PagedKVError
from ..units import format_memory, parse_memory

if TYPE_CHECKING:
    from .llm import LLM
    from .outputs import RequestOutput

SAMPLING_OPTIONS: Final = {
    "temperature": (float, "0 is greedy"),
    "top_k": (int, "keep the k most likely tokens"),
    "top_p": (float, "keep the smallest set of at least this probability"),
    "min_p": (float, "keep tokens at least this fraction as likely as the likeliest"),
    "seed": (int, "make sampling reproducible"),
    "max_tokens": (int, "most tokens to generate"),
    "min_tokens": (int, "fewest tokens to generate"),
    "n": (int, "continuations of each prompt"),
    "best_of": (int, "sample so many and keep the n likeliest"),
}
REQUEST_FIELDS: Final = frozenset(
    {field.name for field in fields(SamplingParams)} - {"logits_processors", "sink_window"}
)
CONTEXT_LENGTHS: Final = (1024, 4096, 32768)


@dataclass(frozen=True)
class Line:
    """One line of JSONL input: a request, or what is wrong with it."""

    number: int
    record: dict[str, Any]
    error: str | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parsed = build_parser().parse_args(arguments)
    try:
        exit_code: int = parsed.run(parsed)
    except PagedKVError as error:
        print(f"paged-kv: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("paged_kv"):
            raise
        print(f"paged-kv needs {error.name}: pip install 'paged-kv[models]'", file=sys.stderr)
        return 2
    return exit_code


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="paged-kv",
        description="Decode language models on quantized, paged KV blocks.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_generate(commands.add_parser("generate", help="continue prompts", description=GENERATE))
    add_demo(commands.add_parser("demo", help="see every KV format at work", description=DEMO))
    add_info(commands.add_parser("info", help="what a model's tokens cost", description=INFO))
    return parser


GENERATE: Final = """Continue prompts: those given as arguments, else one for each line of standard
input, else of a JSONL file. Each JSONL line is an object with "prompt" (text or token ids) or
"messages" (a chat), and optionally "id" and any sampling option; the output has one JSON line for
each, in the same order, with "text" or with "error"."""
DEMO: Final = """Decode 32 requests at once on a small trained model that comes with the package, in
every KV format, and print tokens/s, KV memory and how far each format strays from native."""
INFO: Final = """What each token of a model costs in every KV format, and how many tokens fit in a
given memory. Reads the model's configuration only, not its weights."""


def add_generate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run_generate)
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="text to continue")
    parser.add_argument("--model", help="model folder or hub name (default: the demo model)")
    parser.add_argument("--input", metavar="FILE", help="JSONL requests; - is standard input")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write JSON lines to this file")
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
    memory.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
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
    if arguments.prompts and arguments.input:
        raise InvalidRequestError("give prompts as arguments or --input, not both")
    if arguments.chat and arguments.input:
        raise InvalidRequestError('with --input a chat is a line with "messages", not --chat')
    check_writable(arguments.output)
    if arguments.input:
        with open_input(arguments.input) as source:
            lines = list(read_lines(source))
    else:
        lines = [Line(n, record) for n, record in enumerate(plain_records(arguments), start=1)]
    if not lines:
        raise InvalidRequestError("no prompts: give arguments, standard input or --input")
    with load_llm(arguments) as llm:
        is_conversation = len(lines) == 1 and not arguments.input and not arguments.output
        if is_conversation and params.num_samples == 1:
            return print_stream(llm, lines[0], params)
        results = serve(llm, lines, params)
    write_results(results, arguments, as_json=bool(arguments.input or arguments.output))
    return 1 if any("error" in result for result in results) else 0


def sampling_params(arguments: argparse.Namespace) -> SamplingParams:
    chosen = {name: getattr(arguments, name) for name in SAMPLING_OPTIONS}
    return SamplingParams(stop=tuple(arguments.stop), ignore_eos=arguments.ignore_eos, **chosen)


def open_input(name: str) -> TextIO:
    if name == "-":
        return sys.stdin
    try:
        return Path(name).open(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InvalidRequestError(f"cannot read {name!r}: {error.strerror}") from error


def check_writable(output: Path | None) -> None:
    """Find out before the work, not after it."""
    if output is None:
        return
    try:
        with output.open("a"):
            pass
    except OSError as error:
        raise InvalidRequestError(f"cannot write {str(output)!r}: {error.strerror}") from error


def plain_records(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Records of prompts from arguments or, without any, from lines of standard input."""
    prompts: Iterable[str] = arguments.prompts
    if not arguments.prompts and not sys.stdin.isatty():
        prompts = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    for prompt in prompts:
        if arguments.chat:
            yield {"messages": [{"role": "user", "content": prompt}]}
        else:
            yield {"prompt": prompt}


def read_lines(source: Iterable[str]) -> Iterator[Line]:
    """Lines of a JSONL file; blank ones are skipped, bad ones carry what is wrong with them."""
    for number, text in enumerate(source, start=1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            yield Line(number, {}, f"line {number} is not JSON: {error}")
            continue
        if not isinstance(record, dict):
            yield Line(number, {}, f"line {number} is not a JSON object: {text.strip()[:60]}")
        elif ("prompt" in record) == ("messages" in record):
            yield Line(number, record, f'line {number} needs either "prompt" or "messages"')
        else:
            yield Line(number, record)


def load_llm(arguments: argparse.Namespace) -> LLM:
    import torch

    from .demo import MODEL_FOLDER
    from .llm import LLM

    quiet_loading()
    return LLM(
        arguments.model or MODEL_FOLDER,
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
        device=arguments.device,
    )


def sink_window(arguments: argparse.Namespace) -> SinkWindow | None:
    if arguments.window is None:
        if arguments.sinks is not None:
            raise InvalidRequestError(f"--sinks {arguments.sinks} needs --window")
        return None
    sinks = SinkWindow.num_sink_tokens if arguments.sinks is None else arguments.sinks
    return SinkWindow(sinks, arguments.window)


def quiet_loading() -> None:
    """transformers draws a progress bar for loading weights, also where nobody looks."""
    from transformers.utils import logging

    cast(Any, logging).disable_progress_bar()


def line_params(line: Line, defaults: SamplingParams) -> SamplingParams:
    """The command line's sampling options, changed by those of the line."""
    changes = {k: v for k, v in line.record.items() if k in REQUEST_FIELDS}
    unknown = set(line.record) - REQUEST_FIELDS - {"prompt", "messages", "id"}
    if unknown:
        raise InvalidRequestError(f"unknown fields: {', '.join(sorted(unknown))}")
    try:
        return replace(defaults, **changes)
    except TypeError as error:
        raise InvalidRequestError(f"a field has the wrong type: {error}") from error


def line_prompt(line: Line) -> Any:
    return line.record["prompt"] if "prompt" in line.record else line.record["messages"]


def print_stream(llm: LLM, line: Line, params: SamplingParams) -> int:
    """One prompt: print its text as it comes."""
    for event in llm.stream([line_prompt(line)], params):
        if event.error is not None:
            raise event.error
        print(event.text, end="", flush=True)
    print()
    return 0


def serve(llm: LLM, lines: list[Line], defaults: SamplingParams) -> list[dict[str, Any]]:
    """Serve every good line in one batch; each line gets a result, in order."""
    results: list[dict[str, Any]] = [result_head(line) for line in lines]
    served: list[int] = []
    prompts: list[list[int]] = []
    params: list[SamplingParams] = []
    for index, line in enumerate(lines):
        try:
            if line.error is not None:
                raise InvalidRequestError(line.error)
            one = line_params(line, defaults)
            token_ids = llm.check(line_prompt(line), one)
        except PagedKVError as error:
            results[index]["error"] = str(error)
            continue
        served.append(index)
        prompts.append(token_ids)
        params.append(one)
    if served:
        for index, output in zip(served, generate_all(llm, prompts, params), strict=True):
            results[index].update(result_body(output))
    for line, result in zip(lines, results, strict=True):
        if "error" in result:
            print(f"paged-kv: request {line.number}: {result['error']}", file=sys.stderr)
    return results


def generate_all(
    llm: LLM, prompts: list[list[int]], params: list[SamplingParams]
) -> Sequence[RequestOutput]:
    """Every output, those of failed requests included."""
    from ..errors import GenerationError

    try:
        return llm.generate(prompts, params)
    except GenerationError as error:
        return error.outputs  # type: ignore[return-value]


def result_head(line: Line) -> dict[str, Any]:
    return {key: line.record[key] for key in ("id", "prompt", "messages") if key in line.record}


def result_body(output: RequestOutput) -> dict[str, Any]:
    errors = [str(c.error) for c in output.completions if c.error is not None]
    if errors:
        return {"error": errors[0]}
    completions = [
        {"text": c.text, "finish_reason": c.finish_reason, "num_tokens": len(c.token_ids)}
        for c in output.completions
    ]
    return completions[0] if len(completions) == 1 else {"completions": completions}


def write_results(
    results: list[dict[str, Any]], arguments: argparse.Namespace, as_json: bool
) -> None:
    if as_json:
        lines = [json.dumps(result, ensure_ascii=False) for result in results]
    else:
        lines = [text for result in results for text in result_texts(result)]
    text = "".join(line + "\n" for line in lines)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


def result_texts(result: dict[str, Any]) -> list[str]:
    """What a person reads: prompt and continuation, a blank line between results."""
    if "error" in result:
        return []
    prompt = result.get("prompt", "")
    return [f"{prompt}{c['text']}\n" for c in result.get("completions", [result])]


# -- demo and info ------------------------------------------------------------------------------


def run_demo_command(arguments: argparse.Namespace) -> int:
    from rich.console import Console

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
    layers, dtype = probe_layers(arguments.model or MODEL_FOLDER)
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
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
