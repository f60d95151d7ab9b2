"""What every benchmark writes: command, device, versions, commit, rows. Measures nothing itself."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from traceback import format_exception_only
from typing import Any

import torch

from ..errors import PagedKVError

PACKAGES = (
    *("torch", "triton", "transformers", "numpy", "numba", "xformers", "vllm", "ray"),
    *("optimum-quanto", "hqq"),
)
ROOT = Path(__file__).resolve().parents[2]  # of a checkout
SOURCES = ("bench", "kernels", "paged_kv", "scheduler", "tests")


def commit() -> str:
    """The commit that is checked out; a digest of the sources, where that alone does not tell.

    Of an installed package, which is no checkout, the version.
    """
    if not (ROOT / "pyproject.toml").exists():
        return f"version {version('paged-kv')}"
    name = ""
    if shutil.which("git"):
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        name = result.stdout.strip()
    if name and not name.endswith("-dirty"):
        return name
    return f"{name or 'unknown'}, sources {digest()}"


def digest(root: Path = ROOT) -> str:
    """Of all Python files, which a folder that was copied without its commits still has."""
    files = {file.resolve() for folder in SOURCES for file in (root / folder).rglob("*.py")}
    found = sha256()
    for file in sorted(files):
        found.update(f"{file.relative_to(root.resolve())}\0".encode() + file.read_bytes())
    return found.hexdigest()[:8]


COMMIT = commit()  # of the code that runs, even if it is committed on meanwhile


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure beside its baseline; `ratio` above 1 means that the value is the better one."""

    case: str
    metric: str
    value: float
    unit: str
    baseline: str | None = None
    baseline_value: float | None = None
    ratio: float | None = None


def kept_rows(json_file: Path | None) -> list[Row]:
    """What was measured before by the same code on the same device, for who goes on with it."""
    if json_file is None or not json_file.exists():
        return []
    report = json.loads(json_file.read_text())
    if (report["commit"], report["device"]) != (COMMIT, device()):
        return []
    return [Row(**row) for row in report["rows"]]


def failure_row(case: str, error: Exception) -> Row:
    """In place of a figure, so that whoever goes on with these rows does not fail there again."""
    reason = format_exception_only(error)[0].splitlines()[0]
    return Row(case=case, metric=f"failed: {reason}", value=0, unit="")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every benchmark."""
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--quick", action="store_true", help="a small run that shows it works")


def command_of(words: Sequence[str]) -> str:
    """A command as one types it: folders below this one or the user's are not spelled out."""
    here, home = f"{Path.cwd()}/", f"{Path.home()}/"
    shown = []
    for word in words:
        if word.startswith(here):
            word = word.removeprefix(here)
        in_home = word.startswith(home) and len(home) > 2
        shown.append("~/" * in_home + shlex.quote(word.removeprefix(home) if in_home else word))
    return " ".join(shown)


def report_of(benchmark: str, rows: Sequence[Row], command: str | None = None) -> dict[str, Any]:
    """What is written of some rows; without a `command` the one that runs."""
    return {
        "benchmark": benchmark,
        "command": command or command_of(["python", *sys.argv]),
        "commit": COMMIT,
        "device": device(),
        "versions": versions(),
        "rows": [asdict(row) for row in rows],
    }


def write_report(benchmark: str, rows: list[Row], json_file: Path | None) -> None:
    """Print the rows with where they were measured, and write them as JSON if asked to."""
    report = report_of(benchmark, rows)
    print(f"{benchmark} at {report['commit']} on {report['device']}; {report['versions']}")
    print(report["command"])
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}x "
        beside = "" if row.baseline is None else f"  {ratio}{row.baseline}"
        print(f"  {row.case:44} {row.metric:28} {row.value:12.4f} {row.unit}{beside}")
    if json_file is not None:
        write_json(report, json_file)


def unfinished_of(file: Path) -> Path:
    """Where a file is written before it takes its place; `KeptResults` of it end in .part."""
    return file.with_name(f"{file.name}.new")


def write_json(report: dict[str, Any], json_file: Path) -> None:
    unfinished = unfinished_of(json_file)
    try:
        unfinished.write_text(json.dumps(report, indent=1) + "\n")
        unfinished.replace(json_file)  # whoever is stopped here has the one or the other
    except OSError as error:
        raise PagedKVError(f"cannot write {str(json_file)!r}: {error.strerror}") from error


def device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        names = [line for line in cpu_info.read_text().splitlines() if "model name" in line]
        model = names[0].split(":")[1].strip() if names else model
    return (
        f"CPU {model}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
