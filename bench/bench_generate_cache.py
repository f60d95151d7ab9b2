"""`PagedCache` in transformers' `generate()` beside the caches that come with it.

    python bench/bench_generate_cache.py --model FOLDER --book a.txt --threads 2 --json FILE

DynamicCache; QuantizedCache by quanto and by hqq, 4 and 2 bits, with its defaults (groups of 64,
the newest 128 tokens at most in full precision; for hqq axis 1, which transformers' documentation
recommends); and `PagedCache` by both of its routes. Each is given to a `generate()` of its own, on
the same prompts, whose logits processor lets only the true next token through: so one run tells
memory, tokens a second and, from the logits that the cache led to, the divergence from
DynamicCache. The generations go in turns, a token each, in an order that is drawn anew for every
token, so that what else a machine does falls on all of them.

Bytes are those of all tensors that a cache holds once a token is stored, codes packed as they are;
of ours, all blocks in use, open and sealed. The mean is over the decoded tokens, because caches
that quantize hold most just before they do; 128 tokens are a whole period of each. The token that
the prompt's own pass gives is not counted. A prompt's pass is one turn, however long: on a busy
machine only decoding can be compared.

The peers are no dependency; those that cannot be imported are left out, and said to be:

    pip install --no-deps optimum-quanto hqq ninja termcolor einops
"""

from __future__ import annotations

import argparse
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from quality_windows import book_windows
from report import Row, add_arguments, failure_row, write_report
from torch import Tensor
from training.train_demo_model import read_book
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, QuantizedCache

from paged_kv.entrypoints.demo import MODEL_FOLDER
from paged_kv.integrations.transformers_cache import PagedCache
from paged_kv.models.calibration import Calibration, usual_calibration
from paged_kv.models.huggingface import PagedModel
from paged_kv.models.loading import load_model, load_tokenizer

REFERENCE = "DynamicCache"
BYTES, MOST = "K/V of a sequence, mean", "K/V of a sequence, most"
DECODING, WHOLE = "decoding", "prompt and decoding"
DIVERGENCE = "KL from DynamicCache"
FUSED, GATHER = "paged_kv", "sdpa"  # attention of the model, which chooses our route
ROUTES = {FUSED: "fused", GATHER: "gather"}
FORMATS = {FUSED: ("native", "int8", "int4", "int2"), GATHER: ("int4", "int2")}
MIB = 1 << 20
HQQ_AXES = {"axis_key": 1, "axis_value": 1}


@dataclass(frozen=True)
class Contestant:
    """A cache, made for sequences of so many tokens, and the attention of the model it is for."""

    name: str
    make: Callable[[PreTrainedModel, int], Cache]
    attention: str = GATHER
    rivals: tuple[str, ...] = (REFERENCE,)  # what it is compared with, where that is there


def contestants(known: Calibration) -> list[Contestant]:
    found = [Contestant(REFERENCE, lambda model, _: DynamicCache(config=model.config), rivals=())]
    for backend, axes in (("quanto", {}), ("hqq", HQQ_AXES)):
        for bits in (4, 2):

            def quantized(
                model: PreTrainedModel,
                _: int,
                backend: str = backend,
                bits: int = bits,
                axes: Mapping[str, int] = axes,
            ) -> Cache:
                return QuantizedCache(backend, model.config, nbits=bits, **axes)

            found.append(Contestant(peer(backend, bits), quantized))
    for attention, formats in FORMATS.items():
        for kv_format in formats:

            def paged(model: PreTrainedModel, num_tokens: int, kv_format: str = kv_format) -> Cache:
                given = None if kv_format in ("native", "int8") else known
                return PagedCache(model, kv_format, max_cache_len=num_tokens, calibration=given)

            bits = {"int4": 4, "int2": 2}.get(kv_format)
            rivals = () if bits is None else (peer("quanto", bits), peer("hqq", bits))
            name = f"PagedCache {kv_format}, {ROUTES[attention]}"
            found.append(Contestant(name, paged, attention, (REFERENCE, *rivals)))
    return found


def peer(backend: str, bits: int) -> str:
    return f"QuantizedCache {backend} {bits} bits"


def held_bytes(thing: object) -> int:
    """Of all tensors in it: a tensor, one that others make up, or a collection of such."""
    if isinstance(thing, Tensor):
        if hasattr(thing, "__tensor_flatten__"):
            return sum(held_bytes(getattr(thing, name)) for name in thing.__tensor_flatten__()[0])
        return thing.nbytes
    if isinstance(thing, Mapping):
        return sum(map(held_bytes, thing.values()))
    return sum(map(held_bytes, thing)) if isinstance(thing, list | tuple) else 0


def cache_bytes(cache: Cache) -> int:
    if isinstance(cache, PagedCache):
        return cache.memory_stats().allocated
    return sum(held_bytes(value) for layer in cache.layers for value in vars(layer).values())


class Generation(LogitsProcessor):
    """A `generate()` in a thread of its own, which computes a token whenever it is told to.

    Only while it is told to does it run. What it does between two tokens is timed; what happens in
    here is not.
    """

    def __init__(
        self, contestant: Contestant, model: PreTrainedModel, tokens: Tensor, num_prompt: int
    ) -> None:
        self.contestant = contestant
        self.logits = tokens.new_zeros(0)  # [N, V] of the last token
        self.seconds: list[float] = []  # of the prompt, then of each decoded token
        self.held: list[int] = []  # bytes behind each of these
        self.divergences: list[Tensor] = []  # [N] of each decoded token, in nats
        self.error: Exception | None = None
        self._tokens, self._num_prompt = tokens, num_prompt
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._model = model
        self._thread = threading.Thread(target=self._generate, daemon=True)
        self._began = 0.0
        self._thread.start()

    def advance(self) -> None:
        """Compute the next token; raises what was raised there."""
        self._go.release()
        self._done.acquire()
        if self.error is not None:
            raise self.error

    def _generate(self) -> None:
        self._go.acquire()
        num_tokens = self._tokens.shape[1]
        try:
            self._cache = self.contestant.make(self._model, num_tokens)
            self._began = time.perf_counter()
            self._model.generate(
                self._tokens[:, : self._num_prompt],
                attention_mask=torch.ones_like(self._tokens[:, : self._num_prompt]),
                past_key_values=self._cache,
                logits_processor=LogitsProcessorList([self]),
                max_new_tokens=num_tokens - self._num_prompt,
                do_sample=False,
            )
        except Exception as error:
            self.error = error
        self._done.release()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seconds.append(time.perf_counter() - self._began)
        self.held.append(cache_bytes(self._cache))
        self.logits = scores.float()
        forced = torch.full_like(scores, -torch.inf)
        forced.scatter_(1, self._tokens[:, input_ids.shape[1], None], 0)
        self._done.release()
        self._go.acquire()
        self._began = time.perf_counter()
        return forced


def race(
    generations: list[Generation], num_new: int, seed: int = 0
) -> Iterator[tuple[str, Exception]]:
    """All of them to their ends, the reference first at each token; tells of those that cannot."""
    reference, draw = generations[0], random.Random(seed)
    others = generations[1:]
    for step in range(num_new):
        draw.shuffle(others)
        for generation in (reference, *others):
            try:
                generation.advance()
            except Exception as error:
                if generation is reference:
                    raise
                yield generation.contestant.name, error
                others = [other for other in others if other is not generation]
                generations.remove(generation)
                continue
            if step and generation is not reference:
                generation.divergences.append(divergence(reference.logits, generation.logits))
    for generation in generations:
        generation.advance()  # it returns


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """Kullback-Leibler [N] of logits [N, V] from the reference's, in nats."""
    wanted, found = reference.log_softmax(-1), logits.log_softmax(-1)
    return torch.linalg.vecdot(wanted.exp(), wanted - found)


@dataclass
class Figures:
    """What a generation showed: values by metric; the smaller is the better one but for speed."""

    values: dict[str, tuple[float, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, generation: Generation, batch_size: int) -> Figures:
        decoded, held = generation.seconds[1:], np.array(generation.held[1:]) / batch_size
        values = {
            BYTES: (float(held.mean()) / MIB, "MiB"),
            MOST: (float(held.max()) / MIB, "MiB"),
            DECODING: (batch_size * len(decoded) / sum(decoded), "tokens/s"),
            WHOLE: (batch_size * len(generation.seconds) / sum(generation.seconds), "tokens/s"),
        }
        if generation.divergences:
            values[DIVERGENCE] = (1000 * float(torch.stack(generation.divergences).mean()), "mnat")
        return cls(values)

    def rows(self, case: str, rivals: dict[str, Figures]) -> list[Row]:
        """Each figure beside those of all rivals; alone where there are none."""
        rows = []
        for metric, (value, unit) in self.values.items():
            rows.append(Row(case=case, metric=metric, value=value, unit=unit))
            for name, rival in rivals.items():
                if metric not in rival.values:
                    continue
                other = rival.values[metric][0]
                ratio = value / other if unit == "tokens/s" else other / max(value, 1e-9)
                rows.append(
                    Row(
                        case=f"{case}, beside {name}",
                        metric=metric,
                        value=value,
                        unit=unit,
                        baseline=name,
                        baseline_value=other,
                        ratio=ratio,
                    )
                )
        return rows


def measure(
    models: Mapping[str, PreTrainedModel],
    known: Calibration,
    tokens: Tensor,
    num_prompt: int,
) -> list[Row]:
    """One batch [N, prompt and new tokens] through every cache, in turns."""
    batch_size, num_new = len(tokens), tokens.shape[1] - num_prompt
    generations = [
        Generation(contestant, models[contestant.attention], tokens, num_prompt)
        for contestant in contestants(known)
    ]
    case = f"batch {batch_size}, {num_prompt} + {num_new} tokens"
    rows = []
    for name, error in race(generations, num_new):
        assert isinstance(error, Exception)
        rows.append(failure_row(f"{case}, {name}", error))
    found = {g.contestant.name: Figures.of(g, batch_size) for g in generations}
    for generation in generations:
        name = generation.contestant.name
        rivals = {r: found[r] for r in generation.contestant.rivals if r in found}
        rows += found[name].rows(f"{case}, {name}", rivals)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model", type=Path, default=MODEL_FOLDER, help="the demo model by default"
    )
    parser.add_argument("--book", type=Path, required=True, help="plain text")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32], help="sequences")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--tokens", type=int, default=128, help="decoded ones of each sequence")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, help="of the CPU")
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.batches, arguments.prompt, arguments.tokens = [2], 160, 4
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    tokenizer, dtype = load_tokenizer(arguments.model), getattr(torch, arguments.dtype)
    models = {name: load_model(arguments.model, dtype) for name in (GATHER, FUSED)}
    known = usual_calibration(PagedModel(load_model(arguments.model, dtype)), tokenizer)
    for name, model in models.items():
        model.set_attn_implementation(name)
        model.generation_config.eos_token_id = None  # all go on to the end
    encoded = tokenizer.encode(read_book(arguments.book), add_special_tokens=False, verbose=False)
    length = arguments.prompt + arguments.tokens
    windows = book_windows(encoded, length, tokenizer.bos_token_id, tuning=False)
    if len(windows) < max(arguments.batches):
        raise SystemExit(f"{arguments.book} has {len(windows)} windows of {length} tokens")
    tokens = torch.from_numpy(windows.astype(np.int64))
    warming = tokens[:1, : arguments.prompt + 2]
    measure(models, known, warming, arguments.prompt)  # kernels are compiled
    rows = []
    for batch_size in arguments.batches:
        rows += measure(models, known, tokens[:batch_size], arguments.prompt)
        write_report("generate_cache", rows, arguments.json)  # of what there is so far


if __name__ == "__main__":
    main()
