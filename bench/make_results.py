"""Tables, sentences and pictures of README and docs, made from bench/results/*.json.

    python bench/make_results.py             make all of them (pictures need matplotlib)
    python bench/make_results.py --check     say what differs from the JSON, and make nothing
    python bench/make_results.py --gpu FOLDER   draw what run_gpu.sh left in a folder

In a page stands, with anything between the markers,

    <!-- result: quality.formats --> ... <!-- end -->
    <!-- picture: quality: what is to be seen --> ... <!-- end -->

which is replaced by what `formats(reports)` of tables/quality.py returns (of several names, one
below the other), or by the picture that pictures/quality.py draws. With each stands where its
figures come from. Knows markers and pages, never what is between them.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from html import escape, unescape
from importlib import import_module
from pathlib import Path
from types import ModuleType

from pictures import gpu
from pictures.style import THEMES, drawn_from
from tables.continuations import differences
from tables.report import RESULTS, Reports

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"<!-- (result|picture): (.*?) -->\n(.*?)<!-- end -->", re.DOTALL)
OPENING = re.compile(r"^<!-- (?:result|picture): ", re.MULTILINE)
PICTURES = "docs/pictures"
# Reports that no page shows.
NOT_SHOWN = {
    "quality_book": "the demo model over a whole book, before a real model was measured",
    "quality_decode": "what head, tail and clipping do on the demo model: bench/NOTES.md",
}


def pages(root: Path) -> list[Path]:
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def drawings() -> dict[str, ModuleType]:
    """Modules of pictures that are made of reports in bench/results, by name."""
    names = sorted(file.stem for file in Path(__file__).with_name("pictures").glob("*.py"))
    modules = {name: import_module(f"pictures.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "REPORTS")}


def function_of(name: str) -> Callable[[Reports], str]:
    module, _, function = name.partition(".")
    found: Callable[[Reports], str] = getattr(import_module(f"tables.{module}"), function)
    return found


def result(names: str, reports: Reports) -> str:
    """What the functions return, one below the other, and where all of it comes from."""
    made = [function_of(name)(reports) for name in names.split()]
    sources = ". ".join(reports[report].source() for report in reports.used)
    return "\n\n".join([*made, f"<sub>{sources}</sub>"])


def picture(name: str, page: Path, reports: Reports) -> str:
    """Light or dark, as the reader has it; what is to be seen follows the name, to be read aloud.

    Where its figures come from stands in the picture.
    """
    name, _, told = name.partition(": ")
    folder = os.path.relpath(PICTURES, page.parent).replace(os.sep, "/")
    light, dark = (f"{folder}/{name}-{theme.name}.svg" for theme in THEMES)
    for report in drawings()[name].REPORTS:
        reports[report]  # it is shown
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" width="100%" alt="{escape(told)}"></picture>'
    )


def renewed(text: str, page: Path, folder: Path, used: set[str]) -> str:
    """The page with everything between markers as the reports of a folder have it.

    `page` is where it lies in the repository; what was shown is added to `used`.
    """
    if len(OPENING.findall(text)) != len(BLOCK.findall(text)) or text.count("<!-- end -->") != len(
        BLOCK.findall(text)
    ):
        raise SystemExit(f"{page}: a marker is not closed by <!-- end -->")

    def block(match: re.Match[str]) -> str:
        kind, name, _ = match.groups()
        reports = Reports(folder)
        made = result(name, reports) if kind == "result" else picture(name, page, reports)
        used.update(reports.used)
        return f"<!-- {kind}: {name} -->\n\n{made}\n\n<!-- end -->"

    return BLOCK.sub(block, text)


def is_of(file: Path, reports: Reports, names: tuple[str, ...]) -> bool:
    """Whether a picture says that it was drawn from these reports as they are."""
    return file.exists() and drawn_from(reports, names) in unescape(file.read_text())


def make(root: Path) -> None:
    for page in pages(root):
        text = page.read_text()
        made = renewed(text, page.relative_to(root), RESULTS, set())
        if made != text:
            page.write_text(made)
            print(f"made: {page.relative_to(root)}")
    for name, module in drawings().items():
        for theme in THEMES:
            file = root / PICTURES / f"{name}-{theme.name}.svg"
            module.draw(theme, Reports(), file)
            print(f"drawn: {file.relative_to(root)}")


def faults(root: Path, folder: Path = RESULTS) -> list[str]:
    """What on pages and pictures is not what the reports say, and what nobody shows."""
    found, used = differences(Reports(folder)), set[str]()
    for page in pages(root):
        text, place = page.read_text(), page.relative_to(root)
        made = renewed(text, place, folder, used)
        for mine, theirs in zip(BLOCK.finditer(text), BLOCK.finditer(made), strict=True):
            if mine.group() != theirs.group():
                found.append(f"{place}: {mine.group(2)!r} is not what its report says")
    for name, module in drawings().items():
        used.update(module.REPORTS)
        for theme in THEMES:
            file = root / PICTURES / f"{name}-{theme.name}.svg"
            if not is_of(file, Reports(folder), module.REPORTS):
                found.append(f"{file.relative_to(root)} is not drawn from its reports as they are")
    there = {file.stem for file in folder.glob("*.json")}
    found += [f"{name}.json is shown nowhere" for name in sorted(there - used - {*NOT_SHOWN})]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="make nothing, say what differs")
    parser.add_argument("--gpu", type=Path, help="only draw what run_gpu.sh left in this folder")
    arguments = parser.parse_args()
    if arguments.gpu:
        gpu.draw_folder(arguments.gpu)
        return
    if not arguments.check:
        make(ROOT)
        return
    found = faults(ROOT)
    print("\n".join(found) or "README, docs and pictures are what bench/results says")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
