"""Key calibrations to test with: of queries and keys that are random, but not alike."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np

from paged_kv.cache.key_calibration import KeyCalibration
from paged_kv.cache.layer_spec import LayerSpec


@cache
def random_calibration(num_kv_heads: int, key_dim: int, seed: int = 0) -> KeyCalibration:
    """Every kv head has another order of channels, and feedback that is not small."""
    generator = np.random.default_rng(seed)
    queries = generator.normal(size=(num_kv_heads, 4 * key_dim, key_dim))
    queries = queries @ generator.normal(size=(num_kv_heads, key_dim, key_dim))
    covariance = queries.transpose(0, 2, 1) @ queries / queries.shape[1]
    return KeyCalibration.from_moments(covariance, generator.random((num_kv_heads, key_dim)))


def calibrated(layer: LayerSpec, seed: int = 0) -> LayerSpec:
    calibration = random_calibration(layer.num_kv_heads, layer.key_dim, seed)
    return replace(layer, calibration=calibration)
