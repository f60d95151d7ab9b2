"""Amounts of memory as text. Knows units only."""

from __future__ import annotations

import re
from typing import Final

from .errors import ConfigError

UNITS: Final = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
}


def parse_memory(amount: int | str) -> int:
    """Bytes from a number or from text such as "512MiB" or "1.5 GB"."""
    if isinstance(amount, int):
        number, unit = float(amount), ""
    else:
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", str(amount))
        if match is None or match[2].upper() not in UNITS:
            raise ConfigError(
                f"memory must be bytes or a number with B, KB, MB, GB, KiB, MiB or GiB, "
                f"got {amount!r}"
            )
        number, unit = float(match[1]), match[2].upper()
    size = int(number * UNITS[unit])
    if size < 1:
        raise ConfigError(f"memory must be at least 1 byte, got {amount!r}")
    return size


def format_memory(size: float) -> str:
    """Bytes as a person reads them: 1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError
