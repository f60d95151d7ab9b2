"""A GPU's answers to `bench/tools/gpu_expectations.py` beside those of the emulated one.

    TRITON_INTERPRET=0 PYTHONPATH=bench:. python -m tests.soak.ptx_answers FILE.npz [--json FILE]

Of each answer: how many numbers differ from the emulator's, for sums of products under each rule
that it knows; and the greatest difference in units of the last place. Needs no GPU itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from report import Row, add_arguments, write_report
from tools.gpu_expectations import answers

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


def rows_of(device: Answers, emulated: dict[str, Answers]) -> list[Row]:
    """Of each answer and rule; one row where the rule makes no difference."""
    rows = []
    for name, found in device.items():
        for rule in RULES if name.startswith("sums") else RULES[:1]:
            expected = emulated[rule][name]
            differing = int((found != expected).sum())
            differing -= int((np.isnan(found) & np.isnan(expected)).sum())
            worst = min(difference(found, expected), 1e30)
            case = f"{name}, {rule}" if name.startswith("sums") else name
            rows.append(
                Row(case=case, metric=f"differ of {found.size}", value=differing, unit="numbers")
            )
            rows.append(Row(case=case, metric="greatest difference", value=worst, unit="ulp"))
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
    write_report("a GPU beside the emulated one", rows_of(device, emulated), arguments.json)


if __name__ == "__main__":
    main()
