"""What a step needs, on its way to the device: one buffer, one copy. Knows arrays, no meanings.

Kernels are started by numbers on the device and a copy costs microseconds whatever its size, so all
arrays of a step travel together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

StagedArray = NDArray[np.int64] | NDArray[np.float64]
ALIGNMENT: Final = 16  # elements of 8 bytes: what starts at 128 bytes is compiled for once


def to_device(arrays: Mapping[str, StagedArray], device: torch.device) -> dict[str, Tensor]:
    """The same arrays, int64 or float64, as tensors on `device`, by one copy.

    On a CPU nothing is copied: a tensor is its array's memory.
    """
    if device.type == "cpu":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
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
