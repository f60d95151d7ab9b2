"""README.md and docs/ as tests see them: fenced blocks, links, headings.

Knows Markdown, never what a block means.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import unquote

ROOT: Final = Path(__file__).parent.parent.parent
ROOT_PAGES: Final = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
OUTPUT: Final = "output"
NOT_RUN: Final = "not run: "
FENCE: Final = re.compile(
    r"^(?:<!-- (?P<note>[^\n]+?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
LINK: Final = re.compile(r'\]\(([^)\s]+)\)|\b(?:src|srcset|href)="([^"]+)"')
# What begins like a command and is one, as written: not `paged-kv eval ...`, not `a | b`.
COMMAND: Final = re.compile(r"`((?:paged-kv|make|python) [^`|]+)`")


class Fence(NamedTuple):
    """A fenced block, where it begins, and the note in a comment above it."""

    page: str
    line: int
    language: str
    text: str
    note: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def skipped(self) -> str | None:
        """Why it is not run; None if it is."""
        return self.note.removeprefix(NOT_RUN) if self.note.startswith(NOT_RUN) else None


def paths() -> list[str]:
    """The README and every page, from the root."""
    pages = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
    return ["README.md", *pages]


def fences() -> list[Fence]:
    return [fence for page in paths() for fence in fences_of(page)]


def fences_of(page: str) -> Iterator[Fence]:
    content = (ROOT / page).read_text(encoding="utf-8")
    for match in FENCE.finditer(content):
        line = content.count("\n", 0, match.start("language")) + 1
        text = match["text"].rstrip("\n")
        yield Fence(page, line, match["language"], text, match["note"] or "")


def block_before(all_fences: Sequence[Fence], shown: Fence) -> Fence:
    """The block whose output this is."""
    index = all_fences.index(shown)
    before = all_fences[index - 1]
    assert before.page == shown.page
    return before


def without_fences(content: str) -> str:
    return FENCE.sub("", content)


def indented_code(content: str) -> list[str]:
    """Lines that Markdown takes for code because of their four spaces."""
    found, is_list = [], False
    lines = ["", *without_fences(content).splitlines()]
    for before, line in pairwise(lines):
        if line and not line.startswith(" "):
            is_list = bool(re.match(r"[-*] |\d+\. ", line))
        if line.startswith("    ") and not before.strip() and not is_list:
            found.append(line)
    return found


def commands_in_sentences(content: str) -> Iterator[str]:
    """Commands between backticks, but for those that stand for several (`a|b`, `...`)."""
    for match in COMMAND.finditer(without_fences(content)):
        if "..." not in match[1] and "[" not in match[1]:
            yield " ".join(match[1].split())


def anchors(page: Path) -> set[str]:
    """Names of headings, as GitHub makes them and the site too."""
    content = without_fences(page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", content, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: str) -> list[str]:
    """Links within the checkout that lead to no file, or to no heading of it."""
    broken = []
    content = without_fences((ROOT / page).read_text(encoding="utf-8"))
    for link in (first or second for first, second in LINK.findall(content)):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken
