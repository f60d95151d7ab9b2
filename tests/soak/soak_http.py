"""Random requests over HTTP to a server of its own, at four times what it runs at once.

    make soak-http        or, from the checkout:
    PYTHONPATH=bench:. python -m tests.soak.soak_http --requests 2000 --json FILE

Clients read to the end, read slowly, leave in the middle or before the first byte, set time limits,
and send what is no request. Whoever was told nothing else has to get the answer that the server
gave to the same question when it had nothing else to do. When all are over, nothing may run or be
held, and memory may not have grown. Then SIGTERM comes in the middle of requests: each that was
accepted is answered or told why not, and the server ends with status 0. What must not happen is
printed, and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any, Final

import httpx
from report import Row, write_report

from tests.soak.soak_engine import PAGE_MIB

MAX_NUM_SEQS: Final = 8
NUM_CLIENTS: Final = 4 * MAX_NUM_SEQS
MAX_REQUESTS: Final = 3 * MAX_NUM_SEQS  # fewer than clients: some are told to come again
MAX_BODY: Final = 1 << 20
SERVER: Final = (
    *("-m", "paged_kv", "serve", "--port", "0", "--kv-format", "native", "--dtype", "float32"),
    *("--max-num-seqs", str(MAX_NUM_SEQS), "--max-requests", str(MAX_REQUESTS)),
    *("--num-blocks", "160", "--token-budget", "256", "--max-body", str(MAX_BODY)),
    *("--drain-timeout", "60"),
)
STARTING_SECONDS: Final = 180.0
PATIENCE_SECONDS: Final = 120.0  # of a client that reads to the end
MOST_MIB: Final = 24.0  # that the second half may grow by
TEXT: Final = "the sea was calm and she walked along the shore to see him again"

WORDS: Final = tuple(TEXT.split(" "))


class Wrong(AssertionError):
    """What must not happen."""


@dataclass
class Server:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    url: str

    @classmethod
    def start(cls, arguments: tuple[str, ...]) -> Server:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        for line in process.stderr:
            if "at http://" in line:
                url = line.rsplit(" ", 1)[1].strip()
                break
        else:
            raise Wrong(f"the server has not started: {process.wait()}")
        Thread(target=shutil.copyfileobj, args=(process.stderr, sys.stderr), daemon=True).start()
        give_up = time.monotonic() + STARTING_SECONDS
        while time.monotonic() < give_up:
            try:
                if httpx.get(f"{url}/ready").status_code == 200:
                    return cls(process, url)
            except httpx.TransportError:
                time.sleep(0.1)
        raise Wrong("the server has not become ready")

    @property
    def memory(self) -> float:
        """Resident memory in MiB."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * PAGE_MIB

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_SECONDS)


@dataclass
class Question:
    """What is asked, and the answer that it has alone."""

    path: str
    body: dict[str, Any]
    answer: str = ""


def questions(rng: random.Random, count: int) -> list[Question]:
    """Prompts of a few openings, so that they share prefixes."""
    openings = [" ".join(rng.choices(WORDS, k=rng.randrange(1, 60))) for _ in range(5)]
    asked = []
    for number in range(count):
        text = f"{rng.choice(openings)} {' '.join(rng.choices(WORDS, k=rng.randrange(1, 20)))}"
        body: dict[str, Any] = {
            "model": "demo",
            "prompt": f"{number} {text}",
            "max_tokens": rng.randrange(1, 48),
            "temperature": 0,
        }
        if rng.random() < 0.3:
            body["cache_salt"] = rng.choice(("one", "two"))
        asked.append(Question("/v1/completions", body))
    return asked


class Clients:
    """Clients of one server, and what became of them."""

    def __init__(self, server: Server, asked: list[Question], seed: int) -> None:
        self.server = server
        self.asked = asked
        self.rng = random.Random(seed)
        self.ends: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.memory: list[float] = []
        self.http = httpx.AsyncClient(
            base_url=server.url,
            timeout=PATIENCE_SECONDS,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=8),
        )
        self.kinds: dict[Callable[[Question], Awaitable[str]], int] = {
            self.ask: 30,
            self.stream: 30,
            self.stream_slowly: 8,
            self.leave_early: 8,
            self.leave_in_the_middle: 10,
            self.have_no_patience: 6,
            self.send_nonsense: 8,
        }

    async def answer_alone(self) -> None:
        for question in self.asked:
            question.answer = self.text_of(await self.http.post(question.path, json=question.body))

    async def run(self, num_requests: int) -> None:
        """So many requests, of as many clients at once as there are."""
        numbers = iter(range(num_requests))

        async def client() -> None:
            for number in numbers:
                await self.one()
                if number % 50 == 0:
                    self.memory.append(self.server.memory)

        await asyncio.gather(*(client() for _ in range(NUM_CLIENTS)))

    async def one(self) -> None:
        kinds = list(self.kinds)
        (kind,) = self.rng.choices(kinds, [self.kinds[each] for each in kinds])
        question = self.rng.choice(self.asked)
        try:
            end = await kind(question)
        except Wrong as error:
            self.wrong.append(f"{kind.__name__} {question.body}: {error}")
            end = "wrong"
        except Exception as error:
            self.wrong.append(f"{kind.__name__} {question.body}: {error!r}")
            end = "lost"
        self.ends[f"{kind.__name__}: {end}"] += 1

    # -- who gets an answer ---------------------------------------------------------------------

    async def ask(self, question: Question) -> str:
        while True:
            answer = await self.http.post(question.path, json=question.body)
            if answer.status_code != 429:
                break
            self.ends["told to come again"] += 1
            await asyncio.sleep(self.rng.random() * float(answer.headers["retry-after"]))
        self.check(question, self.text_of(answer))
        return "answered"

    async def stream(self, question: Question, pause: float = 0.0) -> str:
        texts: list[str] = []
        async for text in self.pieces(question):
            texts.append(text)
            if pause:
                await asyncio.sleep(self.rng.random() * pause)
        self.check(question, "".join(texts))
        return "answered"

    async def stream_slowly(self, question: Question) -> str:
        return await self.stream(question, pause=0.2)

    def check(self, question: Question, text: str) -> None:
        if text != question.answer:
            raise Wrong(f"answered {text!r}, alone {question.answer!r}")

    def text_of(self, answer: httpx.Response) -> str:
        if answer.status_code != 200:
            raise Wrong(f"status {answer.status_code}: {answer.text}")
        return str(answer.json()["choices"][0]["text"])

    async def pieces(self, question: Question) -> Any:
        """The pieces of a streamed answer; one that was told to come again comes again."""
        body = {**question.body, "stream": True}
        while True:
            async with self.http.stream("POST", question.path, json=body) as answer:
                if answer.status_code == 429:
                    self.ends["told to come again"] += 1
                    seconds = float(answer.headers["retry-after"])
                elif answer.status_code != 200:
                    raise Wrong(f"status {answer.status_code}: {await answer.aread()!r}")
                else:
                    async for text in pieces_of(answer):
                        yield text
                    return
            await asyncio.sleep(self.rng.random() * seconds)

    # -- who does not ---------------------------------------------------------------------------

    async def leave_early(self, question: Question) -> str:
        task = asyncio.create_task(self.http.post(question.path, json=question.body))
        await asyncio.sleep(self.rng.random() * 0.1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return "left"

    async def leave_in_the_middle(self, question: Question) -> str:
        texts: list[str] = []
        pieces, count = self.pieces(question), self.rng.randrange(1, 10)
        async for text in pieces:
            texts.append(text)
            if len(texts) == count:
                break
        await pieces.aclose()
        if not question.answer.startswith("".join(texts)):
            raise Wrong(f"began with {texts!r}, alone {question.answer!r}")
        return "left"

    async def have_no_patience(self, question: Question) -> str:
        limit = self.rng.random() * 0.3 + 1e-3
        try:
            answer = await self.http.post(question.path, json=question.body, timeout=limit)
        except httpx.TimeoutException:
            return "left"
        if answer.status_code == 200:
            self.check(question, self.text_of(answer))
        return "answered"

    async def send_nonsense(self, question: Question) -> str:
        """What is no request is refused in OpenAI's form, or its connection is closed."""
        kind, raw, expected = self.rng.choice(nonsense(question))
        status, body = await send_raw(self.server.url, raw, is_cut_off=0 in expected)
        if status not in expected:
            raise Wrong(f"{kind}: status {status}, {body[:200]!r}")
        if status and "error" not in json.loads(body):
            raise Wrong(f"{kind}: no error in {body[:200]!r}")
        return f"refused ({kind})"

    # -- what is left ---------------------------------------------------------------------------

    async def check_idle(self) -> dict[str, Any]:
        """Nothing runs, waits or is held a while after all are over."""
        give_up = time.monotonic() + PATIENCE_SECONDS
        while True:
            found = (await self.http.get("/metrics")).text
            figures = dict(line.rsplit(" ", 1) for line in found.splitlines() if line[0] != "#")
            busy = {
                name: float(value)
                for name, value in figures.items()
                if name.startswith(
                    (
                        "vllm:num_requests_running",
                        "vllm:num_requests_waiting",
                        "vllm:kv_cache_usage",
                    )
                )
            }
            if len(busy) >= 3 and not any(busy.values()):
                return busy
            if time.monotonic() > give_up:
                raise Wrong(f"something is left: {busy}")
            await asyncio.sleep(0.1)


async def pieces_of(answer: httpx.Response) -> Any:
    """The texts of server-sent events; raises `Wrong` where they do not end as they should."""
    async for line in answer.aiter_lines():
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise Wrong(f"an error instead of an answer: {event}")
            for choice in event["choices"]:
                yield choice["text"]
    raise Wrong("the stream broke off")


def nonsense(question: Question) -> list[tuple[str, bytes, set[int]]]:
    """Names, bytes and the statuses that may come of them; 0 is a connection that is closed."""
    body = json.dumps(question.body).encode()

    def post(content: bytes, length: int | None = None, path: str = question.path) -> bytes:
        size = len(content) if length is None else length
        head = f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {size}\r\nConnection: close\r\n\r\n".encode() + content

    def changed(**fields: Any) -> bytes:
        return post(json.dumps({**question.body, **fields}).encode())

    return [
        ("no JSON", post(body[:-3]), {400}),
        ("no UTF-8", post(b'{"prompt": "\xff\xfe"}'), {400}),
        ("deep", post(b"[" * 5000), {400}),
        ("a list", post(b"[]"), {400}),
        ("an unknown field", changed(no_such_field=1), {400}),
        ("a wrong type", changed(max_tokens="many"), {400}),
        ("out of range", changed(temperature=-1), {400}),
        ("not a number", post(b'{"prompt": "a", "temperature": NaN}'), {400}),
        ("a long prompt", changed(prompt="word " * 20_000), {400, 429}),  # who has no place waits
        ("an unknown model", changed(model="nobody"), {404}),
        ("an unknown path", post(body, path="/v1/nothing"), {404}),
        ("a large body", post(b"", length=100 << 20), {413}),
        ("half a body", post(body[: len(body) // 2], length=len(body)), {0, 400}),
    ]


async def send_raw(url: str, raw: bytes, *, is_cut_off: bool) -> tuple[int, bytes]:
    """Status and body of the answer to bytes, after which one may hang up; 0: there is none."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(raw)
        await writer.drain()
        if is_cut_off:
            writer.write_eof()
        answer = await asyncio.wait_for(reader.read(), PATIENCE_SECONDS)
    except ConnectionError:
        return 0, b""
    finally:
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]) if head else 0, body


# -- SIGTERM ------------------------------------------------------------------------------------


@dataclass
class Ending:
    """What became of requests that a server was asked to end in the middle of."""

    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    status: int | None = None

    async def watch(self, clients: Clients) -> None:
        """Ask for more than fits, have the server end when some are answered, and read on."""
        tasks = [asyncio.create_task(self._one(clients, q)) for q in clients.asked]
        while self.ends["answered"] < 3:
            await asyncio.sleep(0.01)
        ending = asyncio.create_task(asyncio.to_thread(clients.server.end))
        await asyncio.gather(*tasks)
        self.status = await ending

    async def _one(self, clients: Clients, question: Question) -> None:
        body = {**question.body, "stream": clients.rng.random() < 0.5}
        try:
            async with clients.http.stream("POST", question.path, json=body) as answer:
                if answer.status_code != 200:
                    error = json.loads(await answer.aread())["error"]["message"]
                    self.ends[f"refused, {answer.status_code}: {error[:40]}"] += 1
                    return
                if body["stream"]:
                    text = "".join([piece async for piece in pieces_of(answer)])
                else:
                    await answer.aread()
                    text = clients.text_of(answer)
                clients.check(question, text)
                self.ends["answered"] += 1
        except httpx.ConnectError:
            self.ends["not connected"] += 1
        except Exception as error:
            self.wrong.append(f"{question.body}: {error!r}")


async def soak(arguments: argparse.Namespace) -> int:
    rng = random.Random(arguments.seed)
    asked = questions(rng, 40)
    began = time.monotonic()
    server = Server.start(SERVER)
    try:
        clients = Clients(server, asked, arguments.seed)
        await clients.answer_alone()
        await clients.run(arguments.requests // 10)  # until all that grows once has grown
        clients.memory.clear()
        await clients.run(arguments.requests - arguments.requests // 10)
        await clients.check_idle()
        half = clients.memory[len(clients.memory) // 2 :]
        growth = half[-1] - half[0] if half else 0.0
        if growth > MOST_MIB:
            clients.wrong.append(f"memory grew by {growth:.1f} MiB in the second half")
        ending = Ending()
        await ending.watch(clients)
        if ending.status != 0:
            ending.wrong.append(f"the server ended with status {ending.status}")
    finally:
        server.process.kill()
    wrong = clients.wrong + ending.wrong
    for line in wrong:
        print(line)
    rows = [
        row("requests", arguments.requests),
        row("wrong or lost", len(wrong), "must be", 0),
        row("clients at once", NUM_CLIENTS, "sequences that run at once", MAX_NUM_SEQS),
        row("growth of memory, second half", growth, "must be below", MOST_MIB, "MiB"),
        row("resident memory", half[-1] if half else 0.0, unit="MiB"),
        row("status after SIGTERM", ending.status or 0, "must be", 0),
        row("duration", time.monotonic() - began, unit="s"),
        *(row(name, count) for name, count in sorted(clients.ends.items())),
        *(row(f"SIGTERM: {name}", count) for name, count in sorted(ending.ends.items())),
    ]
    for each in rows:
        print(f"{each.metric}: {each.value:g} {each.unit}")
    if arguments.json:
        write_report("soak_http", rows, arguments.json)
    return 1 if wrong else 0


def row(
    metric: str,
    value: float,
    baseline: str | None = None,
    baseline_value: float | None = None,
    unit: str = "",
) -> Row:
    return Row(
        case="HTTP",
        metric=metric,
        value=value,
        unit=unit,
        baseline=baseline,
        baseline_value=baseline_value,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return asyncio.run(soak(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
