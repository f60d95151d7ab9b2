"""The examples run as they stand, and need no more than they say."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
FORBIDDEN = {
    "embed": ("transformers", "rich"),
    "blocks_only": ("torch", "transformers"),
    "endless_chat": (),
}


ARGUMENTS = {"endless_chat": ("20",)}
pytestmark = pytest.mark.xdist_group("examples")  # so that each of them runs once


@cache
def output_of(name: str) -> str:
    """What an example prints. It must import nothing of what it says it does without."""
    script = f"import runpy, sys; sys.argv[1:] = {ARGUMENTS.get(name, ())!r}\n"
    script += f"runpy.run_path({str(EXAMPLES / name)!r} + '.py', run_name='__main__')\n"
    script += f"assert not set(sys.modules) & {set(FORBIDDEN[name])!r}, sys.modules\n"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("name", sorted(FORBIDDEN))
def test_example_runs_and_imports_only_what_it_says(name: str) -> None:
    assert output_of(name)


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(FORBIDDEN)


def test_the_serving_loop_is_short_and_shares_its_prefix() -> None:
    assert len((EXAMPLES / "embed.py").read_text().splitlines()) < 60
    output = output_of("embed").splitlines()
    assert sum(line.startswith("request ") for line in output) == 12
    assert "41 steps; 2860 of 3720 prompt tokens came from shared blocks" in output[-1]


def test_the_manager_alone_prints_what_it_promises() -> None:
    output = output_of("blocks_only").splitlines()
    assert output[2] == "computed already: 448 tokens"
    assert output[-1] == "free again: 64 of 64"


def test_the_chat_outlives_the_models_length_in_constant_memory() -> None:
    *turns, last = output_of("endless_chat").splitlines()
    lengths = [int(turn.split()[0].strip("[")) for turn in turns]
    assert lengths[-1] > 1200
    held = [int(turn.split()[2]) for turn in turns]
    assert max(held[10:]) <= max(held[:10]) + 1
    assert last.startswith("at most ")
    assert int(last.split()[2]) <= 16
