"""What tests of compiled kernels share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of kernels without machine code: one for all files and processes of a run of tests."""
    folder = tmp_path_factory.getbasetemp()
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    return (folder.parent if is_worker else folder) / "kernels-without-machine-code"
