"""Which stored tokens the layers of a group may still need. Knows positions, never blocks.

Most layers see every token before one. Others see the last W (Mistral, Gemma 3, gpt-oss), or those
of their own chunk of C positions (Llama 4): blocks of tokens that nobody sees again can be let go.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Final

import numpy as np

from ..validation import require_count
from .geometry import BlockGeometry, IntArray
from .sink_window import SinkWindow

# A limit is compared beside other limits, as a number in an array: where there is none it is a
# number that nothing reaches.
UNLIMITED: Final = int(np.iinfo(np.int64).max)


@dataclass(frozen=True, kw_only=True, repr=False)
class Retention:
    """A token sees the last `window_size` tokens, itself included, of its own chunk of so many."""

    window_size: int = UNLIMITED
    chunk_size: int = UNLIMITED

    def __post_init__(self) -> None:
        for field in fields(self):
            size = getattr(self, field.name)
            size = size if size == UNLIMITED else require_count(field.name, size)
            object.__setattr__(self, field.name, size)

    @classmethod
    def of_layer(cls, sliding_window: int | None, attention_chunk: int | None) -> Retention:
        """What masks as `paged_attention` takes them leave to be seen."""
        return cls(
            window_size=UNLIMITED if sliding_window is None else sliding_window,
            chunk_size=UNLIMITED if attention_chunk is None else attention_chunk,
        )

    @cached_property
    def keeps_all(self) -> bool:
        return self.reach == UNLIMITED

    def __repr__(self) -> str:
        """With what limits it."""
        sizes = ((field.name, getattr(self, field.name)) for field in fields(self))
        limits = ", ".join(f"{name}={size}" for name, size in sizes if size != UNLIMITED)
        return f"Retention({limits})"

    def __str__(self) -> str:
        """What it leaves to be seen, in words."""
        window, chunk = f"the last {self.window_size}", f"a chunk of {self.chunk_size}"
        if self.chunk_size == UNLIMITED:
            return "all tokens" if self.window_size == UNLIMITED else window
        return chunk if self.window_size == UNLIMITED else f"{window} of {chunk}"

    @property
    def reach(self) -> int:
        """The most tokens that one sees, itself included."""
        return min(self.window_size, self.chunk_size)

    def step(self, geometry: BlockGeometry) -> int:
        """Tokens that are let go at once, or multiples: whole blocks, and whole chunks.

        So a token's place among those that are left says as much of its chunk as its position.
        """
        if self.chunk_size == UNLIMITED:
            return geometry.block_size
        return math.lcm(geometry.block_size, self.chunk_size)

    def numbers(self, geometry: BlockGeometry) -> IntArray:
        """[3] window, chunk and step, as compiled loops take them."""
        numbers = (self.window_size, self.chunk_size, self.step(geometry))
        return np.array(numbers, dtype=np.int64)

    def first_seen(self, num_tokens: int) -> int:
        """The first position that is seen by the token behind the first `num_tokens`."""
        return max(
            num_tokens - self.window_size + 1, num_tokens // self.chunk_size * self.chunk_size, 0
        )

    def num_evicted(self, geometry: BlockGeometry, num_tokens: int) -> int:
        """Tokens, behind the head, that a sequence of so many lets go, were all of them sealed."""
        step = self.step(geometry)
        return max((self.first_seen(num_tokens) - geometry.num_head_tokens) // step, 0) * step

    def most_stored(self, geometry: BlockGeometry, num_tokens: int, chunk: int = 1) -> int:
        """Tokens at most of a sequence that grows to `num_tokens`, by up to `chunk` a step."""
        if self.keeps_all:
            return num_tokens
        kept = max(self.reach, geometry.min_tail_tokens) + self.step(geometry)
        return min(num_tokens, geometry.num_head_tokens + kept + chunk)

    def blocks_held(self, geometry: BlockGeometry, num_tokens: int) -> int:
        """Blocks of a sequence that has grown to `num_tokens`, one a step, between two steps."""
        num_sealed = int(geometry.num_sealed_blocks(np.array([num_tokens]))[0])
        num_evicted = self.num_evicted(geometry, num_tokens)
        if geometry.seals:
            step = self.step(geometry)
            num_evicted = min(num_evicted, num_sealed * geometry.block_size // step * step)
            num_sealed -= num_evicted // geometry.block_size
        return geometry.count_blocks(num_tokens - num_evicted, num_sealed)

    def is_bounded_by(self, sink_window: SinkWindow | None) -> bool:
        """Whether a request's own window reaches less far: else it changes nothing here."""
        return sink_window is not None and sink_window.window_size < self.reach

    def max_blocks(
        self, geometry: BlockGeometry, num_tokens: int, sink_window: SinkWindow | None = None
    ) -> int:
        """The most blocks that a sequence holds as it grows to `num_tokens`, one a step."""
        if sink_window is not None and self.is_bounded_by(sink_window):
            return sink_window.max_blocks(geometry)
        return geometry.max_blocks(self.most_stored(geometry, num_tokens))


KEEPS_ALL: Final = Retention()
EVERYTHING: Final = (KEEPS_ALL,)  # one group, of layers that all keep all


def longest_reach_first(retentions: tuple[Retention, ...]) -> tuple[Retention, ...]:
    """In the order of groups: a request's own window holds in the first if it does in any."""
    return tuple(sorted(retentions, key=lambda each: -each.reach))
