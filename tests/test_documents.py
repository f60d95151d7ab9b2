"""What README.md and docs/ show is true: every block of code runs, every link leads somewhere.

Python is executed with the demo model in the place of a reader's; commands are parsed by their own
parsers; data are read; what is shown as output is what is printed.
"""

from __future__ import annotations

import re

import pytest

from tests.support import documents
from tests.support.document_commands import check_commands
from tests.support.document_data import DATA
from tests.support.document_runs import printed_by

ROOT = documents.ROOT
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = documents.fences()
PYTHON = [fence for fence in FENCES if fence.language == "python"]
SHOWN = [fence for fence in FENCES if fence.note == documents.OUTPUT]
PAGES = documents.paths()
MOST_README_LINES, MOST_README_COLUMNS = 150, 100


def test_every_fence_has_a_language_that_is_checked() -> None:
    known = {"python", "sh", "text", *DATA}
    assert len(FENCES) > 30
    assert not [str(fence) for fence in FENCES if fence.language not in known]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_code_is_fenced_not_indented(page: str) -> None:
    assert not documents.indented_code((ROOT / page).read_text(encoding="utf-8"))


@pytest.mark.parametrize("fence", [f for f in PYTHON if f.skipped is None], ids=str)
def test_python_runs(fence: documents.Fence) -> None:
    printed = printed_by(fence)
    for shown in SHOWN:
        if documents.block_before(FENCES, shown) == fence:
            assert printed.split("\n") == [*shown.text.split("\n"), ""]


@pytest.mark.parametrize("fence", [f for f in PYTHON if f.skipped is not None], ids=str)
def test_python_that_does_not_run_is_python(fence: documents.Fence) -> None:
    assert fence.skipped
    compile(fence.text, str(fence), "exec")


@pytest.mark.parametrize("fence", [f for f in FENCES if f.language == "sh"], ids=str)
def test_commands_are_understood(fence: documents.Fence) -> None:
    assert check_commands(fence.text)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_within_sentences_are_understood(page: str) -> None:
    for command in documents.commands_in_sentences((ROOT / page).read_text(encoding="utf-8")):
        check_commands(command)


@pytest.mark.parametrize("shown", SHOWN, ids=str)
def test_output_is_what_is_printed(shown: documents.Fence) -> None:
    before = documents.block_before(FENCES, shown)
    if before.language == "python":
        assert before.skipped is None  # it is compared where it runs
        return
    printed = [line.rstrip() for line in printed_by(before).splitlines()]
    assert printed[: len(shown.text.splitlines())] == [
        line.rstrip() for line in shown.text.splitlines()
    ]


@pytest.mark.parametrize("fence", [f for f in FENCES if f.language in DATA], ids=str)
def test_data_can_be_read(fence: documents.Fence) -> None:
    assert DATA[fence.language](fence.text)


@pytest.mark.parametrize("page", [*PAGES, *documents.ROOT_PAGES], ids=str)
def test_links_lead_somewhere(page: str) -> None:
    assert not documents.broken_links(page)


def test_the_readme_is_short() -> None:
    lines = README.splitlines()
    assert len(lines) <= MOST_README_LINES
    wide = [line for line in lines if len(line) > MOST_README_COLUMNS]
    assert all(line.startswith("<picture>") for line in wide)  # written by `make results`


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    pages = re.findall(r"\S+\.md$", navigation, re.MULTILINE)
    here = [page.removeprefix("docs/") for page in PAGES if page != "README.md"]
    assert sorted(pages) == sorted([*here, *documents.ROOT_PAGES])


def test_the_reference_has_exactly_the_public_names() -> None:
    import paged_kv

    pages = [(ROOT / page).read_text(encoding="utf-8") for page in PAGES if "/api/" in page]
    named = re.findall(r"^::: paged_kv\.(\w+)$", "\n".join(pages), re.MULTILINE)
    assert sorted(named) == sorted(paged_kv.__all__)


def test_every_example_has_a_line() -> None:
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    scripts = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert set(re.findall(r"\(\.\./examples/(\w+\.py)\)", page)) == scripts
