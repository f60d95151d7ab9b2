"""What the running forward pass is for: where attention calls find it, and what they find.

Keyword arguments do not reach the attention of every architecture, a context variable does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol, cast

from torch import Tensor, nn

from ..blocks.retention import Retention
from ..cache.kv_cache import PagedKVCache, Step
from ..errors import UnsupportedModelError
from .rotary import StepTurns

# Told of each layer's place in the cache, its queries and its keys [T, H, D].
Observer = Callable[[int, Tensor, Tensor], None]


@dataclass
class Probe:
    """What each layer stores, written down during one forward pass without a cache."""

    shapes: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    windows: set[object] = field(default_factory=set)
    retentions: dict[int, Retention] = field(default_factory=dict)  # what its masks leave
    # Queries and keys [T, H, D]; attention puts out zeros, so all a layer knows is the token.
    tokens: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        settings: Mapping[str, object],
    ) -> Tensor:
        """Instead of attention [T, heads, value_dim]; query, key and value are [T, heads, dim]."""
        layer_idx = cast(int, module.layer_idx)
        if layer_idx in self.shapes:
            raise UnsupportedModelError(f"layer {layer_idx} calls attention more than once")
        self.shapes[layer_idx] = (key.shape[1], key.shape[2], value.shape[2])
        self.windows.add(settings["sliding_window"])
        self.tokens[layer_idx] = query, key
        return query.new_zeros(*query.shape[:2], value.shape[2])


@dataclass(frozen=True)
class ActiveStep:
    """Where the attention calls of the running forward pass read and write."""

    cache: PagedKVCache
    step: Step
    cache_layer: dict[int, int]  # a module's layer_idx -> its place in the cache
    turns: StepTurns | None = None  # of windowed sequences
    observe: Observer | None = None


class LayerCall(Protocol):
    """A cache that a layer has just given its new keys and values: the next call's."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None,
        softcap: float | None,
        sliding_window: int | None,
        attention_chunk: int | None,
        sink_logits: Tensor | None,
    ) -> Tensor:
        """Attention [N, L, heads, value_dim]; query, key and value are [N, heads, L, dim]."""
        ...


_active: ContextVar[ActiveStep | Probe | LayerCall | None] = ContextVar(
    "paged_kv_active_step", default=None
)


def running_step() -> ActiveStep | Probe | LayerCall | None:
    return _active.get()


def expect_call(call: LayerCall | None) -> None:
    """Let the next attention call of this context find a cache, or nothing."""
    _active.set(call)


@contextmanager
def running(active: ActiveStep | Probe) -> Iterator[None]:
    """Make a step or a probe the one that attention calls find."""
    token = _active.set(active)
    try:
        yield
    finally:
        _active.reset(token)
