"""Which keys a query sees and what becomes of a score: one layer's rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import Tensor

NOWHERE: Final = 1 << 62  # position of a padding entry: after every query, so never attended


@dataclass(frozen=True)
class ScoreRules:
    """A token sees itself and earlier ones, less what the options of `attend` take away."""

    scale: float
    softcap: float | None = None
    sliding_window: int | None = None
    attention_chunk: int | None = None
    sink_logits: Tensor | None = None  # [Hq]

    @property
    def hides_context(self) -> bool:
        """Whether a new token may fail to see some token before it."""
        return self.sliding_window is not None or self.attention_chunk is not None

    def visible(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """True where a query may attend to a key, by their positions alone."""
        mask = key_positions <= query_positions
        if self.sliding_window is not None:
            mask = mask & (key_positions > query_positions - self.sliding_window)
        if self.attention_chunk is not None:
            chunk = self.attention_chunk
            mask = mask & (key_positions // chunk == query_positions // chunk)
        return mask
