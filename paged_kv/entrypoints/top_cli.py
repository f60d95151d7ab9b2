"""`paged-kv top`: asks a server for its figures again and again. Knows HTTP, never what they mean.

Standard library and rich alone: it runs where no model does.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from typing import Final
from urllib.parse import urlsplit

from ..errors import InvalidRequestError, NoAnswerError
from ..validation import is_finite
from .server_view import Reading, ServerView, histograms_of

TOP: Final = """A live view of a server: requests, blocks by kind, hit rate, tokens a second and
latencies since the view before, or at first since the server's start. Ctrl-C ends it."""
API_KEY_VARIABLE: Final = "PAGED_KV_API_KEY"
ANSWER_SECONDS: Final = 10.0
MOST_BYTES: Final = 1 << 24  # of an answer


def add_top(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run_top)
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8000", help="of the server")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between views (1)")
    parser.add_argument("--once", action="store_true", help="print one view and end")
    parser.add_argument("--api-key", metavar="KEY", help=f"of the server ({API_KEY_VARIABLE})")


def run_top(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.live import Live

    url, interval = server_url(arguments.url), arguments.interval
    if not is_finite(interval) or interval <= 0:
        raise InvalidRequestError(f"--interval must be a number above 0, got {interval}")
    api_key = arguments.api_key or os.environ.get(API_KEY_VARIABLE)
    view, console = ServerView(url), Console()
    if arguments.once:
        view.show(read_server(url, api_key))
        console.print(view.frame(console.width))
        return 0
    try:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                try:
                    view.show(read_server(url, api_key))
                except NoAnswerError as error:
                    view.fault = str(error)
                live.update(view.frame(console.width), refresh=True)
                time.sleep(interval)
    except KeyboardInterrupt:
        return 0


def server_url(text: str) -> str:
    """Where a server is, from what a person writes: `localhost:8000`, or a client's base URL."""
    url = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(url)
        is_server = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # no number as its port
        is_server = False
    if not is_server:
        raise InvalidRequestError(f"a server is at http://HOST:PORT, got {text!r}")
    return url.rstrip("/").removesuffix("/v1")


def read_server(url: str, api_key: str | None) -> Reading:
    """Its figures and latencies now; raises `NoAnswerError` with what a person can do about it."""
    try:
        figures = json.loads(fetch(f"{url}/statistics", api_key))
        exposition = fetch(f"{url}/metrics", api_key).decode()
    except urllib.error.HTTPError as error:
        hint = ": it wants an --api-key, or another one" if error.code in (401, 403) else ""
        raise NoAnswerError(f"{url} answers with status {error.code}{hint}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error or type(error).__name__
        raise NoAnswerError(f"{url} does not answer: {reason}") from error
    if not isinstance(figures, dict) or "blocks" not in figures:
        raise NoAnswerError(f"{url} is no server of paged_kv that tells its figures")
    return Reading(time.monotonic(), figures, histograms_of(exposition))


def fetch(url: str, api_key: str | None) -> bytes:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
        body: bytes = answer.read(MOST_BYTES)
    return body
