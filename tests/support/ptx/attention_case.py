"""Attention calls in one configuration, for an emulated GPU. Knows the oracle and the reference.

Outputs are held to the oracle in float64, stored and sealed bytes to what torch's kernels write.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paged_kv.blocks.sink_window import SinkWindow
from paged_kv.cache.backend import TORCH_BACKEND
from paged_kv.cache.formats import (
    INT2,
    INT2_LONG,
    INT3,
    INT4,
    INT8,
    INT8_TOKEN,
    K4V2,
    KIVI2,
    NATIVE,
    KVFormat,
)
from paged_kv.kernels.block_views import LayerBlocks
from paged_kv.kernels.new_tokens import NewTokens
from paged_kv.kernels.rules import ScoreRules
from paged_kv.kernels.step_inputs import KernelPlan, StepInputs
from paged_kv.kernels.triton.backend import TritonBackend
from paged_kv.kernels.triton.plan import TritonPlan
from tests.support.attention_oracle import expected_outputs, ragged_fleet, relative_error
from tests.support.fleets import Fleet
from tests.support.token_streams import make_stream
from tests.support.triton_fleet import layer_of, limit_of
from tests.support.windowed_oracle import expected_of_windows, rotated_stream

LENGTHS: Final = (1, 380, 170)  # of which 70 more seal a block in every format
STEPS: Final = ((1, 1, 1), (1, 70, 3))  # decode; a prefill chunk beside a verified draft
STREAM: Final = SinkWindow(4, 130)
STREAM_CHUNKS: Final = ((130, 30), (120, 200), (100, 100), (70, 7))
STREAM_STEPS: Final = ((1, 1), (70, 3))


@dataclass(frozen=True)
class Case:
    kv_format: KVFormat
    head_dim: int = 128
    gqa_group: int = 4
    dtype: torch.dtype = torch.bfloat16
    rules: Mapping[str, Any] = field(default_factory=dict)
    is_stream: bool = False  # sinks and a window of a sequence, beside one that keeps all
    num_kv_heads: int = 2
    value_dim: int | None = None  # the head_dim
    is_apart: bool = False  # a chunk's attention to itself is left to other kernels

    def __str__(self) -> str:
        dim = f"D{self.head_dim}" + (f":{self.value_dim}" if self.value_dim else "")
        parts = [self.kv_format.name, dim, f"gqa{self.gqa_group}", str(self.dtype)[6:]]
        for name, value in self.rules.items():
            parts.append(name if isinstance(value, Tensor) else f"{name}={value}")
        flags = {"stream": self.is_stream, "apart": self.is_apart}
        return "-".join([*parts, *(name for name, is_on in flags.items() if is_on)])


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CAP_AND_WINDOW: Final = {"softcap": 5.0, "sliding_window": 100}
SINK_LOGITS: Final = torch.tensor([-1.0, 0.5, 3.0, 20.0, 0.0, 1.0, -3.0, 2.0])
# What a few cases cover of all that `make test-ptx` runs.
CASES: Final = [
    (80, Case(NATIVE, 128, 4, BF16)),
    (90, Case(NATIVE, 64, 8, FP16, CAP_AND_WINDOW)),
    (90, Case(NATIVE, 64, 1, BF16, is_stream=True)),
    (80, Case(INT8, 64, 8, FP16)),
    (90, Case(INT8, 128, 4, BF16, {"sink_logits": SINK_LOGITS})),
    (80, Case(INT8, 64, 1, FP32, is_stream=True)),
    (90, Case(INT8_TOKEN, 128, 1, FP16)),
    (80, Case(INT8_TOKEN, 64, 4, BF16, {"sliding_window": 100})),
    (80, Case(INT4, 128, 1, BF16, {"softcap": 5.0}, num_kv_heads=1)),
    (90, Case(INT4, 64, 4, FP16, is_stream=True)),
    (90, Case(INT4, 128, 8, BF16, num_kv_heads=1)),
    (80, Case(K4V2, 128, 4, BF16, num_kv_heads=1)),
    (90, Case(K4V2, 64, 1, FP32, CAP_AND_WINDOW)),
    (80, Case(INT3, 64, 8, BF16, CAP_AND_WINDOW)),
    (90, Case(INT3, 128, 4, FP16, num_kv_heads=1)),
    (80, Case(INT2, 128, 4, BF16, {"sink_logits": SINK_LOGITS})),
    (90, Case(INT2, 128, 1, BF16, num_kv_heads=1)),
    (80, Case(INT2, 64, 8, FP16, is_stream=True)),
    (80, Case(INT2_LONG, 128, 8, BF16, num_kv_heads=1)),
    (90, Case(INT2_LONG, 64, 4, BF16, {"softcap": 5.0})),
    (80, Case(KIVI2, 64, 4, FP16)),
    (90, Case(KIVI2, 128, 1, BF16, CAP_AND_WINDOW)),
    (80, Case(INT8, 64, 2, FP16, num_kv_heads=1, is_apart=True)),
    (90, Case(NATIVE, 64, 4, BF16, {"sink_logits": SINK_LOGITS}, is_apart=True)),
    (90, Case(INT2, 64, 2, BF16, num_kv_heads=1, is_apart=True)),
]


@dataclass
class Outcome:
    limit: float
    errors: list[float] = field(default_factory=list)
    differing: set[str] = field(default_factory=set)  # what was not written as by the reference
    num_sealed: int = 0
    num_apart: int = 0  # calls whose new tokens were attended to by other kernels

    @property
    def error(self) -> float:
        return max(self.errors)


class PoisonedPlan(TritonPlan):
    """Partial results that a kernel does not write are NaN."""

    def partials(self, *shape: int) -> tuple[Tensor, Tensor]:
        output, sums = super().partials(*shape)
        return output.fill_(torch.nan), sums.fill_(torch.nan)


def attend_to_new(
    query: Tensor, key: Tensor, value: Tensor, query_lens: NDArray[np.int64], scale: float
) -> tuple[Tensor, Tensor]:
    """What xformers' kernels would answer, as `xformers_attention.attend_to_new` gives it."""
    sequence = torch.from_numpy(np.repeat(np.arange(len(query_lens)), query_lens))
    order = torch.arange(len(query))
    is_seen = (sequence[:, None] == sequence) & (order[:, None] >= order)
    group_size = query.shape[1] // key.shape[1]
    key, value = (each.float().repeat_interleave(group_size, 1) for each in (key, value))
    scores = torch.einsum("thd,shd->hts", query.float(), key) * scale
    scores = scores.masked_fill(~is_seen, -torch.inf)
    output = torch.einsum("hts,shd->thd", scores.softmax(-1), value)
    return output.to(query.dtype).contiguous(), scores.logsumexp(-1).contiguous()


class HeldToReference(TritonBackend):
    """Triton's kernels; what they write is compared with what torch's would."""

    def __init__(self, arena: Tensor, outcome: Outcome, *, is_apart: bool) -> None:
        super().__init__("triton", self.attend_apart if is_apart else None)
        self.arena, self.outcome = arena, outcome

    def attend_apart(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        self.outcome.num_apart += 1
        return attend_to_new(*arguments)

    def plan(self, step: StepInputs) -> TritonPlan:
        return PoisonedPlan(step)

    def rotate(self, rows: Tensor) -> Tensor:
        rotated = super().rotate(rows)
        if not torch.equal(rotated, TORCH_BACKEND.rotate(rows)):
            self.outcome.differing.add("rotated values")
        return rotated

    def attend_and_store(
        self, new: NewTokens, layer: LayerBlocks, plan: KernelPlan, rules: ScoreRules
    ) -> Tensor:
        assert isinstance(plan, TritonPlan)
        before = self.arena.clone()
        output = super().attend_and_store(new, layer, plan, rules)
        stored = self.arena.clone()
        self.arena.copy_(before)
        TORCH_BACKEND.store_tokens(new, layer, plan.step)
        if not torch.equal(stored, self.arena):
            self.outcome.differing.add("stored bytes")
        self.outcome.num_sealed += len(plan.step.seal_block_ids)
        return output


def run_case(case: Case) -> Outcome:
    """Contexts are written by torch's kernels; then a decode step and a chunk by Triton's."""
    spec = layer_of(
        case.kv_format,
        heads=case.num_kv_heads,
        key_dim=case.head_dim,
        value_dim=case.value_dim or case.head_dim,
    )
    outcome = Outcome(limit_of(case.kv_format, case.dtype))
    windows: dict[int, SinkWindow | None] = {}
    if case.is_stream:
        fleet = Fleet([spec], dtype=case.dtype, max_model_len=1200, backend="torch")
        for seed, wanted in enumerate((STREAM, None)):
            stream = make_stream([spec], 700, seed, case.dtype, case.gqa_group)
            window = wanted and fleet.manager.fitted_window(wanted)
            stream = rotated_stream(stream, window) if window else stream
            windows[fleet.add(stream, window)] = window
        slots = list(windows)
        for chunk in STREAM_CHUNKS:
            fleet.step(dict(zip(slots, chunk, strict=True)))
    else:
        fleet, slots = ragged_fleet(
            spec,
            LENGTHS,
            dtype=case.dtype,
            gqa_group=case.gqa_group,
            new_tokens=160,
            backend="torch",
        )
    held = HeldToReference(fleet.cache.arenas[0], outcome, is_apart=case.is_apart)
    object.__setattr__(fleet.cache, "backend", held)
    for step in STREAM_STEPS if case.is_stream else STEPS:
        check_step(fleet, dict(zip(slots, step, strict=True)), windows, case.rules, outcome)
    return outcome


def check_step(
    fleet: Fleet,
    counts: dict[int, int],
    windows: dict[int, SinkWindow | None],
    rules: Mapping[str, Any],
    outcome: Outcome,
) -> None:
    if windows:
        expected = expected_of_windows(fleet, counts, windows)
    else:
        expected = expected_outputs(fleet, counts, **rules)
    outputs = fleet.step(counts, **rules)
    for slot in counts:
        outcome.errors.append(relative_error(outputs[slot][0], expected[slot]))
