"""The smallest runs of benchmarks meant for real models, on the demo model, in process."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import bench_continuations
import bench_generate_cache
import bench_speculation
import bench_windowed_real
import numpy as np
import pytest
import torch
from quality_windows import STRETCH, stretches

TEXT = Path(__file__).parents[1] / "support" / "data" / "persuasion-excerpt.txt"


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """Text enough for two stretches that nothing is tuned on."""
    path = tmp_path / "book.txt"
    path.write_text(TEXT.read_text(encoding="utf-8") * 8, encoding="utf-8")
    return path


def test_streams_are_measured_and_kept(book, tmp_path, monkeypatch):
    output = tmp_path / "streams.json"
    options = ["--books", str(book), "--json", str(output), "--tokens", "700", "--decoded", "100"]
    options += ["--window", "200", "--stretch", "300"]
    monkeypatch.setattr("sys.argv", ["bench_windowed_real.py", *options])
    bench_windowed_real.main()
    rows = json.loads(output.read_text())["rows"]
    found = {(row["case"], row["metric"]): row["value"] for row in rows}
    for name in bench_windowed_real.CASES:
        whole = found[f"{name}, 700 tokens, 64 a step", "perplexity"]
        parts = [found[f"{name}, at {start}", bench_windowed_real.LOSS] for start in (0, 300, 600)]
        assert np.log(whole) == pytest.approx(np.dot(parts, [3, 3, 1]) / 7)
        held = [found[f"{name}, at {start}", bench_windowed_real.HELD] for start in (0, 300, 600)]
        assert 0 < held[2] <= held[1]  # no more than the window
    held = {n: found[f"{n}, at 300", bench_windowed_real.HELD] for n in bench_windowed_real.CASES}
    assert held["sinks + window, int2"] < held["sinks + window, int8"]
    assert held["sinks + window, int8"] < held["sinks + window, native"]
    assert ("sinks + window, int2, first 100 tokens, 1 a step", "perplexity") in found

    # The same again measures nothing.
    monkeypatch.setattr(bench_windowed_real, "windowed", lambda *_: pytest.fail("again"))
    bench_windowed_real.main()
    assert json.loads(output.read_text())["rows"] == rows


def test_a_stream_has_nothing_that_settings_were_tuned_on():
    class Tokenizer:
        bos_token_id = 7

        @staticmethod
        def encode(text: str, **_: object) -> list[int]:
            return list(range(100, 100 + 3 * STRETCH))

    ids = bench_windowed_real.stream_of([TEXT, TEXT], Tokenizer(), 20)
    reported = list(range(100 + STRETCH, 110 + STRETCH))
    assert ids.tolist() == [7, *reported, *reported]
    with pytest.raises(SystemExit, match=f"has {STRETCH} tokens to report, not 10000"):
        bench_windowed_real.stream_of([TEXT], Tokenizer(), 10_000)


def test_prompts_lie_apart_and_nothing_was_tuned_on_them():
    token_ids = list(range(14 * STRETCH))
    found = bench_continuations.passages("book", token_ids, 10, None)
    assert sorted(len(p.token_ids) for p in found) == sorted(bench_continuations.lengths(10))
    assert {len(p.token_ids) for p in found} >= {500, 3000}
    seen = [token for prompt in found for token in prompt.token_ids]
    assert len(seen) == len(set(seen))
    allowed = {t for part in stretches(token_ids, tuning=False) for t in part[STRETCH // 2 :]}
    assert set(seen) <= allowed
    assert all(prompt.token_ids[0] == prompt.start for prompt in found)
    with pytest.raises(SystemExit, match="too few for 10 prompts"):
        bench_continuations.passages("book", token_ids[: 8 * STRETCH], 10, None)


def test_continuations_are_written_side_by_side(book, tmp_path, monkeypatch):
    output = tmp_path / "continuations.json"
    options = ["--books", str(book), "--json", str(output), "--quick", "--name", "demo"]
    monkeypatch.setattr("sys.argv", ["bench_continuations.py", *options])
    bench_continuations.main()
    rows = json.loads(output.read_text())["rows"]
    repeated, same = "runs of 4 tokens repeated", "continuations as native"
    assert [row["metric"] for row in rows] == [repeated, repeated, "tokens as native", same]
    assert 0 <= rows[2]["value"] <= 8
    text = output.with_suffix(".md").read_text()
    assert "demo, float32, greedy; native, int2" in text
    assert "## 1. book, 500 tokens from 12288 on" in text
    assert text.count("\n**native**: ") == text.count("\n**int2**") == 1


def test_repeated_runs_are_counted():
    assert bench_continuations.repeated_share([1, 2, 3, 4, 5]) == 0
    assert bench_continuations.repeated_share([1, 1, 1, 1, 1, 1]) == pytest.approx(2 / 3)


def test_agreement_ends_at_the_first_other_token():
    assert bench_continuations.num_agreeing([1, 2, 3], [1, 2, 4]) == 2
    assert bench_continuations.num_agreeing([1, 2], [1, 2, 4]) == 2


def test_caches_of_generate_go_in_turns(book, tmp_path, monkeypatch):
    output = tmp_path / "caches.json"
    options = ["--book", str(book), "--json", str(output), "--quick"]
    monkeypatch.setattr("sys.argv", ["bench_generate_cache.py", *options])
    bench_generate_cache.main()
    rows = json.loads(output.read_text())["rows"]
    case = "batch 2, 160 + 4 tokens, "
    found = {(row["case"].removeprefix(case), row["metric"]): row for row in rows}
    held, kl = bench_generate_cache.BYTES, bench_generate_cache.DIVERGENCE
    for kv_format in ("int4", "int2"):
        fused, gather = (f"PagedCache {kv_format}, {route}" for route in ("fused", "gather"))
        assert found[fused, held]["value"] == found[gather, held]["value"]
        assert found[fused, kl]["value"] == pytest.approx(found[gather, kl]["value"], rel=0.2)
    native, int8, int2 = (f"PagedCache {name}, fused" for name in ("native", "int8", "int2"))
    assert found[native, kl]["value"] < found[int8, kl]["value"] < found[int2, kl]["value"]
    beside = found[f"{int8}, beside DynamicCache", held]
    assert beside["ratio"] == pytest.approx(beside["baseline_value"] / beside["value"])
    # Each other cache has its figures, or the reason why it has none.
    for backend, bits in ((backend, bits) for backend in ("quanto", "hqq") for bits in (4, 2)):
        name = bench_generate_cache.peer(backend, bits)
        metrics = {metric for who, metric in found if who == name}
        assert kl in metrics or any(metric.startswith("failed: ") for metric in metrics)


def test_bytes_of_a_cache_are_those_of_all_its_tensors():
    parts = [torch.zeros(3, dtype=torch.uint8), ({"scale": torch.zeros(2)}, "name", None)]
    assert bench_generate_cache.held_bytes(parts) == 3 + 8


def test_a_cache_that_fails_leaves_the_race_and_says_why():
    class Failing:
        def __init__(self, name: str, last: int) -> None:
            self.contestant = SimpleNamespace(name=name)
            self.logits, self.divergences, self.count, self.last = torch.zeros(1, 2), [], 0, last

        def advance(self) -> None:
            self.count += 1
            if self.count == self.last:
                raise RuntimeError("out of luck")

    generations = [Failing("reference", 0), Failing("short", 2), Failing("long", 0)]
    failed = list(bench_generate_cache.race(generations, 3))
    assert [(name, str(error)) for name, error in failed] == [("short", "out of luck")]
    assert [(each.contestant.name, each.count) for each in generations] == [
        ("reference", 4),
        ("long", 4),
    ]
    assert len(generations[1].divergences) == 2


def test_guesses_are_measured_and_change_no_token(tmp_path, monkeypatch):
    output = tmp_path / "speculation.json"
    monkeypatch.setattr("sys.argv", ["bench_speculation.py", "--quick", "--json", str(output)])
    bench_speculation.main()
    rows = json.loads(output.read_text())["rows"]
    found = {(row["case"], row["metric"]): row for row in rows}
    for kv_format in bench_speculation.FORMATS:
        for kind in ("repeating", "going on"):
            case = f"{kv_format}, {kind}, 2 sequences"
            same = found[case, "runs with the same tokens"]
            assert same["value"] == same["baseline_value"] == 4
            decoded = found[case, "decoded"]
            assert decoded["ratio"] == decoded["value"] / decoded["baseline_value"]
        assert found[f"{kv_format}, repeating, 2 sequences", "guesses a token"]["value"] > 0
