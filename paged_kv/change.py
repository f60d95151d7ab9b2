"""Whether changes of an object's state are whole. Knows no state.

An exception may strike between any two lines: KeyboardInterrupt and MemoryError ask nobody. What
has several pieces that must agree changes them inside `with self._change:`, with every refusal
before it; a change that was cut off is never forgotten, and nothing builds on it.
"""

from __future__ import annotations

from types import TracebackType

from .errors import InvalidStepError


class Change:
    """Entered for each change of its `owner`; after one that was cut off no other may begin."""

    __slots__ = ("_owner", "is_unfinished")

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self.is_unfinished: bool = False

    def __enter__(self) -> None:
        if self.is_unfinished:
            raise InvalidStepError(
                f"an exception cut off a change of the {self._owner}: recover() comes first"
            )
        self.is_unfinished = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.is_unfinished = False
