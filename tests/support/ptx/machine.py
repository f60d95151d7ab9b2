"""Run a launch: basic blocks, branches, barriers. Knows where threads are, never what they compute.

Threads have a program counter each. The lowest one of those that can run decides which basic block
runs, under a mask of the threads that are there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tests.support.ptx import (
    arithmetic,
    bit_instructions,
    conversions,
    memory_instructions,
    tensor_cores,
    warp_groups,
    warp_instructions,
)
from tests.support.ptx.batch import Batch, Launch, Maker, Mask, Run
from tests.support.ptx.errors import PtxError
from tests.support.ptx.program import Instr, Program

BARRIERS: Final = ("bar.sync", "barrier.sync", "barrier.cta.sync")
INSTRUCTIONS: Final[dict[str, Maker]] = {
    **arithmetic.INSTRUCTIONS,
    **bit_instructions.INSTRUCTIONS,
    **conversions.INSTRUCTIONS,
    **memory_instructions.INSTRUCTIONS,
    **tensor_cores.INSTRUCTIONS,
    **warp_groups.INSTRUCTIONS,
    **warp_instructions.INSTRUCTIONS,
}


@dataclass
class Block:
    """Instructions that run one after another, and the one that ends them, where there is one."""

    steps: list[tuple[Run, Instr]]
    ending: Instr | None


def ends_block(instr: Instr) -> bool:
    return instr.op.split(".")[0] in ("bra", "ret", "exit") or instr.op.startswith(BARRIERS)


def compiled(batch: Batch, instr: Instr) -> Run:
    head, *qualifiers = instr.op.split(".")
    try:
        run = INSTRUCTIONS[head](batch, instr, qualifiers) if head in INSTRUCTIONS else None
    except PtxError as error:
        raise PtxError(f"{error}\n  at: {instr.text}") from None
    if run is None:
        raise PtxError(f"not implemented: {instr.text}")
    return run if instr.pred is None else guarded(run, batch.register(instr.pred), instr.negated)


def guarded(run: Run, predicate: NDArray, is_negated: bool) -> Run:
    def run_some(mask: Mask) -> None:
        mine = predicate ^ is_negated  # a copy: the instruction may write its own predicate
        if mask is not True:
            mine &= mask
        if mine.any():
            run(True if mine.all() else mine)

    return run_some


class Machine:
    """One batch of a launch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        program = batch.program
        leaders = {0, *program.labels.values()}
        leaders |= {i + 1 for i, instr in enumerate(program.instrs) if ends_block(instr)}
        starts = sorted(leader for leader in leaders if leader < len(program.instrs))
        numbers = {start: i for i, start in enumerate(starts)}
        self.done = len(starts)
        self.block_of = {label: numbers.get(at, self.done) for label, at in program.labels.items()}
        ends = [*starts[1:], len(program.instrs)]
        self.blocks = [
            self.block(program, start, end) for start, end in zip(starts, ends, strict=True)
        ]
        self.at_block = np.zeros(batch.num_lanes, np.int32)
        self.is_waiting = np.zeros(batch.num_lanes, bool)

    def block(self, program: Program, start: int, end: int) -> Block:
        instrs = program.instrs[start:end]
        ending = instrs.pop() if ends_block(instrs[-1]) else None
        return Block([(compiled(self.batch, instr), instr) for instr in instrs], ending)

    def run(self) -> None:
        while (can_run := ~self.is_waiting & (self.at_block < self.done)).any():
            number = int(self.at_block[can_run].min())
            here = can_run & (self.at_block == number)
            mask = True if here.all() else here
            for step, instr in self.blocks[number].steps:
                try:
                    step(mask)
                except PtxError as error:
                    raise PtxError(f"{error}\n  at: {instr.text}") from None
            self.go_on(here, number, self.blocks[number].ending)
        if self.is_waiting.any():
            raise PtxError("deadlock: some threads wait at a barrier for ever")

    def go_on(self, here: NDArray, number: int, ending: Instr | None) -> None:
        """Where threads are after a block."""
        self.at_block[here] = number + 1
        if ending is None:
            return
        goes = here
        if ending.pred is not None:
            goes = here & (self.batch.register(ending.pred) ^ ending.negated)
        if ending.op.startswith("bra"):
            self.at_block[goes] = self.block_of[ending.args[0]]
        elif not ending.op.startswith(BARRIERS):
            self.at_block[goes] = self.done
            self.release()
        elif ending.pred is not None or ending.args != ["0"]:
            raise PtxError(f"only barrier 0 of all threads is implemented: {ending.text}")
        else:
            self.is_waiting |= here
            self.release()

    def release(self) -> None:
        """Let CTAs go all of whose threads wait, or have left."""
        if not self.is_waiting.any():
            return
        threads = self.batch.threads
        waiting = self.is_waiting.reshape(-1, threads)
        at_block = self.at_block.reshape(-1, threads)
        ready = (waiting | (at_block >= self.done)).all(1) & waiting.any(1)
        for cta in np.flatnonzero(ready):
            if len(places := np.unique(at_block[cta][waiting[cta]])) > 1:
                raise PtxError(f"threads of a CTA wait at different barriers: blocks {places}")
        self.batch.shared.epoch[ready] += 1
        waiting[ready] = False


def run_launch(launch: Launch) -> None:
    """All CTAs of a grid, as many at a time as the settings say."""
    program = launch.program
    if len(launch.parameters) != len(program.parameters):
        raise PtxError(
            f"{len(launch.parameters)} parameters given, {len(program.parameters)} declared"
        )
    axes = np.meshgrid(*(np.arange(size) for size in launch.grid), indexing="ij")
    ctas = np.stack(axes, -1).reshape(-1, 3)
    size = max(launch.settings.max_lanes // program.threads, 1)
    with np.errstate(all="ignore"):
        for start in range(0, len(ctas), size):
            Machine(Batch(launch, ctas[start : start + size])).run()
