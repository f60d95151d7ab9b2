"""Standard output, as commands write to it. Knows text and who reads it, never what it says."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from ..errors import PagedKVError
from .result_file import explained


def emit(text: str, encoding: str | None = None) -> None:
    """Write to standard output at once; JSON in its own encoding, whatever the terminal's is."""
    stream = sys.stdout
    if stream is None:  # it was closed before we began
        raise BrokenPipeError
    try:
        with explained("write", "standard output"):
            if hasattr(stream, "buffer"):
                stream.buffer.write(text.encode(encoding or stream.encoding, "replace"))
            else:
                stream.write(text)
            stream.flush()
    except (BrokenPipeError, PagedKVError):
        # What is still in the buffer must not fail a second time when Python ends.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise
