"""Checks of values that users give. Knows values, never what they are for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import cast

from .errors import ConfigError


def is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_list_of(values: object, is_valid: Callable[[object], bool]) -> bool:
    is_list = isinstance(values, Sequence) and not isinstance(values, (str, bytes))
    return is_list and all(map(is_valid, cast(Sequence[object], values)))


def require(name: str, value: object, is_valid: bool, expected: str) -> None:
    """Raise `ConfigError` naming the setting, its value and what was expected."""
    if not is_valid:
        raise ConfigError(f"{name} must be {expected}, got {value!r}")
