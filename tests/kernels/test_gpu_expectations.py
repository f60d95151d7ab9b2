"""What is expected of a GPU's arithmetic is met by the interpreter, and by the emulated GPU."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import triton
from tools.gpu_expectations import answers, main, rows_of

from tests.soak.ptx_answers import difference, emulated_answers
from tests.soak.ptx_answers import rows_of as rows_beside
from tests.support.ptx.settings import Settings

IS_INTERPRETED = triton.knobs.runtime.interpret
needs_compiler = pytest.mark.skipif(IS_INTERPRETED, reason="kernels are interpreted")
pytestmark = [  # of the interpreter's own numbers
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
APPROXIMATE = {"ex2.approx", "lg2.approx", "rcp.approx", "div.full"}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def found() -> Iterator[dict[str, np.ndarray]]:
    if not IS_INTERPRETED and DEVICE.type == "cpu":
        pytest.skip("needs TRITON_INTERPRET=1 or a GPU")
    return answers(True, DEVICE)


def test_all_is_asked_and_as_expected(found):
    rows = rows_of(found, True)
    assert {row.case for row in rows} == found.keys()
    assert not [row for row in rows if row.ratio is not None]


@pytest.mark.parametrize(
    "name",
    ["planes of 4 bits", "third bits, tile 1", "codes of 2 bits times fp16, 64x64x16", "to fp16"],
)
def test_one_number_that_is_flushed_is_seen(found, name):
    wrong = found[name].copy()
    where = tuple(np.argwhere(wrong != 0)[0])
    wrong[where] = 0
    (row,) = (row for row in rows_of(found | {name: wrong}, True) if row.case == name)
    assert (row.value, row.baseline_value, row.ratio) == (1, 0, 0)


@pytest.mark.parametrize(
    ("name", "factor"),
    [("ex2.approx", 1 + 2.0**-21), ("div.rn", 1 + 2.0**-23), ("rcp.approx", np.nan)],
)
def test_an_error_that_is_too_large_is_seen(found, name, factor):
    wrong = found | {name: (found[name] * factor).astype(np.float32)}
    (row,) = (row for row in rows_of(wrong, True) if row.case == name)
    assert row.ratio is not None
    assert row.ratio < 1


def test_answers_and_rows_are_written(found, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tools.gpu_expectations.answers", lambda *_: found)
    files = tmp_path / "rows.json", tmp_path / "answers.npz"
    command = ["gpu_expectations.py", "--quick", "--json", files[0], "--answers", files[1]]
    monkeypatch.setattr("sys.argv", [str(part) for part in command])
    assert main() == 0
    assert "0 of 50 not as expected" in capsys.readouterr().out
    with np.load(files[1]) as written:
        assert written.keys() == found.keys()


@needs_compiler
@pytest.mark.parametrize(("arch", "sums"), [(80, "ampere"), (90, "hopper")])
def test_the_emulated_gpu_is_as_expected(arch, sums, cache_folder):
    emulated = emulated_answers(True, arch, Settings(sums=sums), cache_folder)
    assert not [row for row in rows_of(emulated, True) if row.ratio is not None]


@needs_compiler
def test_noise_is_told_beside_the_emulated_gpu(cache_folder):
    emulated = emulated_answers(True, 90, Settings(noise=0), cache_folder)
    for row in rows_of(emulated, True):  # noise is added to what is rounded already
        assert row.ratio is None or (row.case in APPROXIMATE and row.ratio > 0.5), row
    exact = emulated_answers(True, 90, Settings(), cache_folder)
    rows = rows_beside(emulated, dict.fromkeys(("exact", "ampere", "hopper"), exact), True)
    differing = {row.case for row in rows if row.metric.startswith("differ") and row.value}
    assert differing == APPROXIMATE
    assert all(row.value == row.baseline_value for row in rows if row.metric == "greatest error")


def test_differences_are_told():
    ones = np.ones(2, np.float32)
    assert difference(np.float32([1, 1 + 2.0**-22]), ones) == 2
    assert difference(np.float32([1, np.nan]), ones) == np.inf
    assert difference(np.int16([3, 4]), np.int16([3, 6])) == 2
