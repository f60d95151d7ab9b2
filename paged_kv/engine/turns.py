"""Turns at an engine: one thread at a time, on something whole. Knows no requests or steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, get_ident

from ..errors import InvalidStepError


class Turns(ABC):
    """Who takes turns says how what was cut off is undone, and what has come meanwhile."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._owner: int | None = None  # the thread that holds the lock

    @property
    def _is_inside(self) -> bool:
        """Whether this very thread is in the middle of a turn: something that it calls is back."""
        return self._lock.locked() and self._owner == get_ident()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One thread at a time, on an engine that is whole, and that is left whole.

        What an exception cuts off is undone before anybody sees the exception. Where another one
        strikes while that is done, the next turn begins with it.
        """
        if self._is_inside:
            raise InvalidStepError("the engine is in the middle of a step, which calls it again")
        with self._lock:
            self._owner = get_ident()
            try:
                self._mend()
                self._take_out_aborted()
                yield
                self._take_out_aborted()
            except BaseException:
                self._mend()
                raise
            finally:
                self._owner = None

    @abstractmethod
    def _mend(self) -> None:
        """Undo what was cut off."""

    @abstractmethod
    def _take_out_aborted(self) -> None:
        """End what was aborted meanwhile."""
