"""`paged-kv serve`: a model behind an address. Knows arguments and signals, never requests."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import socket
from typing import Final

from ...errors import MissingDependencyError
from ...units import parse_memory
from ...validation import require
from ..llm_options import add_generation_config, load_llm
from ..result_file import explained
from .observation_options import add_observation, observed
from .settings import (
    DEFAULT_DRAIN_SECONDS,
    DEFAULT_MAX_REQUESTS,
    DEFAULT_MIN_PRIORITY,
    ServerSettings,
)

SERVE: Final = """Serve a model over HTTP, as OpenAI's API has it: completions, chats, models.
SIGINT and SIGTERM end it when what was accepted is answered; a second one ends that too."""
API_KEY_VARIABLE: Final = "PAGED_KV_API_KEY"
DEFAULT_PORT: Final = 8000
MAX_PORT: Final = 65535
MAX_SLOWDOWN: Final = 3.0  # so that the times between tokens stay within a few medians
log: Final = logging.getLogger(__name__)


def add_serve(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run_serve, max_slowdown=MAX_SLOWDOWN)
    parser.add_argument("model", nargs="?", help="folder, hub name or .gguf (the demo model)")
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1)")
    server.add_argument("--port", type=int, default=DEFAULT_PORT, help="0: any (8000)")
    server.add_argument(
        "--api-key", metavar="KEY", help=f"what clients have to send ({API_KEY_VARIABLE}, or none)"
    )
    server.add_argument("--served-model-name", metavar="NAME", help="its name in requests (MODEL)")
    server.add_argument(
        "--max-requests",
        type=int,
        default=DEFAULT_MAX_REQUESTS,
        help="that run or wait, each sample is one; of more each gets status 429 (256)",
    )
    server.add_argument(
        "--min-priority",
        type=int,
        default=DEFAULT_MIN_PRIORITY,
        metavar="N",
        help="of a request; lower ones, which come first, are refused (0)",
    )
    server.add_argument(
        "--max-connections",
        type=int,
        metavar="N",
        help="at once; others get status 503 (no limit)",
    )
    server.add_argument("--max-body", default="8MiB", metavar="SIZE", help="of a request (8MiB)")
    server.add_argument(
        "--request-timeout", type=float, metavar="SECONDS", help="that a request may take (no end)"
    )
    server.add_argument(
        "--drain-timeout",
        type=float,
        default=DEFAULT_DRAIN_SECONDS,
        metavar="SECONDS",
        help="for what was accepted before a signal (30)",
    )
    add_generation_config(server)
    server.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="whose pages may ask, in browsers (none)",
    )
    add_observation(parser)


def run_serve(arguments: argparse.Namespace) -> int:
    try:
        from .draining_server import serve
        from .logs import logging_as
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"serving needs {error.name}: pip install 'paged-kv[server]'"
        ) from error

    settings = ServerSettings(
        model_name=arguments.served_model_name or arguments.model or "demo",
        api_key=arguments.api_key or os.environ.get(API_KEY_VARIABLE) or None,
        max_body=parse_memory(arguments.max_body),
        request_timeout=arguments.request_timeout,
        drain_timeout=arguments.drain_timeout,
        max_requests=arguments.max_requests,
        min_priority=arguments.min_priority,
        max_connections=arguments.max_connections,
        allow_origins=arguments.allow_origin,
    )
    # Bound before the model is loaded, and listened at when it is.
    with (
        logging_as(arguments.log_format),
        bound_socket(arguments.host, arguments.port) as listener,
        load_llm(arguments) as llm,
        observed(arguments, llm, settings.model_name) as observation,
    ):
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        log.info("serving %r at http://%s:%d", settings.model_name, shown, port)
        asyncio.run(serve(llm, settings, listener, observation))
    return 0


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet."""
    require("--port", port, 0 <= port <= MAX_PORT, f"from 0 to {MAX_PORT}")
    with explained("listen at", f"{host}:{port}"):
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
        return listener
