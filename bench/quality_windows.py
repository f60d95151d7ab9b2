"""Which tokens of a book settings are tuned on, and which results are reported on: never the same.

Knows places in books, never what is measured there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paged_kv.blocks.geometry import IntArray
from paged_kv.engine.evaluate import token_windows

STRETCH = 8192  # tokens of a book that all tune or all report, whatever the length of windows


def stretches(token_ids: Sequence[int], *, tuning: bool) -> list[Sequence[int]]:
    """Stretches of a book: even-numbered ones, counted from 0, for tuning, odd ones to report."""
    starts = range(0 if tuning else STRETCH, len(token_ids), 2 * STRETCH)
    return [token_ids[start : start + STRETCH] for start in starts]


def book_windows(
    token_ids: Sequence[int],
    length: int,
    first_token: int | None,
    *,
    tuning: bool,
    count: int | None = None,
) -> IntArray:
    """Windows [W, length], opened by `first_token` if there is one; at most `count` of them.

    They come from different stretches in turn, so that a few are not all of one page.
    """
    if not 1 < length <= STRETCH:
        raise SystemExit(f"windows have 2 to {STRETCH} tokens, not {length}")
    body = length - (first_token is not None)
    by_stretch = [
        token_windows(stretch, length, first_token)
        for stretch in stretches(token_ids, tuning=tuning)
        if len(stretch) >= body
    ]
    if not by_stretch:
        raise SystemExit(f"a book of {len(token_ids)} tokens has no window of {length}")
    most = max(map(len, by_stretch))
    in_turn = [windows[i] for i in range(most) for windows in by_stretch if i < len(windows)]
    return np.stack(in_turn[:count])
