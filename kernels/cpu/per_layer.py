"""What a backend makes of a layer's blocks, kept as long as they. Knows no contents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from ..block_views import LayerBlocks

Made = TypeVar("Made")


class PerLayer(Generic[Made]):
    """Makes something of a layer when first asked for it, and forgets it with the layer."""

    def __init__(self, make: Callable[[LayerBlocks], Made]) -> None:
        self._make = make
        self._made: WeakKeyDictionary[LayerBlocks, Made] = WeakKeyDictionary()

    def __call__(self, layer: LayerBlocks) -> Made:
        made = self._made.get(layer)
        if made is None:
            made = self._made[layer] = self._make(layer)
        return made
