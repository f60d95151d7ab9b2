"""Recorded exchanges with a server: requests, and answers without what is new each time.

`python -m tests.support.transcripts` asks again and writes what is answered now.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import httpx

from paged_kv import LLM
from paged_kv.entrypoints.demo import MODEL_FOLDER
from tests.support.running_server import demo_tokenizer, running

FOLDER: Final = Path(__file__).parents[1] / "server" / "transcripts"
NEW_EACH_TIME: Final = ("id", "created")
SERVER: Final = {"max_body": 1_000, "max_requests": 4}
EVENT: Final = "data: "


def demo_llm() -> LLM:
    """A model whose greedy tokens are the same on every machine."""
    return LLM(
        MODEL_FOLDER,
        tokenizer=demo_tokenizer(),
        kv_format="native",
        num_blocks=400,
        max_num_seqs=8,
        dtype="float32",
    )


def answer_to(client: httpx.Client, request: dict[str, Any]) -> dict[str, Any]:
    """What is kept of an answer."""
    answer = client.request(request["method"], request["path"], json=request.get("body"))
    kind = answer.headers["content-type"].partition(";")[0]
    found: dict[str, Any] = {"status": answer.status_code, "type": kind}
    if kind == "text/event-stream":
        events = answer.text.removesuffix("\n\n").split("\n\n")
        return {**found, "events": [event_of(event) for event in events]}
    return {**found, "body": without_new(answer.json())}


def event_of(text: str) -> Any:
    data = text.removeprefix(EVENT)
    return without_new(json.loads(data)) if data.startswith("{") else data


def without_new(body: dict[str, Any]) -> dict[str, Any]:
    """Of a list of models each."""
    if body.get("object") == "list":
        return {**body, "data": [{**card, "created": None} for card in body["data"]]}
    return {name: value for name, value in body.items() if name not in NEW_EACH_TIME}


def record() -> None:
    with demo_llm() as llm, running(llm, **SERVER) as server:
        for path in sorted(FOLDER.glob("*.json")):
            exchanges = json.loads(path.read_text())
            for exchange in exchanges:
                exchange["answer"] = answer_to(server.client, exchange["request"])
            path.write_text(json.dumps(exchanges, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    record()
