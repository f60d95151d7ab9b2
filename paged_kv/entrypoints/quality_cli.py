"""The commands `paged-kv eval` and `paged-kv calibrate`.

Knows their arguments and prints what comes of them; never how anything is measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..cache.formats import FORMATS, KVFormat, resolve_format
from ..cache.layer_formats import CANDIDATES, formats_name, resolve_formats
from ..errors import InvalidRequestError
from ..units import parse_memory
from ..validation import MAX_COUNT
from .progress import WorkBar
from .result_file import explained, require_writable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..blocks.geometry import IntArray
    from ..engine.format_choice import Sensitivity
    from ..models.attached_model import AttachedModel
    from ..models.calibration import Calibration
    from .evaluation import Evaluation

EVALUATE: Final = """What KV formats change in what a model says, on a text that it continues token
by token: Kullback-Leibler divergence from the native format, its standard error and 99th
percentile, how often the first choice is the same, perplexity, how many of 14 key-value pairs
hidden in contexts of 0.8K to 6K tokens are recalled, and what a token takes. With --json each
result is kept in FILE.part as soon as it is there, and the same command goes on with them."""
LEARN: Final = """Learn from a text what a model's queries and keys are like, for formats of 4 and 2
bits, and write it to a file for --calibration. With a --budget measure each layer in each of some
formats too, and print for --kv-format which layer should have which: the least divergence for so
many bytes of a sealed token over all layers. `paged-kv info` says what formats take."""

MEASURED_TOKENS: Final = 1024


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run_evaluate)
    parser.add_argument("model", help="model folder, hub name or .gguf")
    parser.add_argument(
        "--formats",
        nargs="+",
        default=["int8", "int4", "int3", "int2"],
        metavar="FORMAT",
        help=f"of {', '.join(FORMATS)} (int8 int4 int3 int2)",
    )
    add_measuring(parser)
    parser.add_argument("--calibration", default="usual", metavar="FILE", help="none: without")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int, help="CPU threads (torch's default)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")


def add_measuring(parser: argparse.ArgumentParser) -> None:
    """What is measured, and how."""
    parser.add_argument("--text", type=Path, metavar="FILE", help="plain text, not calibrated on")
    parser.add_argument("--windows", type=int, help="how many stretches of it (all)")
    parser.add_argument("--length", type=int, default=1024, help="tokens of each (1024)")
    parser.add_argument(
        "--tokens-per-step",
        type=int,
        default=16,
        help="computed at once (16); 1 is what decoding does, more see newer tokens unquantized",
    )
    parser.add_argument("--no-recall", action="store_true", help="no hidden pairs")


def add_calibrate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run_calibrate)
    parser.add_argument("model", help="model folder, hub name or .gguf")
    parser.add_argument("--text", type=Path, metavar="FILE", help="plain text (the library's own)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="safetensors")
    parser.add_argument("--budget", metavar="BYTES", help="of a token: choose formats by layer")
    parser.add_argument(
        "--formats",
        nargs="+",
        metavar="FORMAT",
        help=f"with --budget: to choose among ({' '.join(CANDIDATES)})",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        help=f"with --budget: that each layer is measured on ({MEASURED_TOKENS})",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, help="CPU threads (torch's default)")


def load(
    arguments: argparse.Namespace, *, widens: bool = False
) -> tuple[AttachedModel, PreTrainedTokenizerBase]:
    import torch

    from ..models.loading import load_model, load_tokenizer
    from ..models.routes import choose_route

    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    tokenizer = load_tokenizer(arguments.model)
    tokenizer.model_max_length = MAX_COUNT  # or it warns of texts that are cut to windows
    # In float32, also where weights have less: rounding would hide what a format does.
    return choose_route(load_model(arguments.model, dtype), widens=widens), tokenizer


def read_text(path: Path | None) -> str | None:
    if path is None:
        return None
    with explained("read", path):
        text = path.read_text(encoding="utf-8", errors="replace")
    if not text.strip():
        raise InvalidRequestError(f"{str(path)!r} holds no text")
    return text


def find_calibration(
    name: str, model: AttachedModel, tokenizer: PreTrainedTokenizerBase
) -> Calibration | None:
    from ..models.calibration import Calibration, usual_calibration

    if name == "none":
        return None
    if name == "usual":
        if model.route == "gather":  # it tells of no queries
            return None
        return usual_calibration(model, tokenizer)
    calibration = Calibration.load(name)
    calibration.require_model(model)
    return calibration


def run_calibrate(arguments: argparse.Namespace) -> int:
    from ..engine.format_choice import bytes_by_layer, require_budget, require_sealed
    from ..models.calibration import calibrate_on_text

    for name in ("formats", "tokens"):
        if arguments.budget is None and getattr(arguments, name) is not None:
            raise InvalidRequestError(f"--{name} needs a --budget")
    kv_formats = [resolve_format(name) for name in arguments.formats or CANDIDATES]
    budget = None if arguments.budget is None else parse_memory(arguments.budget, "--budget")
    require_counts(arguments, tokens=2, threads=1)
    require_writable(arguments.output)
    text = read_text(arguments.text)
    set_threads(arguments.threads)
    model, tokenizer = load(arguments, widens=budget is not None)
    if budget is not None:
        windows = first_window(tokenizer, text, arguments.tokens or MEASURED_TOKENS)
        require_budget(budget, bytes_by_layer(model, kv_formats))
        for each in kv_formats:
            require_sealed(model, each, windows.shape[1] - 1)
    calibration = calibrate_on_text(model, tokenizer, text)
    calibration.save(arguments.output)
    if budget is not None:
        tell_choice(measure(model, windows, calibration, kv_formats), budget)
    return 0


def first_window(tokenizer: PreTrainedTokenizerBase, text: str | None, num_tokens: int) -> IntArray:
    """[1, so many]: the first tokens of the text, or of the library's own."""
    from ..engine.evaluate import token_windows
    from ..models.calibration import TEXT, encode

    token_ids = encode(tokenizer, TEXT.read_text(encoding="utf-8") if text is None else text)
    return token_windows(token_ids, min(num_tokens, len(token_ids)), None)[:1]


def measure(
    model: AttachedModel,
    windows: IntArray,
    calibration: Calibration,
    kv_formats: Sequence[KVFormat],
) -> Sensitivity:
    """What each format changes in each layer."""
    from ..engine.format_choice import measure_layers

    with WorkBar("layers measured", len(model.layer_shapes)) as bar:
        return measure_layers(
            model,
            windows,
            kv_formats=kv_formats,
            calibration=calibration.layers,
            report=bar.advance,
        )


def tell_choice(sensitivity: Sensitivity, budget: int) -> None:
    """The chosen formats on standard output, and what they are expected to do on the other one."""
    chosen, divergence = sensitivity.choose(budget)
    num_layers = len(sensitivity.divergences)
    lines = [f"of {budget} bytes a token: {1000 * divergence:.3g} mnat expected"]
    sums = zip(
        sensitivity.kv_formats,
        sensitivity.token_bytes.sum(0),
        sensitivity.divergences.sum(0),
        strict=True,
    )
    lines += [
        f"{each.name} in all layers: {size:.0f} bytes, {1000 * nats:.3g} mnat"
        for each, size, nats in sums
    ]
    print("\n".join(lines), file=sys.stderr)
    with explained("write", "standard output"):
        print(formats_name(chosen.of(num_layers)))


def require_counts(arguments: argparse.Namespace, **least: int) -> None:
    """Raise `InvalidRequestError` for numbers that are too small."""
    for name, smallest in least.items():
        count = getattr(arguments, name)
        if count is not None and count < smallest:
            raise InvalidRequestError(f"--{name.replace('_', '-')} {count} is too few")


def set_threads(num_threads: int | None) -> None:
    import torch

    if num_threads is not None:
        torch.set_num_threads(num_threads)


def run_evaluate(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from .evaluation import write_json

    if arguments.json is not None:
        require_writable(arguments.json)
    evaluation = evaluate(arguments, arguments.json)
    with explained("write", "standard output"):
        Console().print(evaluation.table())
    if arguments.json is not None:
        with explained("write", arguments.json):
            write_json(evaluation, arguments.json)
    return 0


def evaluate(arguments: argparse.Namespace, json_file: Path | None) -> Evaluation:
    """Measure what the arguments say; results are kept beside the file they will be in."""
    from ..models.calibration import TEXT
    from .evaluation import Evaluation
    from .kept_results import KeptResults

    formats = [resolve_formats(name) for name in arguments.formats]
    require_counts(arguments, windows=1, length=2, tokens_per_step=1, threads=1)
    text, kept = read_text(arguments.text or TEXT), KeptResults(json_file)
    assert text is not None
    set_threads(arguments.threads)
    model, tokenizer = load(arguments)
    calibration = find_calibration(arguments.calibration, model, tokenizer)
    evaluation = Evaluation(model, tokenizer, formats, kept, calibration)
    evaluation.take_text(text, arguments.length, arguments.windows, recall=not arguments.no_recall)
    evaluation.run(arguments.tokens_per_step)
    if arguments.text is None and calibration is not None:
        print("no --text: measured on the text that calibrates, which flatters", file=sys.stderr)
    return evaluation
