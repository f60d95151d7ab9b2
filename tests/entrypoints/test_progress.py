"""The progress bar: on a terminal and for long work only."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from paged_kv.entrypoints import progress
from paged_kv.entrypoints.progress import Progress

ENGINE: Any = SimpleNamespace(manager=SimpleNamespace(num_blocks=40, num_free_blocks=33))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that moves when the test says so."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def finish_requests(clock: list[float], show: bool | None, seconds: float) -> None:
    with Progress(4, ENGINE, show) as bar:
        for _ in range(4):
            clock[0] += seconds / 4
            bar.update(is_finished=True)


def test_shows_requests_rate_and_blocks(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    finish_requests(clock, show=True, seconds=2.0)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "4/4" in captured.err
    assert "2 tokens/s" in captured.err
    assert "7/40 blocks" in captured.err


def test_silent_where_there_is_no_terminal(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    finish_requests(clock, show=None, seconds=60.0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("seconds", "is_shown"), [(0.9, False), (3.0, True)])
def test_on_a_terminal_only_long_work_shows(
    seconds: float,
    is_shown: bool,
    clock: list[float],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    finish_requests(clock, show=None, seconds=seconds)
    assert ("blocks" in capsys.readouterr().err) == is_shown
