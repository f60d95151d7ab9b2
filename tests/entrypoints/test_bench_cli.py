"""`paged-kv bench`, every kind on the demo model in its smallest run, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from paged_kv.benchmarks import report
from paged_kv.benchmarks.report import Row
from paged_kv.entrypoints.cli import main

FIELDS = ["benchmark", "command", "commit", "device", "versions", "rows"]
TEXT = Path(__file__).parents[1] / "support" / "data" / "persuasion-excerpt.txt"


@pytest.fixture
def bench(tmp_path, capsys):
    """Runs a command; its rows by case and metric, and what it printed."""

    def run(*words: str) -> tuple[dict[tuple[str, str], Row], str]:
        output = tmp_path / "rows.json"
        command = ["bench", *words, "--quick", "--json", str(output)]
        assert main(command) == 0
        printed = capsys.readouterr().out
        written = json.loads(output.read_text())
        assert list(written) == FIELDS
        assert written["benchmark"] == words[0]
        assert written["command"].startswith(f"paged-kv bench {words[0]}")
        assert f"again: {written['command']}" in printed
        assert written["versions"]["torch"]
        rows = [Row(**row) for row in written["rows"]]
        for row in rows:
            assert row.ratio is None or row.baseline is not None
        return {(row.case, row.metric): row for row in rows}, printed

    return run


def test_throughput_at_a_fixed_budget(bench):
    rows, printed = bench(
        *("throughput", "--workload", "fixed", "--native-sequences", "4", "--requests", "9"),
        *("--formats", "native", "int8", "--max-ttft", "60000", "--threads", "1"),
    )
    assert "9 requests, all at once; inputs 160 tokens on average" in printed
    native, int8 = (rows[f"fixed, {n}", "sequences at once, most"] for n in ("native", "int8"))
    assert native.value <= 5  # four of them when they end
    assert int8.value > native.value
    assert int8.ratio == int8.value / native.value
    held = rows["fixed, native", "peak KV"].value
    assert held < 0.1 + float(printed.partition(" MiB of K/V")[0].split()[-1])
    assert rows["fixed, int8", "requests that keep the limits"].value == 100
    assert rows["fixed, int8", "output tokens"].value > 0


def test_latency_of_arrivals(bench, tmp_path):
    trace = tmp_path / "trace.jsonl"
    lines = [{"timestamp": 5 * n, "input_length": 20, "output_length": 3} for n in range(4)]
    trace.write_text("\n".join(map(json.dumps, lines)))
    rows, printed = bench("latency", "--workload", str(trace), "--formats", "int8")
    assert "4 requests, the last after 0.0 s" in printed
    for metric in ("time to first token", "between tokens"):
        found = [rows[f"{trace}, int8", f"{metric}, p{p}"].value for p in (50, 90, 99)]
        assert found == sorted(found)
        assert found[0] > 0
    _, printed = bench("latency", "--workload", "shared", "--rate", "100", "--formats", "int8")
    assert "shared tokens, then inputs median" in printed


def test_memory_and_its_bound(bench):
    rows, _ = bench("memory", "--formats", "native", "int8", "int2")
    assert {case for case, _ in rows} == {
        f"{n} tokens, {name}" for n in (96, 160) for name in ("native", "int8", "int2")
    }
    for (case, metric), row in rows.items():
        if metric == "held":
            assert row.value == rows[case, "held, by arithmetic"].value


def test_quality(bench):
    rows, _ = bench("quality", "--formats", "int8", "int2", "--text", str(TEXT))
    assert rows["native", "KL mnat"].value == 0
    assert 0 < rows["int8", "KL mnat"].value < rows["int2", "KL mnat"].value
    size = rows["int2", "B/token"]
    assert size.ratio == pytest.approx(size.baseline_value / size.value)


def test_attention(bench):
    pytest.importorskip("numba")
    rows, _ = bench("attention", "--cases", "call", "append", "--formats", "int8", "--threads", "1")
    beside = {row.baseline for row in rows.values()}
    assert {"torch backend"} <= beside
    assert any(case.startswith("append 8 sequences, int8") for case, _ in rows)


def test_manager(bench, monkeypatch):
    monkeypatch.setattr("paged_kv.benchmarks.manager.sizes_of", lambda is_quick: (8, 16))
    monkeypatch.setattr("paged_kv.benchmarks.manager.ADMITTED", 4)
    rows, _ = bench("manager")
    assert rows["16 running requests", "schedule + update"].value > 0
    assert rows["8 to 16 running requests", "growth of schedule + update"].value > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("throughput", "--workload", "nothing"), "--workload 'nothing' is none of fixed, "),
        (("throughput", "--workload", "missing.jsonl"), "cannot read 'missing.jsonl'"),
        (("throughput", "--requests", "0"), "--requests must be at least 1, got 0"),
        (("throughput", "--repeats", "-1"), "--repeats must be at least 1, got -1"),
        (("throughput", "--input-sigma", "-2"), "--input-sigma must be at least 0"),
        (("throughput", "--output-median", "nan"), "--output-median must be above 0"),
        (("throughput", "--formats", "int5"), "unknown KV format 'int5'"),
        (("throughput", "--kv-memory", "much"), "--kv-memory must be bytes"),
        (
            ("throughput", "--kv-memory", "1GiB", "--native-sequences", "8"),
            "give --native-sequences or --kv-memory, not both",
        ),
        *(
            (
                ("throughput", "--workload", "a.jsonl", option, value),
                f"{option} is for workloads that are drawn, not traces",
            )
            for option, value in (
                *(("--max-input", "8"), ("--max-output", "8"), ("--shared-tokens", "0")),
                *(("--input-median", "9"), ("--input-sigma", "0"), ("--output-sigma", "0.0")),
            )
        ),
        (("latency", "--rate", "0"), "--rate must be above 0"),
        (("memory", "--lengths", "5000"), "--lengths may be at most 1022"),
        (("attention", "--cases", "none"), "--cases 'none' is no part of any of 4x512 8/2 64, "),
        (("attention", "--cases", "call,append"), "--cases 'call,append' is no part of any of"),
        (("attention", "--formats", "int8", "int5"), "--formats 'int5' is no part of any of nat"),
        (("attention", "--formats", "native,int8"), "--formats 'native,int8' is no part of any"),
        (("attention", "--formats", ""), "--formats '' is no part of any of native fp32, "),
        (("throughput", "--formats", "native,int8"), "kv_format 'native,int8' must be a format"),
        (("attention", "--patience", "0"), "--patience must be above 0 seconds, got 0"),
        (("manager", "--json", "missing/rows.json"), "missing/rows.json': No such file or dir"),
        (("manager", "--json", ""), "cannot write '.': it is a folder"),
        (("manager", "--json", "/"), "cannot write '/': it is a folder"),
        (("manager", "--json", "x" * 300), "File name too long"),
        (("manager", "--plot", "picture.png"), "pip install 'paged-kv[plot]'"),
    ],
)
def test_what_cannot_be_is_refused(words, message, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    if "5000" not in words:  # the model's length has to be known
        monkeypatch.setattr("paged_kv.benchmarks.manager.manager_rows", pytest.fail)
    assert main(["bench", *words, "--quick"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"input_length": 2, "timestamp": 1}', '"output_length" must be a number of tokens'),
        (b'{"input_length": 2, "output_length": 1, "timestmap": 3}', 'it has no "timestamp", and'),
        (b'{"input_length": 2, "output_length": 1, "timestamp": 1e300}', "at most 10000000000"),
        (b'{"prompt": "caf\xe9", "output_length": 1, "timestamp": 1}', "it is not UTF-8"),
        (b"{'prompt': 1}", "it is no JSON: "),
    ],
)
def test_a_wrong_line_of_a_trace_is_named(line, message, tmp_path, capsys):
    trace = tmp_path / "trace.jsonl"
    trace.write_bytes(b'{"timestamp": 0, "input_length": 2, "output_length": 1}\n' + line)
    assert main(["bench", "latency", "--workload", str(trace), "--quick"]) == 2
    said = capsys.readouterr().err
    assert "line 2 of the trace" in said
    assert message in said


def test_requests_too_long_for_the_model_are_refused(capsys):
    assert main(["bench", "throughput", "--quick", "--input-median", "2000"]) == 2
    assert "the model's sequences have at most 1024" in capsys.readouterr().err


def test_pictures_show_values_beside_bars(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "held.svg"
    assert main(["bench", "memory", "--quick", "--plot", str(picture)]) == 0
    assert picture.read_text().count("<svg") == 1


# -- reports --------------------------------------------------------------------------------------


def test_commands_do_not_spell_out_folders(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/somebody"))
    words = ["paged-kv", str(tmp_path / "a b"), "/home/somebody/models/x y", "/tmp/c"]
    assert report.command_of(words) == "paged-kv 'a b' ~/'models/x y' /tmp/c"


def test_the_commit_of_an_installed_package_is_its_version(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "version", lambda name: "1.2")
    assert report.commit() == "version 1.2"
