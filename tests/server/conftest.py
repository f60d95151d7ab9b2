"""The demo model behind a server, which all tests of a file ask."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from paged_kv import LLM
from tests.support.running_server import RunningServer, running
from tests.support.transcripts import demo_llm


@pytest.fixture(scope="session")
def llm() -> Iterator[LLM]:
    with demo_llm() as llm:
        yield llm


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[RunningServer]:
    with running(llm) as server:
        yield server
