"""What `machine_code` says of small kernels, whose loops, MMAs and spills are known beforehand."""

from __future__ import annotations

from typing import Any

import pytest
import triton.language as tl
from tools.machine_code import (
    SHARED_MEMORY_LIMIT,
    Instruction,
    MachineCode,
    compile_kernel,
    disassemble,
    find_loops,
    hottest_loop,
    instructions_per_byte,
    unrolled_iterations,
)
from triton import jit, knobs

pytestmark = pytest.mark.skipif(knobs.runtime.interpret, reason="kernels are interpreted")
BOTH_ARCHITECTURES = pytest.mark.parametrize("arch", SHARED_MEMORY_LIMIT)

BLOCK, WIDTH, ROWS = 64, 128, 8
MMA_SIZE = 16 * 8 * 16
SIGNATURE = {"keys": "*i8", "queries": "*fp16", "out": "*fp32", "num_blocks": "i32"}
CONSTANTS = {"BLOCK": BLOCK, "WIDTH": WIDTH, "ROWS": ROWS}


@jit
def sum_products(
    keys, queries, out, num_blocks, BLOCK: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    """Over all blocks of keys [num_blocks, BLOCK, WIDTH]: keys @ queries [WIDTH, ROWS], added."""
    tokens, channels, rows = tl.arange(0, BLOCK), tl.arange(0, WIDTH), tl.arange(0, ROWS)
    query_tile = tl.load(queries + channels[:, None] * ROWS + rows[None, :])
    products = tl.zeros([BLOCK, ROWS], tl.float32)
    for block in range(num_blocks):
        first = keys + block.to(tl.int64) * BLOCK * WIDTH
        tile = tl.load(first + tokens[:, None] * WIDTH + channels[None, :])
        products = tl.dot(tile.to(tl.float16), query_tile, products)
    tl.store(out + tokens[:, None] * ROWS + rows[None, :], products)


@jit
def sum_rows(table, out, num_rows, num_columns):
    """A loop in a loop: the highest sum of a row of table [num_rows, num_columns, 128]."""
    lanes = tl.arange(0, 128)
    total = tl.zeros([128], tl.float32)
    for row in range(num_rows):
        sum_of_row = tl.zeros([128], tl.float32)
        for column in range(num_columns):
            sum_of_row += tl.load(table + (row * num_columns + column) * 128 + lanes)
        total = tl.maximum(total, sum_of_row)
    tl.store(out + lanes, total)


@jit
def add_one(values):
    """No loop."""
    lanes = tl.arange(0, 128)
    tl.store(values + lanes, tl.load(values + lanes) + 1.0)


def machine_code(arch: int, *, num_warps: int = 2, rows: int = ROWS, **options: Any) -> MachineCode:
    """Of `sum_products`."""
    constants = {**CONSTANTS, "ROWS": rows}
    compiled = compile_kernel(
        sum_products, SIGNATURE, constants, arch=arch, num_warps=num_warps, num_stages=3, **options
    )
    return disassemble(compiled)


@BOTH_ARCHITECTURES
@pytest.mark.parametrize("num_warps", [1, 2, 4])
def test_finds_the_loop_and_its_mmas(arch: int, num_warps: int) -> None:
    code = machine_code(arch, num_warps=num_warps)
    loop = hottest_loop(code)
    mma_per_iteration = BLOCK * WIDTH * ROWS // MMA_SIZE // num_warps
    iterations = unrolled_iterations(loop, mma_per_iteration)
    assert loop.is_innermost
    assert loop.opcodes["HMMA"] == loop.num_mma == iterations * mma_per_iteration
    assert loop.opcodes["LDGSTS"] > 0, "the loads are not pipelined"
    assert loop.opcodes.total() == loop.num_instructions < len(code.instructions)
    assert code.instructions[loop.end].opcode == "BRA"
    per_byte = instructions_per_byte(loop, num_warps, BLOCK * WIDTH, iterations)
    assert per_byte == loop.num_instructions * num_warps / (BLOCK * WIDTH * iterations)


@BOTH_ARCHITECTURES
def test_reads_registers_and_memory(arch: int) -> None:
    code = machine_code(arch)
    assert code.arch == arch
    assert 32 < code.registers < 255
    assert code.num_spill_instructions == code.local_bytes == 0
    assert code.shared_bytes >= 2 * BLOCK * WIDTH, "num_stages - 1 buffers of int8 keys"
    assert code.fits_shared_memory


@BOTH_ARCHITECTURES
def test_reports_spills(arch: int) -> None:
    """Negative control: the products alone, 64 x 32 in a warp, are 64 registers of a thread."""
    code = machine_code(arch, num_warps=1, rows=32, max_registers=32)
    assert code.registers <= 32
    assert code.num_spill_instructions > 0
    assert code.local_bytes > 0


@BOTH_ARCHITECTURES
def test_flags_innermost_loops(arch: int) -> None:
    signature = {"num_columns": "i32", "num_rows": "i32", "out": "*fp32", "table": "*fp32"}
    compiled = compile_kernel(sum_rows, signature, {}, arch=arch, num_warps=4, num_stages=1)
    code = disassemble(compiled)
    outer = [loop for loop in code.loops if not loop.is_innermost]
    assert len(outer) == 1
    assert outer[0] is code.loops[0]
    assert all(loop.positions < outer[0].positions for loop in code.loops[1:])
    hottest = hottest_loop(code)
    assert hottest.is_innermost
    assert hottest.num_instructions == max(loop.num_instructions for loop in code.loops[1:])


@BOTH_ARCHITECTURES
def test_no_loop(arch: int) -> None:
    signature = {"values": "*fp32"}
    compiled = compile_kernel(add_one, signature, {}, arch=arch, num_warps=4, num_stages=1)
    code = disassemble(compiled)
    assert code.loops == ()
    with pytest.raises(ValueError, match="no loop"):
        hottest_loop(code)


def test_alignment_widens_loads() -> None:
    """Negative control of `divisible`: bytes at unknown addresses are loaded one by one."""
    aligned, unaligned = machine_code(90), machine_code(90, divisible=())
    assert aligned.loops != unaligned.loops
    assert hottest_loop(aligned).opcodes["LDGSTS"] > 0
    assert hottest_loop(unaligned).opcodes["LDGSTS"] == 0
    swapped = compile_kernel(
        sum_products,
        dict(reversed(SIGNATURE.items())),
        CONSTANTS,
        arch=90,
        num_warps=2,
        num_stages=3,
        divisible=("out", "queries", "keys"),
    )
    assert disassemble(swapped) == aligned


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"signature": {**SIGNATURE, "values": "*i8"}}, r"unknown: \['values'\]"),
        ({"constants": {"BLOCK": 64}}, r"missing: \['ROWS', 'WIDTH'\]"),
        ({"signature": {**SIGNATURE, "ROWS": "i32"}}, r"both .*\['ROWS'\]; constexpr.*\['ROWS'\]"),
        ({"divisible": ["values"]}, r"divisible .*\['values'\]"),
        ({"arch": 75}, "arch is 75"),
    ],
)
def test_names_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    arguments = {"signature": SIGNATURE, "constants": CONSTANTS, "arch": 90, **changes}
    with pytest.raises(ValueError, match=message):
        compile_kernel(sum_products, num_warps=4, num_stages=1, **arguments)


def test_refuses_what_is_not_compiled() -> None:
    with pytest.raises(TypeError, match="TRITON_INTERPRET"):
        compile_kernel(lambda values: None, {}, {}, arch=90, num_warps=4, num_stages=1)


def program(*lines: str) -> tuple[Instruction, ...]:
    """Instructions of lines like `@P0 BRA 3`, whose last operand is a position."""
    instructions = []
    for line in lines:
        *predicate, opcode, operands = line.split() if " " in line else (line, "")
        if operands:
            *conditions, position = operands.split(",")
            operands = ",".join([*conditions, hex(16 * int(position))])
        name, *qualifiers = opcode.split(".")
        instructions.append(Instruction(name, tuple(qualifiers), operands, "".join(predicate)))
    return tuple(instructions)


def loops_of(*lines: str) -> list[tuple[list[int], int]]:
    """Positions and number of conditional instructions of each loop in a program."""
    loops = find_loops(program(*lines))
    return [(sorted(loop.positions), loop.num_conditional) for loop in loops]


def test_code_behind_the_loop_that_comes_back_is_in_it() -> None:
    found = loops_of("MOV", "@P0 BRA 5", "HMMA", "@P1 BRA 1", "EXIT", "IMAD", "BRA 2")
    assert found == [([1, 2, 3, 5, 6], 2)]


def test_code_for_diverged_warps_is_not_in_the_loop() -> None:
    found = loops_of("MOV", "BRA.DIV UR4,5", "SHFL", "@P1 BRA 1", "EXIT", "IMAD", "BRA 3")
    assert found == [([1, 2, 3], 0)]


def test_two_jumps_back_make_one_loop() -> None:
    assert loops_of("IMAD", "@P0 BRA 0", "HMMA", "BRA P1,0", "EXIT") == [([0, 1, 2, 3], 2)]


def test_a_call_to_an_address_leaves_the_loop() -> None:
    found = loops_of("HMMA", "@!P0 CALL.REL 3", "BRA 0", "MOV", "@P1 BRA 3", "EXIT")
    assert found == [([0, 1, 2], 0), ([3, 4], 0)]


def test_computed_jumps_are_refused() -> None:
    with pytest.raises(ValueError, match="instruction 1 jumps"):
        loops_of("MOV", "BRX", "EXIT")


def test_the_trap_behind_the_end_is_no_loop() -> None:
    assert loops_of("MOV", "EXIT", "BRA 2") == []


def test_a_loop_that_waits_does_not_hide_the_one_with_mmas() -> None:
    instructions = program("MOV", "SYNCS", "@P0 BRA 1", "HMMA", "@P1 BRA 0", "EXIT")
    loops = find_loops(instructions)
    code = MachineCode(90, 32, 0, 0, instructions, loops)
    assert [loop.is_innermost for loop in loops] == [False, True]
    assert hottest_loop(code) is loops[0]


def test_says_when_mmas_do_not_add_up() -> None:
    loop = hottest_loop(machine_code(90))
    with pytest.raises(ValueError, match="expected k x 5"):
        unrolled_iterations(loop, 5)
