"""The examples run as they stand, and need no more than they say."""

from __future__ import annotations

import json
import os
import random
import re
import runpy
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from functools import cache
from pathlib import Path

import pytest

from paged_kv import LLM

EXAMPLES = Path(__file__).parent.parent / "examples"
SERVER = ("fastapi", "uvicorn", "openai")
FORBIDDEN = {
    "best_of_n": SERVER,
    "blocks_only": ("torch", "transformers"),
    "chat_server": (),
    "embed": ("transformers", "rich"),
    "endless_chat": SERVER,
    "prefill_elsewhere": SERVER,
    "summarise_folder": SERVER,
    "watch_log": SERVER,
}
ARGUMENTS = {"endless_chat": ("20",)}
RUN_BELOW = "summarise_folder"  # on texts of its own
WORDS = "the captain saw a ship and no land that day"
MOST_LINES = 60
SECONDS = 120.0
OF_EXAMPLE = {name: pytest.mark.xdist_group(f"example {name}") for name in FORBIDDEN}  # runs once


def started(name: str, *arguments: str, folder: Path | None = None) -> subprocess.Popen[str]:
    """An example in a process. It must import nothing of what it says it does without."""
    script = f"import runpy, sys; sys.argv[1:] = {arguments!r}\n"
    script += f"runpy.run_path({str(EXAMPLES / name)!r} + '.py', run_name='__main__')\n"
    script += f"assert not set(sys.modules) & {set(FORBIDDEN[name])!r}, sys.modules\n"
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
    )


def finished(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output


@cache
def output_of(name: str) -> str:
    """What an example prints."""
    return finished(started(name, *ARGUMENTS.get(name, ())))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=OF_EXAMPLE[name]) for name in sorted(set(FORBIDDEN) - {RUN_BELOW})],
)
def test_example_runs_and_imports_only_what_it_says(name: str) -> None:
    assert output_of(name)


def test_every_example_is_tested_and_told_of() -> None:
    told = (EXAMPLES.parent / "docs" / "examples.md").read_text()
    for path in EXAMPLES.glob("*.py"):
        assert path.stem in FORBIDDEN
        assert f"python examples/{path.name}" in told
        assert f"\n    python examples/{path.name}" in path.read_text() or path.stem == "watch_log"


@pytest.mark.parametrize("name", sorted(FORBIDDEN))
def test_examples_are_short(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < MOST_LINES


@OF_EXAMPLE["embed"]
def test_the_serving_loop_shares_its_prefix() -> None:
    output = output_of("embed").splitlines()
    assert sum(line.startswith("request ") for line in output) == 12
    assert "41 steps; 2860 of 3720 prompt tokens came from shared blocks" in output[-1]


@OF_EXAMPLE["blocks_only"]
def test_the_manager_alone_prints_what_it_promises() -> None:
    output = output_of("blocks_only").splitlines()
    assert output[2] == "computed already: 448 tokens"
    assert output[-1] == "free again: 64 of 64"


@OF_EXAMPLE["endless_chat"]
def test_the_chat_outlives_the_models_length_in_constant_memory() -> None:
    *turns, last = output_of("endless_chat").splitlines()
    lengths = [int(turn.split()[0].strip("[")) for turn in turns]
    assert lengths[-1] > 1200
    held = [int(turn.split()[2]) for turn in turns]
    assert max(held[10:]) <= max(held[:10]) + 1
    assert last == f"at most {max(held)} KiB; the model was trained on 1024 tokens"


@OF_EXAMPLE["best_of_n"]
def test_samples_of_all_questions_share_the_blocks_of_what_comes_before() -> None:
    *answers, last = output_of("best_of_n").splitlines()
    assert sum(" of 8: " in line for line in answers) == 4
    assert sum("likeliest, -" in line for line in answers) == 4
    held, alone = map(int, re.findall(r"\d+", last))
    assert held * 4 < alone


@OF_EXAMPLE["prefill_elsewhere"]
def test_a_prompt_goes_on_in_another_process_as_in_one() -> None:
    moved, *text, last = output_of("prefill_elsewhere").splitlines()
    assert re.fullmatch(r"\d+ tokens came as \d+ bytes each", moved)
    assert any(text)
    assert last == "the same as alone: True"


@OF_EXAMPLE["chat_server"]
def test_the_server_streams_answers_to_all_who_talk_to_it() -> None:
    serving, *lines = output_of("chat_server").splitlines()
    assert re.fullmatch(r"serving at http://127\.0\.0\.1:\d+/v1", serving)
    pieces = [int(count) for count in re.findall(r"\[(\d+) pieces\]$", "\n".join(lines), re.M)]
    assert len(pieces) == 4
    assert min(pieces) > 1


@OF_EXAMPLE["watch_log"]
def test_the_watcher_finds_every_fault_and_nothing_else_in_constant_memory() -> None:
    output = output_of("watch_log")
    assert re.findall(r"^line (\d+):", output, re.M) == ["71", "171", "271"]
    lines, tokens, held = zip(
        *re.findall(r"^\[(\d+) lines, (\d+) tokens; (\d+) bytes held\]$", output, re.M), strict=True
    )
    assert lines == ("100", "200", "300")
    assert int(tokens[0]) > 1000  # of which 544 are kept
    assert max(map(int, held[1:])) <= 1.2 * int(held[0])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("endless_chat", ("abc",), "argument turns: invalid int value: 'abc'"),
        ("best_of_n", ("--examples", "MISSING"), "No such file or directory: 'MISSING'"),
        ("best_of_n", ("--n", "0"), "n must be from 1 to 65536, got 0"),
        ("best_of_n", ("--model", "./MISSING"), "no model folder at './MISSING'"),
        ("summarise_folder", ("MISSING",), "No such file or directory: 'MISSING'"),
        ("summarise_folder", (__file__,), "Not a directory"),
        ("watch_log", ("--model", "./MISSING"), "./MISSING"),
        ("chat_server", ("--port", "TAKEN"), "Address already in use"),
        ("chat_server", ("--port", "70000"), "--port 70000 is none from 0 to 65535"),
    ],
)
def test_wrong_arguments_are_one_line_before_anything_is_loaded(
    name: str,
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if "MISSING" not in arguments[-1]:  # what is no model is only found by looking for it
        monkeypatch.setattr(LLM, "__init__", lambda *_, **__: pytest.fail("it was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        words = [port if word == "TAKEN" else word for word in arguments]
        monkeypatch.setattr("sys.argv", [f"{name}.py", *words])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr()
    last = ended.value.code if isinstance(ended.value.code, str) else printed.err
    assert message in last.splitlines()[-1]
    assert last.startswith((f"{name}.py: ", "usage: "))
    assert not printed.out


# -- summaries, and a kill in between --------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of several pieces, of one, of none, and one that is no text."""
    folder = tmp_path_factory.mktemp("texts")
    words = random.Random(0).choices(WORDS.split(), k=3000)
    (folder / "a long one.txt").write_text(" ".join(words[:1800]))
    (folder / "another.txt").write_text(" ".join(words[1800:]))
    (folder / "empty.txt").write_text("")
    (folder / "letter.md").write_text("Dear Jane, the ship is at Bath, and I am glad.")
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder


def kept_answers(folder: Path) -> dict[str, str]:
    with closing(sqlite3.connect(folder / "summaries.sqlite")) as kept:
        try:
            return dict(kept.execute("SELECT asked, text FROM answers"))
        except sqlite3.OperationalError:  # it has not begun
            return {}


def summarising(texts: Path, folder: Path) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    return started(RUN_BELOW, str(texts), "--kv-format", "native", folder=folder)


def test_a_killed_summary_of_a_folder_goes_on_as_if_undisturbed(texts: Path, tmp_path: Path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    output = finished(summarising(texts, undisturbed))
    results = {result["file"]: result for result in map(json.loads, output.splitlines())}
    assert list(results) == sorted(path.name for path in texts.iterdir())
    assert "decode" in results.pop("picture.png")["error"]
    assert results.pop("empty.txt")["summary"] == ""
    assert all(result["summary"] for result in results.values())

    answers = kept_answers(undisturbed)
    assert len(answers) >= 8
    number = random.randrange(1, len(answers))
    process = summarising(texts, killed)
    give_up = time.monotonic() + SECONDS
    while len(kept_answers(killed)) < number and process.poll() is None:
        assert time.monotonic() < give_up
        time.sleep(0.002)
    process.kill()
    process.communicate()
    before = kept_answers(killed)
    assert len(before) >= number
    assert before.items() <= answers.items()
    assert finished(summarising(texts, killed)) == output
    assert kept_answers(killed) == answers
