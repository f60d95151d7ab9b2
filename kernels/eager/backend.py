"""Torch's own operations as a backend. Knows the kernels of this folder, never how they work."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..block_views import LayerBlocks
from ..new_tokens import NewTokens
from ..rules import ScoreRules
from ..step_inputs import KernelPlan, StepInputs
from ..stored_places import DenseTokens, StoredPlaces
from .attention import EagerPlan, attend
from .read import read_stored
from .rotation import rotate
from .store import store_tokens


class EagerBackend:
    """Runs on every device, and needs no package but torch."""

    name = "torch"

    def warm_up(self, layers: Sequence[LayerBlocks]) -> None:
        """Torch brings its operations compiled."""

    def plan(self, step: StepInputs) -> EagerPlan:
        return EagerPlan(step)

    def attend(
        self, new: NewTokens, layer: LayerBlocks, plan: KernelPlan, rules: ScoreRules
    ) -> Tensor:
        assert isinstance(plan, EagerPlan)
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
        read_stored(layer, places, target, rotate if rotates_values else None)

    def attend_and_store(
        self, new: NewTokens, layer: LayerBlocks, plan: KernelPlan, rules: ScoreRules
    ) -> Tensor:
        output = self.attend(new, layer, plan, rules)
        store_tokens(new, layer, plan.step)
        return output
