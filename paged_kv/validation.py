"""Checks of values that users give. Knows values, never what they are for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from reprlib import repr as short_repr
from typing import Final, cast

from .errors import ConfigError, PagedKVError

# Block ids and token ids are 32-bit integers, and no sequence has more tokens.
MAX_COUNT: Final = (1 << 31) - 1


def is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_flag(value: object) -> bool:
    """True or False; text and None, which mean one of them as a condition, are neither."""
    return isinstance(value, bool)


def is_finite(value: object) -> bool:
    """A real number, neither infinite nor NaN; a bool is none."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    return isinstance(value, Integral) or math.isfinite(value)


def is_list_of(values: object, is_valid: Callable[[object], bool]) -> bool:
    is_list = isinstance(values, Sequence) and not isinstance(values, (str, bytes))
    return is_list and all(map(is_valid, cast(Sequence[object], values)))


def require(name: str, value: object, is_valid: bool, expected: str) -> None:
    """Raise `ConfigError` naming the setting, its value and what was expected."""
    if not is_valid:
        raise ConfigError(f"{name} must be {expected}, got {value!r}")


def require_instance(
    name: str, value: object, kind: type, error: type[PagedKVError] = ConfigError
) -> None:
    """Raise `ConfigError`, or another error, for a value of another type."""
    if not isinstance(value, kind):
        raise error(f"{name} must be a {kind.__name__}, got {short_repr(value)}")


def require_count(name: str, value: object, least: int = 1, most: int = MAX_COUNT) -> int:
    """The integer as Python's own; raises `ConfigError` unless it is one from `least` to `most`."""
    require(name, value, is_integer(value), "an integer")
    count = int(cast(int, value))
    if count < least:
        expected = "not be negative" if least == 0 else f"be at least {least}"
        raise ConfigError(f"{name} must {expected}, got {value}")
    require(name, count, count <= most, f"at most {most}")
    return count
