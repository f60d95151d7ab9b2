"""How much memory the host has left for this process. Knows files of the kernel, never torch.

What is free is what the machine can give without swapping, within the limits of every control group
that the process is in. Where nobody says it (not on Linux) it is unknown, and nothing is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

from .errors import ConfigError
from .units import format_memory

MEMORY_INFO: Final = Path("/proc/meminfo")
OWN_GROUPS: Final = Path("/proc/self/cgroup")
GROUPS: Final = Path("/sys/fs/cgroup")
# Of a control group, version 2 and 1: its limit, what it uses, and what of that is cache that goes
# when memory is short.
GROUP_FILES: Final = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_host_memory() -> int | None:
    """Bytes that this process can still take; None where that is unknown."""
    known = [free for free in (free_in_machine(), *free_in_groups()) if free is not None]
    return min(known) if known else None


def require_memory(what: str, num_bytes: int, free: int | None = None, where: str = "host") -> None:
    """Raise `ConfigError` with both figures where `what` takes more than is free.

    `free` is the host's memory unless it is given.
    """
    if free is None and where == "host":
        free = free_host_memory()
    if free is not None and num_bytes > free:
        raise ConfigError(
            f"{what} needs {format_memory(num_bytes)} of {where} memory; {format_memory(free)} "
            "are free"
        )


def free_in_machine() -> int | None:
    for line in text_of(MEMORY_INFO).splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None


def free_in_groups() -> Iterator[int]:
    """What each control group of this process that has a limit leaves."""
    for line in text_of(OWN_GROUPS).splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, files = GROUPS, GROUP_FILES[0]
        elif "memory" in controllers.split(","):
            root, files = GROUPS / "memory", GROUP_FILES[1]
        else:
            continue
        own = PurePosixPath(path.lstrip("/"))
        for folder in (own, *own.parents):  # in a container its own group may be the root
            free = free_in_group(root / folder, *files)
            if free is not None:
                yield free


def free_in_group(folder: Path, limit_file: str, usage_file: str, cache: str) -> int | None:
    limit, usage = text_of(folder / limit_file).strip(), text_of(folder / usage_file).strip()
    if not (limit.isdigit() and usage.isdigit()):
        return None
    reclaimable = 0
    for line in text_of(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == cache and value.isdigit():
            reclaimable = int(value)
    return max(int(limit) - int(usage) + reclaimable, 0)


def text_of(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
