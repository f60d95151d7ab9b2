"""Where a job's results go: a file that keeps them while it runs, or a stream in input order.

Knows files, results by index and what an interrupted job was; never requests or models.

A result is written to `OUTPUT.part` when its request has finished, in whatever order that is, and
handed to the kernel by one write: nothing that kills the process takes it back. It is not synced to
the disk each time: that would cost more than a token, and what a machine that loses its power loses
is computed again. At the end all results, in input order and synced, replace `OUTPUT` in one step.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

from ..errors import ConfigError, InvalidRequestError, PagedKVError
from .request_lines import encode_json

if sys.platform != "win32":
    import fcntl

Result: TypeAlias = dict[str, Any]
Job: TypeAlias = dict[str, Any]  # "requests": their number, "input": their hash, "options"
JOB_VERSION: Final = 1


class ResultSink(Protocol):
    """Takes each result once, in any order; `finish` when none is missing."""

    def __enter__(self) -> ResultSink: ...

    def __exit__(self, *exception: object) -> None: ...

    def is_done(self, index: int) -> bool: ...

    def add(self, index: int, result: Result) -> None: ...

    def finish(self) -> None: ...

    @property
    def advice(self) -> str:
        """Where the results of a job that is cut short are, and how to go on."""
        ...


class OrderedSink:
    """Hands results on as soon as all before them are there."""

    advice = "--output FILE would keep what is done, and --resume go on"

    def __init__(self, write: Callable[[Result], None]) -> None:
        self._write = write
        self._waiting: dict[int, Result] = {}
        self._next_index = 0

    def __enter__(self) -> OrderedSink:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def is_done(self, index: int) -> bool:
        return False

    def add(self, index: int, result: Result) -> None:
        self._waiting[index] = result
        while self._next_index in self._waiting:
            self._write(self._waiting.pop(self._next_index))
            self._next_index += 1

    def finish(self) -> None:
        assert not self._waiting, "results are missing"


class StreamSink(OrderedSink):
    """A pipe or a device as output: what it has taken, nothing can replace."""

    def __init__(self, output: Path) -> None:
        self._output = output
        with explained("write", output):
            self._file = output.open("wb", buffering=0)
        super().__init__(self._write_line)

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def _write_line(self, result: Result) -> None:
        with explained("write", self._output):
            write_all(self._file, encode_json(result) + b"\n")


class ResultFile:
    """Keeps results in `OUTPUT.part`, which becomes `OUTPUT`.

    The first line of that file is the `job`: what decides the results. Only a job that is equal
    goes on with them. A line that is not whole is no result, and a failed request is tried again.
    """

    def __init__(self, output: Path, job: Job, *, resume: bool) -> None:
        self.output: Path = Path(os.path.realpath(output))
        self.part: Path = part_of(self.output)
        self._job: Job = {"paged_kv_job": JOB_VERSION, **job}
        self._places: dict[int, tuple[int, int]] = {}  # offset and length of each result
        self._failed: set[int] = set()
        self._end = 0
        self._is_begun = False
        with explained("write", self.output):
            if self.output.exists() and not os.access(self.output, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            self._file = self.part.open("ab", buffering=0)
        try:
            self._lock()
            self._begin(self._load(), resume)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def num_done(self) -> int:
        return len(self._places) - len(self._failed)

    @property
    def num_failed(self) -> int:
        return len(self._failed)

    @property
    def advice(self) -> str:
        if not self._places:
            return "nothing to keep"
        return f"what is done is kept in {str(self.part)!r}: go on with --resume"

    def is_done(self, index: int) -> bool:
        return index in self._places and index not in self._failed

    def add(self, index: int, result: Result) -> None:
        content = encode_json({"index": index, **result}) + b"\n"
        with explained("write", self.part):
            # A file that was deleted takes what is written, and loses it.
            if not os.path.samestat(os.stat(self.part), os.fstat(self._file.fileno())):
                raise FileNotFoundError(errno.ENOENT, "it was replaced by another file")
            self._write(content)
        self._place(index, len(content), "error" in result)

    def finish(self) -> None:
        """Put all results in order, and in the place of the output."""
        new = self.part.with_name(self.part.name + ".new")
        with explained("write", self.output):
            try:
                self._write_ordered(new)
                os.replace(new, self.output)
            except BaseException:
                with suppress(OSError):
                    new.unlink()
                raise
        self._places.clear()  # they are in the output now, so that `close` removes the part

    def close(self) -> None:
        """Remove the part unless it has results that are nowhere else, or is not this job's."""
        if self._is_begun and not self._places:
            with suppress(OSError):
                self.part.unlink()
        self._file.close()

    def _lock(self) -> None:
        """Keep a second job from the same file; the lock goes with the process."""
        if sys.platform == "win32":
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InvalidRequestError(f"another job is writing {str(self.part)!r}") from error
        except OSError:
            pass  # a file system without locks

    def _load(self) -> Job | None:
        """Find the results of an interrupted job; None if there was none."""
        with explained("read", self.part), self.part.open("rb") as lines:
            first = lines.readline()
            if not first:
                return None
            job = read_object(first)
            if job is None or "paged_kv_job" not in job:
                raise InvalidRequestError(
                    f"{str(self.part)!r} is in the way, and is not of an interrupted job"
                )
            self._end = len(first)
            for line in lines:
                entry = read_object(line)
                if entry is not None and isinstance(entry.get("index"), int):
                    self._place(entry["index"], len(line), "error" in entry)
                elif line.endswith(b"\n"):
                    self._end += len(line)
            return job

    def _begin(self, job: Job | None, resume: bool) -> None:
        """Go on with an equal job if that is asked for, or begin where no result would be lost."""
        if self._places and not resume:
            raise InvalidRequestError(
                f"{str(self.part)!r} keeps {len(self._places)} of {job and job['requests']} results"
                " of an interrupted job: go on with --resume, or delete it to begin again"
            )
        if self._places and job != self._job:
            raise InvalidRequestError(
                f"{str(self.part)!r} is of another job ({difference(job or {}, self._job)}): "
                "give it what it had, or delete that file to begin again"
            )
        with explained("write", self.part):
            self._is_begun = True
            if self._places:
                self._file.truncate(self._end)
            else:
                self._copy_mode(self.part)
                self._file.truncate(0)
                self._end = 0
                header = encode_json(self._job) + b"\n"
                self._write(header)
                self._end = len(header)

    def _place(self, index: int, length: int, is_failed: bool) -> None:
        self._places[index] = self._end, length
        self._end += length
        (self._failed.add if is_failed else self._failed.discard)(index)

    def _write(self, content: bytes) -> None:
        """All of it at the end of the file, or nothing."""
        try:
            write_all(self._file, content)
        except BaseException:
            with suppress(OSError):
                self._file.truncate(self._end)
            raise

    def _copy_mode(self, path: Path) -> None:
        """Who may not read the output that is replaced may not read what replaces it."""
        if self.output.exists():
            shutil.copymode(self.output, path)

    def _write_ordered(self, new: Path) -> None:
        with self.part.open("rb") as part, new.open("wb") as target:
            self._copy_mode(new)
            for index in range(self._job["requests"]):
                offset, length = self._places[index]
                part.seek(offset)
                result = json.loads(part.read(length))
                del result["index"]
                target.write(encode_json(result) + b"\n")
            target.flush()
            os.fsync(target.fileno())


def part_of(output: Path) -> Path:
    """Where the results of a job that writes `output` are kept."""
    real = Path(os.path.realpath(output))  # a link stays one: what it leads to is replaced
    return real.with_name(real.name + ".part")


def write_all(file: FileIO, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def read_object(line: bytes) -> dict[str, Any] | None:
    """The object in a whole line, or None: a killed job may leave half of its last one."""
    try:
        value = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def difference(was: Job, now: Job) -> str:
    """In what an interrupted job is not this one, in words."""
    options, new_options = was.get("options", {}), now["options"]
    words = [
        f"--{name.replace('_', '-')} was {options.get(name)}, is {value}"
        for name, value in new_options.items()
        if options.get(name) != value
    ]
    if was.get("input") != now["input"]:
        words.append("its requests differ")
    return ", ".join(words) or "made by another version"


@contextmanager
def explained(action: str, path: Path | str) -> Iterator[None]:
    """What the system refuses, in one line that names the file."""
    try:
        yield
    except BrokenPipeError:
        raise  # nobody is there to be told
    except OSError as error:
        raise PagedKVError(f"cannot {action} {str(path)!r}: {error.strerror}") from error


def require_writable(path: Path) -> None:
    """Before anything is computed: that a file can be there, whatever is there now stays."""
    with explained("write", path):
        if path.is_dir() or not path.name:
            raise ConfigError(f"cannot write {str(path)!r}: it is a folder")
        trial = path.with_name(f".{path.name}.{os.getpid()}.trial")
        trial.touch()
        trial.unlink()
