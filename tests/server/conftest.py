"""The demo model behind a server, which all tests of a file ask."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from paged_kv import LLM
from paged_kv.entrypoints.demo import MODEL_FOLDER
from tests.support.running_server import RunningServer, demo_tokenizer, running


@pytest.fixture(scope="session")
def llm() -> Iterator[LLM]:
    with LLM(
        MODEL_FOLDER,
        tokenizer=demo_tokenizer(),
        kv_format="native",
        num_blocks=400,
        max_num_seqs=8,
        dtype="float32",  # the tokens of transcripts
    ) as llm:
        yield llm


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[RunningServer]:
    with running(llm) as server:
        yield server
