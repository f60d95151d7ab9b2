"""What every test of kernels runs under: Triton's interpreter without its two slowest habits."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest


@pytest.fixture(scope="session", autouse=True)
def fast_interpreter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if find_spec("triton"):
            from tests.support.interpreter import speed_up

            speed_up(patch)
        yield
