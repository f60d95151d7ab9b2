"""A server on a port of its own, in a thread: what tests of it share."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from paged_kv import LLM, SamplingParams
from paged_kv.entrypoints.async_llm import AsyncLLM
from paged_kv.entrypoints.async_request import AsyncRequest
from paged_kv.entrypoints.demo import MODEL_FOLDER
from paged_kv.entrypoints.server.draining_server import DrainingServer
from paged_kv.entrypoints.server.observation import Observation
from paged_kv.entrypoints.server.serve_cli import bound_socket
from paged_kv.entrypoints.server.settings import ServerSettings
from paged_kv.errors import ClosedError

NAME = "demo"
SECONDS = 30.0  # for what takes a moment; no test waits so long unless it fails
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}{{ ending | default('') }}"
)


def demo_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


class RecordingLLM(AsyncLLM):
    """Notes what is submitted."""

    def __init__(self, llm: LLM, settings: ServerSettings, observation: Observation) -> None:
        super().__init__(llm, max_requests=settings.max_requests, listener=observation)
        self.submitted: list[tuple[Any, SamplingParams, dict[str, Any]]] = []
        self.is_dry = False  # note them and nothing else

    async def submit(
        self, prompt: Any, params: SamplingParams | None = None, **options: Any
    ) -> AsyncRequest:
        assert params is not None
        self.submitted.append((prompt, params, options))
        if self.is_dry:
            raise ClosedError("dry")
        return await super().submit(prompt, params, **options)


class RunningServer:
    """Where it is, and what it is made of."""

    def __init__(self, llm: LLM, settings: ServerSettings) -> None:
        self.llm = llm
        self._settings = settings
        self._listener = bound_socket("127.0.0.1", 0)
        # Small, so that what nobody reads is soon held up.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=SECONDS, trust_env=False)
        self.engine: RecordingLLM
        self.server: DrainingServer
        self._loop: asyncio.AbstractEventLoop
        self._is_made = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        observation = Observation(self.llm, self._settings.model_name)
        async with RecordingLLM(self.llm, self._settings, observation) as self.engine:
            self.server = DrainingServer(self.engine, self._settings, observation)
            self._listener.listen()  # so that who connects now waits until it is served
            self._is_made.set()
            await self.server.serve([self._listener])

    def start(self) -> None:
        self._thread.start()
        assert self._is_made.wait(SECONDS)

    def stop(self, *, closes_client: bool = True) -> None:
        """As a signal does it."""
        if closes_client:
            self.client.close()
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self.server.stop)

    def join(self) -> None:
        self._thread.join(SECONDS)
        assert not self._thread.is_alive(), "the server has not ended"

    def get(self, path: str) -> httpx.Response:
        return self.client.get(path)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), SECONDS)


@contextmanager
def running(llm: LLM, **options: Any) -> Iterator[RunningServer]:
    server = RunningServer(llm, ServerSettings(**{"model_name": NAME, **options}))
    server.start()
    try:
        yield server
    finally:
        server.stop()
        server.join()
