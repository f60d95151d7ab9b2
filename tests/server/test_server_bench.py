"""The benchmark of the server, with a load tool and servers that are stand-ins."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import bench_server
import pytest

from paged_kv.entrypoints.cli import build_parser

# Answers /health as a server, or writes what `vllm bench serve` writes.
STAND_IN = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

options = dict(part.removeprefix("--").split("=", 1) for part in sys.argv if "=" in part)


class Health(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()


if "bench" in sys.argv:
    prompts = Path(options["dataset-path"]).read_text().splitlines()
    count, num_new = int(options["num-prompts"]), int(options["custom-output-len"])
    assert len({json.loads(line)["prompt"] for line in prompts}) == len(prompts) >= count
    result = {
        "output_lens": [num_new] * (count - 1) + [num_new - FEWER],
        "errors": [""] * count,
        "ttfts": [0.5] * (count - 1) + [1.0],
        "itls": [[0.1] * (num_new - 1)] * count,
        "latencies": [1.0] * (count - 1) + [2.5],
        "output_throughput": min(float(options["request-rate"]), 10.0) * num_new,
        "request_throughput": min(float(options["request-rate"]), 10.0),
    }
    Path(options["result-dir"], options["result-filename"]).write_text(json.dumps(result))
else:
    HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Health).serve_forever()
"""


class Offline:
    """As fast as the stand-in, and a quarter more."""

    def __init__(self, load: bench_server.Load, texts: list[str], arguments: object) -> None:
        self._load = load
        assert len(texts) == load.count

    def run(self) -> dict[str, float]:
        rate = 12.5
        return {bench_server.THROUGHPUT: rate * self._load.num_new, bench_server.RATE: rate}

    def close(self) -> None:
        pass


def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fewer: int) -> list[dict]:
    script, output = tmp_path / "stand_in.py", tmp_path / "server.json"
    script.write_text(STAND_IN.replace("FEWER", str(fewer)))
    command = [sys.executable, str(script)]
    monkeypatch.setattr(bench_server, "vllm_command", lambda _: command)
    monkeypatch.setattr(bench_server, "our_command", lambda _: command)
    monkeypatch.setattr(bench_server, "Offline", Offline)
    options = ["--vllm-python", sys.executable, "--quick", "--json", str(output)]
    monkeypatch.setattr("sys.argv", ["bench_server.py", *options])
    bench_server.main()
    return json.loads(output.read_text())["rows"]


def test_servers_are_driven_in_turns(tmp_path, monkeypatch):
    rows = measured(tmp_path, monkeypatch, fewer=0)
    found = {(row["case"], row["metric"]): row for row in rows}
    beside = found["saturated, ours beside offline", bench_server.THROUGHPUT]
    assert (beside["baseline_value"], beside["ratio"]) == (100, 0.8)
    for server in ("ours", "vLLM"):
        assert found[f"saturated, {server}", bench_server.RATE]["value"] == 10
        assert found[f"Poisson, {server}", bench_server.RATE]["value"] == 8  # 80 %
        assert found[f"Poisson, {server}", "first token, median"]["value"] == 500
        assert found[f"Poisson, {server}", bench_server.SPREAD]["value"] == pytest.approx(1)
        assert found[f"Poisson, {server}", bench_server.LONGEST_REQUEST]["value"] == 2.5
    row = found["Poisson, ours", "between tokens, p99"]
    assert (row["baseline"], row["ratio"]) == ("vLLM", 1)
    throughputs = {"saturated, offline": 100, "saturated, ours": 80, "Poisson, ours": 64}
    for case, value in throughputs.items():
        assert found[case, bench_server.THROUGHPUT]["value"] == value
        assert ((case, "between tokens, p99") in found) == ("offline" not in case)


def test_requests_that_end_early_are_no_figures(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match=r"requests ended early: \[8, 8, 8, 7\]"):
        measured(tmp_path, monkeypatch, fewer=1)


def test_a_server_that_ends_is_no_server():
    server = bench_server.Server("nobody", [sys.executable, "-c", "pass"], {}, Path(os.devnull))
    with pytest.raises(RuntimeError, match=r"nobody does not serve: .* -c pass --port"), server:
        pass


def test_a_server_lets_tokens_come_evenly_unless_it_is_told_otherwise():
    parser = build_parser()
    assert parser.parse_args(["serve", "model"]).max_slowdown == 3
    assert parser.parse_args(["serve", "model", "--max-slowdown", "9"]).max_slowdown == 9
    assert parser.parse_args(["generate", "--model", "model"]).max_slowdown is None
