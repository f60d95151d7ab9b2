"""What a layer computes for a step's new tokens, as kernels take it. Knows tensors, no blocks."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class NewTokens(NamedTuple):
    """T new tokens of a step, in its order, with Hq query heads, a multiple of H kv heads."""

    query: Tensor  # [T, Hq, key_dim]
    key: Tensor  # [T, H, key_dim]
    value: Tensor  # [T, H, value_dim]
    # Scores the sinks among the context of windowed sequences; None: `query` does.
    sink_query: Tensor | None = None  # [T, Hq, key_dim]
