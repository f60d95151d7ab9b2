"""Choose the next token of every sequence from its logits. Knows logits, never blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .sampling_params import SamplingParams

GOLDEN_GAMMA: Final = np.uint64(0x9E3779B97F4A7C15)
NUM_CANDIDATES: Final = 256  # tokens that are put in order before all are


def find_unusable_rows(logits: Tensor) -> NDArray[np.bool_]:
    """Rows of logits [M, V] from which nothing can be sampled: NaN, +inf, or nothing but -inf."""
    highest = logits.amax(-1)  # NaN if any is NaN
    return (~highest.isfinite()).cpu().numpy()


def sample(
    logits: Tensor, params: Sequence[SamplingParams], uniforms: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Token ids [M] for logits [M, V], params of each row and one uniform number of each row.

    One uniform number through the inverse of the cumulative distribution decides a token, so a
    row's token depends on nothing but its own logits, params and number.
    """
    tokens = logits.argmax(-1)
    rows = [row for row, p in enumerate(params) if not p.is_greedy]
    if rows:
        index = torch.tensor(rows, device=logits.device)
        numbers = torch.from_numpy(uniforms[rows]).to(logits.device)
        tokens[index] = draw(logits[index], [params[row] for row in rows], numbers)
    return tokens.cpu().numpy()


def draw(logits: Tensor, params: Sequence[SamplingParams], uniforms: Tensor) -> Tensor:
    """Tokens [M] of sampled (not greedy) rows; `uniforms` [M] are float64 in [0, 1)."""
    logits = logits.double()
    # Less the maximum, so that no temperature, however small, overflows.
    scaled = logits - logits.amax(-1, keepdim=True)
    scaled /= column([p.temperature for p in params], logits.device)
    tokens = torch.empty(len(params), dtype=torch.int64, device=logits.device)
    # The order of the tokens matters only where something is excluded by it, and costs most.
    is_limited = torch.tensor([p.top_k is not None or p.top_p < 1 or p.min_p > 0 for p in params])
    free, limited = (~is_limited).nonzero()[:, 0], is_limited.nonzero()[:, 0]
    if len(free):
        tokens[free] = pick(scaled[free].softmax(-1), uniforms[free])
    if len(limited):
        its_params = [params[row] for row in limited.tolist()]
        tokens[limited] = draw_likeliest(scaled[limited], its_params, uniforms[limited])
    return tokens


def column(values: list[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)[:, None]


def pick(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The index [M] whose part of the cumulative probabilities [M, K] a uniform number hits."""
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    # Below the total even where the product is rounded up to it.
    threshold = torch.minimum(uniforms[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0]


def draw_likeliest(scaled: Tensor, params: Sequence[SamplingParams], uniforms: Tensor) -> Tensor:
    """`draw` for rows of scaled logits [M, V] that exclude unlikely tokens."""
    vocab_size = scaled.shape[1]
    top_k = column([p.top_k or vocab_size for p in params], scaled.device)
    top_p = column([p.top_p for p in params], scaled.device)
    min_p = column([p.min_p for p in params], scaled.device)
    total = scaled.exp().sum(-1, keepdim=True)
    count = max(NUM_CANDIDATES, *(p.top_k or 0 for p in params))
    while True:
        ordered, token_ids = likeliest(scaled, count)
        places = torch.arange(ordered.shape[1], device=scaled.device)
        weights = ordered.exp().masked_fill_(places >= top_k, 0.0)
        in_top_k = torch.where(top_k < vocab_size, weights.sum(-1, keepdim=True), total)
        probabilities = weights / in_top_k
        likelier = probabilities.cumsum(-1) - probabilities
        excluded = (likelier >= top_p) | (probabilities < min_p * probabilities[:, :1])
        excluded |= places >= top_k
        if count >= vocab_size or bool(excluded[:, -1].all()):
            break
        count = vocab_size  # some row may keep more than the candidates
    chosen = pick(probabilities.masked_fill(excluded, 0.0), uniforms)
    return token_ids.gather(-1, chosen[:, None])[:, 0]


def likeliest(scaled: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """At least the `count` highest of each row [M, V] in order, of equal ones the first; and ids.

    All that equal the last one are among them, so that none is preferred by chance.
    """
    if count >= scaled.shape[1]:
        ordered, ids = scaled.sort(dim=-1, descending=True, stable=True)
        return ordered, ids
    lowest = scaled.topk(count).values[:, -1:]
    ids = scaled.topk(int((scaled >= lowest).sum(-1).max())).indices.sort(dim=-1).values
    ordered, order = scaled.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return ordered, ids.gather(-1, order)


def uniform_numbers(
    seeds: Sequence[int], sample_indices: Sequence[int], positions: Sequence[int]
) -> NDArray[np.float64]:
    """The number in [0, 1) that decides each token, from nothing but these three.

    A counter-based generator: the finalizer of SplitMix64 (Steele et al. 2014,
    doi:10.1145/2660193.2660195) over each in turn, so that neither order nor batch matters.
    """
    state = np.zeros(len(seeds), dtype=np.uint64)
    for values in (seeds, sample_indices, positions):
        state = scrambled(state + np.array(values, dtype=np.uint64) + GOLDEN_GAMMA)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def scrambled(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Every bit of the result depends on every bit given; different bits stay different."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return bits ^ (bits >> np.uint64(31))


def process_logits(logits: Tensor, token_ids: Sequence[int], params: SamplingParams) -> Tensor:
    """One row of logits [V] after the request's own processors, given all its tokens so far."""
    scores = logits[None]
    ids = torch.tensor([list(token_ids)], device=logits.device)
    for processor in params.logits_processors:
        scores = processor(ids, scores)
    return scores[0]
