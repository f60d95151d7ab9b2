"""Which kernels run: the one place where a backend is chosen. Knows devices, never blocks.

A backend is functions of the same signatures: `warm_up` for all layers of a cache, `plan` a step
once for all layers, `attend_and_store` for each layer, or one of `attend` and `store_tokens` where
the other is done elsewhere. PAGED_KV_BACKEND=torch, cpu, triton or xformers overrides the choice;
the last is triton, but a chunk's tokens attend to each other by xformers' kernels.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Final

import torch
from torch import Tensor

from ..errors import ConfigError
from ..kernels.block_views import LayerBlocks
from ..kernels.eager.attention import attend, plan_groups
from ..kernels.eager.store import store_tokens
from ..kernels.step_inputs import StepInputs

BACKEND_VARIABLE: Final = "PAGED_KV_BACKEND"
NEEDED_PACKAGE: Final = {"cpu": "numba", "triton": "triton", "xformers": "xformers"}


@dataclass(frozen=True)
class Backend:
    """The kernels of one kind of machine; see `kernels.attention` and `kernels.store`."""

    name: str
    warm_up: Callable[[Sequence[LayerBlocks]], None]
    plan: Callable[[StepInputs], Any]
    attend: Callable[..., Tensor]
    store_tokens: Callable[[LayerBlocks, Tensor, Tensor, StepInputs], None]
    # What `store_tokens` does but for appending, where `attend(..., appends=True)` can do that.
    seal_blocks: Callable[[LayerBlocks, Tensor, Tensor, StepInputs], None] | None = None

    def attend_and_store(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        records: LayerBlocks,
        step: StepInputs,
        plan: Any,
        **rules: Any,
    ) -> Tensor:
        """Attend, then write the new tokens: as `attend` and `store_tokens`, in less time."""
        if self.seal_blocks is None:
            output = self.attend(query, key, value, records, plan, **rules)
            self.store_tokens(records, key, value, step)
            return output
        output = self.attend(query, key, value, records, plan, appends=True, **rules)
        if len(step.seal_block_ids):
            self.seal_blocks(records, key, value, step)
        return output


def nothing_to_warm_up(layers: Sequence[LayerBlocks]) -> None:
    """Torch brings its operations compiled."""


TORCH_BACKEND: Final = Backend("torch", nothing_to_warm_up, plan_groups, attend, store_tokens)


def choose_backend(device: torch.device, name: str | None = None) -> Backend:
    """The backend of that name, or the one that PAGED_KV_BACKEND or else the device asks for."""
    wanted = name or os.environ.get(BACKEND_VARIABLE) or None
    if wanted not in (None, "torch", *NEEDED_PACKAGE):
        raise ConfigError(f"unknown backend {wanted!r}; expected torch, cpu, triton or xformers")
    chosen = wanted or {"cpu": "cpu", "cuda": "triton"}.get(device.type, "torch")
    if chosen == "torch":
        return TORCH_BACKEND
    if chosen == "cpu" and device.type != "cpu":
        raise ConfigError(f"backend 'cpu' cannot run on device {device}")
    try:
        if chosen == "cpu":
            return cpu_backend()
        backend = triton_backend(device.type)
        return with_xformers(backend) if chosen == "xformers" else backend
    except ImportError as error:  # none, or one that does not fit the other packages
        package = NEEDED_PACKAGE[chosen]
        if wanted:
            raise ConfigError(f"backend {chosen!r} needs {package}: {error}") from error
        warn_of_torch(package, str(error))
        return TORCH_BACKEND


@cache
def cpu_backend() -> Backend:
    """The CPU's own kernels; raises `ImportError` where numba cannot be imported."""
    from ..kernels.cpu.attention import attend
    from ..kernels.cpu.plan import CpuPlan
    from ..kernels.cpu.store import seal_blocks, store_tokens
    from ..kernels.cpu.warming import warm_up

    return Backend("cpu", warm_up, CpuPlan, attend, store_tokens, seal_blocks)


@cache
def triton_backend(device_type: str) -> Backend:
    """A GPU's kernels; raises `ImportError` where triton cannot be imported."""
    from ..kernels.triton.attention import attend
    from ..kernels.triton.codes import INTERPRETED
    from ..kernels.triton.plan import TritonPlan
    from ..kernels.triton.store import seal_blocks, store_tokens

    if device_type != "cuda" and not INTERPRETED:
        raise ConfigError(
            f"backend 'triton' cannot run on device {device_type}, unless TRITON_INTERPRET=1 was "
            "set before triton was imported"
        )
    return Backend("triton", nothing_to_warm_up, TritonPlan, attend, store_tokens, seal_blocks)


@cache
def with_xformers(backend: Backend) -> Backend:
    """Raises `ImportError` where xformers cannot be imported."""
    from ..kernels.triton.xformers_attention import attend_to_new

    return replace(
        backend, name="xformers", attend=partial(backend.attend, attend_to_new=attend_to_new)
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
