"""The list of planted faults goes with the code, and the tool tells which of them are caught."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from tools.mutant_list import MUTANTS, Mutant
from tools.mutants import mutated, outcomes

ROOT = Path(__file__).parent.parent
SOURCE = "def double(number):\n    return 2 * number\n"
TEST = "from module import double\n\n\ndef test_doubling():\n    assert double(3) == 6\n"


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_every_fault_has_its_place_and_is_code(mutant: Mutant) -> None:
    source = mutated((ROOT / mutant.path).read_text(), mutant)
    compile(source, mutant.path, "exec")
    for test in mutant.tests:
        assert (ROOT / test.partition("::")[0]).is_file(), test


def test_there_are_many_faults_and_each_has_a_name() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 60


def in_module(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, "module.py", old, new, ("test_module.py",))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "module.py").write_text(SOURCE)
    (tmp_path / "test_module.py").write_text(TEST)
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


def test_the_tool_tells_what_is_caught(checkout: Path) -> None:
    found = outcomes(
        checkout,
        [
            in_module("seen", "2 * number", "3 * number"),
            in_module("not seen", "2 * number", "number + number"),
            in_module("nowhere", "4 * number", "5 * number"),
            in_module("no code", "return", "return ("),
        ],
    )
    assert [(outcome.mutant.name, outcome.verdict) for outcome in found] == [
        ("seen", "caught"),
        ("not seen", "survived"),
        ("nowhere", "error"),
        ("no code", "error"),
    ]
    assert (checkout / "module.py").read_text() == SOURCE


def test_a_copy_that_fails_without_a_fault_says_nothing(checkout: Path) -> None:
    (checkout / "module.py").write_text(SOURCE.replace("2", "3"))
    with pytest.raises(SystemExit, match="without any fault"):
        next(outcomes(checkout, [in_module("seen", "2 * number", "4 * number")]))
