"""A real browser without a window, of the system's packages. Knows how it starts, never a page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = ("background-networking", "sync", "component-update", "gpu")  # what it does without
ARGUMENTS = ("--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in QUIET))


@contextmanager
def chromium() -> Iterator[Any]:
    """A `playwright.sync_api.Browser`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()
