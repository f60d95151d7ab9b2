"""The one exception of the emulator. Knows messages only."""

from __future__ import annotations


class PtxError(Exception):
    """A program did what no GPU allows or promises, or what is not implemented."""
