"""A step on its way to the device: one buffer, one copy. Knows arrays, never blocks' contents.

Kernels are started by numbers on the device and a copy costs microseconds whatever its size, so all
arrays of a step travel together, those of whoever runs the model among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..blocks.geometry import BlockGeometry
from ..blocks.step_arrays import StepArrays
from ..blocks.step_plan import StepPlan
from ..kernels.step_inputs import NO_WINDOW, StepInputs

StagedArray = NDArray[np.int64] | NDArray[np.float64]
ALIGNMENT: Final = 16  # elements of 8 bytes: what starts at 128 bytes is compiled for once


def to_device(arrays: Mapping[str, StagedArray], device: torch.device) -> dict[str, Tensor]:
    """The same arrays, int64 or float64, as tensors on `device`, by one copy.

    On a CPU nothing is copied, a tensor is its array's memory: but for a field of records, since
    kernels read one element behind the other.
    """
    if device.type == "cpu":
        return {
            name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()
        }
    starts: dict[str, int] = {}
    end = 0
    for name, array in arrays.items():
        starts[name] = end
        end += -(-array.size // ALIGNMENT) * ALIGNMENT
    # Torch keeps pinned memory, and hands it out again only once the copy is done.
    buffer = torch.empty(end, dtype=torch.int64, pin_memory=device.type == "cuda")
    words = buffer.numpy()
    for name, array in arrays.items():
        words[starts[name] :][: array.size] = array.reshape(-1).view(np.int64)
    on_device = buffer.to(device, non_blocking=True)
    return {
        name: on_device[starts[name] : starts[name] + array.size]
        .view(torch.float64 if array.dtype == np.float64 else torch.int64)
        .view(array.shape)
        for name, array in arrays.items()
    }


@dataclass(frozen=True)
class StagedStep:
    """A plan on the device."""

    inputs: tuple[StepInputs, ...]  # of each group of layers
    positions: Tensor  # [T] of each new token in its sequence
    copy_sources: Tensor  # [C] blocks to copy before anything is written ...
    copy_targets: Tensor  # [C] ... and where to
    # Of a step with windowed sequences:
    is_windowed: Tensor | None  # [T] 0 or 1
    head_shifts: Tensor | None  # [T] see `StepPlan.head_shifts`; None where all are 0
    extra: dict[str, Tensor]


def stage(
    geometry: BlockGeometry,
    plan: StepPlan,
    arrays: Sequence[StepArrays],
    extra: Mapping[str, StagedArray],
    device: torch.device,
) -> StagedStep:
    """A plan and the arrays of its parts on `device`; `extra` travels along under its own names."""
    sent = step_arrays(arrays[0]) | plan_arrays(plan)
    for group, (part, its) in enumerate(zip(plan.others, arrays[1:], strict=True), start=1):
        sent |= in_group(group, step_arrays(its) | window_arrays(part))
    assert not sent.keys() & extra.keys(), "two arrays of one name"
    on_device = to_device(sent | dict(extra), device)
    inputs = [step_inputs(geometry, arrays[0], on_device)]
    for group, its in enumerate(arrays[1:], start=1):
        prefix = f"{group}: "
        own = {n.removeprefix(prefix): t for n, t in on_device.items() if n.startswith(prefix)}
        inputs.append(step_inputs(geometry, its, own))
    return StagedStep(
        inputs=tuple(inputs),
        positions=on_device.get("positions", inputs[0].cache_positions),
        copy_sources=on_device["copy_sources"],
        copy_targets=on_device["copy_targets"],
        is_windowed=on_device.get("is_windowed"),
        head_shifts=on_device.get("head_shifts"),
        extra={name: on_device[name] for name in extra},
    )


def step_inputs(
    geometry: BlockGeometry,
    arrays: StepArrays,
    on_device: Mapping[str, Tensor],
    *,
    seals_in_place: bool = False,
) -> StepInputs:
    """What kernels read, of arrays whose tensors are `on_device` by their names."""
    return StepInputs(
        query_lens=arrays.query_lens,
        context_lens_host=arrays.context_lens,
        block_size=geometry.block_size,
        open_block_size=geometry.open_block_size,
        num_head_tokens=geometry.num_head_tokens,
        seals_in_place=seals_in_place,
        num_sink_tokens=on_device.get("num_sink_tokens"),
        window_sizes=on_device.get("window_sizes"),
        **{name: on_device[name] for name in INPUT_NAMES},
    )


INPUT_NAMES: Final = (
    "context_lens",
    "query_start_loc",
    "cache_positions",
    "block_table",
    "num_sealed",
    "stored_tokens",
    "stored_slots",
    "seal_block_ids",
    "seal_sources",
)


def step_arrays(arrays: StepArrays) -> dict[str, StagedArray]:
    """What kernels read of every step."""
    return {name: getattr(arrays, name) for name in INPUT_NAMES}


def in_group(group: int, arrays: Mapping[str, StagedArray]) -> dict[str, StagedArray]:
    """Under names of that group."""
    return {f"{group}: {name}": array for name, array in arrays.items()}


def plan_arrays(plan: StepPlan) -> dict[str, StagedArray]:
    """Blocks to copy, of all groups, and what the model has to know of windows."""
    parts = plan.parts
    sent: dict[str, StagedArray] = {
        "copy_sources": np.concatenate([part.copy_sources for part in parts]).astype(np.int64),
        "copy_targets": np.concatenate([part.copy_targets for part in parts]).astype(np.int64),
        **window_arrays(plan),
    }
    if plan.num_evicted_tokens is not None:
        sent["positions"] = plan.positions
    is_windowed, shifts = plan.is_windowed, plan.head_shifts
    if is_windowed is not None:
        sent["is_windowed"] = is_windowed.astype(np.int64)
    if shifts is not None:
        sent["head_shifts"] = shifts
    return sent


def window_arrays(part: StepPlan) -> dict[str, StagedArray]:
    """What kernels read of windowed sequences."""
    if part.num_sink_tokens is None or part.window_sizes is None:
        return {}
    return {
        "num_sink_tokens": part.num_sink_tokens,
        "window_sizes": np.where(part.window_sizes, part.window_sizes, NO_WINDOW),
    }
