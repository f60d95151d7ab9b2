"""`paged-kv eval` and `calibrate`, and calibrations for `generate`, in process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import bench_quality
import pytest

from paged_kv import LLM, SamplingParams
from paged_kv.cache.layer_formats import resolve_formats
from paged_kv.cache.layer_groups import block_bytes
from paged_kv.cache.layer_spec import usual_kv_dtype
from paged_kv.entrypoints import quality_cli
from paged_kv.entrypoints.cli import main
from paged_kv.entrypoints.demo import MODEL_FOLDER
from paged_kv.entrypoints.kept_results import KeptResults
from paged_kv.models.cost import probe_layers

TEXT = Path(__file__).parents[1] / "support" / "data" / "persuasion-excerpt.txt"


def evaluate(*options: str) -> int:
    command = ["eval", str(MODEL_FOLDER), "--text", str(TEXT), "--windows", "2", "--length", "400"]
    return main([*command, "--no-recall", "--tokens-per-step", "50", *options])


def test_formats_are_measured_and_kept(tmp_path, capsys, monkeypatch):
    output = tmp_path / "quality.json"
    assert evaluate("--formats", "int8", "int2", "--json", str(output)) == 0
    table = capsys.readouterr().out
    assert "2 windows of 400 tokens" in table
    rows = json.loads(output.read_text())["rows"]
    assert [row["format"] for row in rows] == ["native", "int8", "int2"]
    native, int8, int2 = rows
    assert native["KL mnat"] == 0
    assert 0 < int8["KL mnat"] < int2["KL mnat"]
    assert int2["B/token"] < int8["B/token"] < native["B/token"]
    assert int2["B/token"] < int2["held"]

    # The same again measures nothing; a further format is measured alone.
    assert len(KeptResults(output)._results) == 6
    monkeypatch.setattr(
        "paged_kv.entrypoints.evaluation.compare_formats", lambda *_, **__: pytest.fail("again")
    )
    assert evaluate("--formats", "int8", "int2", "--json", str(output)) == 0
    assert json.loads(output.read_text())["rows"] == rows


def test_pairs_are_recalled(tmp_path):
    output = tmp_path / "quality.json"
    command = ["eval", str(MODEL_FOLDER), "--text", str(TEXT), "--windows", "1", "--length", "64"]
    assert main([*command, "--formats", "int8", "--json", str(output)]) == 0
    assert all(0 <= row["recall"] <= 3 for row in json.loads(output.read_text())["rows"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--formats", "int5"), "unknown KV format 'int5'"),
        (("--windows", "0"), "--windows 0 is too few"),
        (("--length", "1"), "--length 1 is too few"),
        (("--text", "missing.txt"), "cannot read 'missing.txt'"),
        (("--length", "1000000"), "windows may have at most 1024 tokens, got 1000000"),
        (("--calibration", "missing"), "no calibration can be read from 'missing'"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message, capsys):
    assert evaluate(*options) == 2
    assert message in capsys.readouterr().err


def test_a_calibration_goes_from_one_command_to_the_others(tmp_path, capsys):
    file = tmp_path / "demo.safetensors"
    model = str(MODEL_FOLDER)
    for dtype in ("float32", "bfloat16"):
        options = ["--text", str(TEXT), "--dtype", dtype, "--output", f"{file}-{dtype}"]
        assert main(["calibrate", model, *options]) == 0
    assert evaluate("--formats", "int2", "--calibration", f"{file}-float32") == 0
    file = Path(f"{file}-bfloat16")
    options = ["--kv-format", "int2", "--calibration", str(file), "--kv-dtype", "float16"]
    options += ["--dtype", "bfloat16"]
    assert main(["generate", "--model", model, "--max-tokens", "4", *options, "She had"]) == 0
    assert capsys.readouterr().out.strip()
    file.write_bytes(b"nothing")
    assert main(["generate", "--model", model, *options, "She had"]) == 2
    assert "no calibration can be read" in capsys.readouterr().err


def test_the_benchmark_goes_on_where_it_was(tmp_path, monkeypatch):
    """Ours and a peer's, emulated; then ours by the library itself, in the same file."""
    output = tmp_path / "quality.json"
    options = ["--books", str(TEXT), "--tuning", "--windows", "1", "--json", str(output)]
    options += ["--model", str(MODEL_FOLDER), "--lengths", "290", "--no-recall"]

    def rows(*more: str) -> dict[tuple[str, str], float]:
        monkeypatch.setattr("sys.argv", ["bench_quality.py", *options, *more])
        bench_quality.main()
        return {
            (r["case"], r["metric"]): r["value"] for r in json.loads(output.read_text())["rows"]
        }

    cases = "--cases", "int8", "KIVI-2"
    first = rows(*cases)
    place = "persuasion-excerpt, 1 x 290 tokens"
    ours, theirs = (first[f"{name}, {place}", "KL from native"] for name in cases[1:])
    assert 0 < ours < theirs
    assert first["KIVI-2", "bytes of a token and kv head"] == 48
    decoded = rows("--check", "--cases", "int8")
    found = decoded[f"int8, {place}", "KL from native"]
    assert found == pytest.approx(ours, rel=0.02)
    monkeypatch.setattr(
        bench_quality.ParallelModel, "hidden_states", lambda *_: pytest.fail("again")
    )
    assert rows(*cases) == first


def test_the_benchmark_knows_no_other_case(tmp_path, monkeypatch):
    options = ["--books", str(TEXT), "--model", str(MODEL_FOLDER), "--tuning", "--lengths", "290"]
    monkeypatch.setattr("sys.argv", ["bench_quality.py", *options, "--cases", "int5"])
    with pytest.raises(SystemExit, match="no case int5; there are int8, "):
        bench_quality.main()


def divergence_of(kv_format: str, told: str) -> float:
    (line,) = [line for line in told.splitlines() if line.startswith(f"{kv_format} in all layers")]
    return float(line.split()[-2])


@pytest.mark.parametrize("formats", [("int8", "int4"), ("int2", "int2-long")])
def test_what_is_printed_has_blocks_as_large_as_what_was_measured(tmp_path, capsys, formats):
    """All layers alike in one whose own blocks are smaller, and take more bytes a token."""
    options = ["--output", str(tmp_path / "found"), "--tokens", "300", "--formats", *formats]
    budget = {"int8": "1320", "int2": "400"}[formats[0]]
    assert main(["calibrate", str(MODEL_FOLDER), *options, "--budget", budget]) == 0
    printed = capsys.readouterr().out.strip()
    assert main(["info", str(MODEL_FOLDER), "--kv-format", printed]) == 0
    table = capsys.readouterr().out
    (row,) = [line for line in table.splitlines() if line.count("│") > 3][-1:]
    assert int(row.split("│")[2]) <= int(budget)


def test_too_few_tokens_to_seal_anything_are_refused(tmp_path, capsys):
    options = ["--output", str(tmp_path / "found"), "--tokens", "150", "--budget", "900"]
    assert main(["calibrate", str(MODEL_FOLDER), *options]) == 2
    assert (
        "150 tokens say too little of int2-long, whose blocks hold 128" in capsys.readouterr().err
    )
    assert not (tmp_path / "found").exists()


@pytest.mark.parametrize(
    "command",
    [
        ("eval", "--json", "no/where.json"),
        ("eval", "--json", "folder"),
        ("calibrate", "--output", "no/where"),
        ("calibrate", "--output", "folder"),
        ("eval", "--text", "empty"),
        ("calibrate", "--output", "found", "--text", "empty"),
    ],
)
def test_files_that_cannot_be_are_named_before_a_model_is_loaded(
    tmp_path, monkeypatch, capsys, command
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").write_text(" \n")
    monkeypatch.setattr(quality_cli, "load", lambda *_, **__: pytest.fail("loaded"))
    name, *options = command
    assert main([name, str(MODEL_FOLDER), *options]) == 2
    assert repr(options[-1]) in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "folder"]


def test_formats_are_chosen_within_a_budget(tmp_path, capsys):
    """What is printed can be given to --kv-format, and takes no more than it may."""
    layers, dtype = probe_layers(MODEL_FOLDER)

    def token_bytes(kv_format: str) -> float:
        formats = resolve_formats(kv_format).of(len(layers))
        specs = [replace(layer, kv_format=f) for layer, f in zip(layers, formats, strict=True)]
        return block_bytes(specs, usual_kv_dtype(specs, dtype)) / formats[0].block_size

    budget = str(int((token_bytes("int8") + token_bytes("int2")) / 2))
    options = ["--output", str(tmp_path / "found"), "--tokens", "200", "--formats", "int8", "int2"]
    assert main(["calibrate", str(MODEL_FOLDER), *options, "--budget", budget]) == 0
    printed = capsys.readouterr()
    formats = resolve_formats(printed.out.strip()).of(len(layers))
    assert {each.name for each in formats} == {"int2", "int8"}
    assert token_bytes(printed.out.strip()) <= int(budget)
    assert f"of {budget} bytes a token" in printed.err
    assert "int8 in all layers" in printed.err
    assert divergence_of("int8", printed.err) < 0.2 * divergence_of("int2", printed.err)
    with LLM(MODEL_FOLDER, kv_format=printed.out.strip(), calibration=tmp_path / "found") as llm:
        assert llm.generate("It is", SamplingParams(max_tokens=3))[0].token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--budget", "100"), "a budget of 100 bytes a token is less than"),
        (("--budget", "many"), "--budget must be bytes"),
        (("--budget", "900", "--formats", "int5"), "unknown KV format 'int5'"),
        (("--budget", "900", "--tokens", "1"), "--tokens 1 is too few"),
        (("--tokens", "300"), "--tokens needs a --budget"),
        (("--formats", "int8"), "--formats needs a --budget"),
    ],
)
def test_a_budget_that_cannot_be_is_refused_before_anything_is_measured(
    tmp_path, capsys, options, message
):
    output = tmp_path / "found"
    assert main(["calibrate", str(MODEL_FOLDER), "--output", str(output), *options]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()
