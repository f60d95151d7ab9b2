"""Server-sent events as clients read them."""

from __future__ import annotations

import json
from typing import Any

import httpx

DONE = "data: [DONE]"


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """What a stream says, which must have ended well."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, nothing = response.text.split("\n\n")
    assert (done, nothing) == (DONE, "")
    return [json.loads(event.removeprefix("data: ")) for event in events]
