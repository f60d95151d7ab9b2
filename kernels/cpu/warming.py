"""Compile what a CPU cache needs before the first step, and say so where it takes a while.

Knows what there is to compile, not what for.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from hashlib import sha256
from typing import Final

from ...code_cache import read_code, write_code
from ..block_views import LayerBlocks
from .attention import plain_layer
from .microkernels import affine_kernel
from .native_attention import attention_worker
from .native_code import KINDS
from .native_plan import plan_worker
from .stages import stages_worker
from .store import store_worker, stored_layer
from .vectors import host_features, host_name

logger: Final = logging.getLogger("paged_kv")


def warm_up(layers: Sequence[LayerBlocks]) -> None:
    """Compile the workers, and the microkernels of these layers, or read them from the disk."""
    host = sha256(repr((host_name(), host_features())).encode()).hexdigest()
    is_first = read_code(f"{host}.warm") is None
    if is_first:
        logger.warning("compiling the CPU kernels, once on this machine: about 5 seconds")
    attention_worker()
    store_worker()
    plan_worker()
    stages_worker()
    for kind in KINDS.values():
        affine_kernel(kind)
    for layer in layers:
        plain_layer(layer)
        stored_layer(layer)
    if is_first:
        write_code(f"{host}.warm", b"")
