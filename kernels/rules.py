"""Which keys a query sees and what becomes of a score: one layer's rules. Knows positions only."""

from __future__ import annotations

from typing import Final, NamedTuple

from torch import Tensor

NOWHERE: Final = 1 << 62  # position of a padding entry: after every query, so never attended


class ScoreRules(NamedTuple):
    """A token sees itself and earlier ones, less what the rules take away."""

    scale: float  # of the product of a query and a key
    softcap: float | None = None  # scores are bounded to it by tanh
    sliding_window: int | None = None  # w: only the last w tokens, itself included, are seen
    attention_chunk: int | None = None  # c: only tokens of the same position // c are seen
    sink_logits: Tensor | None = None  # [Hq] join the softmax without a value

    @property
    def hides_context(self) -> bool:
        """Whether a new token may fail to see some token before it."""
        return self.sliding_window is not None or self.attention_chunk is not None

    def visible(
        self,
        query_positions: Tensor,
        key_positions: Tensor,
        num_sinks: Tensor | None = None,
        windows: Tensor | None = None,
    ) -> Tensor:
        """True where a query may attend to a key, by their positions alone.

        A windowed sequence sees its first `num_sinks` tokens and the last `windows`; positions are
        those among the tokens that it stores. A sink is as near as in a sequence of just sinks and
        window.
        """
        mask = key_positions <= query_positions
        if num_sinks is not None and windows is not None:
            is_sink = key_positions < num_sinks
            mask = mask & (is_sink | (key_positions > query_positions - windows))
            nearest = query_positions.minimum(num_sinks + windows - 1)
            query_positions = query_positions.where(~is_sink, nearest)
        if self.sliding_window is not None:
            mask = mask & (key_positions > query_positions - self.sliding_window)
        if self.attention_chunk is not None:
            chunk = self.attention_chunk
            mask = mask & (key_positions // chunk == query_positions // chunk)
        return mask
