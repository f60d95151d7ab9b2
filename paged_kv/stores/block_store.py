"""Where entries outlive a process: bytes under keys. Knows what such a store does, not how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class BlockStore(Protocol):
    """Bytes under keys, for several threads and processes at once.

    An entry may be gone at any time, and whoever reads one checks what it says: a store need not
    promise anything but that it gives back what was put, or part of it, or nothing. Any method may
    raise what its medium raises; whoever calls it goes on without the store then.
    """

    def put(self, key: bytes, data: bytes) -> None:
        """Keep an entry, in the place of one that is there; others may have to go for it."""

    def get(self, key: bytes) -> bytes | None:
        """An entry, or None where there is none; it counts as used now."""

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Of each key whether there is an entry."""

    def remove(self, key: bytes) -> None:
        """Forget an entry, if there is one."""
