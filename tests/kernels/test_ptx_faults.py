"""Whether the emulated GPU and its oracles would see faults in compiled kernels: some, planted."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import triton

from paged_kv.cache.formats import INT4, INT8
from tests.support.device_tables import decode_across_a_seal
from tests.support.ptx.attention_case import Case, Outcome, run_case
from tests.support.ptx.errors import PtxError
from tests.support.ptx.triton_emulation import emulated_gpu

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="kernels are interpreted")
CASE = Case(INT4, 64, 4, torch.bfloat16, num_kv_heads=1)  # launches every kernel
ACCUMULATOR = r"(mma\.sync[^;]*\{)\s*%r\d+(, [^{};]*\};)"  # its first register
BARRIER = r"bar\.sync\s+0;"


def run_with(
    change: Callable[[str], str], kernel: str, arch: int, folder: Path, case: Case = CASE
) -> Outcome:
    """With one kernel's PTX changed, which has to change something."""
    changed = []

    def edit(name: str, ptx: str) -> str:
        if name != kernel:
            return ptx
        changed.append(change(ptx) != ptx)
        return change(ptx)

    with emulated_gpu(arch, folder, edit=edit):
        try:
            return run_case(case)
        finally:
            assert any(changed), "the fault was not planted"


class Fault(NamedTuple):
    kernel: str
    pattern: str
    replacement: str
    seen: str  # in the emulator's message; or by "outputs", or "bytes"
    which: int = 0  # of the places that match
    arch: int = 80
    case: Case = CASE

    def change(self, ptx: str) -> str:
        matches = list(re.finditer(self.pattern, ptx))
        if not -len(matches) <= self.which < len(matches):
            return ptx
        match = matches[self.which]
        return ptx[: match.start()] + match.expand(self.replacement) + ptx[match.end() :]


FAULTS = {
    "wait for one group of copies less": Fault(
        "attend_open", r"cp\.async\.wait_group(\s+)2;", r"cp.async.wait_group\g<1>3;", "cp.async"
    ),
    "matrix not transposed": Fault(
        "attend_open", r"x4\.trans\.shared", "x4.shared", "outputs", which=-1
    ),
    "query 2 bytes further": Fault(
        "attend_open",
        r"ld\.param\.b64\s+(%rd\d+), \[attend_open_param_0\];",
        r"\g<0> add.s64 \1, \1, 2;",
        "misaligned",
    ),
    "copy from 1 MiB further": Fault(
        "attend_open",
        r"(cp\.async\.cg\.shared\.global \[ %r\d+ \+ 0 \], \[ %rd\d+) \+ 0 \]",
        r"\1 + 16777216 ]",
        "no buffer there|which has",
    ),
    "sum of a product forgotten": Fault(
        "attend_sealed",
        r"(mma\.sync[^;]*\{)\s*%r\d+(, [^{};]*\};)",
        r"\1 0f00000000\2",
        "outputs",
        which=-1,
    ),
    "exponent of the wrong sign": Fault(
        "attend_sealed",
        r"ex2\.approx\.ftz\.f32 (%r\d+), (%r\d+);",
        r"neg.f32 \1, \2; ex2.approx.ftz.f32 \1, \1;",
        "outputs",
        which=1,
    ),
    "wrong byte unpacked": Fault(
        "attend_sealed",
        r" 0, 0x4140",
        " 0, 0x4142",
        "outputs",
        case=replace(CASE, kv_format=INT8),
    ),
    "sum of a product forgotten in a prefill": Fault(
        "attend_prefill",
        r"(mma\.sync[^;]*\{)\s*%r\d+(, [^{};]*\};)",
        r"\1 0f00000000\2",
        "outputs",
        which=-1,
    ),
    "no fence before a warp group's product": Fault(
        "attend_prefill", r"fence\.proxy\.async[^;]*;", "", "fence.proxy.async", arch=90
    ),
    "no wait for a warp group's product": Fault(
        "attend_prefill",
        r"wgmma\.wait_group\.sync\.aligned 0;",
        "wgmma.wait_group.sync.aligned 1;",
        "a wgmma may still read",
        arch=90,
    ),
    "output 16 bytes further": Fault(
        "merge_parts", r"(st\.global\.[\w.]* \[ %rd\d+) \+ 0 \]", r"\1 + 16 ]", "outputs|bytes|race"
    ),
    "log-sum-exps of other kernels to another base": Fault(
        "merge_parts",
        r"0f3FB8AA3B",
        "0f3F800000",
        "outputs",
        which=-1,
        case=replace(CASE, is_apart=True),
    ),
    "a code too great by one": Fault("seal_blocks", "0f4B400000", "0f4B400001", "bytes"),
    "a scale in its neighbour's place": Fault(
        "seal_blocks", r"(st\.global\.b16 \[ %rd\d+) \+ 0 \]", r"\1 + 2 ]", "bytes|race|which has"
    ),
    "a sum instead of a difference": Fault(
        "rotate_rows", r"sub(\.\w+)?\.f32", r"add\1.f32", "bytes"
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_a_compiled_kernel_is_seen(name, cache_folder):
    fault = FAULTS[name]
    try:
        outcome = run_with(fault.change, fault.kernel, fault.arch, cache_folder, fault.case)
    except PtxError as error:
        seen = str(error)
    else:
        seen = "outputs " if outcome.error > outcome.limit else ""
        seen += "bytes" if outcome.differing else ""
    assert re.search(fault.seen, seen), seen


def test_nothing_is_seen_where_nothing_is_wrong(cache_folder):
    outcome = run_with(lambda ptx: ptx + "\n// as it was\n", "attend_open", 80, cache_folder, CASE)
    assert outcome.error <= outcome.limit
    assert not outcome.differing


def without_barrier(which: int, ptx: str) -> str:
    barriers = list(re.finditer(BARRIER, ptx))
    place = barriers[which % len(barriers)]
    return ptx[: place.start()] + ptx[place.end() :]


@pytest.mark.parametrize(
    ("kernel", "arch"),
    [
        ("attend_open", 80),
        ("attend_sealed", 80),  # int8's: that of int4 is of one warp
        ("attend_prefill", 80),
        ("attend_prefill", 90),
        ("seal_blocks", 80),
    ],
)
@pytest.mark.parametrize("which", [1, 3, -1])
def test_a_barrier_less_is_seen(kernel, arch, which, cache_folder):
    """The first one is between the first copies of two stages, which touch different memory."""
    change = partial(without_barrier, which)
    with pytest.raises(PtxError, match=r"without a barrier|nobody wrote"):
        run_with(change, kernel, arch, cache_folder, replace(CASE, kv_format=INT8))


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        pytest.param(r"setp\.lt\.s64", "setp.le.s64", id="a bound too far by one"),
        pytest.param(r"sub\.s64", "add.s64", id="a sum instead of a difference"),
        pytest.param(
            r"selp\.b64(\s+%rd\d+, %rd\d+), -1,", r"selp.b64\1, -2,", id="another mark of no slot"
        ),
    ],
)
@pytest.mark.parametrize("arch", [80, 90])
def test_a_fault_in_decode_steps_is_seen(
    arch: int, pattern: str, replacement: str, cache_folder: Path
) -> None:
    planted = []

    def edit(name: str, ptx: str) -> str:
        changed = re.sub(pattern, replacement, ptx)
        planted.append(changed != ptx)
        return changed

    with emulated_gpu(arch, cache_folder, edit=edit), pytest.raises((AssertionError, PtxError)):
        decode_across_a_seal()
    assert any(planted)
