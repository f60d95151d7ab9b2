"""What an attention layer stores, and what layers cost together. Knows sizes, never tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from ..blocks.geometry import BlockGeometry
from ..blocks.retention import KEEPS_ALL, Retention
from ..errors import ConfigError
from ..validation import is_list_of, require, require_count, require_instance
from .formats import KVFormat, RecordLayout, block_geometry, resolve_format
from .key_calibration import KeyCalibration, usual_channel_order

FULL_PRECISION_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_SIZE: Final = 1 << 16  # for what dimensions can be see `RecordLayout`


@dataclass(frozen=True, kw_only=True, repr=False)
class LayerSpec:
    """What one attention layer stores for each token; `kv_format` may be given by its name.

    `calibration` is what was learned of its queries and keys, for formats that ask for it.
    `retention` says which tokens it may still need: its own sliding window or chunk, with which
    attention is called. The cache may let go of all others.
    """

    kv_format: KVFormat
    num_kv_heads: int
    key_dim: int
    value_dim: int
    calibration: KeyCalibration | None = None
    retention: Retention = KEEPS_ALL

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_format", resolve_format(self.kv_format))
        for name, least in (("num_kv_heads", 1), ("key_dim", 0), ("value_dim", 0)):
            size = require_count(name, getattr(self, name), least, MAX_HEAD_SIZE)
            object.__setattr__(self, name, size)
        require_instance("retention", self.retention, Retention)
        known = self.calibration
        if known is None:
            return
        require_instance("calibration", known, KeyCalibration)
        if (known.num_kv_heads, known.key_dim) != (self.num_kv_heads, self.key_dim):
            raise ConfigError(
                f"the calibration is of {known.num_kv_heads} kv heads of {known.key_dim} channels, "
                f"the layer has {self.num_kv_heads} of {self.key_dim}"
            )
        if not self.kv_format.wants_calibration:
            object.__setattr__(self, "calibration", None)  # equal layers look equal

    def __repr__(self) -> str:
        """With its retention where that limits anything: layers that keep all look as ever."""
        shown = [each.name for each in fields(self)]
        if self.retention.keeps_all:
            shown.remove("retention")
        return f"LayerSpec({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    @property
    def wide_channels(self) -> NDArray[np.int64] | None:
        """[num_kv_heads, W] channels of a key that have more bits, ascending, if any have."""
        num_wide = self.kv_format.num_wide_channels(self.key_dim)
        if not num_wide:
            return None
        if self.calibration is not None:
            order = self.calibration.channel_order
        else:
            order = np.tile(usual_channel_order(self.key_dim), (self.num_kv_heads, 1))
        return np.sort(order[:, :num_wide].astype(np.int64), axis=1)

    @property
    def feedback(self) -> NDArray[np.float32] | None:
        """[num_kv_heads, key_dim, key_dim], as of `KeyCalibration`, where errors are fed back."""
        if self.calibration is None or not self.kv_format.has_error_feedback:
            return None
        return self.calibration.feedback.astype(np.float32)

    def record_layout(self, dtype: torch.dtype) -> RecordLayout:
        return RecordLayout(
            kv_format=self.kv_format,
            key_dim=self.key_dim,
            value_dim=self.value_dim,
            itemsize=dtype.itemsize,
        )


def keeping_all(layers: Sequence[LayerSpec]) -> list[LayerSpec]:
    """The same layers for who reads tokens back that no layer would see again."""
    return [replace(layer, retention=KEEPS_ALL) for layer in layers]


def usual_kv_dtype(layers: Sequence[LayerSpec], dtype: torch.dtype) -> torch.dtype:
    """The precision of open blocks where a model computes in `dtype`.

    Beside quantized tokens float32 would be a waste; native layers alone keep every bit.
    """
    is_native = all(layer.kv_format.is_native for layer in layers)
    return torch.bfloat16 if dtype is torch.float32 and not is_native else dtype


def cache_geometry(layers: Sequence[LayerSpec], dtype: torch.dtype) -> BlockGeometry:
    """The block geometry that these layers share; what a `BlockManager` is made with."""
    require_layers(layers)
    is_dtype = isinstance(dtype, torch.dtype) and dtype in FULL_PRECISION_DTYPES
    require("dtype", dtype, is_dtype, "float32, bfloat16 or float16")
    return block_geometry([layer.record_layout(dtype) for layer in layers])


def require_layers(layers: Sequence[LayerSpec]) -> None:
    is_layers = is_list_of(layers, lambda layer: isinstance(layer, LayerSpec))
    require("layers", layers, is_layers, "a list of LayerSpec")
    if not layers:
        raise ConfigError("a cache needs at least one layer, got none")
