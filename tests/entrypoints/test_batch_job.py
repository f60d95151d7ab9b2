"""Jobs on a small model: failing steps, full disks, signals, and that resuming changes nothing."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from paged_kv import Completion, PagedKVError, RequestOutput, TokenLogprob
from paged_kv.entrypoints import cli
from paged_kv.entrypoints.batch_job import result_body
from paged_kv.entrypoints.result_file import ResultFile
from tests.support.batch_jobs import random_requests
from tests.support.small_llm import MODEL_LEN, raise_once

OPTIONS = ("--temperature", "1", "--seed", "5", "--ignore-eos")
REQUESTS = random_requests(12, seed=1)

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def llm(make_llm, monkeypatch) -> Any:
    """The model of every job of a test."""
    llm = make_llm(max_num_seqs=4)
    monkeypatch.setattr(cli, "load_llm", lambda arguments: nullcontext(llm))
    return llm


@pytest.fixture
def source(tmp_path: Path) -> Path:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(request) + "\n" for request in REQUESTS))
    return source


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture
def run(llm, source, output, capsys) -> Run:
    def run(*options: str) -> tuple[int, str]:
        files = ("--input", str(source), "--output", str(output))
        code = cli.main(("generate", *files, *OPTIONS, *options))
        captured = capsys.readouterr()
        assert captured.out == ""
        return code, captured.err

    return run


def read(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text().splitlines()]


def part_of(output: Path) -> Path:
    return output.with_name(output.name + ".part")


def after_results(count: int, action: Callable[[], None], monkeypatch) -> None:
    """Do something once so many results are kept."""
    add = ResultFile.add
    kept: list[int] = []

    def counting(self: ResultFile, index: int, result: dict[str, Any]) -> None:
        add(self, index, result)
        kept.append(index)
        if len(kept) == count:
            action()

    monkeypatch.setattr(ResultFile, "add", counting)


def test_results_are_in_order_with_all_continuations(run, output) -> None:
    assert run() == (0, "")
    results = read(output)
    assert [result["id"] for result in results] == [request["id"] for request in REQUESTS]
    for request, result in zip(REQUESTS, results, strict=True):
        completions = result.get("completions", [result])
        assert len(completions) == request.get("n", 1)
        assert all(c["num_tokens"] == request["max_tokens"] for c in completions)
    assert not part_of(output).exists()


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("count", [1, 4, 11])
def test_a_stopped_job_says_so_and_goes_on_to_the_same_results(
    run, output, monkeypatch, stop, count
) -> None:
    run()
    undisturbed = read(output)
    output.write_text("older results")
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        after_results(count, lambda: signal.raise_signal(stop), patch)
        code, said = run()
    assert code == 128 + stop
    assert f"stopped by {stop.name}: {count} of 12 done; " in said
    assert f"kept in {str(part_of(output))!r}: go on with --resume" in said
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    assert output.read_text() == "older results"
    kept = part_of(output).read_bytes()
    code, said = run()
    assert code == 2
    assert f"keeps {count} of 12 results" in said
    assert part_of(output).read_bytes() == kept
    computed: list[int] = []
    with monkeypatch.context() as patch:
        add = ResultFile.add
        patch.setattr(
            ResultFile, "add", lambda self, i, r: (computed.append(i), add(self, i, r))[1]
        )
        code, said = run("--resume")
    assert code == 0
    assert said == f"paged-kv: {count} of 12 are done in {str(part_of(output))!r}\n"
    assert len(computed) == 12 - count
    assert read(output) == undisturbed
    assert not part_of(output).exists()


def test_a_signal_after_the_last_result_changes_nothing(run, output, monkeypatch) -> None:
    after_results(12, lambda: signal.raise_signal(signal.SIGTERM), monkeypatch)
    assert run() == (0, "")
    assert len(read(output)) == 12


def test_a_signal_that_is_ignored_stays_ignored(run, output, monkeypatch) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        after_results(1, lambda: signal.raise_signal(signal.SIGINT), monkeypatch)
        assert run() == (0, "")
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_step_that_fails_costs_its_own_requests_and_resuming_tries_them_again(
    llm, run, output, monkeypatch
) -> None:
    run()
    undisturbed = read(output)
    with monkeypatch.context() as patch:
        run_step = llm.engine.runner.run
        patch.setattr(
            llm.engine.runner, "run", raise_once(run_step, 9, RuntimeError("CUDA out of memory"))
        )
        code, said = run()
    results = read(output)
    failed = [result for result in results if "error" in result]
    assert code == 1
    assert 0 < len(failed) <= 4
    assert all("out of memory" in result["error"] for result in failed)
    assert said.count("paged-kv: request") == len(failed)
    assert f"(id {failed[0]['id']!r}): " in said
    for result, expected in zip(results, undisturbed, strict=True):
        assert result in (expected, *failed)
    # The same job stopped after the failure: what failed is computed again.
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "run", raise_once(run_step, 9, RuntimeError("out")))
        after_results(10, lambda: signal.raise_signal(signal.SIGTERM), patch)
        code, said = run()
    assert code == 143
    code, said = run("--resume")
    assert code == 0
    assert "that failed are tried again" in said
    assert read(output) == undisturbed


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(5, "I/O error")])
def test_a_disk_that_fails_ends_the_job_with_one_line_and_keeps_what_is_done(
    run, output, monkeypatch, error
) -> None:
    run()
    undisturbed = read(output)
    with monkeypatch.context() as patch:
        patch.setattr(ResultFile, "_write", raise_once(ResultFile._write, 6, error))
        code, said = run()
    assert code == 2
    assert said == (
        f"paged-kv: cannot write {str(part_of(output))!r}: {error.strerror}; 4 of 12 done; "
        f"what is done is kept in {str(part_of(output))!r}: go on with --resume\n"
    )
    assert read(output) == undisturbed
    assert run("--resume")[0] == 0
    assert read(output) == undisturbed


def test_options_that_decide_tokens_must_be_those_of_the_interrupted_job(
    run, output, monkeypatch
) -> None:
    with monkeypatch.context() as patch:
        after_results(5, lambda: signal.raise_signal(signal.SIGTERM), patch)
        run()
    for options, words in {
        ("--seed", "6"): "--seed was 5, is 6",
        ("--top-p", "0.5"): "--top-p was None, is 0.5",
        ("--kv-format", "int2"): "--kv-format was 'int8', is 'int2'",
        ("--stop", "x"): "--stop was [], is ['x']",
        ("--model", "other"): "--model was None, is 'other'",
        ("--max-tokens", "none"): "--max-tokens was 128, is None",
    }.items():
        code, said = run("--resume", *options)
        assert code == 2
        assert words in said
    assert run("--resume", "--max-num-seqs", "2", "--token-budget", "64")[0] == 0
    assert len(read(output)) == 12


def test_the_pool_decides_where_nothing_else_ends_a_request(run, source, output, monkeypatch):
    source.write_text('{"prompt": "a"}\n' * 2 + '{"prompt": "a", "max_tokens": null}\n')
    with monkeypatch.context() as patch:
        after_results(1, lambda: signal.raise_signal(signal.SIGTERM), patch)
        run("--num-blocks", "200")
    code, said = run("--resume", "--num-blocks", "300")
    assert code == 2
    assert "--num-blocks was 200, is 300" in said
    assert run("--resume", "--num-blocks", "200")[0] == 0
    assert read(output)[2]["num_tokens"] == MODEL_LEN - 1


def test_changed_requests_are_not_mixed_with_results_of_others(
    run, source, output, monkeypatch
) -> None:
    with monkeypatch.context() as patch:
        after_results(5, lambda: signal.raise_signal(signal.SIGTERM), patch)
        run()
    text = source.read_text()
    source.write_text(text.replace("r11", "r12"))
    code, said = run("--resume")
    assert code == 2
    assert "its requests differ" in said
    source.write_text(text)
    assert run("--resume")[0] == 0


def test_an_input_is_never_its_own_output(source, tmp_path, capsys, monkeypatch) -> None:
    text = source.read_text()
    link, hard = tmp_path / "link", tmp_path / "hard"
    link.symlink_to(source)
    hard.hardlink_to(source)
    part = tmp_path / "other.part"
    part.symlink_to(source)
    monkeypatch.chdir(tmp_path)
    pairs = [(source, source), (source, link), (link, source), (source, hard)]
    pairs += [(source, "in.jsonl"), (source, "./in.jsonl"), (source, tmp_path / "other")]
    for given, output in pairs:
        assert cli.main(["generate", "--input", str(given), "--output", str(output)]) == 2
        assert "is the input" in capsys.readouterr().err
    with source.open() as standard_input, monkeypatch.context() as patch:
        patch.setattr("sys.stdin", standard_input)
        assert cli.main(["generate", "--input", "-", "--output", str(source)]) == 2
    assert "is the input" in capsys.readouterr().err
    assert source.read_text() == text


def test_what_cannot_be_written_is_refused_before_a_model_is_loaded(
    source, tmp_path, capsys, monkeypatch
) -> None:
    def load(arguments: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(cli, "load_llm", load)
    somebody = tmp_path / "else.part"
    somebody.write_text("notes")
    for output in (tmp_path, tmp_path / "none" / "out", source / "out", tmp_path / "else"):
        assert cli.main(["generate", "--input", str(source), "--output", str(output)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("paged-kv: ")
        assert str(output) in said
        assert said.count("\n") == 1
    for prompts in (["--input", str(source)], ["a"]):
        assert cli.main(["generate", *prompts, "--resume"]) == 2
        assert "--output" in capsys.readouterr().err
    assert somebody.read_text() == "notes"


def test_a_model_that_cannot_be_loaded_leaves_nothing_behind(source, output, capsys) -> None:
    files = ["--input", str(source), "--output", str(output)]
    assert cli.main(["generate", *files, "--model", "/no/such/model"]) == 2
    assert sorted(output.parent.iterdir()) == [source]


def test_a_pipe_takes_results_in_order_as_they_come(llm, source, tmp_path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    code = cli.main(["generate", "--input", str(source), "--output", str(pipe), *OPTIONS])
    results = os.read(reader, 1 << 20).splitlines()
    os.close(reader)
    assert code == 0
    assert [json.loads(line)["id"] for line in results] == [r["id"] for r in REQUESTS]


def test_printed_results_come_in_order_while_others_run(llm, source, capsys, monkeypatch) -> None:
    seen: list[int] = []
    stream = llm.stream

    def watched(*args: Any, **options: Any) -> Iterator[Any]:
        for event in stream(*args, **options):
            yield event
            seen.append(len(out := capsys.readouterr().out.splitlines()))
            printed.extend(json.loads(line)["id"] for line in out)

    printed: list[str] = []
    monkeypatch.setattr(llm, "stream", watched)
    assert cli.main(["generate", "--input", str(source), *OPTIONS]) == 0
    assert printed + [json.loads(line)["id"] for line in capsys.readouterr().out.splitlines()] == [
        request["id"] for request in REQUESTS
    ]
    assert sum(count > 0 for count in seen) > 1


def test_a_printing_job_that_is_stopped_says_how_it_would_be_kept(
    llm, source, capsys, monkeypatch
) -> None:
    print_json = cli.print_json

    def stop_after(result: dict[str, Any]) -> None:
        print_json(result)
        if result["id"] == "r2":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(cli, "print_json", stop_after)
    assert cli.main(["generate", "--input", str(source), *OPTIONS]) == 130
    captured = capsys.readouterr()
    assert captured.out.count("\n") >= 3
    assert "stopped by SIGINT: " in captured.err
    assert "of 12 done; --output FILE would keep" in captured.err


def test_an_engine_that_cannot_go_on_is_one_line_and_keeps_what_is_done(
    llm, run, output, monkeypatch
) -> None:
    stream = llm.stream

    def cut_off(*args: Any, **options: Any) -> Iterator[Any]:
        for number, event in enumerate(stream(*args, **options)):
            if number == 150:
                raise MemoryError("no room at all")
            yield event

    monkeypatch.setattr(llm, "stream", cut_off)
    code, said = run()
    assert code == 2
    assert said.startswith("paged-kv: MemoryError: no room at all; ")
    assert "of 12 done; what is done is kept in" in said
    monkeypatch.undo()
    assert part_of(output).exists()


def test_standard_output_that_was_closed_before_ends_it_quietly(
    llm, source, capsys, monkeypatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", None)
        assert cli.main(["generate", "--input", str(source), *OPTIONS]) == 141
    assert capsys.readouterr().err == ""


def test_arguments_that_are_not_text_are_errors_of_their_own(llm, capsys) -> None:
    assert cli.main(["generate", "caf\udce9", "tea", "--max-tokens", "2"]) == 1
    captured = capsys.readouterr()
    assert "prompt 1 is not UTF-8" in captured.err
    assert captured.out.startswith("tea")


def test_nobody_listening_to_errors_ends_no_job(llm, source, output, monkeypatch) -> None:
    class Gone:
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def isatty(self) -> bool:
            return False

    source.write_text("no JSON\n" + '{"prompt": "a"}\n')
    monkeypatch.setattr("sys.stderr", Gone())
    assert cli.main(["generate", "--input", str(source), "--output", str(output)]) == 1
    assert len(read(output)) == 2


def test_the_keys_of_results_are_those_that_operations_tells_of() -> None:
    said = TokenLogprob(5, -0.5, [(5, -0.5)])
    one = Completion(text="x", token_ids=[5], finish_reason="stop", logprobs=[said])
    failed = Completion(finish_reason="error", error=PagedKVError("no"))
    given = {"prompt": "x", "prompt_token_ids": [5]}
    results = [
        result_body(RequestOutput(**given, completions=[one], prompt_logprobs=[None, said])),
        result_body(RequestOutput(**given, completions=[one, one])),
        result_body(RequestOutput(**given, completions=[one, failed])),
    ]
    told = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    table = told.partition("| Key | |")[2].partition("\n\n")[0]
    keys = {key for result in results for key in result}
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.M)) == keys
    row = next(line for line in table.splitlines() if line.startswith("| `logprobs`"))
    assert all(f"`{key}`" in row for key in results[0]["logprobs"][0])
