"""What was answered once is answered still: `tests/server/transcripts`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.running_server import running
from tests.support.transcripts import FOLDER, SERVER, answer_to

TRANSCRIPTS = sorted(FOLDER.glob("*.json"))


@pytest.fixture(scope="module")
def server(llm):
    llm.reset_prefix_cache()  # usage tells what is found in it
    with running(llm, **SERVER) as server:
        yield server


def about(value: Any) -> Any:
    """A value whose log-probabilities may be those of another processor."""
    if isinstance(value, float):
        return pytest.approx(value, abs=0.01)
    if isinstance(value, list):
        return [about(each) for each in value]
    if isinstance(value, dict):
        return {name: about(each) for name, each in value.items()}
    return value


def by_sample(answer: dict[str, Any]) -> dict[str, Any]:
    """With the events of each sample together: which of two comes first says who was faster."""

    def sample(event: Any) -> int:
        choices = event.get("choices") if isinstance(event, dict) else None
        return choices[0]["index"] if choices else len(answer["events"])

    return (
        {**answer, "events": sorted(answer["events"], key=sample)} if "events" in answer else answer
    )


def test_there_are_transcripts():
    assert {path.stem for path in TRANSCRIPTS} == {"chats", "completions", "errors", "others"}


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_a_transcript_is_true(server, path):
    for exchange in json.loads(path.read_text()):
        found = answer_to(server.client, exchange["request"])
        assert by_sample(found) == about(by_sample(exchange["answer"])), exchange["request"]
