"""Decode steps of a fixed size on a GPU: block tables that stay there, and rows that are sent.

Knows plans and tables, never a model. Where a step has one new token for each of its sequences, all
that the host sends of it are a few numbers for each row, where tables changed, and what the caller
adds, in one copy; `DecodeStep` makes the rest. So its kernels can be captured and replayed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..blocks.geometry import BlockGeometry, IntArray
from ..blocks.step_plan import StepPlan
from ..blocks.table_replica import TableReplica
from ..kernels.step_inputs import NO_WINDOW
from .step_staging import ALIGNMENT, StagedArray, StagedStep, to_device

if TYPE_CHECKING:
    from ..kernels.triton.decode_step import DecodeStep

# What an empty row says. It is no sequence and has no context: its token sees itself alone.
USUAL_ROWS: Final = {
    "seq_ids": -1,
    "token_ids": 0,
    "sources": -1,
    "context_lens": 0,
    "num_sealed": 0,
}
SEALING_ROWS: Final = {"seal_block_ids": -1}
WINDOWED_ROWS: Final = {
    "positions": 0,
    "head_shifts": 0,
    "is_windowed": 0,
    "num_sink_tokens": 0,
    "window_sizes": NO_WINDOW,
}


class BatchKind(NamedTuple):
    """What decode steps have in common that run by the same launches."""

    num_rows: int
    seals: bool
    is_windowed: bool

    @property
    def empty_row(self) -> dict[str, int]:
        """Of each array of the kind, what it has where there is no sequence."""
        return (
            USUAL_ROWS
            | (SEALING_ROWS if self.seals else {})
            | (WINDOWED_ROWS if self.is_windowed else {})
        )


class Drawn(NamedTuple):
    """Tokens that the host does not know: the new ones of some of a plan's N sequences."""

    sources: IntArray  # [N] places in `token_ids`; -1: the host knows it
    token_ids: Tensor  # [M] on the device, at most as many as sequences may run


class DecodeTables:
    """The block tables of all sequences on the device, and the steps that are made of them."""

    def __init__(
        self,
        geometry: BlockGeometry,
        device: torch.device,
        *,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        self.geometry = geometry
        self.device = device
        self.max_num_seqs = max_num_seqs
        shape = max_num_seqs, geometry.table_width(max_model_len)
        self.ids: Tensor = torch.zeros(shape, dtype=torch.int32, device=device)
        # All batches write the rows of their step to the same: one runs after the other.
        self.block_table: Tensor = torch.zeros(shape, dtype=torch.int64, device=device)
        self.drawn: Tensor = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)

    def holds(self, plan: StepPlan) -> bool:
        """Whether a plan is a decode step that fits: each sequence has one new token."""
        if not plan.is_decode or not 0 < len(plan.seq_ids) <= self.max_num_seqs:
            return False
        longest, most_seals = int(plan.context_lens.max()) + 1, 0
        if len(plan.changed_rows):
            most_seals = int(plan.block_counts[:, 0].max())
        return self.geometry.table_width(longest) <= self.ids.shape[1] and most_seals <= 1

    def changes(self, replica: TableReplica) -> dict[str, StagedArray]:
        """Places of `ids` where the host's tables are ahead, and what stands there."""
        rows, places, ids = replica.changes()
        fits = (rows < self.ids.shape[0]) & (places < self.ids.shape[1])
        changed = (rows * self.ids.shape[1] + places)[fits]
        return {"changed_places": changed, "changed_ids": ids[fits].astype(np.int64)}

    def apply(self, places: Tensor, ids: Tensor) -> None:
        """Take changes over that have arrived; twice is as good as once."""
        if len(places):
            self.ids.view(-1)[places] = ids.int()


class DecodeBatch:
    """Decode steps of one kind: the numbers of their rows, in tensors that stay where they are."""

    def __init__(self, tables: DecodeTables, kind: BatchKind) -> None:
        self.tables = tables
        self.kind = kind
        self._empty = kind.empty_row
        width = -(-kind.num_rows // ALIGNMENT) * ALIGNMENT
        self._numbers = torch.zeros(
            (len(self._empty), width), dtype=torch.int64, device=tables.device
        )
        self._rows = dict(zip(self._empty, self._numbers[:, : kind.num_rows].unbind(), strict=True))
        self.logit_tokens: Tensor = torch.arange(kind.num_rows, device=tables.device)

    @cached_property
    def step(self) -> DecodeStep:
        from ..kernels.triton.decode_step import DecodeStep
        from ..kernels.triton.groups import DecodeRows, Tables

        rows, geometry = self._rows, self.tables.geometry
        return DecodeStep.empty(
            DecodeRows(
                rows["seq_ids"],
                rows["token_ids"],
                rows["sources"],
                rows["context_lens"],
                rows["num_sealed"],
                rows.get("seal_block_ids"),
            ),
            self.tables.ids,
            self.tables.drawn,
            self.tables.block_table[: self.kind.num_rows],
            Tables(
                WIDTH=self.tables.ids.shape[1],
                BLOCK_SIZE=geometry.block_size,
                OPEN_BLOCK_SIZE=geometry.open_block_size,
                NUM_HEAD_TOKENS=geometry.num_head_tokens,
            ),
            num_sink_tokens=rows.get("num_sink_tokens"),
            window_sizes=rows.get("window_sizes"),
        )

    def row_numbers(
        self,
        plan: StepPlan,
        num_sealed: IntArray,
        token_ids: IntArray,
        sources: IntArray | None,
    ) -> NDArray[np.int64]:
        """A plan's sequences as this batch's first rows; the others are empty."""
        numbers: NDArray[np.int64] = np.empty(tuple(self._numbers.shape), dtype=np.int64)
        numbers[:] = np.array(list(self._empty.values()))[:, None]
        rows = dict(zip(self._empty, numbers[:, : len(plan.seq_ids)], strict=True))
        rows["seq_ids"][:] = plan.seq_ids
        rows["token_ids"][:] = token_ids
        if sources is not None:
            rows["sources"][:] = sources
        rows["context_lens"][:] = plan.context_lens
        rows["num_sealed"][:] = num_sealed
        if self.kind.seals:
            sealing = plan.changed_rows[plan.block_counts[:, 0] > 0]
            rows["seal_block_ids"][sealing] = plan.seal_block_ids
        if plan.num_sink_tokens is not None and plan.window_sizes is not None:
            windows, shifts = plan.window_sizes, plan.head_shifts
            rows["positions"][:] = plan.positions
            rows["head_shifts"][:] = 0 if shifts is None else shifts
            rows["is_windowed"][:] = windows > 0
            rows["num_sink_tokens"][:] = plan.num_sink_tokens
            rows["window_sizes"][:] = np.where(windows, windows, NO_WINDOW)
        return numbers

    def send(
        self,
        plan: StepPlan,
        replica: TableReplica,
        token_ids: IntArray,
        drawn: Drawn | None,
        extra: Mapping[str, StagedArray],
    ) -> StagedStep:
        """Bring a plan's rows to their places on the device, and tables up to date."""
        tables, sources = self.tables, None if drawn is None else drawn.sources
        sent = {
            "numbers": self.row_numbers(plan, replica.num_sealed(plan), token_ids, sources),
            "copy_sources": plan.copy_sources.astype(np.int64),
            "copy_targets": plan.copy_targets.astype(np.int64),
            **tables.changes(replica),
        }
        assert not sent.keys() & extra.keys(), "two arrays of one name"
        on_device = to_device(sent | dict(extra), tables.device)
        tables.apply(on_device["changed_places"], on_device["changed_ids"])
        replica.forget_changes()
        if drawn is not None:
            tables.drawn[: len(drawn.token_ids)] = drawn.token_ids
        self._numbers.copy_(on_device["numbers"])
        return StagedStep(
            inputs=(self.step.plan.step,),
            positions=self._rows["positions" if self.kind.is_windowed else "context_lens"],
            copy_sources=on_device["copy_sources"],
            copy_targets=on_device["copy_targets"],
            is_windowed=self._rows.get("is_windowed"),
            head_shifts=self._rows.get("head_shifts"),
            extra={name: on_device[name] for name in extra},
        )
