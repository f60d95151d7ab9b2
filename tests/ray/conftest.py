"""One cluster of Ray for all tests: this machine, small, and gone at their end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # or a token is left in the home folder
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}
os.environ.update(ENVIRONMENT)  # before Ray is imported; all of its processes take it over


@pytest.fixture(scope="session")
def cluster() -> Iterator[Path]:
    """The folder of its logs."""
    import ray

    ray.init("local", num_cpus=4, object_store_memory=200 << 20, include_dashboard=False)
    try:
        yield Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"
    finally:
        ray.shutdown()
