"""Choose the next token of every sequence from its logits. Knows logits, never blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .sampling import SamplingParams


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

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    logits = logits.double()
    # Less the maximum, so that no temperature, however small, overflows.
    scaled = (logits - logits.amax(-1, keepdim=True)) / column([p.temperature for p in params])
    ordered, token_ids = scaled.sort(dim=-1, descending=True, stable=True)
    vocab_size = logits.shape[-1]
    top_k = column([p.top_k or vocab_size for p in params])
    ordered[torch.arange(vocab_size, device=logits.device) >= top_k] = -torch.inf
    probabilities = ordered.softmax(-1)
    likelier = probabilities.cumsum(-1) - probabilities
    top_p = column([p.top_p for p in params])
    min_p = column([p.min_p for p in params])
    excluded = (likelier >= top_p) | (probabilities < min_p * probabilities[:, :1])
    cumulative = probabilities.masked_fill(excluded, 0.0).cumsum(-1)
    threshold = uniforms[:, None] * cumulative[:, -1:]
    chosen = (cumulative > threshold).to(torch.uint8).argmax(-1, keepdim=True)
    return token_ids.gather(-1, chosen).squeeze(-1)


def uniform_number(seed: int, sample_index: int, position: int) -> float:
    """The number that decides one token: a counter-based generator, so order does not matter."""
    generator = np.random.Philox(
        key=np.array([seed, sample_index], dtype=np.uint64),
        counter=np.array([position, 0, 0, 0], dtype=np.uint64),
    )
    return float(np.random.Generator(generator).random())


def process_logits(logits: Tensor, token_ids: Sequence[int], params: SamplingParams) -> Tensor:
    """One row of logits [V] after the request's own processors, given all its tokens so far."""
    scores = logits[None]
    ids = torch.tensor([list(token_ids)], device=logits.device)
    for processor in params.logits_processors:
        scores = processor(ids, scores)
    return scores[0]
