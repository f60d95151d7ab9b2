"""A benchmark's report as it lies in bench/results, and how its figures are written in Markdown.

Knows rows and where they were measured, never what they mean. Needs only Python.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "results"
# Versions that a figure may hang on; of these a report names what it was measured with.
VERSIONS = ("torch", "transformers", "numba", "vllm")
VERSIONS_OF = {
    "block_manager": ("numpy", "numba"),
    "fleet": ("numpy", "numba"),
    "generate_cache": ("torch", "transformers", "numba", "optimum-quanto", "hqq"),
    "layer_groups": ("numpy", "numba", "vllm"),
    "machine_code": ("triton",),
    "mutants": (),
    "ptx": ("triton",),
    "ray_serve": ("torch", "transformers", "numba", "ray"),
    "ray_vllm": ("torch", "transformers", "vllm", "ray"),
    "soak_block_manager": ("numpy", "numba"),
}

# Measured with presets of formats that have others by now (blocks, wide channels): the bytes and
# divergence of these names are not today's. A new measurement is at another commit.
EARLIER_FORMATS = {
    ("throughput", "72bfae7"),
    ("windowed", "bd0fa53"),
    ("windowed_generate", "4d938d0"),
    ("windowed_sinks", "bd0fa53"),
}

Row = dict[str, Any]


class Report:
    """One JSON; asks for a figure by its case and metric, and tells what is missing by name."""

    def __init__(self, name: str, file: Path) -> None:
        written = file.read_bytes()
        found = json.loads(written)
        self.name = name
        self.rows: list[Row] = found["rows"]
        self.commit: str = found["commit"]
        self.device: str = found["device"].replace("1 threads", "1 thread")
        self.versions: dict[str, str] = found["versions"]
        self.digest = sha256(written).hexdigest()[:16]

    def row(self, case: str, metric: str, baseline: str | None = None, unit: str = "") -> Row:
        """The first one that fits; several rows of a figure differ by what is beside it."""
        for row in self.rows:
            if (row["case"], row["metric"]) != (case, metric):
                continue
            if (not baseline or row["baseline"] == baseline) and (not unit or row["unit"] == unit):
                return row
        raise LookupError(f"{self.name}.json has no {metric!r} of {case!r}, beside {baseline}")

    def value(self, case: str, metric: str, unit: str = "") -> float:
        value: float = self.row(case, metric, unit=unit)["value"]
        return value

    def ratio(self, case: str, metric: str, baseline: str | None = None) -> float:
        ratio: float = self.row(case, metric, baseline)["ratio"]
        return ratio

    def source(self) -> str:
        """Where, at which commit and with what: one line under everything that is shown."""
        names = VERSIONS_OF.get(self.name, VERSIONS)
        versions = ", ".join(
            f"{name} {self.versions[name]}" for name in names if name in self.versions
        )
        earlier = (self.name, self.commit) in EARLIER_FORMATS
        parts = (
            f"`bench/results/{self.name}.json`",
            f"commit {self.commit}" + ", with the formats of that time" * earlier,
            self.device,
            versions,
        )
        return "; ".join(part for part in parts if part)


class Reports:
    """All reports of a folder by name; remembers which were asked for."""

    def __init__(self, folder: Path = RESULTS) -> None:
        self.folder = folder
        self.used: list[str] = []
        self._read: dict[str, Report] = {}

    def __getitem__(self, name: str) -> Report:
        if name not in self.used:
            self.used.append(name)
        if name not in self._read:
            self._read[name] = Report(name, self.folder / f"{name}.json")
        return self._read[name]


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are figures."""
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ruler, *lines))


def brief(value: float) -> str:
    """Two digits, three from 10 on, whole numbers from 100 on: what noise leaves of a figure."""
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    decimals = 1 if size >= 0.995 else 2 if size >= 0.0995 else 3 if size >= 0.00995 else 4
    return f"{value:.{decimals}f}"


def signed(value: float) -> str:
    """Of a change in percent."""
    written = f"{value:+.2f}" if abs(value) < 9.995 else f"{value:+.1f}"
    return written.replace("-0.00", "0.00").replace("+0.00", "0.00")


def times(ratio: float) -> str:
    return (
        f"{ratio:.0f}x" if ratio >= 9.95 else f"{ratio:.1f}x" if ratio >= 0.995 else f"{ratio:.2f}x"
    )


def between(values: Iterable[float], form: str = "{:.1f}") -> str:
    """The least and the most, or one of them where they are written alike."""
    found = sorted(values)
    least, most = form.format(found[0]), form.format(found[-1])
    return least if least == most else f"{least} to {most}"


def code(names: Iterable[str]) -> str:
    """`a`, `b` and `c`."""
    *before, last = (f"`{name}`" for name in names)
    return f"{', '.join(before)} and {last}" if before else last
