"""A progress bar for long generation. Knows counts of tokens and blocks, never requests."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

if TYPE_CHECKING:
    from ..engine.engine import Engine

SHOW_AFTER_SECONDS: Final = 1.0
REFRESH_SECONDS: Final = 0.2


class Progress:
    """Finished requests, tokens a second and blocks in use, on standard error.

    With `show` None the bar appears on a terminal once the work has taken a second.
    """

    def __init__(self, total: int, engine: Engine, show: bool | None) -> None:
        self._engine = engine
        self._total = total
        self._is_wanted = sys.stderr.isatty() if show is None else show
        self._delay = SHOW_AFTER_SECONDS if show is None else 0.0
        self._started = self._refreshed = time.monotonic()
        self._num_tokens = self._num_finished = 0
        self._bar: RichProgress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._refresh()
            self._bar.stop()

    def update(self, is_finished: bool) -> None:
        """One more token, which may be the last of its request."""
        self._num_tokens += 1
        self._num_finished += is_finished
        now = time.monotonic()
        if not self._is_wanted or now - self._refreshed < REFRESH_SECONDS:
            return
        if now - self._started >= self._delay:
            self._refreshed = now
            self._refresh()

    def _refresh(self) -> None:
        if self._bar is None:
            self._bar = RichProgress(
                TextColumn("requests"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]:.0f} tokens/s"),
                TextColumn("{task.fields[used]}/{task.fields[blocks]} blocks"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("", total=self._total, rate=0.0, used=0, blocks=0)
            self._bar.start()
        manager = self._engine.manager
        self._bar.update(
            self._task,
            completed=self._num_finished,
            rate=self._num_tokens / (time.monotonic() - self._started),
            used=manager.num_blocks - manager.num_free_blocks,
            blocks=manager.num_blocks,
        )


class WorkBar:
    """So many pieces of work done and the time that is left, on standard error of a terminal."""

    def __init__(self, name: str, total: int) -> None:
        self._bar = RichProgress(
            TextColumn(name),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> WorkBar:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def advance(self, pieces: int = 1) -> None:
        self._bar.advance(self._task, pieces)
