"""A causal language model that computes on the blocks of a cache: what both routes have in common.

Knows transformers and what layers store, never how attention reads it.

Many arguments because `forward` takes all that a step is.
"""

from __future__ import annotations

import inspect
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..blocks.retention import KEEPS_ALL, Retention
from ..cache.key_calibration import KeyCalibration
from ..cache.kv_cache import PagedKVCache, Step
from ..cache.layer_formats import KVFormats, resolve_formats
from ..cache.layer_spec import LayerSpec
from ..errors import ConfigError
from .active_step import Observer
from .adapters import AdapterNames, Adapters, TokenAdapters, refuse_invoked, state_of
from .attachment import attach, attaching, attachments, detach, widen_once
from .length_limit import find_length_limit
from .rotary import Rotation
from .wrapped_weights import stored_tensors

Route = Literal["fused", "gather"]
LayerShape = tuple[int, int, int]  # heads, channels of a key, channels of a value


class AttachedModel(ABC):
    """A model that is taken out of training mode and computes on blocks, until `close()`.

    With `widens` it computes in float32 meanwhile (see `widening`). Raises `UnsupportedModelError`,
    and leaves the model as it was, where its route would not compute what the model means.
    """

    route: ClassVar[Route]
    implementation: ClassVar[str | None]  # of its attention; None is the model's own
    layer_retentions: Mapping[int, Retention] = MappingProxyType({})  # the others keep all
    # Of recurrent layers: its sequences cannot begin behind their first token.
    keeps_states: bool = False
    layer_shapes: dict[int, LayerShape]
    vocab_size: int

    def __init__(self, model: PreTrainedModel, *, widens: bool = False) -> None:
        refuse_invoked(model)
        with attaching:
            self._attach(model, widens)

    def _attach(self, model: PreTrainedModel, widens: bool) -> None:
        self.model = model
        self.adapters: Adapters = Adapters(model)
        self._arguments = inspect.signature(model.forward).parameters.keys()
        attach(model, self.implementation)
        # Detaches once: by close(), or when nothing refers to this object any more.
        self._detach = weakref.finalize(self, detach, model)
        self._detach.atexit = False
        try:
            if widens:
                widen_once(model, self.fingerprint())
            self._dtype = attachments[model].dtype
            self.layer_shapes, self.vocab_size = self._probe()
            self._make_ready()
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _probe(self) -> tuple[dict[int, LayerShape], int]:
        """Run a few tokens: what each layer that stores something stores, and how many logits."""

    @abstractmethod
    def _make_ready(self) -> None:
        """Do what there is to do once it is known that the model can be served."""

    @abstractmethod
    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        logit_rows: Tensor,
        cache: PagedKVCache,
        step: Step,
        adapters: TokenAdapters | None = None,
        observe: Observer | None = None,
    ) -> Tensor:
        """Run one step of tokens [T] at positions [T]; logits [M, V] of the tokens `logit_rows`.

        Without `adapters` all tokens get those that are active in the model.
        """

    @abstractmethod
    def _try_adapters(self, adapters: TokenAdapters) -> None:
        """Run a few tokens with adapters, or raise whatever that raises."""

    def adapters_for(self, name: str | None) -> AdapterNames:
        """What a request with this `adapter` is computed with; see `Adapters.find`."""
        return self.adapters.find(name, self._try_adapters)

    @property
    @abstractmethod
    def rotations(self) -> dict[int, Rotation]:
        """How each layer embeds positions.

        Raises `UnsupportedModelError` where that is not by turning channels, so that the
        sinks of a window could not be brought near.
        """

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, also where the model computes in float32."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def is_closed(self) -> bool:
        return not self._detach.alive

    def close(self) -> None:
        """Give the model its own attention implementation back."""
        self._detach()

    def state_bytes(self, cache: PagedKVCache) -> int:
        """What is kept of sequences on `cache` beside their blocks."""
        return 0

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def fingerprint(self) -> bytes:
        """32 bytes that differ between models: by architecture, and by a sample of every weight."""
        attachment = attachments.get(self.model)
        if attachment is not None and attachment.fingerprint is not None:
            return attachment.fingerprint
        return fingerprint_of(self.model)

    def layers(
        self, kv_format: KVFormats, calibration: Sequence[KeyCalibration] | None = None
    ) -> list[LayerSpec]:
        """What the cache of this model must hold, in the order of its layers.

        Layers that see a window or a chunk keep no more than that where attention is ours.
        """
        formats = resolve_formats(kv_format).of(len(self.layer_shapes))
        known = [None] * len(self.layer_shapes) if calibration is None else calibration
        if len(known) != len(self.layer_shapes):
            raise ConfigError(
                f"a calibration of {len(known)} layers is not one of this model's "
                f"{len(self.layer_shapes)}"
            )
        return [
            LayerSpec(
                kv_format=each,
                num_kv_heads=heads,
                key_dim=key,
                value_dim=value,
                calibration=its,
                retention=self.layer_retentions.get(layer, KEEPS_ALL),
            )
            for each, (layer, (heads, key, value)), its in zip(
                formats, self.layer_shapes.items(), known, strict=True
            )
        ]

    def check_batch(self, num_tokens: int) -> None:
        """Raise `ConfigError` for steps of so many tokens, where their places would count."""
        limit, reason, what = find_length_limit(self.model)
        if what == "place" and limit is not None and num_tokens > limit:
            raise ConfigError(
                f"token_budget must be at most {limit}, got {num_tokens}: beyond that {reason}"
            )


def fingerprint_of(
    model: PreTrainedModel, whole: Callable[[Tensor], Tensor] = lambda weight: weight
) -> bytes:
    """`AttachedModel.fingerprint` of a model as it is; `whole` makes one of weights in parts."""
    digest = sha256(type(model).__name__.encode())
    for name, weight in model.state_dict().items():
        for tensor in stored_tensors(whole(weight)):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            flat = tensor.flatten()
            samples = flat[:: max(flat.numel() // 64, 1)].cpu().contiguous()
            digest.update(samples.view(torch.uint8).numpy().tobytes())
    for state in state_of(model):
        digest.update(state)
    return digest.digest()
