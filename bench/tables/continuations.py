"""Whether bench/results/continuations.md, which its benchmark wrote, is of its JSON's run."""

from __future__ import annotations

import re

from tables.report import Reports

SAME = re.compile(r"^\*\*int2\*\* \((?:the same for (\d+) tokens|the same)\)", re.MULTILINE)


def differences(reports: Reports) -> list[str]:
    report = reports["continuations"]
    text = (reports.folder / "continuations.md").read_text()
    found = []
    if f"`bench/bench_continuations.py` at {report.commit}." not in text:
        found.append("continuations.md is of another commit than continuations.json")
    told = [row["value"] for row in report.rows if row["metric"] == "tokens as native"]
    most = max(told)
    if [int(same or most) for same in SAME.findall(text)] != told:
        found.append("continuations.md: texts agree for other numbers of tokens than the JSON says")
    return found
