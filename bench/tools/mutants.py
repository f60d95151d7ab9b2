"""Whether the tests would see a mistake: faults of one line, each in a copy of the checkout.

    PYTHONPATH=bench python bench/tools/mutants.py --json bench/results/mutants.json
    PYTHONPATH=bench python bench/tools/mutants.py --list
    PYTHONPATH=bench python bench/tools/mutants.py --only fork-keeps-the-capacity-of-its-parent

Knows how to plant a fault and run tests, not what the faults are: `mutant_list.py` has them. What
is copied are the tracked files as they stand. Tests run once without any fault before they are to
see one: they have to pass, or being caught would mean nothing. A fault whose old text is not there
exactly once, or after which the tests cannot even be collected, is an error of the list. A crash of
the tests is seen by everybody, so it counts as caught; a run without an end does not.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

from report import Row, write_report
from tools.mutant_list import MUTANTS, Mutant

ROOT: Final = Path(__file__).resolve().parent.parent.parent
LIMIT: Final = 600  # seconds for the tests of one fault
PASSED, FAILED = 0, 1  # exit codes of pytest


class Run(NamedTuple):
    """Tests that ran until the first one failed; `first_failed` is empty where none did."""

    exit_code: int | None  # None: stopped after `LIMIT`
    seconds: float
    first_failed: str
    output: str


class Outcome(NamedTuple):
    mutant: Mutant
    verdict: str  # "caught", "survived" or "error"
    seconds: float
    remark: str  # the test that caught it, or what went wrong


def mutated(source: str, mutant: Mutant) -> str:
    """A file with the fault; raises `ValueError` unless there is one place for it."""
    count = source.count(mutant.old)
    if count != 1:
        raise ValueError(f"{mutant.name}: its old text is {count} times in {mutant.path}")
    return source.replace(mutant.old, mutant.new)


def copy_checkout(root: Path, target: Path) -> None:
    """The tracked files as they stand, links as links."""
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z"], capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if os.path.lexists(root / name):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name, follow_symlinks=False)


@contextmanager
def planted(checkout: Path, mutant: Mutant) -> Iterator[None]:
    """The copy with a fault, for as long as that takes."""
    path = checkout / mutant.path
    source = path.read_text()
    path.write_text(mutated(source, mutant))
    try:
        yield
    finally:
        path.write_text(source)


def run_tests(checkout: Path, tests: Sequence[str], limit: float = LIMIT) -> Run:
    """Tests of a copy, in this order, up to the first that fails."""
    shutil.rmtree(checkout / ".hypothesis", ignore_errors=True)  # what other faults have taught it
    code_folder = checkout.parent / "code"  # has a folder for each state of the sources
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "PYTHONDONTWRITEBYTECODE": "1",  # two sources of one second would look the same to it
        "PAGED_KV_CACHE_DIR": str(code_folder),
    }
    options = ["-x", "-q", "-rfE", "--tb=no", "--no-header", "-p", "no:cacheprovider"]
    options += ["-p", "no:xdist", "--hypothesis-seed=0"]
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    exit_code: int | None
    try:
        output, _ = process.communicate(timeout=limit)
        exit_code = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        exit_code = None
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    seconds = time.perf_counter() - start
    return Run(exit_code, seconds, failed[1] if failed else "", output)


def outcome_of(checkout: Path, mutant: Mutant) -> Outcome:
    """What the tests say to a fault."""
    try:
        with planted(checkout, mutant):
            run = run_tests(checkout, mutant.tests)
    except ValueError as error:
        return Outcome(mutant, "error", 0.0, str(error))
    if run.exit_code == FAILED:
        return Outcome(mutant, "caught", run.seconds, run.first_failed)
    if run.exit_code == PASSED:
        return Outcome(mutant, "survived", run.seconds, "")
    if run.exit_code is not None and run.exit_code < 0:
        return Outcome(mutant, "caught", run.seconds, f"a crash by signal {-run.exit_code}")
    if run.exit_code is None:
        return Outcome(mutant, "error", run.seconds, f"no end within {LIMIT} s")
    return Outcome(mutant, "error", run.seconds, run.output[-500:])


def outcomes(root: Path, mutants: Sequence[Mutant]) -> Iterator[Outcome]:
    """Of each fault; raises `SystemExit` if tests that are to see it fail without any."""
    with TemporaryDirectory(prefix="mutants-") as folder:
        checkout = Path(folder) / "checkout"
        copy_checkout(root, checkout)
        passed: set[str] = set()
        for mutant in mutants:
            new = [test for test in mutant.tests if test not in passed]
            if new:
                sound = run_tests(checkout, new, LIMIT * len(new))
                if sound.exit_code != PASSED:
                    raise SystemExit(f"tests fail without any fault:\n{sound.output[-2000:]}")
                passed.update(new)
            yield outcome_of(checkout, mutant)


def rows_of(found: Sequence[Outcome]) -> list[Row]:
    """One row for each fault, and their sums."""
    verdicts = [outcome.verdict for outcome in found]
    rows = [
        Row(case="all", metric=f"faults {verdict}", value=verdicts.count(verdict), unit="")
        for verdict in ("caught", "survived", "error")
    ]
    for outcome in found:
        metric = " ".join(filter(None, (outcome.verdict, "by", outcome.remark)))
        if outcome.verdict != "caught":
            metric = outcome.verdict
        rows.append(
            Row(case=outcome.mutant.name, metric=metric, value=round(outcome.seconds, 1), unit="s")
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these faults alone")
    parser.add_argument("--list", action="store_true", help="say what there is, run nothing")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    known = {mutant.name: mutant for mutant in MUTANTS}
    unknown = [name for name in arguments.only or () if name not in known]
    if unknown:
        parser.error(f"no fault is called {', '.join(unknown)}")
    mutants = [known[name] for name in arguments.only or known]
    if arguments.list:
        for mutant in mutants:
            print(f"{mutant.name:56} {mutant.path}")
        return
    found = []
    for outcome in outcomes(ROOT, mutants):
        found.append(outcome)
        name, seconds = outcome.mutant.name, outcome.seconds
        print(f"{outcome.verdict:9}{seconds:6.1f} s  {name:56} {outcome.remark}", flush=True)
    write_report("mutants", rows_of(found), arguments.json)
    if any(outcome.verdict != "caught" for outcome in found):
        raise SystemExit("not every fault is caught")


if __name__ == "__main__":
    main()
