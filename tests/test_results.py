"""What README and docs say of measurements is what bench/results says, and a change is seen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import make_results
import pytest
import torch
from make_results import faults, renewed
from pictures import layers, quality
from pictures.style import LIGHT
from tables.report import RESULTS, Reports, between, brief, signed, times

from paged_kv.cache.formats import FORMATS

ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """README and docs, to be changed."""
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    return tmp_path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """All reports, to be changed."""
    return Path(shutil.copytree(RESULTS, tmp_path / "results"))


def change(file: Path, of: Callable[[dict[str, Any]], None]) -> None:
    report = json.loads(file.read_text())
    of(report)
    file.write_text(json.dumps(report))


def test_pages_and_pictures_are_what_the_reports_say() -> None:
    assert faults(ROOT) == []


def test_a_figure_that_is_changed_in_the_text_is_seen(checkout: Path) -> None:
    assert faults(checkout) == []
    page = checkout / "docs" / "results.md"
    page.write_text(
        page.read_text().replace("| `int2` | 42 | 14.0 / 15.3", "| `int2` | 42 | 13.0 / 15.3")
    )
    assert faults(checkout) == ["docs/results.md: 'quality.formats' is not what its report says"]


def test_a_report_that_is_changed_is_seen_in_text_and_pictures(folder: Path) -> None:
    def faster(report: dict[str, Any]) -> None:
        for row in report["rows"]:
            row["value"] *= 2 if row["unit"] == "tokens/s" else 1

    change(folder / "throughput.json", faster)
    assert faults(ROOT, folder) == [
        "docs/results.md: 'serving.throughput serving.step serving.memory' is not what its "
        "report says",
        "docs/pictures/serving-light.svg is not drawn from its reports as they are",
        "docs/pictures/serving-dark.svg is not drawn from its reports as they are",
    ]


def test_another_commit_alone_is_seen(folder: Path) -> None:
    change(folder / "server.json", lambda report: report.update(commit="0000000"))
    found = faults(ROOT, folder)
    assert found[0] == "docs/load.md: 'server.servers server.told' is not what its report says"


def test_what_a_page_says_in_words_is_held_to_the_report(folder: Path) -> None:
    def lose_one(report: dict[str, Any]) -> None:
        (row,) = (r for r in report["rows"] if r["metric"] == "lost")
        row["value"] = 1

    change(folder / "soak_job.json", lose_one)
    with pytest.raises(ValueError, match=r"soak_job\.json: lost of native is not 0"):
        faults(ROOT, folder)


def test_a_report_that_nobody_shows_is_seen(folder: Path) -> None:
    shutil.copy(folder / "soak.json", folder / "another.json")
    assert faults(ROOT, folder) == ["another.json is shown nowhere"]


def test_what_is_not_shown_says_why_and_is_there() -> None:
    used: set[str] = set()
    for page in make_results.pages(ROOT):
        renewed(page.read_text(), page.relative_to(ROOT), RESULTS, used)
    for name, reason in make_results.NOT_SHOWN.items():
        assert reason
        assert (RESULTS / f"{name}.json").exists()
        assert name not in used


def test_continuations_are_those_of_their_report(folder: Path) -> None:
    file = folder / "continuations.md"
    file.write_text(file.read_text().replace("(the same for 8 tokens)", "(the same for 9 tokens)"))
    (found,) = faults(ROOT, folder)
    assert found.startswith("continuations.md: texts agree for other numbers of tokens")


def test_a_picture_that_is_missing_is_seen(checkout: Path) -> None:
    (checkout / "docs" / "pictures" / "quality-dark.svg").unlink()
    (found,) = faults(checkout)
    assert found == "docs/pictures/quality-dark.svg is not drawn from its reports as they are"


def test_a_marker_that_is_not_closed_is_refused(checkout: Path) -> None:
    page = checkout / "docs" / "results.md"
    page.write_text(page.read_text() + "\n<!-- result: soak.engine -->\n")
    with pytest.raises(SystemExit, match=r"docs/results\.md: a marker is not closed"):
        faults(checkout)


def test_a_figure_that_is_missing_is_named() -> None:
    with pytest.raises(LookupError, match=r"soak\.json has no 'losses' of 'real model'"):
        Reports()["soak"].value("real model", "losses")


def test_figures_have_the_digits_that_noise_leaves() -> None:
    written = [
        brief(value) for value in (0.01342, 0.0399, 0.7987, 1.004, 7.479, 14.03, 164.2, 1105.2)
    ]
    assert written == ["0.013", "0.040", "0.80", "1.0", "7.5", "14.0", "164", "1,105"]
    assert [signed(value) for value in (-0.004, 0.0052, -1.05, 22.71)] == [
        "0.00",
        "+0.01",
        "-1.05",
        "+22.7",
    ]
    assert [times(ratio) for ratio in (0.7446, 1.004, 5.41, 321.7)] == [
        "0.74x",
        "1.0x",
        "5.4x",
        "322x",
    ]
    assert between([2.21, 2.34]) == "2.2 to 2.3"
    assert between([2.21, 2.24]) == "2.2"


def test_points_of_the_quality_picture_are_means_over_books() -> None:
    rows = [
        {"case": "a, with a comma", "metric": quality.BYTES, "value": 40.0},
        {
            "case": "a, with a comma, book, 1 x 2048 tokens",
            "metric": quality.DIVERGENCE,
            "value": 1.0,
        },
        {
            "case": "a, with a comma, other, 1 x 2048 tokens",
            "metric": quality.DIVERGENCE,
            "value": 3.0,
        },
        {
            "case": "a, with a comma, other, 2 x 512 tokens",
            "metric": quality.DIVERGENCE,
            "value": 9.0,
        },
        {"case": "native, book, 1 x 2048 tokens", "metric": quality.DIVERGENCE, "value": 0.0},
    ]
    assert quality.points(rows) == {"a, with a comma": (40.0, 2.0)}
    assert quality.frontier([(3, 1), (1, 2), (2, 5), (4, 0.5)]) == [(1, 2), (3, 1), (4, 0.5)]


def test_a_title_holds_only_while_its_figures_do() -> None:
    line = [(40.0, 10.0), (80.0, 0.1)]
    assert quality.are_above(
        [(60.0, 1.01), (30.0, 0.01)], line
    )  # the second is over no bytes of it
    assert not quality.are_above([(60.0, 0.99)], line)


@pytest.mark.skipif(not find_spec("matplotlib"), reason="needs matplotlib")
def test_a_picture_is_drawn_the_same_every_time(tmp_path: Path) -> None:
    files = [tmp_path / "once.svg", tmp_path / "again.svg"]
    for file in files:
        layers.draw(LIGHT, Reports(), file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert make_results.is_of(files[0], Reports(), layers.REPORTS)


def test_limits_of_errors_are_those_of_the_tests() -> None:
    pytest.importorskip("triton")
    from tests.support.triton_fleet import limit_of

    int8, int4, int2 = (limit_of(FORMATS[f], torch.float32) for f in ("int8", "int4", "int2"))
    assert int4 == int2
    told = f"(int8 within {int8:.0e}, int4 and int2 within {int4:.0e},".replace("e-03", "e-3")
    assert told in (ROOT / "docs" / "results.md").read_text()
