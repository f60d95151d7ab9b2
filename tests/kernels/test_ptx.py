"""What the compiler makes of Triton's kernels, run on an emulated GPU: whole attention calls.

A covering set: every format, with head dims, groups of query heads, dtypes and rules spread over
them. `make test-ptx` runs all of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import triton

from paged_kv.cache.formats import INT2, INT8
from tests.support.device_tables import decode_across_a_seal
from tests.support.ptx.attention_case import CASES, Case, run_case
from tests.support.ptx.settings import Settings
from tests.support.ptx.triton_emulation import emulated_gpu

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="kernels are interpreted")
KERNELS = {"attend_open", "attend_sealed", "attend_prefill", "merge_parts", "seal_blocks"}


@pytest.mark.parametrize(
    ("arch", "case"), [pytest.param(arch, case, id=f"sm{arch}-{case}") for arch, case in CASES]
)
def test_attention_is_that_of_the_oracle_and_bytes_those_of_the_reference(
    arch: int, case: Case, cache_folder: Path
) -> None:
    with emulated_gpu(arch, cache_folder) as gpu:
        outcome = run_case(case)
    assert outcome.error <= outcome.limit
    assert not outcome.differing
    if not case.kv_format.is_native:
        assert outcome.num_sealed
        assert gpu.launches.keys() - {"rotate_rows"} == KERNELS
    assert ("rotate_rows" in gpu.launches) == case.kv_format.rotates_values
    assert outcome.num_apart == case.is_apart


@pytest.mark.parametrize(("arch", "sums"), [(80, "ampere"), (90, "hopper")])
def test_there_is_room_for_the_hardware_s_own_rounding(arch, sums, cache_folder):
    for kv_format in (INT8, INT2):
        with emulated_gpu(arch, cache_folder, Settings(sums=sums, noise=0)):
            outcome = run_case(Case(kv_format, 64, 1, torch.float16, num_kv_heads=1))
        assert outcome.error <= outcome.limit
        assert not outcome.differing


@pytest.mark.parametrize("arch", [80, 90])
def test_decode_steps_are_made_of_tables_as_of_plans(arch: int, cache_folder: Path) -> None:
    with emulated_gpu(arch, cache_folder) as gpu:
        num_seals = decode_across_a_seal()
    assert num_seals == 1
    assert gpu.launches == {"make_decode_inputs": 6}
