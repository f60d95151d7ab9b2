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

QUESTIONS = (
    "Why is the sky blue? Answer in two sentences.",
    "And why is it red in the evening?",
    "Write four lines about the sea.",
)
MAX_TOKENS = 120
MINUTES = 10
SET = "(fields, values) => fields.forEach((field, i) => { field.value = values[i]; })"


def take_pictures(browser: Any, url: str, folder: Path) -> None:
    """Talk as a person would, and take the pictures while the last answer comes."""
    page = browser.new_page(viewport={"width": 1200, "height": 800}, color_scheme="light")
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
    page.screenshot(path=folder / "page.png")
    page.set_viewport_size({"width": 390, "height": 800})
    page.emulate_media(color_scheme="dark")
    page.locator("#cache:not([open]) summary").click()  # it is folded on a phone
    page.wait_for_timeout(4000)  # for more of the answer, and figures
    page.screenshot(path=folder / "page-narrow.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(exist_ok=True)
    with chromium() as browser:
        take_pictures(browser, arguments.url, arguments.folder)


if __name__ == "__main__":
    main()
