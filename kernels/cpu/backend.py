"""The CPU's own kernels as a backend. Knows the kernels of this folder, never how they work."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..block_views import LayerBlocks
from ..new_tokens import NewTokens
from ..rules import ScoreRules
from ..step_inputs import KernelPlan, StepInputs
from ..stored_places import DenseTokens, StoredPlaces
from .attention import attend, prepare
from .decoder_layer import DecoderLayer
from .plan import CpuPlan, WorkItems
from .read import read_stored
from .rotation import rotate
from .store import seal_blocks, store_tokens
from .warming import warm_up


class CpuBackend:
    """Needs numba; importing this module raises `ImportError` where that is missing."""

    name = "cpu"

    def warm_up(self, layers: Sequence[LayerBlocks]) -> None:
        warm_up(layers)

    def plan(self, step: StepInputs) -> CpuPlan:
        return CpuPlan(step)

    def attend(
        self, new: NewTokens, layer: LayerBlocks, plan: KernelPlan, rules: ScoreRules
    ) -> Tensor:
        assert isinstance(plan, CpuPlan)
        return attend(new, layer, plan, rules)

    def rotate(self, rows: Tensor) -> Tensor:
        return rotate(rows)

    def store_tokens(self, new: NewTokens, layer: LayerBlocks, step: StepInputs) -> None:
        store_tokens(new, layer, step)

    def read_stored(
        self,
        layer: LayerBlocks,
        places: StoredPlaces,
        target: DenseTokens,
        *,
        rotates_values: bool = False,
    ) -> None:
        read_stored(layer, places, target, rotates_values=rotates_values)

    def attend_and_store(
        self, new: NewTokens, layer: LayerBlocks, plan: KernelPlan, rules: ScoreRules
    ) -> Tensor:
        """Attention appends on the way; what is left is to seal."""
        assert isinstance(plan, CpuPlan)
        output = attend(new, layer, plan, rules, appends=True)
        if len(plan.step.seal_block_ids):
            seal_blocks(new, layer, plan.step)
        return output

    def run_layer(
        self,
        decoder: DecoderLayer,
        rules: ScoreRules,
        hidden: Tensor,
        angles: Sequence[Tensor],
        layer: LayerBlocks,
        plan: KernelPlan,
        *,
        rotates_values: bool = False,
    ) -> Tensor:
        """`attend_and_store` with all of a decoder layer around it; one new token a sequence."""
        assert isinstance(plan, CpuPlan)
        cpu_plan = plan

        def prepare_attention(new: NewTokens, output: Tensor) -> WorkItems:
            return prepare(new, layer, cpu_plan, rules, output, appends=True)

        hidden, new = decoder(hidden, angles, prepare_attention, rotates_values=rotates_values)
        if len(plan.step.seal_block_ids):
            seal_blocks(new, layer, plan.step)
        return hidden
