"""Which devices there are and how much memory they have left. Knows torch, never blocks."""

from __future__ import annotations

from typing import Final

import torch

from ..errors import ConfigError
from ..free_memory import free_host_memory

DEFAULT_KV_MEMORY: Final = 1 << 30
DEFAULT_PART: Final = 0.5  # of the memory that is free


def require_device(device: torch.device | str) -> torch.device:
    """The device; raises `ConfigError` unless it is one of this machine that holds numbers."""
    try:
        if isinstance(device, bool) or not isinstance(device, (str, int, torch.device)):
            raise TypeError("not a device")
        found = torch.device(device)
        torch.empty(0, device=found)
    except Exception as error:  # what a device that is not there raises is up to its package
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"there is no device {device!r}: {reason}") from error
    return found


def usual_kv_memory(device: torch.device) -> int:
    """Bytes of a pool that nobody sizes: at most `DEFAULT_PART` of what is free."""
    free = free_memory(device)
    return DEFAULT_KV_MEMORY if free is None else min(DEFAULT_KV_MEMORY, int(DEFAULT_PART * free))


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where that is unknown.

    On a GPU what torch keeps for later use counts as free.
    """
    if device.type == "cpu":
        return free_host_memory()
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
