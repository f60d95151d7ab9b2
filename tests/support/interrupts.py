"""Exceptions at chosen lines of chosen files, as a signal or a lack of memory would raise them."""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

# What follows None where a `with` ends as it should, in versions of Python.
CALLS_OF_EXIT = (
    ["DUP_TOP", "DUP_TOP", "CALL_FUNCTION"],
    ["LOAD_CONST", "LOAD_CONST", "PRECALL"],
    ["LOAD_CONST", "LOAD_CONST", "CALL"],
)
FOLDERS = ("paged_kv/blocks/", "paged_kv/scheduler/", "paged_kv/engine/", "paged_kv/entrypoints/")


class Lines:
    """Counts the lines that are executed in files of these folders; raises at one of them."""

    def __init__(
        self, error: BaseException | None = None, at: int = 0, folders: Sequence[str] = FOLDERS
    ) -> None:
        self.error = error
        self.at = at  # counted from 1
        self.count = 0
        self.where = ""  # the error was raised
        self._folders = tuple(folders)
        self._silent: dict[CodeType, frozenset[int] | None] = {}  # None where it is not ours

    @contextmanager
    def traced(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self._trace_call)
        try:
            yield
        finally:
            sys.settrace(before)

    def _trace_call(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if code not in self._silent:
            is_ours = any(folder in code.co_filename for folder in self._folders)
            self._silent[code] = silent_offsets(code) if is_ours else None
        return None if self._silent[code] is None else self._trace_line

    def _trace_line(self, frame: FrameType, event: str, argument: Any) -> Any:
        silent = self._silent[frame.f_code]
        if event == "line" and silent is not None and frame.f_lasti not in silent:
            self.count += 1
            if self.count == self.at and self.error is not None:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                sys.settrace(None)
                raise self.error
        return self._trace_line


def silent_offsets(code: CodeType) -> frozenset[int]:
    """Where lines begin at which neither a signal nor a lack of memory raises, only a tracer.

    Python leaves them out of its tables of handlers: the `try:` itself, and the end of a `with`
    before `__exit__` is called, after which a signal that came meanwhile is raised.
    """
    instructions = list(dis.get_instructions(code))
    names = [instruction.opname for instruction in instructions]
    silent = {i.offset for i in instructions if i.opname == "NOP"}
    for index, instruction in enumerate(instructions):
        is_none = instruction.opname == "LOAD_CONST" and instruction.argval is None
        if is_none and names[index + 1 : index + 4] in CALLS_OF_EXIT:
            silent.add(instruction.offset)
        if "WITH_EXCEPT_START" in names[index : index + 2]:
            silent.add(instruction.offset)
    return frozenset(silent)
