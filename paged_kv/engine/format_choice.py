"""Choose a format for each layer: where bits of a budget do most. Knows layers and divergences.

Quantizing one layer moves what a model says by so much, nearly whatever is done to the others: the
errors of different layers have little to do with each other, and divergence grows with their
squares. So each layer is measured by itself, and the least sum of all is looked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..blocks.geometry import IntArray
from ..cache.formats import NATIVE, KVFormat, resolve_format
from ..cache.key_calibration import KeyCalibration
from ..cache.layer_formats import CANDIDATES, LayerFormats, with_shared_sizes
from ..cache.layer_spec import cache_geometry, usual_kv_dtype
from ..errors import ConfigError
from ..models.attached_model import AttachedModel
from .evaluate import compare_formats

USUAL: Final = tuple(map(resolve_format, CANDIDATES))
TOKENS_PER_STEP: Final = 64
Report = Callable[[], None]  # told of each layer that was measured


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Of L layers in F formats, which can share a block table."""

    kv_formats: tuple[KVFormat, ...]
    divergences: NDArray[np.float64]  # [L, F] in nats, where that layer alone is in that format
    token_bytes: NDArray[np.float64]  # [L, F] of a sealed token

    def choose(self, budget: float) -> tuple[LayerFormats, float]:
        """The formats of least divergence whose sealed tokens take at most `budget` bytes over all
        layers, and the sum of their divergences.

        Raises `ConfigError` where even the smallest take more.
        """
        require_budget(budget, self.token_bytes)
        chosen = least_sum(self.divergences, self.token_bytes, budget)
        layers = np.arange(len(chosen))
        formats = tuple((layer, self.kv_formats[index]) for layer, index in enumerate(chosen))
        return LayerFormats(None, formats), float(self.divergences[layers, chosen].sum())


def measure_layers(
    model: AttachedModel,
    windows: IntArray,
    *,
    kv_formats: Sequence[KVFormat] = USUAL,
    calibration: Sequence[KeyCalibration] | None = None,
    report: Report | None = None,
) -> Sensitivity:
    """Each format in each layer, all others native, on token windows [W, L]."""
    shared = with_shared_sizes(kv_formats, 0)
    rows = []
    for layer in range(len(model.layer_shapes)):
        rows.append(measure_layer(model, layer, windows, shared, calibration=calibration))
        if report is not None:
            report()
    return Sensitivity(tuple(shared), np.stack(rows), bytes_by_layer(model, shared))


def measure_layer(
    model: AttachedModel,
    layer: int,
    windows: IntArray,
    kv_formats: Sequence[KVFormat],
    *,
    calibration: Sequence[KeyCalibration] | None = None,
) -> NDArray[np.float64]:
    """[F]: the divergence of each of these formats in one layer, in nats, all others native."""
    for each in kv_formats:
        require_sealed(model, each, windows.shape[1] - 1)
    mixtures = [LayerFormats(NATIVE, ((layer, each),)) for each in kv_formats]
    found = compare_formats(
        model,
        [NATIVE, *mixtures],
        windows,
        calibration=calibration,
        tokens_per_step=TOKENS_PER_STEP,
    )
    return np.array([quality.divergence for quality in found[1:]])


def require_sealed(model: AttachedModel, kv_format: KVFormat, num_tokens: int) -> None:
    """Raise `ConfigError` where so many tokens would say nothing of a format."""
    layers = model.layers(kv_format)
    geometry = cache_geometry(layers, usual_kv_dtype(layers, model.dtype))
    least = geometry.num_head_tokens + geometry.block_size + geometry.min_tail_tokens
    least += geometry.block_size // 2  # that see it
    if geometry.seals and num_tokens < least:
        raise ConfigError(
            f"{num_tokens + 1} tokens say too little of {kv_format.name}, whose blocks hold "
            f"{geometry.block_size}: at least {least + 1} are needed"
        )


def bytes_by_layer(
    model: AttachedModel, kv_formats: Sequence[KVFormat] = USUAL
) -> NDArray[np.float64]:
    """[L, F] of a sealed token in each layer and format, where these share a block table."""
    columns = []
    for each in with_shared_sizes(kv_formats, 0):
        layers = model.layers(each)
        dtype = usual_kv_dtype(layers, model.dtype)
        heads = [layer.num_kv_heads for layer in layers]
        sizes = [layer.record_layout(dtype).bytes_per_token for layer in layers]
        columns.append(np.array(heads) * np.array(sizes))
    return np.stack(columns, axis=1)


def require_budget(budget: float, token_bytes: NDArray[np.float64]) -> None:
    """Raise `ConfigError` where even the smallest formats [L, F] take more bytes."""
    least = token_bytes.min(1).sum()
    if budget < least:
        raise ConfigError(
            f"a budget of {budget:g} bytes a token is less than {least:g}, which the smallest of "
            "the formats take"
        )


def least_sum(
    costs: NDArray[np.float64], sizes: NDArray[np.float64], budget: float
) -> NDArray[np.int64]:
    """[L] which of F to take in each of L rows: the least sum of costs [L, F], exactly, of those
    whose sizes [L, F] add up to at most `budget`. Some have to fit."""
    best: dict[float, tuple[float, tuple[int, ...]]] = {0.0: (0.0, ())}
    for row_costs, row_sizes in zip(costs, sizes, strict=True):
        found: dict[float, tuple[float, tuple[int, ...]]] = {}
        for size, (cost, chosen) in best.items():
            for index, (more_cost, more_size) in enumerate(zip(row_costs, row_sizes, strict=True)):
                total = round(size + float(more_size), 6)
                candidate = cost + float(more_cost), (*chosen, index)
                if total <= budget + 1e-6 and candidate < found.get(total, (np.inf, ())):
                    found[total] = candidate
        best = without_worse(found)
    return np.array(min(best.values())[1])


def without_worse(
    found: dict[float, tuple[float, tuple[int, ...]]],
) -> dict[float, tuple[float, tuple[int, ...]]]:
    """Those that no smaller one is as cheap as."""
    kept: dict[float, tuple[float, tuple[int, ...]]] = {}
    least = np.inf
    for size in sorted(found):
        if found[size][0] < least:
            kept[size], least = found[size], found[size][0]
    return kept
