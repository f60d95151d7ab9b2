"""Settings of every test run."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

# NumPy's own threads spin beside those of another worker; it asks when it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import torch

from paged_kv.blocks import block_tables

NEEDED_PACKAGE = {
    "kernels/test_cpu_code.py": "numba",
    "kernels/test_cpu_kernels.py": "numba",
    "kernels/test_cpu_store.py": "numba",
    "kernels/test_cpu_threads.py": "numba",
    "integrations/test_lmcache.py": "lmcache",
    "kernels/test_gpu_expectations.py": "triton",
    "kernels/test_machine_code.py": "triton",
    "kernels/test_ptx.py": "triton",
    "kernels/test_ptx_faults.py": "triton",
    "kernels/test_triton_kernels.py": "triton",
    "kernels/test_triton_machine_code.py": "triton",
    "kernels/test_triton_windowed.py": "triton",
    "kernels/test_tune.py": "triton",
}
pytest.register_assert_rewrite("tests.support")
collect_ignore = [name for name, package in NEEDED_PACKAGE.items() if not find_spec(package)]
if not find_spec("vllm"):  # an environment of its own has it: make test-vllm
    collect_ignore.append("integrations")
if not find_spec("ray"):  # the same one: make test-ray
    collect_ignore.append("ray")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported
block_tables.FIRST_WIDTH = 2  # so that tables widen again and again in short sequences
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell runs these tests behind itself
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share what one process has made come first: workers steal from the end."""
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Threads that spin for each other's small operations cost ten times the work itself.

    In processes that tests start, too.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def small_heap() -> None:
    """No collection of garbage walks through what was loaded before the first test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def fast_interpreter() -> Iterator[None]:
    """Triton's, where a test has loaded it, without its slowest habits."""
    with pytest.MonkeyPatch.context() as patch:
        if "triton.runtime.interpreter" in sys.modules:
            from tests.support.interpreter import speed_up

            speed_up(patch)
        yield
