"""Machine code for the few loops over blocks where numba is installed, the same loops where not."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a function over arrays and numbers, kept on disk for the next start."""
    try:
        from numba import njit
    except ImportError:
        return function
    try:
        machine_code: Callable[P, R] = njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no folder can be written
        machine_code = njit(nogil=True)(function)
    return machine_code
