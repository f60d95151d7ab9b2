"""Which kernels run: the one place where a backend is chosen. Knows devices, never blocks.

PAGED_KV_BACKEND=torch, cpu, triton or xformers overrides the choice; the last is triton, but a
prefill's tokens attend to each other by xformers' kernels.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Final, Protocol

import torch
from torch import Tensor

from ..errors import ConfigError
from ..kernels.block_views import LayerBlocks
from ..kernels.eager.backend import EagerBackend
from ..kernels.new_tokens import NewTokens
from ..kernels.rules import ScoreRules
from ..kernels.step_inputs import KernelPlan, StepInputs
from ..kernels.stored_places import DenseTokens, StoredPlaces

BACKEND_VARIABLE: Final = "PAGED_KV_BACKEND"
NEEDED_PACKAGE: Final = {"cpu": "numba", "triton": "triton", "xformers": "xformers"}


class Backend(Protocol):
    """The kernels of one kind of machine.

    They mean what `kernels.naive` says; a plan is only good for the backend that made it.
    """

    @property
    def name(self) -> str: ...

    def warm_up(self, layers: Sequence[LayerBlocks]) -> None:
        """Make ready, once for each cache, what the first step would wait for."""

    def plan(self, step: StepInputs) -> KernelPlan:
        """Work out, once for all layers of a step, what they share."""
        ...

    def attend(
        self, new: NewTokens, layer: LayerBlocks, plan: KernelPlan, rules: ScoreRules
    ) -> Tensor:
        """Attend from new tokens to all earlier ones: [T, Hq, value_dim] in the query's dtype."""
        ...

    def rotate(self, rows: Tensor) -> Tensor:
        """Rows [..., D] times a Hadamard matrix, as `eager.rotation` says it, bit by bit."""
        ...

    def store_tokens(self, new: NewTokens, layer: LayerBlocks, step: StepInputs) -> None:
        """Write the new tokens to open blocks, and seal what the step seals."""

    def read_stored(
        self,
        layer: LayerBlocks,
        places: StoredPlaces,
        target: DenseTokens,
        *,
        rotates_values: bool = False,
    ) -> None:
        """Write all that these places hold, dequantized, as `eager.read` says it, bit by bit.

        Values that were rotated when they were stored are turned back.
        """

    def attend_and_store(
        self, new: NewTokens, layer: LayerBlocks, plan: KernelPlan, rules: ScoreRules
    ) -> Tensor:
        """`attend`, then `store_tokens`, in less time."""
        ...


TORCH_BACKEND: Final = EagerBackend()


def choose_backend(device: torch.device, name: str | None = None) -> Backend:
    """The backend of that name, or the one that PAGED_KV_BACKEND or else the device asks for."""
    wanted = os.environ.get(BACKEND_VARIABLE) or None if name is None else name
    is_name = wanted is None or isinstance(wanted, str)
    if not is_name or wanted not in (None, "torch", *NEEDED_PACKAGE):
        raise ConfigError(f"unknown backend {wanted!r}; expected torch, cpu, triton or xformers")
    chosen = wanted or {"cpu": "cpu", "cuda": "triton"}.get(device.type, "torch")
    if chosen == "torch":
        return TORCH_BACKEND
    if chosen == "cpu" and device.type != "cpu":
        raise ConfigError(f"backend 'cpu' cannot run on device {device}")
    try:
        if chosen == "cpu":
            return cpu_backend()
        return (xformers_backend if chosen == "xformers" else triton_backend)(device.type)
    except ImportError as error:  # none, or one that does not fit the other packages
        package = NEEDED_PACKAGE[chosen]
        if wanted:
            raise ConfigError(f"backend {chosen!r} needs {package}: {error}") from error
        warn_of_torch(package, str(error))
        return TORCH_BACKEND


@cache
def cpu_backend() -> Backend:
    """The CPU's own kernels; raises `ImportError` where numba cannot be imported."""
    from ..kernels.cpu.backend import CpuBackend

    return CpuBackend()


@cache
def triton_backend(device_type: str) -> Backend:
    """A GPU's kernels; raises `ImportError` where triton cannot be imported."""
    from ..kernels.triton.backend import TritonBackend

    check_runs_triton(device_type)
    return TritonBackend()


@cache
def xformers_backend(device_type: str) -> Backend:
    """Raises `ImportError` where triton or xformers cannot be imported."""
    from ..kernels.triton.backend import TritonBackend

    check_runs_triton(device_type)
    from ..kernels.triton.xformers_attention import attend_to_new

    return TritonBackend("xformers", attend_to_new)


def check_runs_triton(device_type: str) -> None:
    """Raise `ConfigError` for a device that Triton has no kernels for and does not interpret on."""
    from ..kernels.triton.codes import INTERPRETED

    if device_type != "cuda" and not INTERPRETED:
        raise ConfigError(
            f"backend 'triton' cannot run on device {device_type}, unless TRITON_INTERPRET=1 was "
            "set before triton was imported"
        )


@cache
def warn_of_torch(package: str, reason: str) -> None:
    """Once in a process."""
    warnings.warn(
        f"{package} cannot be used ({reason}): attention runs on plain torch operations, several "
        f"times slower; pip install {package}",
        RuntimeWarning,
        stacklevel=3,
    )
