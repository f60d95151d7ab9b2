"""What has to raise. Needs no test framework."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def refused(error: type[Exception]) -> Iterator[None]:
    """What happens inside raises this error."""
    try:
        yield
    except error:
        return
    raise AssertionError(f"no {error.__name__}")
