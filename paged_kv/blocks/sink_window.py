"""How a windowed sequence goes on for ever in constant memory: sinks and newest tokens.

Knows numbers of tokens, never blocks or tensors. Source: StreamingLLM (Xiao et al. 2023,
arXiv:2309.17453).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from ..errors import ConfigError
from ..validation import require_count
from .geometry import BlockGeometry

MIN_CHUNK_ROOM: Final = 256  # tokens beyond the window that a step may store before it lets go


@dataclass(frozen=True)
class SinkWindow:
    """A token sees the first `num_sink_tokens` of its sequence and the last `window_size`.

    The token itself is the last of these. Sinks are rounded up to whole open blocks (`fitted`), and
    the rounded number is what counts. Once more tokens than both together have come, sinks are seen
    at the distance that they had in a sequence of just these: a token at position p sees sink j at
    distance p - E - j, where E = p + 1 - num_sink_tokens - window_size tokens are *evicted* for it.
    """

    num_sink_tokens: int = 4
    window_size: int = 1020

    def __post_init__(self) -> None:
        for name, least in (("num_sink_tokens", 0), ("window_size", 1)):
            object.__setattr__(self, name, require_count(name, getattr(self, name), least))

    @property
    def num_visible_tokens(self) -> int:
        """Sinks and window together: what a sequence may have before anything is evicted."""
        return self.num_sink_tokens + self.window_size

    def fitted(self, geometry: BlockGeometry) -> SinkWindow:
        """With sinks in whole open blocks; raises `ConfigError` for what this geometry cannot keep.

        Blocks that seal keep their sinks in the head, whose size is the format's.
        """
        block_size = geometry.block_size
        if self.window_size < block_size:
            raise ConfigError(
                f"window_size must be at least a block of {block_size} tokens, got "
                f"{self.window_size}"
            )
        size = geometry.open_block_size
        num_sinks = -(-self.num_sink_tokens // size) * size
        if geometry.seals and num_sinks > geometry.num_head_tokens:
            raise ConfigError(
                f"num_sink_tokens must be at most {geometry.num_head_tokens}, which this format "
                f"keeps in full precision (its own num_sink_tokens), got {self.num_sink_tokens}"
            )
        return replace(self, num_sink_tokens=num_sinks)

    def max_stored(self, geometry: BlockGeometry) -> int:
        """Tokens that a sequence may store at the end of a step, before blocks are let go.

        After a step it stores less than a block more than head, window and the least tail.
        """
        room = max(2 * geometry.block_size, MIN_CHUNK_ROOM)
        return self._num_kept(geometry) + room

    def max_storable(self, geometry: BlockGeometry, num_stored: int) -> int:
        """Tokens that a sequence may store at the end of its next step.

        The step that stores its sinks computes nothing that would see them nearer than they are.
        """
        most = self.max_stored(geometry)
        return most if num_stored >= self.num_sink_tokens else min(most, self.num_visible_tokens)

    def max_blocks(self, geometry: BlockGeometry) -> int:
        """The most blocks that a sequence holds if it grows by one token a step."""
        return geometry.max_blocks(self._num_kept(geometry) + geometry.block_size)

    def _num_kept(self, geometry: BlockGeometry) -> int:
        """Tokens that stay whatever comes, but for those that share a block with one that does."""
        head = max(self.num_sink_tokens, geometry.num_head_tokens)
        return head + max(self.window_size, geometry.min_tail_tokens)
