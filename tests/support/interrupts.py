"""Exceptions at chosen lines of chosen files, as a signal or a lack of memory would raise them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

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
        self._is_ours: dict[CodeType, bool] = {}

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
        if code not in self._is_ours:
            name = code.co_filename
            self._is_ours[code] = any(folder in name for folder in self._folders)
        return self._trace_line if self._is_ours[code] else None

    def _trace_line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.count += 1
            if self.count == self.at and self.error is not None:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                sys.settrace(None)
                raise self.error
        return self._trace_line
