"""Blocks where transformers asks a cache for one layer's keys and values.

Knows transformers' cache layers, never which sequences there are nor where they are stored.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..errors import InvalidRequestError


class LayerStore(Protocol):
    """Where all layers of a cache store the tokens of N sequences."""

    @property
    def length(self) -> int:
        """Positions that all layers were given, padding included."""
        ...

    @property
    def max_length(self) -> int:
        """Positions that there may be."""
        ...

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Take new keys and values [N, H, L, D]; returns them behind all that came before."""
        ...


class PagedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of a cache, as transformers asks for it."""

    is_croppable = True
    is_sliding = False  # it returns all positions; masks leave out what a window does not see

    def __init__(self, store: LayerStore, layer: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.store: LayerStore = store
        self.layer: int = layer
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Blocks are taken when tokens are stored."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values [N, H, L, D] of new tokens; returns those of all tokens so far."""
        return self.store.update(self.layer, key_states, value_states)

    def get_seq_length(self) -> int:
        return self.store.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return self.store.max_length

    def offload(self) -> None:
        """Blocks stay where they are."""

    def prefetch(self) -> None:
        """Blocks stay where they are."""

    def reset(self) -> None:
        raise_for_one_layer("reset")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise_for_one_layer("reorder_cache")

    def crop(self, tokens_to_remove: int) -> None:
        raise_for_one_layer("crop")


def raise_for_one_layer(name: str) -> None:
    raise InvalidRequestError(f"layers share their sequences: call {name} of the PagedCache")
