"""States of recurrent layers, kept for each sequence beside its blocks.

Knows transformers' cache layers and how many tokens a state stands for, never the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from ..errors import InvalidStepError
from .paged_layer import LayerStore, PagedLayer

CacheLayer = CacheLayerMixin | LinearAttentionCacheLayerMixin

ATTENTION: Final = (DynamicLayer, DynamicSlidingWindowLayer)
HYBRID: Final = (
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)
KNOWN: Final = (*ATTENTION, *HYBRID, LinearAttentionLayer)


class HybridPagedLayer(LinearAttentionLayer, PagedLayer):  # type: ignore[misc, override]
    """A layer that has a state, and keys and values in blocks."""

    is_compileable = False

    def __init__(self, store: LayerStore, layer: int, number_of_states: int) -> None:
        PagedLayer.__init__(self, store, layer)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class RecurrentState:
    """What the recurrent layers of a model know of a sequence's first tokens."""

    num_tokens: int
    attributes: dict[int, dict[str, Any]]  # of their cache layers, by the number of the layer

    @classmethod
    def of(cls, num_tokens: int, layers: Sequence[CacheLayer]) -> RecurrentState:
        """What layers know after so many tokens; they are not used any more."""
        return cls(
            num_tokens,
            {
                number: {k: v for k, v in vars(layer).items() if k not in ATTRIBUTES_OF_BLOCKS}
                for number, layer in enumerate(layers)
                if isinstance(layer, LinearAttentionCacheLayerMixin)
            },
        )

    def copied_to(self, layers: Sequence[CacheLayer]) -> None:
        """Let new layers go on from here; this stays as it is."""
        for number, attributes in self.attributes.items():
            vars(layers[number]).update(deepcopy(attributes))

    @property
    def num_bytes(self) -> int:
        return sum(
            tensor.nbytes
            for attributes in self.attributes.values()
            for states in attributes.values()
            if isinstance(states, dict)
            for tensor in states.values()
            if isinstance(tensor, Tensor)
        )


ATTRIBUTES_OF_BLOCKS: Final = frozenset(("keys", "values", "is_initialized", "store", "layer"))
NO_TOKENS: Final = RecurrentState(0, {})


class RecurrentStates:
    """Of each sequence on a cache the state after its last step, and that before it.

    A step may be undone; the next one then goes on from before it.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[RecurrentState, RecurrentState]] = {}

    def of(self, seq_id: int, num_tokens: int) -> RecurrentState:
        """The state of a sequence's first tokens; raises `InvalidStepError` where it is unknown."""
        if not num_tokens:
            return NO_TOKENS
        for state in self._kept.get(seq_id, ()):
            if state.num_tokens == num_tokens:
                return state
        raise InvalidStepError(
            f"the state of sequence {seq_id} after {num_tokens} tokens is not known: sequences of "
            "a model with recurrent layers compute all their tokens, in order"
        )

    def keep(self, seq_id: int, before: RecurrentState, after: RecurrentState) -> None:
        self._kept[seq_id] = before, after

    @property
    def num_bytes(self) -> int:
        return sum(state.num_bytes for states in self._kept.values() for state in states)
