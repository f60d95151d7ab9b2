"""The one place that runs the model: a plan to logits.

Knows a model, its cache and plans; never requests, nor what becomes of the logits. The engine,
beam search and evaluation all run the model through this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from ..blocks.geometry import IntArray
from ..blocks.step_plan import StepPlan
from ..cache.decode_tables import Drawn
from ..cache.kv_cache import NO_ARRAYS, PagedKVCache
from ..cache.step_staging import StagedArray
from ..cache.transfer import write_records
from ..models.adapters import AdapterNames
from ..models.attached_model import AttachedModel
from ..scheduler.step import Arrival, BlockCopy
from .decode_graphs import DecodeGraphs


class ModelRunner:
    """A model on the blocks of a cache; with `graphs`, its decode steps are captured."""

    def __init__(
        self, model: AttachedModel, cache: PagedKVCache, graphs: DecodeGraphs | None = None
    ) -> None:
        self.model = model
        self.cache = cache
        self.graphs = graphs
        self._captured_with = model.adapters.active

    def copy_swapped(self, swap_outs: Sequence[BlockCopy], swap_ins: Sequence[BlockCopy]) -> None:
        """Copy blocks to the host, then from it, before anything is written to the pool."""
        for copy in swap_outs:
            self.cache.swap_out(copy.device_block_ids, copy.host_block_ids)
        for copy in swap_ins:
            self.cache.swap_in(copy.device_block_ids, copy.host_block_ids)

    def write_arrived(self, arrivals: Sequence[Arrival]) -> None:
        """Write blocks that were computed elsewhere, before a step reads them."""
        for arrival in arrivals:
            write_records(self.cache, cast("list[Tensor]", arrival.records), arrival.block_ids)

    @property
    def failure(self) -> str | None:
        """Why no step can be run any more; None while steps can."""
        return None

    @property
    def runs_ahead(self) -> bool:
        """Whether a device computes steps while the host goes on."""
        return self.graphs is not None

    def takes_drawn(
        self, plan: StepPlan, logit_tokens: IntArray, adapters: Sequence[AdapterNames] = ()
    ) -> bool:
        """Whether a plan can be run with tokens that are only on the device."""
        if self.graphs is None or not self.graphs.fits(plan, logit_tokens):
            return False
        is_captured = all(names == self._captured_with for names in adapters)
        return is_captured and self.model.adapters.active == self._captured_with

    @torch.inference_mode()
    def run(
        self,
        plan: StepPlan,
        token_ids: IntArray,
        logit_tokens: IntArray,
        extra: Mapping[str, StagedArray] = NO_ARRAYS,
        drawn: Drawn | None = None,
        adapters: Sequence[AdapterNames] = (),
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute a plan's tokens [T] and store their keys and values.

        Returns logits [M, V] in float32 of the tokens at the places `logit_tokens` [M] among them,
        and the `extra` arrays on the device, where they arrive together with the plan. The next
        step may overwrite the logits. Last tokens that the host does not know are `drawn`, for a
        plan that `takes_drawn`. Sequences [N] have the `adapters` that are given, or all of them
        those that are active in the model.
        """
        if self.graphs is not None and self.takes_drawn(plan, logit_tokens, adapters):
            return self.graphs.run(plan, token_ids, extra, drawn)
        chosen = self.model.adapters.of_step(adapters, plan.token_rows, logit_tokens)
        step = self.cache.begin(plan, token_ids=token_ids, logit_tokens=logit_tokens, extra=extra)
        logits = self.model.forward(
            step.token_ids, step.positions, step.logit_tokens, self.cache, step, chosen
        )
        return logits.float(), step.extra
