"""Pictures of the page at `/` for the docs, with answers of a server that runs.

paged-kv serve path/to/SmolLM2-135M-Instruct --served-model-name SmolLM2-135M-Instruct
python -m tests.support.page_pictures http://127.0.0.1:8000 docs/pictures
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from playwright.sync_api import expect

from tests.support.browser import chromium

# Name, size, colours.
VIEWS = (("page", (1200, 800), "light"), ("page-narrow", (390, 800), "dark"))
QUESTIONS = (
    "Why is the sky blue? Answer in two sentences.",
    "And why is it red in the evening?",
    "Write four lines about the sea.",
)
MAX_TOKENS = 120
MINUTES = 10
# Fields of settings, which may be folded.
SET = "(fields, values) => fields.forEach((field, i) => { field.value = values[i]; })"


def take_picture(browser: Any, url: str, path: Path, size: tuple[int, int], scheme: str) -> None:
    """Talk as a person would, with the picture taken while the last answer comes."""
    viewport = dict(zip(("width", "height"), size, strict=True))
    context = browser.new_context(viewport=viewport, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(MINUTES * 60_000)
    expect.set_options(timeout=MINUTES * 60_000)
    page.goto(url)
    page.locator("#settings input").evaluate_all(SET, [0, MAX_TOKENS])
    for question in QUESTIONS:
        page.get_by_label("Message", exact=True).fill(question)
        page.keyboard.press("Enter")
        if question != QUESTIONS[-1]:
            page.wait_for_selector("#turns li:last-child:not(.coming) .usage")
    expect(page.locator(".text").last).to_have_text(re.compile(".{40}", re.DOTALL))
    page.locator("#cache:not([open]) summary").evaluate_all("found => found.map((s) => s.click())")
    page.wait_for_timeout(1500)  # for figures
    page.screenshot(path=path)
    context.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(exist_ok=True)
    with chromium() as browser:
        for name, size, scheme in VIEWS:
            path = arguments.folder / f"{name}.png"
            take_picture(browser, arguments.url, path, size, scheme)
            print(path)


if __name__ == "__main__":
    main()
