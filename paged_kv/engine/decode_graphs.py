"""Decode steps as captured graphs: launched as a whole, by one call. Knows a model and its cache.

A step's launches take the host longer than the device where batches are small. Steps are rounded up
to few sizes; one of a size that is new runs as it is, which compiles what is missing, the next one
is captured, and later ones replay that.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from ..blocks.block_manager import BlockManager
from ..blocks.geometry import IntArray
from ..blocks.step_plan import StepPlan
from ..cache.decode_tables import BatchKind, DecodeBatch, Drawn
from ..cache.kv_cache import PagedKVCache, Step
from ..cache.step_staging import StagedArray
from ..models.attached_model import AttachedModel

LEAST_STRIDE: Final = 8  # sequences between two sizes, from there on


class Graph(Protocol):
    """What was captured."""

    def replay(self) -> None:
        """Launch all of it again, on what its tensors hold now."""


# What a function launches, as a graph, and what it returns: tensors that each replay writes.
Capture = Callable[[Callable[[], Tensor]], tuple[Graph, Tensor]]


def rounded_up(num_seqs: int, most: int) -> int:
    """Rows of a step for so many sequences: at most a quarter of them, or 7, stay empty."""
    if num_seqs <= LEAST_STRIDE // 2:
        return min(1 << (num_seqs - 1).bit_length(), most)
    stride = max(LEAST_STRIDE, (1 << (num_seqs - 1).bit_length()) // 8)
    return min(-(-num_seqs // stride) * stride, most)


@dataclass(eq=False)
class _Entry:
    """One kind of step, as far as it has come."""

    batch: DecodeBatch
    has_run: bool = False  # so that all that it launches is compiled
    graph: Graph | None = None
    logits: Tensor | None = None  # what the graph writes


class DecodeGraphs:
    """Runs decode steps. A model that cannot be captured runs on without graphs, after a warning.

    `num_bytes` of the device's memory were taken by capturing.
    """

    def __init__(self, model: AttachedModel, cache: PagedKVCache, manager: BlockManager) -> None:
        self.model = model
        self.cache = cache
        self.tables: Final = cache.decode_tables(manager)
        self.is_enabled: bool = True
        self.num_bytes: int = 0
        self._capture = cuda_capture(cache.device)
        self._entries: dict[BatchKind, _Entry] = {}

    def fits(self, plan: StepPlan, logit_tokens: IntArray) -> bool:
        """Whether a plan is a decode step all of whose logits are wanted."""
        return self.is_enabled and self.tables.holds(plan) and len(logit_tokens) == plan.num_tokens

    def run(
        self,
        plan: StepPlan,
        token_ids: IntArray,
        extra: Mapping[str, StagedArray],
        drawn: Drawn | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `ModelRunner.run`, for a plan that `fits`. The next step overwrites the logits."""
        num_seqs = len(plan.seq_ids)
        kind = BatchKind(
            rounded_up(num_seqs, self.tables.max_num_seqs),
            seals=len(plan.seal_block_ids) > 0,
            is_windowed=plan.window_sizes is not None,
        )
        if kind not in self._entries:
            self._entries[kind] = _Entry(DecodeBatch(self.tables, kind))
        entry = self._entries[kind]
        step = self.cache.begin_decode(
            plan, entry.batch, token_ids=token_ids, drawn=drawn, extra=extra
        )
        if entry.graph is None and entry.has_run:
            self._try_capture(entry, step)
        if entry.graph is None or entry.logits is None:
            logits = self._compute(entry.batch, step)
            entry.has_run = True
            if not self.is_enabled:
                self.cache.drop_decode_tables()
        else:
            entry.graph.replay()
            step.stored_layers.update(range(len(self.cache.layers)))
            logits = entry.logits
        return logits[:num_seqs], step.extra

    def _compute(self, batch: DecodeBatch, step: Step) -> Tensor:
        """What is captured: logits [B, V] in float32."""
        batch.step.refresh()
        logits = self.model.forward(
            step.token_ids, step.positions, step.logit_tokens, self.cache, step
        )
        return logits.float()

    def _try_capture(self, entry: _Entry, step: Step) -> None:
        """Capture what this step launches; nothing has run then."""
        before = reserved_bytes(self.cache.device)
        try:
            entry.graph, entry.logits = self._capture(lambda: self._compute(entry.batch, step))
        except Exception as error:  # whatever the model's own code does
            self.is_enabled = False
            warnings.warn(
                f"decode steps of {type(self.model.model).__name__} cannot be captured as graphs "
                f"({error}): they are launched one kernel after the other, which "
                "enforce_eager=True would do without this warning",
                RuntimeWarning,
                stacklevel=2,
            )
        finally:
            step.stored_layers.clear()
        self.num_bytes += reserved_bytes(self.cache.device) - before


def cuda_capture(device: torch.device) -> Capture:
    """Captures CUDA graphs whose memory is shared: one of them runs at a time."""
    pool = torch.cuda.graph_pool_handle()

    def capture(run: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(device),
            torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
        ):
            output = run()
        return graph, output

    return capture


def reserved_bytes(device: torch.device) -> int:
    """Of the device's memory, what torch holds and uses."""
    torch.cuda.empty_cache()  # as capturing does
    return torch.cuda.memory_reserved(device)
