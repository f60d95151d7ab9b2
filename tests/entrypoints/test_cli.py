"""The command line, run in process on the demo model."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from transformers import Gemma3TextConfig, GptOssConfig

import paged_kv
from paged_kv.entrypoints.cli import main

FAST = ["--max-tokens", "8"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    exit_code = main(arguments)
    captured = capsys.readouterr()
    return exit_code, captured.out, captured.err


def write_lines(path: Path, *lines: object) -> str:
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text) + "\n")
    return str(path)


@pytest.mark.parametrize("command", [[], ["generate"], ["chat"], ["demo"], ["info"]])
def test_help_names_every_option_and_ends(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    assert "usage: paged-kv" in capsys.readouterr().out


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"paged-kv {paged_kv.__version__}\n"


def test_max_tokens_none_is_as_many_as_fit(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    target = tmp_path / "out.jsonl"
    options = ["--max-tokens", "none", "--max-model-len", "300", "--ignore-eos"]
    code, _, err = run(capsys, "generate", "It was", *options, "--output", str(target))
    assert (code, err) == (0, "")
    assert json.loads(target.read_text())["num_tokens"] > 280
    with pytest.raises(SystemExit) as ended:
        main(["generate", "x", "--max-tokens", "some"])
    assert ended.value.code == 2


def test_one_prompt_is_streamed_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "generate", "It was a", *FAST)
    assert code == 0
    assert out.strip()
    assert err == ""


def test_many_prompts_keep_their_order(capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["The captain", "Her sister", "The doctor"]
    code, out, _ = run(capsys, "generate", *prompts, *FAST)
    assert code == 0
    positions = [out.index(prompt) for prompt in prompts]
    assert positions == sorted(positions)


def test_standard_input_gives_one_prompt_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("The captain\n\nHer sister\n"))
    code, out, _ = run(capsys, "generate", *FAST)
    assert code == 0
    assert "The captain" in out
    assert "Her sister" in out


def test_jsonl_serves_good_lines_and_reports_bad_ones_in_order(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = write_lines(
        tmp_path / "in.jsonl",
        {"id": "a", "prompt": "The captain", "max_tokens": 3, "ignore_eos": True},
        "this is not JSON",
        {"id": "b", "prompt": ""},
        {"id": "c", "prompt": [5, 6, 7], "temperature": 0.5, "seed": 1},
        {"id": "d", "prompt": "x", "temperature": -1},
        {"id": "e", "prompt": "x", "colour": "red"},
        {"id": "f"},
        {"id": "g", "messages": [{"role": "user", "content": "hello"}]},
        {"id": "h", "prompt": [10**9]},
        {"id": "i", "prompt": "x", "max_tokens": "many"},
        {"id": "k", "prompt": "x", "n": 1.5},
        {"id": "l", "prompt": "x", "stop_token_ids": ["a"]},
        {"id": "m", "prompt": "x", "stop": ["a", 5]},
        '{"id": "o", "prompt": [' + "9" * 5000 + "]}",
        {"id": "j", "prompt": "The doctor", "n": 2, "temperature": 1.0},
    )
    target = tmp_path / "out.jsonl"
    code, out, err = run(capsys, "generate", "--input", source, "--output", str(target), *FAST)
    results = [json.loads(line) for line in target.read_text().splitlines()]
    assert code == 1
    assert out == ""
    assert [r.get("id") for r in results] == ["a", None, *"bcdefghiklm", None, "j"]
    served = [r.get("id") for r in results if "error" not in r]
    assert served == ["a", "c", "g", "j"]
    assert results[0]["num_tokens"] == 3
    assert len(results[-1]["completions"]) == 2
    errors = {r.get("id"): r["error"] for r in results if "error" in r}
    assert "not JSON" in errors[None]
    assert "1.5" in errors["k"]
    assert "'a'" in errors["l"]
    assert "5" in errors["m"]
    assert "empty" in errors["b"]
    assert "-1" in errors["d"]
    assert "colour" in errors["e"]
    assert "messages" in errors["f"]
    assert str(10**9) in errors["h"]
    assert err.count("paged-kv: request") == len(results) - len(served)


def test_jsonl_equals_one_prompt_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "The captain"}, {"prompt": "A lady"})
    native = ["--kv-format", "native", *FAST]
    _, out, _ = run(capsys, "generate", "--input", source, *native)
    together = [json.loads(line)["text"] for line in out.splitlines()]
    alone = [run(capsys, "generate", p, *native)[1] for p in ("The captain", "A lady")]
    assert [text + "\n" for text in together] == alone


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["generate", "x", "--kv-format", "int5"], "int3"),
        (["generate", "x", "--temperature", "-0.5"], "-0.5"),
        (["generate", "x", "--model", "/no/such/model"], "/no/such/model"),
        (["generate", "x", "--kv-memory", "lots"], "lots"),
        (["generate", "x", "--num-blocks", "2"], "blocks"),
        (["generate", "--input", "/no/such/file"], "/no/such/file"),
        (["generate", "x", "--input", "y"], "not both"),
        (["generate", "--chat", "--input", "y"], "messages"),
        (["generate", "x", "--output", "/no/such/folder/file"], "/no/such/folder/file"),
        (["generate", "x", "--device", "nonsense"], "nonsense"),
        (["info", "/no/such/model"], "/no/such/model"),
        (["info", "--memory", "0"], "0"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("paged-kv: ")
    assert named in err
    assert "Traceback" not in err


def test_info_counts_tokens_in_memory(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "info", "--memory", "2560000")
    assert code == 0
    assert "native" in out
    assert "1,000" in out  # 5 layers * 2 heads * 128 elements * 2 bytes = 2560 bytes a token


def test_info_tells_what_kinds_of_layers_hold(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shape = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    config = Gemma3TextConfig(num_hidden_layers=26, vocab_size=99, dtype="bfloat16", **shape)
    config.save_pretrained(tmp_path)
    code, out, _ = run(capsys, "info", str(tmp_path))
    assert code == 0
    rows = {line.split("│")[1].strip(): line.split("│") for line in out.splitlines() if "│" in line}
    assert [rows[name][2].strip() for name in ("all tokens", "the last 4096", "together")] == [
        "4", "22", "26"
    ]  # fmt: skip
    # Native blocks of 16 tokens, 128 bytes a token and layer: 4 layers, and 6 groups of 4.
    assert [rows["all tokens"][place].strip() for place in (3, 5)] == ["512", "4 MiB"]
    assert rows["the last 4096"][3].strip() == "3072"
    assert rows["the last 4096"][6].strip() == rows["the last 4096"][7].strip() == "12 MiB"


def test_info_knows_models_of_experts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """gpt-oss in float32, whose layers keep all or the last 128 tokens in turn."""
    shape = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    config = GptOssConfig(
        num_hidden_layers=4, vocab_size=99, num_local_experts=2, num_experts_per_tok=1, **shape
    )
    config.save_pretrained(tmp_path)
    code, out, _ = run(capsys, "info", str(tmp_path))
    assert code == 0
    assert "the last 128" in out
    native = next(line for line in out.splitlines() if line.startswith("│ native"))
    held = next(line for line in out.splitlines() if line.startswith("│ together"))
    assert "16.1 MiB" in held  # of 32K tokens: 2 layers of 4, 256 bytes a token, and a little
    assert int(native.split("│")[-2].replace(",", "")) > 1.9 * 8 * 2**30 / (4 * 256)


def test_info_tells_of_formats_by_layer(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "info", "--kv-format", "int2,-1=native")
    assert code == 0
    rows = {line.split("│")[1].strip(): line for line in out.splitlines() if line.count("│") > 3}
    sizes = {name: int(row.split("│")[2]) for name, row in rows.items() if name != "KV format"}
    assert sizes["int2,4=native"] == pytest.approx(0.8 * sizes["int2"] + 0.2 * 2560, abs=1)
    code, _, err = run(capsys, "info", "--kv-format", "int2,9=native")
    assert code == 2
    assert "names layer 9 of a model that stores 5 layers" in err


def test_demo_prints_a_row_for_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "demo", "--max-tokens", "6")
    assert code == 0
    for name in ("native", "int8", "int4", "int2"):
        assert name in out


def test_a_demo_of_more_tokens_than_the_model_has_places_for_is_refused(capsys):
    code, out, err = run(capsys, "demo", "--max-tokens", "100000")
    assert (code, out) == (2, "")
    assert "--max-tokens must be at most 960, got 100000" in err


def test_a_window_makes_streams(capsys: pytest.CaptureFixture[str]) -> None:
    """Beyond the length that the model is given, with and without a number of sinks."""
    options = ["--max-model-len", "64", "--max-tokens", "200", "--ignore-eos", "--kv-format"]
    for window in (["--window", "48"], ["--sinks", "4", "--window", "48"]):
        assert main(["generate", "It was", *options, "native", *window]) == 0
        assert len(capsys.readouterr().out) > 300
    assert main(["generate", "It was", "--sinks", "4"]) == 2
    assert "--sinks 4 needs --window" in capsys.readouterr().err
    assert main(["generate", "It was", "--window", "3"]) == 2
    assert "window_size must be at least a block of 64 tokens, got 3" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["generate", "--model", "", "a"], ["info", ""]])
def test_an_empty_model_name_does_not_mean_the_demo_model(capsys, command) -> None:
    assert main(command) == 2
    assert "''" in capsys.readouterr().err
