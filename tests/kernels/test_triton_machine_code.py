"""What the compiler makes of our Triton kernels, without a GPU: spills, memory, instructions.

Every launch is recorded from the host's own code, so these are the very kernels that a GPU runs.
"""

from __future__ import annotations

from typing import Any

import pytest
import triton
from bench_machine_code import Case, cases, measure
from tools.kernel_launches import (
    META,
    Launch,
    context_loop_density,
    record_launches,
    recorded_kernels,
)
from tools.machine_code import SHARED_MEMORY_LIMIT

from paged_kv.blocks.geometry import BlockGeometry
from paged_kv.cache.decode_tables import BatchKind, DecodeBatch, DecodeTables
from paged_kv.cache.formats import (
    INT2,
    INT2_LONG,
    INT3,
    INT4,
    INT8,
    INT8_TOKEN,
    K4V2,
    KIVI2,
    NATIVE,
    KVFormat,
)

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="kernels are interpreted")
BOTH_ARCHITECTURES = pytest.mark.parametrize("arch", SHARED_MEMORY_LIMIT)
FORMATS = {
    "native": NATIVE,
    "int8": INT8,
    "int8-token": INT8_TOKEN,
    "int4": INT4,
    "int4-plain": INT4.with_options(wide_key_share=0.0),
    "k4v2": K4V2,
    "int3": INT3,
    "int2": INT2,
    "int2-long": INT2_LONG,
    "int4-g32": INT4.with_options(wide_key_share=0.0, key_group_size=32),
    "kivi2": KIVI2,
}
SAME_OPEN_BLOCKS = (
    "int8-token",
    "int4-plain",
    "int4-g32",
    "int3",
    "int2-long",
    "k4v2",
    "kivi2",
)  # as others have
FEW, MORE, MANY = (4, 1), (8, 2), (8, 64)  # query heads of a kv head, new tokens
FEW_OR_MANY = pytest.mark.parametrize("rows", [FEW, MANY], ids=["few rows", "many rows"])
ALL_RULES = {"sliding_window": 4096, "softcap": 50.0}
# Warp-instructions for each K/V byte in the loop over context, 8 query rows, sm_90, D = 128.
BUDGETS = {
    "native": 0.029,
    "int8": 0.063,
    "int8-token": 0.048,
    "int4": 0.124,
    "int4-plain": 0.11,  # without wide channels
    "k4v2": 0.147,
    "int3": 0.26,
    "int2": 0.18,
    "int2-long": 0.208,  # as many for a token as with 82 bytes of it: 0.21
    "kivi2": 0.22,
}
OLDER_MAY_TAKE = 4  # times as many on sm_80


# Two registers, saved once before the loop for what comes after it, with 256 channels on sm_80.
SAVED_BYTES = {("attend_prefill", "int3"): 8}


def launches_of(kv_format: KVFormat, rows: tuple[int, int], **options: Any) -> list[Launch]:
    group_size, num_new = rows
    return record_launches(kv_format, group_size=group_size, query_lens=(num_new,), **options)


def attention_of(name: str, rows: tuple[int, int], **options: Any) -> list[Launch]:
    """The attention kernels of a format, but none again that another format's test compiles.

    Open blocks are read alike whatever the groups of sealed keys; and under the same rules, of all
    formats that seal, those of int2 have the smallest open blocks, so the most of them in a tile.
    """
    launches = launches_of(FORMATS[name], rows, **options)
    has_rules = options.keys() & {*ALL_RULES, "has_windows"}
    if name in SAME_OPEN_BLOCKS or (has_rules and name in ("int8", "int4")):
        launches = [launch for launch in launches if launch.name != "attend_open"]
    found = [launch for launch in launches if launch.name.startswith(("attend", "merge"))]
    assert any(launch.name.startswith("attend") for launch in found)
    return found


def check_fits(launch: Launch, arch: int, name: str = "", head_dim: int = 0) -> None:
    is_known = head_dim == 256 and arch == 80
    saved_bytes = SAVED_BYTES.get((launch.name, name), 0) if is_known else 0
    taken = launch.resources(arch)
    told = launch.name, launch.arguments.get("SPLIT"), launch.options, arch, taken
    assert taken.local_bytes <= saved_bytes, told
    assert taken.fits_shared_memory, told


@BOTH_ARCHITECTURES
@FEW_OR_MANY
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", FORMATS)
def test_attention_spills_nothing_and_fits(name, head_dim, rows, arch):
    for launch in attention_of(name, rows, head_dim=head_dim, arch=arch):
        check_fits(launch, arch, name, head_dim)


@BOTH_ARCHITECTURES
@pytest.mark.parametrize("rules", [{}, ALL_RULES], ids=["no rule", "all rules"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ["native", "int8", "int8-token", "int4-plain"])
def test_tiles_of_16_rows_spill_nothing(name, head_dim, rules, arch):
    """Other formats, and more channels, have tiles of 8."""
    launches = attention_of(name, MORE, head_dim=head_dim, arch=arch, **rules)
    assert launches[0].arguments["SPLIT"].ROWS == 16
    for launch in launches:
        check_fits(launch, arch)


@BOTH_ARCHITECTURES
@FEW_OR_MANY
@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("name", FORMATS)
def test_all_rules_at_once_spill_nothing(name, head_dim, rows, arch):
    for launch in attention_of(name, rows, head_dim=head_dim, arch=arch, **ALL_RULES):
        check_fits(launch, arch, name, head_dim)


@BOTH_ARCHITECTURES
@FEW_OR_MANY
@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("name", ["native", "int8", "int4", "int2"])
def test_windowed_steps_spill_nothing(name, head_dim, rows, arch):
    for launch in attention_of(name, rows, head_dim=head_dim, arch=arch, has_windows=True):
        check_fits(launch, arch, name, head_dim)


@BOTH_ARCHITECTURES
@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("name", ["native", "int8", "int4", "int2", "kivi2"])
def test_one_rule_spills_nothing(name, head_dim, rule, arch):
    rules = {rule: ALL_RULES[rule]}
    for launch in attention_of(name, FEW, head_dim=head_dim, arch=arch, **rules):
        check_fits(launch, arch, name, head_dim)


@BOTH_ARCHITECTURES
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "native"])
def test_sealing_spills_next_to_nothing(name, head_dim, arch):
    """Exact division is a call, around which some registers are saved."""
    kv_format = FORMATS[name]
    for is_calibrated in {False, kv_format.has_error_feedback}:
        options = {"head_dim": head_dim, "is_calibrated": is_calibrated}
        (launch,) = (
            launch
            for launch in launches_of(kv_format, FEW, **options)
            if launch.name == "seal_blocks"
        )
        taken = launch.resources(arch)
        assert taken.local_bytes <= 128
        assert taken.fits_shared_memory


@BOTH_ARCHITECTURES
@pytest.mark.parametrize("head_dim", [40, 128, 256])
def test_rotating_spills_nothing(head_dim, arch):
    """In pieces of powers of two: 32 and 8 channels of 40."""
    launches = launches_of(INT4, FEW, head_dim=head_dim)
    launches = [launch for launch in launches if launch.name == "rotate_rows"]
    assert len(launches) == (2 if head_dim == 40 else 1)
    for launch in launches:
        check_fits(launch, arch)


@BOTH_ARCHITECTURES
@pytest.mark.parametrize("seals", [False, True])
def test_making_a_decode_step_spills_nothing(seals, arch):
    geometry = BlockGeometry(
        block_size=128, open_block_size=32, num_head_tokens=32, min_tail_tokens=32
    )
    tables = DecodeTables(geometry, META, max_num_seqs=64, max_model_len=9000)
    batch = DecodeBatch(tables, BatchKind(num_rows=16, seals=seals, is_windowed=False))
    with recorded_kernels(arch) as launches:
        batch.step.refresh()
    (launch,) = launches
    assert launch.grid == (16,)
    check_fits(launch, arch)


@BOTH_ARCHITECTURES
@pytest.mark.parametrize("name", BUDGETS)
def test_loops_over_context_keep_to_their_budget(name, arch):
    """And read through asynchronous copies: every load of codes or of open blocks is an LDGSTS."""
    kernel = "attend_open" if name == "native" else "attend_sealed"
    (launch,) = (each for each in launches_of(FORMATS[name], FEW, arch=arch) if each.name == kernel)
    code = launch.machine_code(arch)
    budget = BUDGETS[name] if arch >= 90 else BUDGETS[name] * OLDER_MAY_TAKE
    assert context_loop_density(launch, code) <= budget
    assert all(loop.opcodes["LDGSTS"] for loop in code.loops if loop.num_mma)
    assert code.num_spill_instructions == code.local_bytes == 0


def test_a_budget_can_be_missed():
    """The same loop with four times the warps issues more instructions for the same bytes."""
    (launch,) = (each for each in launches_of(INT2, FEW) if each.name == "attend_sealed")
    code = launch.machine_code(90, num_warps=4)
    launch.options["num_warps"] = 4
    assert context_loop_density(launch, code) > BUDGETS["int2"]


def test_a_spill_is_seen():
    (launch,) = (each for each in launches_of(INT2, FEW) if each.name == "attend_sealed")
    code = launch.machine_code(90, max_registers=128)
    assert code.num_spill_instructions
    assert code.local_bytes


def test_the_record_of_kernels_tells_each_with_its_loop():
    """`bench_machine_code`, of one case of all."""
    assert len(set(cases(is_quick=False))) == len(list(cases(is_quick=False))) >= 90
    rows = [row for _, rows in measure(Case(90, 64, "native", "few")) for row in rows]
    told = [(row.case.partition(",")[0], row.metric) for row in rows]
    resources = ["registers", "shared memory", "spilled"]
    expected = [("attend_open", each) for each in (*resources, "warp-instructions")]
    assert told == expected + [("merge_parts", each) for each in resources]
    assert all(row.value > 0 for row in rows if row.metric in ("registers", "warp-instructions"))
