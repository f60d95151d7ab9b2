"""What commands that run an `LLM` ask about it, and what a user answers.

Knows arguments, never what a command does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from ..blocks.sink_window import SinkWindow
from ..cache.formats import FORMATS
from ..engine.sampling_params import SamplingParams
from ..errors import InvalidRequestError
from ..stores.opening import USUAL_SIZE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..engine.draft_model import DraftModel
    from ..engine.prompt_lookup import PromptLookup
    from .llm import LLM

    Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]

DTYPES: Final = ("float32", "bfloat16", "float16")
KV_FORMAT: Final = f"""{", ".join(FORMATS)} (default: int8); int8/0: first tokens too;
with other layers behind it: int2,0=int8,-1=native"""


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
    "adapter": (str, "name of one of the model's; __base__: none (what is active)"),
    "logprobs": (int, "with each token so many likeliest ones, in JSON"),
}


def add_memory(parser: argparse.ArgumentParser, *, has_format: bool = True) -> None:
    """What an `LLM` is made of; several of them have formats of their own."""
    memory = parser.add_argument_group("memory")
    if has_format:
        memory.add_argument("--kv-format", default="int8", help=KV_FORMAT)
    memory.add_argument("--kv-memory", metavar="SIZE", help="pool size, for example 2GiB")
    memory.add_argument("--num-blocks", type=int, help="pool size in blocks, instead")
    memory.add_argument("--max-num-seqs", type=int, default=64, help="sequences at once (64)")
    memory.add_argument("--token-budget", type=int, default=1024, help="tokens a step (1024)")
    memory.add_argument(
        "--max-slowdown",
        type=float,
        metavar="TIMES",
        help="that a step takes of one without prompts: tokens come evenly (no end; serve: 3)",
    )
    memory.add_argument("--max-model-len", type=int, help="longest sequence (the model's)")
    memory.add_argument(
        "--no-prefix-caching", action="store_true", help="share no blocks between prompts"
    )
    memory.add_argument(
        "--block-store", metavar="WHERE", help="folder or url where cached blocks outlive this"
    )
    memory.add_argument(
        "--block-store-size", default=USUAL_SIZE, metavar="SIZE", help=f"of it ({USUAL_SIZE})"
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
    add_computation(memory)


def add_computation(memory: argparse._ArgumentGroup) -> None:
    """In which precision, by which guesses, and where."""
    memory.add_argument("--dtype", choices=DTYPES)
    memory.add_argument("--kv-dtype", choices=DTYPES, help="of what is not quantized of a sequence")
    memory.add_argument(
        "--calibration",
        default="usual",
        metavar="FILE",
        help="of `paged-kv calibrate`; none: do without (on the library's own text)",
    )
    memory.add_argument(
        "--prompt-lookup",
        type=int,
        metavar="TOKENS",
        help="try so many tokens at once that followed the same ones before; outputs stay the same",
    )
    memory.add_argument(
        "--draft-model", metavar="MODEL", help="try what this smaller model says, instead"
    )
    memory.add_argument("--device", help="cpu or cuda (default: where the model loads)")
    memory.add_argument(
        "--tensor-parallel-size",
        type=int,
        default=1,
        metavar="PROCESSES",
        help="so many compute the model together on CPUs, each with its part of the heads (1)",
    )
    memory.add_argument("--threads", type=int, help="CPU threads (torch's default)")


def add_sampling(parser: argparse.ArgumentParser) -> None:
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
    add_generation_config(sampling)
    sampling.add_argument("--ignore-eos", action="store_true", help="go on past end-of-sequence")


def add_generation_config(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--generation-config",
        choices=("auto", "none"),
        default="auto",
        help="what the model's says of options that are not given: apply it or not (auto)",
    )


def sampling_params(arguments: argparse.Namespace) -> SamplingParams:
    chosen = {name: getattr(arguments, name) for name in SAMPLING_OPTIONS}
    stop = tuple(arguments.stop) or None
    return SamplingParams(stop=stop, ignore_eos=arguments.ignore_eos, **chosen)


def load_llm(arguments: argparse.Namespace, loaded: Loaded | None = None) -> LLM:
    """An `LLM` as the arguments say, on a model that is `loaded` already or on theirs."""
    import torch

    from .demo import MODEL_FOLDER
    from .llm import LLM

    named = MODEL_FOLDER if arguments.model is None else arguments.model
    model, tokenizer = loaded or (named, None)
    return LLM(
        model,
        tokenizer=tokenizer,
        kv_format=arguments.kv_format,
        kv_memory=arguments.kv_memory,
        num_blocks=arguments.num_blocks,
        max_num_seqs=arguments.max_num_seqs,
        token_budget=arguments.token_budget,
        max_slowdown=arguments.max_slowdown,
        max_model_len=arguments.max_model_len,
        prefix_caching=not arguments.no_prefix_caching,
        record_events=getattr(arguments, "kv_events", None) is not None,  # a server may have it
        block_store=arguments.block_store,
        block_store_size=arguments.block_store_size,
        swap_space=arguments.swap_space or 0,
        num_threads=arguments.threads,
        sink_window=sink_window(arguments),
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        kv_dtype=getattr(torch, arguments.kv_dtype) if arguments.kv_dtype else None,
        calibration=None if arguments.calibration == "none" else arguments.calibration,
        generation_config=None if arguments.generation_config == "none" else "auto",
        speculation=speculation(arguments),
        tensor_parallel_size=arguments.tensor_parallel_size,
        device=arguments.device,
    )


def speculation(arguments: argparse.Namespace) -> PromptLookup | DraftModel | None:
    from ..engine.draft_model import DraftModel
    from ..engine.prompt_lookup import PromptLookup

    if arguments.draft_model is not None:
        if arguments.prompt_lookup is not None:
            raise InvalidRequestError("give --prompt-lookup or --draft-model, not both")
        return DraftModel(model=arguments.draft_model)
    if arguments.prompt_lookup is None:
        return None
    return PromptLookup(num_tokens=arguments.prompt_lookup)


def sink_window(arguments: argparse.Namespace) -> SinkWindow | None:
    if arguments.window is None:
        if arguments.sinks is not None:
            raise InvalidRequestError(f"--sinks {arguments.sinks} needs --window")
        return None
    sinks = SinkWindow.num_sink_tokens if arguments.sinks is None else arguments.sinks
    return SinkWindow(sinks, arguments.window)
