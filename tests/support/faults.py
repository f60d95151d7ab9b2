"""Faults that strike calls at random lines, what they did, and what must never come of them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import get_ident
from typing import Any, Final

from paged_kv.engine.engine import Engine
from paged_kv.errors import GenerationError, OutOfBlocksError
from tests.support.interrupts import FOLDERS, Lines

TRACED: Final = (*FOLDERS, "paged_kv/change.py")
LINES_OF_THE_FIRST_CALL: Final = 500


class Violation(AssertionError):
    """What must never happen: something "lost", "leaked", "changed" or "raised"."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class DeviceError(RuntimeError):
    """What a device raises in the middle of a step."""


@dataclass(eq=False, kw_only=True)
class Tally:
    """What happened."""

    num_requests: int = 0
    num_tokens: int = 0
    num_recovered: int = 0  # faults after which all went on
    faults: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        self.num_requests += other.num_requests
        self.num_tokens += other.num_tokens
        self.num_recovered += other.num_recovered
        self.faults += other.faults
        self.ends += other.ends
        self.events += other.events

    def note(self, fault: str) -> None:
        self.faults[fault] += 1
        self.num_recovered += 1


class Faults:
    """Calls an engine, or what stands above it, and lets exceptions strike at random lines.

    `line_fault` of all calls are struck, `second_fault` of these once more while the engine mends
    what the first one did. The caller gets the exception that struck; any other is a violation.
    """

    def __init__(
        self,
        engine: Engine,
        tally: Tally,
        numbers: random.Random,
        *,
        errors: Sequence[type[BaseException]],
        line_fault: float,
        second_fault: float,
    ) -> None:
        self.tally = tally
        self.random = numbers
        self.errors = errors
        self.line_fault, self.second_fault = line_fault, second_fault
        self._line_counts: dict[str, int] = {}  # of a call that was traced and not struck
        self._second: Lines | None = None
        self._thread = get_ident()
        self._mend = engine._mend
        engine._mend = self._mend_under_fault  # type: ignore[method-assign]

    def call(
        self,
        function: Callable[..., Any],
        *args: Any,
        name: str = "",
        is_absorbed: bool = False,
        **options: Any,
    ) -> tuple[Any, BaseException | None]:
        """What it returns, or the exception that struck; `is_absorbed` where that may be kept."""
        name = name or function.__name__
        first, second = self._next_fault(name)
        self._second = second
        try:
            if first is None:
                return function(*args, **options), None
            with first.traced():
                result = function(*args, **options)
        except (StopIteration, DeviceError, OutOfBlocksError, GenerationError) as error:
            return None, error
        except BaseException as error:
            if any(each is not None and each.error is error for each in (first, second)):
                return None, error
            if isinstance(error, Violation):
                raise
            raise Violation("raised", f"{error!r} by {name}") from error
        finally:
            self._account_for(name, first, second)
        if first.where and not is_absorbed:
            raise Violation("raised", f"the error at {first.where} reached nobody")
        return result, None

    def until_done(self, function: Callable[..., Any], *args: Any) -> None:
        """As a caller would in a `finally`: until no exception strikes."""
        while self.call(function, *args)[1] is not None:
            pass

    def _next_fault(self, name: str) -> tuple[Lines | None, Lines | None]:
        chance, draw = self.random.random, self.random.randrange
        if chance() >= self.line_fault:
            return None, None
        num_lines = self._line_counts.get(name, LINES_OF_THE_FIRST_CALL)
        first = Lines(
            self.random.choice(self.errors)("struck"),
            at=draw(1, num_lines * 11 // 10 + 2),
            folders=TRACED,
        )
        if chance() >= self.second_fault:
            return first, None
        at = draw(1, self.random.choice([10, 100, 1500]))
        return first, Lines(MemoryError("struck while mending"), at=at, folders=TRACED)

    def _mend_under_fault(self) -> None:
        """What the engine does after an exception, or before a turn."""
        second = self._second
        if second is None or second.where or get_ident() != self._thread:
            self._mend()
            return
        with second.traced():
            self._mend()

    def _account_for(self, name: str, *struck: Lines | None) -> None:
        for lines in struck:
            if lines is not None and lines.where:
                self.tally.note(f"{type(lines.error).__name__} at a line")
                self.tally.events[f"faults in {Path(lines.where.rpartition(':')[0]).name}"] += 1
        first = struck[0]
        if first is not None and not first.where:
            self._line_counts[name] = max(first.count, 1)
