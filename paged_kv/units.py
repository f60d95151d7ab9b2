"""Amounts of memory as text. Knows units only."""

from __future__ import annotations

import re
from reprlib import repr as short_repr
from typing import Final, cast

from .errors import ConfigError
from .validation import is_finite

# As GNU's tools read them: K and KiB are 1024 bytes, KB is 1000.
UNITS: Final[dict[str, int]] = {"": 1, "B": 1} | {
    letter + ending: base**power
    for power, letter in enumerate("KMGT", start=1)
    for ending, base in (("", 1024), ("IB", 1024), ("B", 1000))
}
AMOUNT: Final = re.compile(r"\s*([0-9]*)(\.[0-9]+)?\s*([A-Za-z]*)\s*")
MAX_LENGTH: Final = 64  # of such a text
MAX_BYTES: Final = 1 << 62


def parse_memory(amount: int | float | str, name: str = "memory", least: int = 1) -> int:
    """Bytes from a number or from text: "512MiB", "1.5 GB"; "2G" is 2 GiB.

    Raises `ConfigError` naming the setting, for less than `least` bytes too.
    """
    size = parse_amount(amount)
    if size is None:
        raise ConfigError(
            f"{name} must be bytes, or a number with B, K, KB, KiB, M, MB, MiB, G, GB, GiB, T, TB "
            f"or TiB, got {short_repr(amount)}"
        )
    if not least <= size <= MAX_BYTES:
        limit = f"at least {least} byte" if size < least else f"at most {MAX_BYTES} bytes"
        raise ConfigError(f"{name} must be {limit}, got {short_repr(amount)}")
    return size


def parse_amount(amount: object) -> int | None:
    """Bytes, or None for what is no amount of memory."""
    if is_finite(amount):
        return int(cast(float, amount))
    if not isinstance(amount, str) or len(amount) > MAX_LENGTH:
        return None
    match = AMOUNT.fullmatch(amount)
    if match is None or match[3].upper() not in UNITS or not (match[1] or match[2]):
        return None
    unit, fraction = UNITS[match[3].upper()], match[2] or "."
    digits = fraction[1:]
    return int(match[1] or 0) * unit + int(digits or 0) * unit // int(10 ** len(digits))


def format_memory(size: float) -> str:
    """Bytes as a person reads them: 1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError
