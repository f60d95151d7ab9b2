"""A decoder layer in one launch beside its parts in float64, whatever is around its attention."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

pytest.importorskip("numba")

from paged_kv.cache.formats import INT2, INT4, INT8, NATIVE
from paged_kv.cache.kv_cache import Step
from paged_kv.cache.layer_spec import cache_geometry
from paged_kv.kernels import naive
from paged_kv.kernels.cpu.backend import CpuBackend
from paged_kv.kernels.cpu.decoder_layer import DecoderLayer, LayerParts
from paged_kv.kernels.cpu.dense import DenseLayer, Weight
from paged_kv.kernels.cpu.dense_kernels import HAS_PAIRS
from paged_kv.kernels.cpu.token_rows import Norm
from paged_kv.kernels.eager.rotation import rotate
from paged_kv.kernels.naive import NaivePlan
from paged_kv.kernels.new_tokens import NewTokens
from paged_kv.kernels.rules import ScoreRules
from tests.support import cpu_kernels
from tests.support.attention_oracle import layer_of, ragged_fleet
from tests.support.fleets import Fleet

on_cpu_kernels = cpu_kernels.on_cpu_kernels
two_threads = cpu_kernels.two_threads

CHANNELS, INNER = 96, 160
EPSILON = 1e-5
TURNS = 8
# Hidden states are rounded three times on their way, what is multiplied a few times more.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2}


class Case(NamedTuple):
    """How a layer differs from the usual one."""

    kv_format: Any = INT8
    head_dim: int = 64
    group: int = 3
    dtype: torch.dtype = torch.float32
    stored: torch.dtype = torch.float32
    has_bias: bool = False
    has_head_norms: bool = False
    is_offset: bool = False
    activation: str = "silu"
    rules: ScoreRules = ScoreRules(0.1)
    num_turned: int | None = None


CASES = {
    "usual": Case(),
    "native": Case(NATIVE),
    "int4": Case(INT4, group=1),
    "int2": Case(INT2, group=8),
    "bias": Case(has_bias=True),
    "head norms": Case(has_head_norms=True),
    "offset": Case(is_offset=True, activation="gelu_tanh"),
    "half weights": Case(stored=torch.bfloat16, has_bias=True),
    "bfloat16": Case(dtype=torch.bfloat16, stored=torch.bfloat16, has_head_norms=True),
    "softcap": Case(rules=ScoreRules(0.2, softcap=2.0)),
    "window": Case(rules=ScoreRules(0.1, sliding_window=50)),
    "sinks": Case(group=2, rules=ScoreRules(0.1, sink_logits=torch.tensor([-1.0, 0.5, 3.0, 9.0]))),
    "turned in part": Case(num_turned=32),
    **{f"head of {dim}": Case(head_dim=dim, group=2) for dim in (32, 128, 256)},
}


class Layer:
    """Weights of a layer, and what they mean."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.heads = 2 * case.group, 2, 2
        torch.manual_seed(0)
        inputs = 2 * case.group * case.head_dim
        self.projections = [self._weight(n * case.head_dim, CHANNELS) for n in self.heads]
        self.output = self._weight(CHANNELS, inputs)
        self.gates = [self._weight(INNER, CHANNELS) for _ in range(2)]
        self.down = self._weight(CHANNELS, INNER)
        self.norms = [self._norm(CHANNELS) for _ in range(2)]
        self.head_norms = [
            self._norm(case.head_dim) if case.has_head_norms else None for _ in range(2)
        ]

    def _weight(self, columns: int, channels: int) -> Weight:
        bias = torch.randn(columns).to(self.case.stored) / 4 if self.case.has_bias else None
        return Weight((torch.randn(columns, channels) / channels**0.5).to(self.case.stored), bias)

    def _norm(self, channels: int) -> Norm:
        weight = torch.rand(channels) + (0.0 if self.case.is_offset else 0.5)
        return Norm(weight.to(self.case.dtype), EPSILON, self.case.is_offset)

    def parts(self) -> LayerParts:
        return LayerParts(
            attention_norm=self.norms[0],
            projections=DenseLayer(self.projections),
            head_norms=self.head_norms,
            attention_output=DenseLayer([self.output]),
            gate_norm=self.norms[1],
            gate=DenseLayer(self.gates, self.case.activation),
            down=DenseLayer([self.down]),
            head_dim=self.case.head_dim,
        )

    def new_tokens(self, hidden: Tensor, angles: list[Tensor]) -> NewTokens:
        rows = normed(hidden, self.norms[0])
        heads = [
            linear(rows, weight).view(len(rows), -1, self.case.head_dim)
            for weight in self.projections
        ]
        for place, norm in enumerate(self.head_norms):
            if norm is not None:
                heads[place] = normed(heads[place], norm)
        return NewTokens(turned(heads[0], angles), turned(heads[1], angles), heads[2])

    def behind(self, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = hidden + linear(attended.reshape(len(hidden), -1), self.output)
        gate, up = (linear(normed(hidden, self.norms[1]), weight) for weight in self.gates)
        activated = functional.silu(gate)
        if self.case.activation == "gelu_tanh":
            activated = functional.gelu(gate, approximate="tanh")
        return hidden + linear(activated * up, self.down)


def linear(rows: Tensor, weight: Weight) -> Tensor:
    bias = None if weight.bias is None else weight.bias.double()
    return functional.linear(rows, weight.matrix.double(), bias)


def normed(rows: Tensor, norm: Norm) -> Tensor:
    weight = norm.weight.double() + (1.0 if norm.is_offset else 0.0)
    return rows * (rows.square().mean(-1, keepdim=True) + norm.epsilon).rsqrt() * weight


def turned(heads: Tensor, angles: list[Tensor]) -> Tensor:
    cosines, sines = (one.double()[:, None] for one in angles)
    moving, still = heads.split([cosines.shape[-1], heads.shape[-1] - cosines.shape[-1]], -1)
    first, second = moving.chunk(2, -1)
    return torch.cat([moving * cosines + torch.cat([-second, first], -1) * sines, still], -1)


def error_of(given: Tensor, exact: Tensor) -> float:
    return float((given.double() - exact).norm() / exact.norm())


def begin(fleet: Fleet, slots: list[int]) -> tuple[Any, Step]:
    plan = fleet.plan(dict.fromkeys(slots, 1))
    return plan, fleet.cache.begin(plan)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_layer_is_what_its_parts_are(case, two_threads):
    """For as many steps as it takes to seal blocks; what it stores is what attention reads."""
    if case.dtype is torch.bfloat16 and not HAS_PAIRS:
        pytest.skip("this processor multiplies no pairs")
    spec = layer_of(case.kv_format, key_dim=case.head_dim)
    geometry = cache_geometry([spec], torch.float32)
    sealed_at = geometry.num_head_tokens + geometry.block_size + geometry.min_tail_tokens
    lengths = (0, 1, 63, 130, sealed_at + geometry.block_size - TURNS // 2)
    fleet, slots = ragged_fleet(spec, lengths, gqa_group=case.group)
    layer = Layer(case)
    decoder, blocks = DecoderLayer(layer.parts()), fleet.cache.records[0]
    stored, rotates, num_seals = None, case.kv_format.rotates_values, 0
    for turn in range(TURNS):
        plan, step = begin(fleet, slots)
        num_seals += len(plan.seal_block_ids)
        check_newest(step, blocks, stored, TOLERANCE[case.dtype])
        hidden = torch.randn(len(slots), CHANNELS).to(case.dtype)
        phases = torch.rand(len(slots), (case.num_turned or case.head_dim) // 2) * 6
        angles = [torch.cat([one, one], -1).to(case.dtype) for one in (phases.cos(), phases.sin())]
        exact = layer.new_tokens(hidden.double(), angles)
        stored = exact._replace(value=rotate(exact.value)) if rotates else exact
        attended = naive.attend(stored, blocks, NaivePlan(step.inputs), case.rules)
        attended = rotate(attended) if rotates else attended
        expected = layer.behind(hidden.double(), attended)
        given = hidden.clone()
        output = CpuBackend().run_layer(
            decoder, case.rules, hidden, angles, blocks, step.plan, rotates_values=rotates
        )
        assert output.dtype is case.dtype
        assert torch.equal(hidden, given)
        assert error_of(output, expected) < TOLERANCE[case.dtype], turn
        fleet.manager.commit(plan)
        fleet.poison_blocks(plan.freed_block_ids)
    assert num_seals or case.kv_format.is_native


def check_newest(step: Step, blocks: Any, before: NewTokens | None, limit: float) -> None:
    """What each sequence stored last is what was computed, where it is not sealed yet."""
    inputs = step.inputs
    for row in range(len(inputs.context_lens) if before is not None else 0):
        sealed_end = inputs.num_head_tokens + int(inputs.num_sealed[row]) * inputs.block_size
        if before is not None and inputs.context_lens[row] > sealed_end:
            keys, values = naive.read_context(blocks, inputs, row)
            assert error_of(keys[-1], before.key[row]) < limit
            assert error_of(values[-1], before.value[row]) < limit
