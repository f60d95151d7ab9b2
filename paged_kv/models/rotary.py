"""Rotary position embedding (RoPE) after the fact: turning queries and keys by further positions.

Knows channels and angles, nothing of models' code: what a model does to its keys is found by
looking at one token at several positions. A windowed sequence needs it twice. Its sinks are scored
by queries turned back, so that stored keys never change (StreamingLLM's positions); and since
models compute angles in float32, they are given small positions, and the rest is turned here by
angles in float64.

Source: RoFormer (Su et al. 2021, arXiv:2104.09864).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch
from torch import Tensor

MODEL_PERIOD: Final = 1024  # the model of a windowed sequence sees positions modulo this
TOLERANCE: Final = {torch.float32: 1e-3}  # relative, of a turned key
HALF_TOLERANCE: Final = 0.03


@dataclass(frozen=True, eq=False)
class Rotation:
    """Which channels one layer turns, and how fast; none, where a layer knows no positions.

    Channels come in pairs: neighbours where `is_interleaved`, else the first half of those that
    turn with the second half.
    """

    frequencies: Tensor  # [F] radians for each position, float64
    first_channel: int
    is_interleaved: bool

    def phases(self, shifts: Tensor) -> Tensor:
        """Factors [T, 1, F], complex64, that move tokens by `shifts` [T] positions."""
        angles = shifts.double()[:, None] * self.frequencies
        phases = torch.polar(torch.ones_like(angles), angles)
        return phases[:, None].to(torch.complex64)

    def turn(self, tokens: Tensor, phases: Tensor) -> Tensor:
        """Tokens [T, H, D] moved; the same where nothing turns."""
        num_turned = 2 * len(self.frequencies)
        if not num_turned:
            return tokens
        end = self.first_channel + num_turned
        channels = tokens[..., self.first_channel : end].float()
        if self.is_interleaved:
            pairs = torch.view_as_complex(torch.unflatten(channels, -1, (-1, 2)).contiguous())
            turned = torch.view_as_real(pairs * phases).flatten(-2)
        else:
            pairs = torch.complex(*(half.contiguous() for half in channels.chunk(2, -1))) * phases
            turned = torch.cat([pairs.real, pairs.imag], -1)
        if num_turned == tokens.shape[-1]:
            return turned.to(tokens.dtype)
        moved = tokens.clone()
        moved[..., self.first_channel : end] = turned
        return moved


def find_rotation(
    tokens: Tensor, positions: Tensor, candidates: Sequence[Tensor]
) -> Rotation | None:
    """What turns the first of `tokens` [P, H, D] into the others, which are at `positions` [P].

    `candidates` are the frequencies [F] that the model may use, in float64. None where nothing
    fits: then its tokens know their positions in another way.
    """
    first, dim = tokens[:1].double(), tokens.shape[-1]
    limit = TOLERANCE.get(tokens.dtype, HALF_TOLERANCE) * first.norm() * len(tokens) ** 0.5
    found = [Rotation(torch.empty(0, dtype=torch.float64, device=tokens.device), 0, False)]
    for frequencies in candidates:
        num_turned = 2 * len(frequencies)
        if num_turned > dim:
            continue
        for first_channel in {0, dim - num_turned}:
            found += [
                Rotation(frequencies, first_channel, is_interleaved)
                for is_interleaved in (False, True)
            ]
    shifts = positions - positions[0]
    for rotation in found:
        moved = rotation.turn(first.expand_as(tokens), rotation.phases(shifts))
        if (moved - tokens).norm() <= limit:
            return rotation
    return None


@dataclass(frozen=True)
class StepTurns:
    """What one step turns: of windowed sequences, the tokens that the model could not place."""

    positions: Tensor  # [T] in each token's sequence
    is_windowed: Tensor  # [T] 1 where a token belongs to a windowed sequence, else 0
    head_shifts: Tensor | None  # [T] see `StepPlan.head_shifts`
    rotations: dict[int, Rotation]  # by layer
    known_phases: dict[tuple[int, str], Tensor]  # layers share frequencies

    @property
    def model_positions(self) -> Tensor:
        """[T] what the model is told."""
        return self.positions - self.turns

    @cached_property
    def turns(self) -> Tensor:
        """[T] positions by which tokens are moved after the model's own embedding."""
        whole = self.positions // MODEL_PERIOD * MODEL_PERIOD
        return whole * self.is_windowed

    def apply(self, layer: int, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Query and key [T, H, D] at their true positions, and the query that scores sinks."""
        rotation = self.rotations[layer]
        sink_query = None
        if self.head_shifts is not None:
            phases = self.phases(rotation, "sinks", self.turns - self.head_shifts)
            sink_query = rotation.turn(query, phases)
        phases = self.phases(rotation, "turns", self.turns)
        return rotation.turn(query, phases), rotation.turn(key, phases), sink_query

    def phases(self, rotation: Rotation, purpose: str, shifts: Tensor) -> Tensor:
        key = id(rotation.frequencies), purpose
        if key not in self.known_phases:
            self.known_phases[key] = rotation.phases(shifts)
        return self.known_phases[key]
