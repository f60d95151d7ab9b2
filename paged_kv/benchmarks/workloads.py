"""Requests to measure with: when each arrives, its prompt and how many tokens it wants.

Knows numbers and a seed, never a model: the same settings are the same requests everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import numpy as np

from ..blocks.geometry import IntArray
from ..errors import ConfigError


class WorkItem(NamedTuple):
    """One request. `arrival` is in seconds from the start."""

    arrival: float
    prompt: list[int]
    num_outputs: int


Workload = list[WorkItem]  # in the order of arrival


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens: lognormal with this median, `sigma` of the logarithm, 1 to `most`.

    What is drawn above `most` is `most`. A `sigma` of 0 is the median alone.
    """

    median: float
    sigma: float
    most: int

    def draw(self, count: int, rng: np.random.Generator) -> IntArray:
        drawn = self.median * np.exp(self.sigma * rng.standard_normal(count))
        return np.rint(drawn).clip(1, self.most).astype(np.int64)

    def __str__(self) -> str:
        spread = f", sigma {self.sigma:g}" if self.sigma else ""
        return f"median {self.median:g}{spread}, at most {self.most}"


@dataclass(frozen=True)
class Shape:
    """What requests are like; `shared` tokens in front of each prompt are the same in all."""

    inputs: Lengths
    outputs: Lengths
    shared: int = 0

    @property
    def longest(self) -> int:
        return self.shared + self.inputs.most + self.outputs.most

    def __str__(self) -> str:
        opening = f"{self.shared} shared tokens, then " if self.shared else ""
        return f"{opening}inputs {self.inputs}; outputs {self.outputs}"


# What `paged-kv bench --workload` calls them. "lognormal" has the medians of the conversations that
# Splitwise published (Patel et al. 2023, arXiv:2311.18677: 1020 and 129 tokens); the sigmas are
# those with which the means come to about 1150 and 210.
SHAPES: Final[dict[str, Shape]] = {
    "fixed": Shape(Lengths(512, 0.0, 512), Lengths(128, 0.0, 128)),
    "lognormal": Shape(Lengths(1020, 0.5, 4096), Lengths(129, 1.0, 512)),
    "shared": Shape(Lengths(128, 0.7, 512), Lengths(128, 0.7, 512), shared=1024),
    "documents": Shape(Lengths(4096, 0.5, 16384), Lengths(64, 0.5, 256)),
}


def fitted(shape: Shape, longest: int) -> Shape:
    """The shape in sequences of at most so many tokens: where it has more, everything shrinks."""
    if shape.longest <= longest:
        return shape
    scale = longest / shape.longest

    def shrunk(lengths: Lengths) -> Lengths:
        most = max(math.floor(lengths.most * scale), 1)
        return Lengths(max(round(lengths.median * scale), 1), lengths.sigma, most)

    inputs, outputs = shrunk(shape.inputs), shrunk(shape.outputs)
    return Shape(inputs, outputs, max(longest - inputs.most - outputs.most, 0) * bool(shape.shared))


def make_workload(shape: Shape, count: int, num_vocab: int, seed: int = 0) -> Workload:
    """So many requests of random tokens that are all there from the start."""
    rng = np.random.default_rng(seed)
    inputs, outputs = shape.inputs.draw(count, rng), shape.outputs.draw(count, rng)
    shared = rng.integers(num_vocab, size=shape.shared).tolist()
    return [
        WorkItem(0.0, [*shared, *rng.integers(num_vocab, size=num_input).tolist()], num_output)
        for num_input, num_output in zip(inputs.tolist(), outputs.tolist(), strict=True)
    ]


def poisson_arrivals(workload: Workload, rate: float, seed: int = 0) -> Workload:
    """The requests in their order, as a Poisson process of `rate` a second brings them."""
    if not rate > 0 or math.isinf(rate):
        raise ConfigError(f"the rate must be above 0 requests a second, got {rate:g}")
    # A generator of its own: the rate changes no request.
    gaps = np.random.default_rng((seed, 1)).exponential(1 / rate, size=len(workload))
    arrivals = np.cumsum(gaps).tolist()
    return [item._replace(arrival=at) for item, at in zip(workload, arrivals, strict=True)]


def all_at_once(workload: Workload) -> Workload:
    return [item._replace(arrival=0.0) for item in workload]


def check_lengths(workload: Sequence[WorkItem], longest: int) -> None:
    """Raise `ConfigError` for requests that a model of this length cannot serve."""
    if not workload:
        raise ConfigError("a workload needs at least one request")
    for index, item in enumerate(workload):
        total = len(item.prompt) + item.num_outputs
        if total > longest:
            raise ConfigError(
                f"request {index + 1} of the workload has {len(item.prompt)} + {item.num_outputs} "
                f"tokens; the model's sequences have at most {longest}"
            )


def mean_tokens(workload: Workload) -> float:
    """Tokens that a request has stored when it ends, of which the last is none."""
    return float(np.mean([len(item.prompt) + item.num_outputs - 1 for item in workload]))


def describe(workload: Workload) -> str:
    """What was drawn, in one line."""
    inputs = [len(item.prompt) for item in workload]
    outputs = [item.num_outputs for item in workload]
    last = max(item.arrival for item in workload)
    when = f", the last after {last:.1f} s" if last else ", all at once"
    return (
        f"{len(workload)} requests{when}; inputs {np.mean(inputs):.0f} tokens on average "
        f"({min(inputs)} to {max(inputs)}), outputs {np.mean(outputs):.0f} "
        f"({min(outputs)} to {max(outputs)})"
    )


def with_limits(
    lengths: Lengths, median: float | None, sigma: float | None, most: int | None
) -> Lengths:
    """The lengths, with what is given in place of theirs; 4 medians at least, if not said."""
    if median is not None:
        lengths = replace(lengths, median=median, most=max(lengths.most, math.ceil(4 * median)))
    if sigma is not None:
        lengths = replace(lengths, sigma=sigma)
    return lengths if most is None else replace(lengths, most=most)
