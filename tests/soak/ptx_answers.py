"""A GPU's answers to `bench/tools/gpu_expectations.py` beside those of the emulated one.

    TRITON_INTERPRET=0 PYTHONPATH=bench:. python -m tests.soak.ptx_answers FILE.npz [--json FILE]

Of each answer: how many numbers differ from the emulator's, and by how many units of the last
place; of sums of products, for each rule that it knows, how far both are from the exact sum, in
units of 2^-24 of the greatest term. Needs no GPU itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from report import Row, add_arguments, write_report
from tools.gpu_expectations import answers, products, sum_error

from tests.support.ptx.settings import Settings
from tests.support.ptx.triton_emulation import emulated_gpu

RULES = ("exact", "ampere", "hopper")
Answers = dict[str, NDArray]


def emulated_answers(quick: bool, arch: int, settings: Settings, folder: Path) -> Answers:
    """The folder keeps what is compiled."""
    with emulated_gpu(arch, folder, settings):
        return answers(quick, torch.device("cpu"))


def difference(found: NDArray, expected: NDArray) -> float:
    """The greatest, in units of float32's last place; of bits, in numbers of their type between."""
    if found.dtype == np.float32:
        unit = np.spacing(np.maximum(np.abs(expected), np.float32(2.0**-126)))
        apart = np.abs(found.astype(np.float64) - expected) / unit
    else:
        apart = np.abs(found.astype(np.float64) - expected)
    is_same = (found == expected) | (np.isnan(found) & np.isnan(expected))
    return float(np.nan_to_num(np.where(is_same, 0, apart), nan=np.inf).max())


def number_differing(found: NDArray, expected: NDArray) -> int:
    both_are_none = np.isnan(found) & np.isnan(expected)
    return int(((found != expected) & ~both_are_none).sum())


def rows_of(device: Answers, emulated: dict[str, Answers], quick: bool) -> list[Row]:
    """How far answers are apart; for sums of products how far each is from the exact sum."""
    cases = {f"sums of {case}": case for case in products(quick)}
    rows = []
    for name, found in device.items():
        for rule in RULES if name in cases else RULES[:1]:
            expected = emulated[rule][name]
            label = f"{name}, {rule}" if name in cases else name
            number = number_differing(found, expected)
            rows.append(
                Row(case=label, metric=f"differ of {found.size}", value=number, unit="numbers")
            )
            if name in cases:
                errors = [sum_error(cases[name], answer) for answer in (found, expected)]
                figure = {"metric": "greatest error", "value": errors[0], "unit": "2^-24"}
                beside = {"baseline": "emulated", "baseline_value": errors[1]}
                rows.append(Row(case=label, **figure, **beside))
            else:
                apart = min(difference(found, expected), 1e30)
                rows.append(Row(case=label, metric="greatest difference", value=apart, unit="ulp"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help="what gpu_expectations.py wrote as --answers")
    parser.add_argument("--arch", type=int, default=90, help="of that GPU (90)")
    add_arguments(parser)
    arguments = parser.parse_args()
    with np.load(arguments.file) as file:
        device = dict(file)
    with TemporaryDirectory() as folder:
        emulated = {
            rule: emulated_answers(
                arguments.quick, arguments.arch, Settings(sums=rule), Path(folder)
            )
            for rule in RULES
        }
    write_report(
        "a GPU beside the emulated one", rows_of(device, emulated, arguments.quick), arguments.json
    )


if __name__ == "__main__":
    main()
