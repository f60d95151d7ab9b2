"""A GPU's kernels as a backend. Knows the kernels of this folder, never how they work."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..block_views import LayerBlocks
from ..eager.read import read_stored
from ..new_tokens import NewTokens
from ..rules import ScoreRules
from ..step_inputs import KernelPlan, StepInputs
from ..stored_places import DenseTokens, StoredPlaces
from .attention import Attender, attend
from .plan import TritonPlan
from .rotation import rotate
from .store import seal_blocks, store_tokens


class TritonBackend:
    """With `attend_to_new`, a prefill's tokens attend to each other by it, where it can."""

    def __init__(self, name: str = "triton", attend_to_new: Attender | None = None) -> None:
        self.name = name
        self.attend_to_new = attend_to_new

    def warm_up(self, layers: Sequence[LayerBlocks]) -> None:
        """Triton compiles a kernel when it is first launched, and keeps it on disk."""

    def plan(self, step: StepInputs) -> TritonPlan:
        return TritonPlan(step)

    def attend(
        self, new: NewTokens, layer: LayerBlocks, plan: KernelPlan, rules: ScoreRules
    ) -> Tensor:
        assert isinstance(plan, TritonPlan)
        return attend(new, layer, plan, rules, attend_to_new=self.attend_to_new)

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
        read_stored(layer, places, target, rotate if rotates_values else None)

    def attend_and_store(
        self, new: NewTokens, layer: LayerBlocks, plan: KernelPlan, rules: ScoreRules
    ) -> Tensor:
        """Attention appends on the way; what is left is to seal."""
        assert isinstance(plan, TritonPlan)
        output = attend(new, layer, plan, rules, appends=True, attend_to_new=self.attend_to_new)
        if len(plan.step.seal_block_ids):
            seal_blocks(new, layer, plan.step)
        return output
