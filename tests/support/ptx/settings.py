"""What an emulated GPU checks, and how it uses the freedom that hardware has. Knows no program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Settings:
    check_races: bool = True
    # "exact" sums of products are rounded once; the others align and cut off products as tensor
    # cores of these generations have been measured to do.
    sums: Literal["exact", "ampere", "hopper"] = "exact"
    # Seed: approximate instructions err by a random part of what their documentation allows.
    noise: int | None = None
    max_lanes: int = 8192  # threads that are executed together
    fence_copies: bool = False  # whether wgmma may read what cp.async wrote only after a fence
