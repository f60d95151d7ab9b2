"""Run a native worker on all threads: on torch's own pool, so that no second pool fights it.

Knows a worker's address and its argument's, not what it does.
Torch on Linux uses OpenMP, whose threads spin for a while after each operation: a second pool
would share the cores with them. `GOMP_parallel` starts the worker on the very same threads. Where
that symbol is missing (other builds of torch), plain threads run it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

Launch = Callable[[int, int, int], object]  # worker address, its argument, number of threads


def run_worker(worker: int, argument: int, num_threads: int) -> None:
    """Call the native function at `worker` with a pointer on each of `num_threads` threads."""
    launcher()(worker, argument, num_threads)


@cache
def launcher() -> Launch:
    library = openmp_library()
    if library is None:
        return run_on_plain_threads
    parallel = library.GOMP_parallel
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None

    def run_on_openmp(worker: int, argument: int, num_threads: int) -> None:
        if num_threads == 1:
            callable_at(worker)(argument)
        else:
            parallel(worker, argument, num_threads, 0)

    return run_on_openmp


def openmp_library() -> ctypes.CDLL | None:
    """The OpenMP library that torch has loaded into this process."""
    torch.get_num_threads()
    for path in loaded_libraries():
        if "omp" in Path(path).name:
            library = ctypes.CDLL(path)
            if hasattr(library, "GOMP_parallel"):
                return library
    return None


def loaded_libraries() -> list[str]:
    """Files mapped into this process, those of torch first; empty where that cannot be known."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[5] for line in lines if "/" in line}
    return sorted(paths, key=lambda path: ("torch" not in path, path))


@cache
def callable_at(worker: int) -> Callable[[int], None]:
    """A worker at an address as a Python function; it runs without the interpreter's lock."""
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(worker)


@cache
def plain_threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="paged_kv")


def run_on_plain_threads(worker: int, argument: int, num_threads: int) -> None:
    """The worker on threads of our own, this one among them."""
    call = callable_at(worker)
    others = []
    if num_threads > 1:
        pool = plain_threads(num_threads - 1)
        others = [pool.submit(call, argument) for _ in range(num_threads - 1)]
    call(argument)
    for other in others:
        other.result()
