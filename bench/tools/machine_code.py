"""What the compiler made of a Triton kernel: its registers, spills, shared memory and loops.

Knows cubins, never tensors, and needs no GPU: the compiler and the disassembler are in the Triton
wheel. It needs kernels that are compiled, so TRITON_INTERPRET must not be set when Triton and the
kernel are imported.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import reduce
from operator import and_
from tempfile import NamedTemporaryFile
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

# The shared memory that one CTA can have, by architecture: the SM has 1 KiB more, for the system.
SHARED_MEMORY_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
INSTRUCTION_BYTES = 16
MMA_OPCODES = frozenset({"HMMA", "IMMA", "QMMA", "HGMMA", "IGMMA", "QGMMA"})
SPILL_OPCODES = frozenset({"LDL", "STL"})


@dataclass(frozen=True)
class Instruction:
    """One line of SASS. `opcode` is without qualifiers: HMMA of HMMA.16816.F32."""

    opcode: str
    qualifiers: tuple[str, ...] = ()
    operands: str = ""
    predicate: str = ""


@dataclass(frozen=True)
class Loop:
    """The instructions that may run between two arrivals at the loop's first one.

    A prologue is no part of it; a branch that the compiler moved behind the loop is, if it comes
    back. Both sides of a branch are counted, and an inner loop once. Not counted are functions that
    are called (the loop then has a CALL) and code that only a diverged warp runs (BRA.DIV).
    """

    positions: frozenset[int]  # in `MachineCode.instructions`
    num_conditional: int  # of these, how many an iteration may jump over
    opcodes: Counter[str]
    is_innermost: bool

    @property
    def start(self) -> int:
        """The lowest position."""
        return min(self.positions)

    @property
    def end(self) -> int:
        """The highest position, inclusive; not all between the two need belong to the loop."""
        return max(self.positions)

    @property
    def num_instructions(self) -> int:
        return len(self.positions)

    @property
    def num_mma(self) -> int:
        return sum(self.opcodes[opcode] for opcode in MMA_OPCODES)


@dataclass(frozen=True)
class Resources:
    """What a kernel takes of a GPU. One without local bytes has spilled nothing."""

    arch: int
    registers: int  # of each thread
    local_bytes: int  # of each thread, in memory: spilled registers and local arrays
    shared_bytes: int  # of each CTA

    @property
    def fits_shared_memory(self) -> bool:
        return self.shared_bytes <= SHARED_MEMORY_LIMIT[self.arch]


@dataclass(frozen=True)
class MachineCode(Resources):
    """A kernel as one warp runs it. Outer loops come before the loops inside them."""

    instructions: tuple[Instruction, ...]  # those of functions that it calls are behind its own
    loops: tuple[Loop, ...]

    @property
    def num_spill_instructions(self) -> int:
        """Loads from and stores to local memory, anywhere in the code."""
        return sum(instruction.opcode in SPILL_OPCODES for instruction in self.instructions)


def compile_kernel(
    kernel: JITFunction,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    arch: int,
    num_warps: int,
    num_stages: int,
    divisible: Collection[str] | None = None,
    max_registers: int | None = None,
    enable_fp_fusion: bool = True,
) -> CompiledKernel:
    """Compile a kernel for sm_80 (`arch` 80) or sm_90 (90).

    `signature` has the type of each argument ("*fp16", "i32", "fp32") and `constants` the value of
    every other one, both by name and in any order. `divisible` names the arguments whose value or
    address is a multiple of 16: all pointers if it is None. A thread gets at most `max_registers`;
    without `enable_fp_fusion` every operation is rounded.
    Raises TypeError if the kernel is not compiled (TRITON_INTERPRET is set, or it is wrapped by a
    tuner), ValueError if a name or the architecture is wrong, and Triton's own errors.
    """
    check_kernel(kernel, signature, constants, arch)
    pointers = [name for name, kind in signature.items() if kind.startswith("*")]
    aligned = set(pointers if divisible is None else divisible)
    if unknown := aligned - signature.keys():
        raise ValueError(f"divisible names no arguments of the signature: {sorted(unknown)}")
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: signature.get(name, "constexpr") for name in names},
        constexprs=dict(constants),
        # Spelled as Triton's launcher spells them: so it finds on disk what was compiled here.
        attrs={
            (index,): [["tt.divisibility", 16]] if name in aligned else []
            for index, name in enumerate(names)
            if not signature.get(name, "fp").startswith("fp")
        },
    )
    options = {
        "num_warps": num_warps,
        "num_stages": num_stages,
        "maxnreg": max_registers,
        "enable_fp_fusion": enable_fp_fusion,
    }
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def check_kernel(
    kernel: JITFunction, signature: Mapping[str, str], constants: Mapping[str, Any], arch: int
) -> None:
    """Raise what `compile_kernel` raises where its arguments do not fit the kernel's."""
    if not isinstance(kernel, JITFunction):
        raise TypeError(
            f"expected a function that @triton.jit compiles, got {type(kernel).__name__}; "
            "TRITON_INTERPRET must not be set when Triton and the kernel are imported"
        )
    if arch not in SHARED_MEMORY_LIMIT:
        raise ValueError(f"arch is {arch}, expected one of {sorted(SHARED_MEMORY_LIMIT)}")
    expected = set(kernel.arg_names)
    given = signature.keys() | constants.keys()
    untyped = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    problems = {
        "missing": expected - given,
        "unknown": given - expected,
        "both in signature and constants": signature.keys() & constants.keys(),
        "constexpr, so in constants": untyped & signature.keys(),
    }
    found = [f"{problem}: {sorted(names)}" for problem, names in problems.items() if names]
    if found:
        raise ValueError(f"arguments of {kernel.fn.__name__}: {'; '.join(found)}")


def read_resources(compiled: CompiledKernel) -> Resources:
    """What a kernel takes that was compiled for one of the known architectures.

    Reads only tables of the cubin: a hundred times faster than `disassemble`. Raises RuntimeError
    if the tool fails.
    """
    with cubin_file(compiled) as path:
        usage = run_tool(knobs.nvidia.cuobjdump.path, "-res-usage", path)
    found = re.search(rf"Function {re.escape(compiled.metadata.name)}:\s+(.*)", usage)
    assert found is not None, usage
    sizes = {key: int(size) for key, size in re.findall(r"(\w+):(\d+)", found[1])}
    return Resources(
        arch=compiled.metadata.target.arch,
        registers=sizes["REG"],
        local_bytes=sizes["STACK"] + sizes["LOCAL"],
        shared_bytes=compiled.metadata.shared,
    )


def disassemble(compiled: CompiledKernel) -> MachineCode:
    """Read the machine code of a kernel that was compiled for one of the known architectures.

    Raises RuntimeError if a tool fails, ValueError if the code jumps to computed addresses.
    """
    with cubin_file(compiled) as path:
        _, functions = json.loads(run_tool(knobs.nvidia.nvdisasm.path, "-json", path))
    instructions = read_instructions(functions)
    resources = asdict(read_resources(compiled))
    return MachineCode(**resources, instructions=instructions, loops=find_loops(instructions))


@contextmanager
def cubin_file(compiled: CompiledKernel) -> Iterator[str]:
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        yield file.name


def run_tool(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed: {result.stderr or result.stdout}")
    return result.stdout


def read_instructions(functions: Sequence[Mapping[str, Any]]) -> tuple[Instruction, ...]:
    """The functions of one section, as nvdisasm lists them, without the padding at the end."""
    instructions: list[Instruction] = []
    for function in functions:
        # Branches hold addresses in the section; here these are positions.
        assert function["start"] == len(instructions) * INSTRUCTION_BYTES, "not one section"
        for line in function["sass-instructions"]:
            opcode, *qualifiers = line["opcode"].split(".")
            operands, predicate = line.get("operands", ""), line.get("predicate", "")
            instructions.append(Instruction(opcode, tuple(qualifiers), operands, predicate))
    while instructions and instructions[-1].opcode == "NOP":
        instructions.pop()
    return tuple(instructions)


def find_loops(instructions: Sequence[Instruction]) -> tuple[Loop, ...]:
    """The natural loops of the code that is reached from its first instruction.

    A loop is an instruction, the jumps back to it from code that cannot be reached without it, and
    everything on a way from it to these jumps: positions decide nothing.
    """
    successors = [next_positions(instructions, position) for position in range(len(instructions))]
    predecessors: list[list[int]] = [[] for _ in instructions]
    for position in walk({0}, successors):
        for successor in successors[position]:
            predecessors[successor].append(position)
    dominators = find_dominators(predecessors)
    bodies: list[tuple[frozenset[int], int]] = []
    for header, sources in enumerate(predecessors):
        jumps = {source for source in sources if dominators[source] >> header & 1}
        if jumps:
            body = walk(jumps, predecessors, stop=header)
            in_every_iteration = reduce(and_, (dominators[jump] for jump in jumps))
            bodies.append((body, sum(not in_every_iteration >> i & 1 for i in body)))
    return tuple(
        Loop(
            positions=body,
            num_conditional=num_conditional,
            opcodes=Counter(instructions[position].opcode for position in body),
            is_innermost=not any(other < body for other, _ in bodies),
        )
        for body, num_conditional in sorted(bodies, key=lambda item: -len(item[0]))
    )


def next_positions(instructions: Sequence[Instruction], position: int) -> tuple[int, ...]:
    """Where a warp may go from here. A call comes back; threads that diverge are left aside."""
    instruction = instructions[position]
    following = position + 1
    if instruction.opcode in {"BRX", "JMX", "JMXU", "BRXU"}:
        raise ValueError(f"instruction {position} jumps to an address that is computed")
    # The compiler leaves some loops by a CALL to an address; functions are called by their names.
    is_jump = instruction.opcode in {"BRA", "JMP", "CALL"} and "0x" in instruction.operands
    if is_jump and "DIV" not in instruction.qualifiers:
        *conditions, address = instruction.operands.split(",")
        target = int(address, 16) // INSTRUCTION_BYTES
        may_stay = conditions or instruction.predicate
        return (following, target) if may_stay else (target,)
    if instruction.opcode in {"EXIT", "RET"} and not instruction.predicate:
        return ()
    return (following,) if following < len(instructions) else ()


def walk(
    starts: Collection[int], neighbours: Sequence[Collection[int]], stop: int | None = None
) -> frozenset[int]:
    """All positions that can be reached from `starts`, and these, but not through `stop`."""
    reached = set(starts)
    waiting = list(starts)
    while waiting:
        position = waiting.pop()
        if position != stop:
            found = set(neighbours[position]) - reached
            reached |= found
            waiting += found
    return frozenset(reached)


def find_dominators(predecessors: Sequence[Sequence[int]]) -> list[int]:
    """Of each position, a bit for every position on all ways to it from the first, itself included.

    A position that is never reached has all bits.
    """
    everything = (1 << len(predecessors)) - 1
    dominators = [everything] * len(predecessors)
    changed = True
    while changed:
        changed = False
        for position, sources in enumerate(predecessors):
            before = 0 if position == 0 else everything
            for source in sources:
                before &= dominators[source]
            dominators_here = before | 1 << position
            changed |= dominators_here != dominators[position]
            dominators[position] = dominators_here
    return dominators


def hottest_loop(code: MachineCode) -> Loop:
    """The loop with most MMAs of those with no MMA loop inside; the longest innermost if none has.

    So neither a loop that waits at a barrier inside the main one is taken, nor what remains of a
    loop beside its unrolled body. Raises ValueError if the code has no loop.
    """
    if not code.loops:
        raise ValueError("the machine code has no loop")
    with_mma = [loop for loop in code.loops if loop.num_mma]
    innermost_with_mma = [
        loop for loop in with_mma if not any(inner.positions < loop.positions for inner in with_mma)
    ]
    candidates = innermost_with_mma or [loop for loop in code.loops if loop.is_innermost]
    return max(candidates, key=lambda loop: (loop.num_mma, loop.num_instructions))


def unrolled_iterations(loop: Loop, mma_per_iteration: int) -> int:
    """How many iterations of the source one pass through the machine's loop makes.

    `mma_per_iteration` is what one warp issues for one iteration; with HMMA on 16-bit operands, M x
    N x K / (16 x 8 x 16) / num_warps for each `tl.dot` whose warps share the work. Raises
    ValueError if the loop's MMAs are no multiple of it.
    """
    iterations, rest = divmod(loop.num_mma, mma_per_iteration)
    if rest or not iterations:
        raise ValueError(f"{loop.num_mma} MMAs in the loop, expected k x {mma_per_iteration}")
    return iterations


def instructions_per_byte(
    loop: Loop, num_warps: int, bytes_per_iteration: int, iterations: int = 1
) -> float:
    """Instructions that the CTA's warps issue, together, for each byte that an iteration reads.

    `iterations` is how many of them one pass through the loop makes, see `unrolled_iterations`.
    """
    return loop.num_instructions * num_warps / (bytes_per_iteration * iterations)
