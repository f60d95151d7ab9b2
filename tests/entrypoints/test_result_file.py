"""Results on their way to a file: what is kept of them when a job, a disk or a folder ends."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_kv.entrypoints.result_file import OrderedSink, ResultFile, StreamSink, write_all
from paged_kv.errors import InvalidRequestError, PagedKVError

JOB = {"requests": 3, "input": "abc", "options": {"seed": "1", "kv_format": "'int8'"}}
RESULTS = [{"id": "é", "text": "a\nb"}, {"text": "\u2028"}, {"completions": []}]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def part_of(output: Path) -> Path:
    return output.with_name(output.name + ".part")


def read(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_bytes().split(b"\n")[:-1]]


def interrupt(output: Path, *indices: int) -> None:
    """A job that ends after these results, as a kill would end it."""
    with ResultFile(output, JOB, resume=False) as file:
        for index in indices:
            file.add(index, RESULTS[index])


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_results_replace_the_output_in_order_when_all_are_there(output, order) -> None:
    output.write_text("older results")
    output.chmod(0o640)
    with ResultFile(output, JOB, resume=False) as file:
        for index in order:
            assert output.read_text() == "older results"
            assert stat.S_IMODE(part_of(output).stat().st_mode) == 0o640
            file.add(index, RESULTS[index])
            assert read(part_of(output))[-1] == {"index": index, **RESULTS[index]}
        file.finish()
    assert read(output) == RESULTS
    assert stat.S_IMODE(output.stat().st_mode) == 0o640
    assert list(output.parent.iterdir()) == [output]


def test_a_job_without_a_result_leaves_nothing_behind(output) -> None:
    with ResultFile(output, JOB, resume=False):
        assert part_of(output).exists()
    assert list(output.parent.iterdir()) == []


def test_a_link_is_followed_and_stays_one(output, tmp_path) -> None:
    real = tmp_path / "real.jsonl"
    real.write_text("older results")
    output.symlink_to(real.name)
    with ResultFile(output, JOB, resume=False) as file:
        for index, result in enumerate(RESULTS):
            file.add(index, result)
        file.finish()
    assert output.is_symlink()
    assert read(real) == RESULTS


def test_an_interrupted_job_is_neither_begun_again_nor_lost_unasked(output) -> None:
    interrupt(output, 2, 0)
    kept = part_of(output).read_bytes()
    with pytest.raises(InvalidRequestError, match=r"keeps 2 of 3 results .* --resume, or delete"):
        ResultFile(output, JOB, resume=False)
    assert part_of(output).read_bytes() == kept
    with ResultFile(output, JOB, resume=True) as file:
        assert [file.is_done(index) for index in range(3)] == [True, False, True]
        file.add(1, RESULTS[1])
        file.finish()
    assert read(output) == RESULTS
    assert not part_of(output).exists()


def test_a_job_that_was_killed_before_its_first_result_is_begun_again(output) -> None:
    with ResultFile(output, JOB, resume=False):
        shutil.copy(part_of(output), output)
    output.rename(part_of(output))
    other = {**JOB, "input": "other"}
    with ResultFile(output, other, resume=False):
        assert json.loads(part_of(output).read_bytes())["input"] == "other"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input": "other"}, ["its requests differ"]),
        ({"options": {**JOB["options"], "seed": "2"}}, ["--seed was 1, is 2"]),
        ({"options": {**JOB["options"], "kv_format": "'int2'"}}, ["--kv-format was 'int8', is"]),
        ({"requests": 2, "input": "other"}, ["its requests differ"]),
    ],
)
def test_another_job_is_not_gone_on_with(output, change, words) -> None:
    interrupt(output, 1)
    kept = part_of(output).read_bytes()
    with pytest.raises(InvalidRequestError) as caught:
        ResultFile(output, {**JOB, **change}, resume=True)
    for word in [*words, "delete that file"]:
        assert word in str(caught.value)
    assert part_of(output).read_bytes() == kept


def test_a_file_of_somebody_else_is_not_touched(output) -> None:
    for content in ("notes\n", '{"a": 1}\n', "no line"):
        part_of(output).write_text(content)
        for resume in (False, True):
            with pytest.raises(InvalidRequestError, match="is in the way"):
                ResultFile(output, JOB, resume=resume)
        assert part_of(output).read_text() == content


def test_two_jobs_do_not_write_one_output(output) -> None:
    with ResultFile(output, JOB, resume=False) as file:
        file.add(0, RESULTS[0])
        with pytest.raises(InvalidRequestError, match="another job is writing"):
            ResultFile(output, JOB, resume=True)
        file.add(1, RESULTS[1])
    assert len(read(part_of(output))) == 3


@given(cut=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_whatever_a_kill_cuts_off_only_whole_lines_are_results(tmp_path_factory, cut) -> None:
    output = tmp_path_factory.mktemp("cut") / "out.jsonl"
    interrupt(output, 1, 2)
    content = part_of(output).read_bytes()
    header = content.index(b"\n") + 1
    size = header + cut % (len(content) - header + 1)
    part_of(output).write_bytes(content[:size])
    num_whole = content[:size].count(b"\n") - 1
    with ResultFile(output, JOB, resume=True) as file:
        assert [index for index in (1, 2) if file.is_done(index)] == [1, 2][:num_whole]
        for index in range(3):
            if not file.is_done(index):
                file.add(index, RESULTS[index])
        file.finish()
    assert read(output) == RESULTS


def test_a_spoiled_line_in_the_middle_is_computed_again(output) -> None:
    """A machine that lost its power may leave zeros where a line was."""
    interrupt(output, 0, 1)
    header, first, second, _ = part_of(output).read_bytes().split(b"\n")
    part_of(output).write_bytes(b"\n".join([header, b"\0" * len(first), second, b""]))
    with ResultFile(output, JOB, resume=True) as file:
        assert [file.is_done(index) for index in range(3)] == [False, True, False]
        file.add(0, RESULTS[0])
        file.add(2, RESULTS[2])
        file.finish()
    assert read(output) == RESULTS


def test_a_failed_request_is_tried_again(output) -> None:
    with ResultFile(output, JOB, resume=False) as file:
        file.add(0, {"error": "out of memory"})
        file.add(1, RESULTS[1])
    with ResultFile(output, JOB, resume=True) as file:
        assert (file.num_done, file.num_failed) == (1, 1)
        assert not file.is_done(0)
        file.add(0, RESULTS[0])
        assert file.num_failed == 0
        file.add(2, RESULTS[2])
        file.finish()
    assert read(output) == RESULTS


# -- what the system refuses ----------------------------------------------------------------------


class FullDisk:
    """A file that has room for so many bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self._file, self._room = file, room

    def write(self, content: bytes) -> int:
        if not self._room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written: int = self._file.write(bytes(content)[: self._room])
        self._room -= written
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize("room", [0, 1, 20])
def test_a_full_disk_costs_the_result_that_found_it_full(output, room) -> None:
    output.write_text("older results")
    with ResultFile(output, JOB, resume=False) as file:
        file.add(0, RESULTS[0])
        kept = part_of(output).read_bytes()
        file._file = FullDisk(file._file, room)  # type: ignore[assignment]
        with pytest.raises(PagedKVError, match=r"cannot write .*part': No space left on device"):
            file.add(1, RESULTS[1])
        assert part_of(output).read_bytes() == kept
        assert "--resume" in file.advice
    assert part_of(output).read_bytes() == kept
    assert output.read_text() == "older results"
    with ResultFile(output, JOB, resume=True) as file:
        assert file.num_done == 1


def test_a_disk_that_is_full_at_the_end_keeps_both_files(output, monkeypatch) -> None:
    output.write_text("older results")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with ResultFile(output, JOB, resume=False) as file:
        for index, result in enumerate(RESULTS):
            file.add(index, result)
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(PagedKVError, match=r"cannot write .*out.jsonl': No space left"):
            file.finish()
    assert output.read_text() == "older results"
    assert sorted(output.parent.iterdir()) == [output, part_of(output)]
    monkeypatch.undo()
    with ResultFile(output, JOB, resume=True) as file:
        assert file.num_done == 3
        file.finish()
    assert read(output) == RESULTS


def test_a_folder_that_vanishes_is_found_out_at_the_next_result(output) -> None:
    folder = output.parent / "folder"
    folder.mkdir()
    with ResultFile(folder / "out", JOB, resume=False) as file:
        file.add(0, RESULTS[0])
        shutil.rmtree(folder)
        with pytest.raises(PagedKVError, match=r"cannot write .*: No such file or directory"):
            file.add(1, RESULTS[1])


def test_a_part_that_was_replaced_is_not_written_to(output) -> None:
    with ResultFile(output, JOB, resume=False) as file:
        file.add(0, RESULTS[0])
        part_of(output).rename(output)
        part_of(output).write_text("somebody else's")
        with pytest.raises(PagedKVError, match="replaced by another file"):
            file.add(1, RESULTS[1])
    assert part_of(output).read_text() == "somebody else's"


def test_a_folder_or_a_file_in_no_folder_cannot_be_an_output(tmp_path) -> None:
    with pytest.raises(PagedKVError, match="cannot write"):
        ResultFile(tmp_path / "none" / "out", JOB, resume=False)
    with pytest.raises(PagedKVError, match="Is a directory"):
        StreamSink(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has such a device")
def test_a_device_that_is_full_says_so(tmp_path) -> None:
    with StreamSink(Path("/dev/full")) as sink, pytest.raises(PagedKVError, match="No space left"):
        sink.add(0, {})


# -- in order -------------------------------------------------------------------------------------


@given(st.permutations(range(6)))
def test_what_is_printed_is_in_order_and_no_later_than_it_can_be(order) -> None:
    printed: list[Any] = []
    sink = OrderedSink(printed.append)
    for number, index in enumerate(order):
        sink.add(index, {"n": index})
        done = set(order[: number + 1])
        num_ready = next(n for n in range(7) if n not in done)
        assert printed == [{"n": n} for n in range(num_ready)]
    sink.finish()


def test_writing_goes_on_after_a_part_was_taken() -> None:
    class Slow:
        taken = b""

        def write(self, content: bytes) -> int:
            self.taken += bytes(content[:3])
            return min(len(content), 3)

    file = Slow()
    write_all(file, b"0123456789")  # type: ignore[arg-type]
    assert file.taken == b"0123456789"
