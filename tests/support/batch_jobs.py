"""Batch jobs in processes of their own, which are killed when they have done so much."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
SECONDS_TO_WAIT = 120.0
WORDS = "The captain said to her sister that a doctor of the town had seen no letter"


def random_requests(count: int, seed: int, most_tokens: int = 48) -> list[dict[str, Any]]:
    """Requests of many lengths, some with several continuations, each named by its place."""
    rng = random.Random(seed)
    requests = []
    for number in range(count):
        prompt = " ".join(rng.choices(WORDS.split(), k=rng.randint(1, 12)))
        request = {"id": f"r{number}", "prompt": prompt, "max_tokens": rng.randint(4, most_tokens)}
        if number % 7 == 3:
            request["n"] = rng.randint(2, 3)
        if number % 11 == 5:
            request.update(n=1, best_of=2)
        requests.append(request)
    return requests


@dataclass(frozen=True)
class JobFiles:
    """The files of one job in a folder of its own, and how it is started."""

    folder: Path
    options: tuple[str, ...]

    @property
    def source(self) -> Path:
        return self.folder / "in.jsonl"

    @property
    def output(self) -> Path:
        return self.folder / "out.jsonl"

    @property
    def part(self) -> Path:
        return self.folder / "out.jsonl.part"

    def write(self, requests: list[dict[str, Any]]) -> None:
        self.folder.mkdir(exist_ok=True)
        self.source.write_text("".join(json.dumps(request) + "\n" for request in requests))

    def start(self, *options: str) -> subprocess.Popen[str]:
        files = ["--input", str(self.source), "--output", str(self.output)]
        command = [sys.executable, "-m", "paged_kv", "generate", *files, *self.options, *options]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path}
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)

    def run(self, *options: str) -> tuple[int, str]:
        """To its end: exit code and what it said."""
        process = self.start(*options)
        said = process.communicate()[1]
        return process.returncode, said

    def run_until(
        self, num_results: int, stop: signal.Signals, *options: str, delay: float = 0.0
    ) -> tuple[int, str]:
        """Until so many results are kept, and then `delay` seconds; and then it is stopped."""
        process = self.start(*options)
        deadline = time.monotonic() + SECONDS_TO_WAIT
        while process.poll() is None and len(self.kept()) < num_results:
            assert time.monotonic() < deadline, f"{self.part} does not grow"
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(stop)
        said = process.communicate()[1]
        return process.returncode, said

    def kept(self) -> list[int]:
        """Indices of all whole lines that the job keeps, in their order."""
        if not self.part.exists():
            return []
        lines = self.part.read_bytes().split(b"\n")[1:-1]
        return [json.loads(line)["index"] for line in lines]

    def results(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.read_text().splitlines()]


def num_repeated(indices: list[int]) -> int:
    return sum(count - 1 for count in Counter(indices).values())
