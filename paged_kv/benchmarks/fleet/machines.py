"""What a replica's machine is on paper: how long a step takes, how many blocks its memory holds.

Knows published figures and arithmetic, never a request. What is assumed is in `ASSUMED`; nothing
here was measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import torch

from ...blocks.geometry import BlockGeometry
from ...cache.formats import resolve_format
from ...cache.layer_groups import block_bytes, num_blocks_for
from ...cache.layer_spec import LayerSpec, cache_geometry


class Work(NamedTuple):
    """What a step does."""

    num_tokens: int  # that it computes
    num_pairs: int  # tokens that these see, each counted for each, itself included
    num_bytes: int  # of blocks that it reads: all that its sequences hold


NO_WORK: Final = Work(0, 0, 0)


class StepTime(NamedTuple):
    """Seconds that a step takes, the sum of its parts."""

    step: float  # each step: the weights are read once, and the host prepares it
    token: float = 0.0  # of `Work`, each
    pair: float = 0.0
    byte: float = 0.0

    def seconds(self, work: Work) -> float:
        tokens, pairs, num_bytes = work
        return self.step + self.token * tokens + self.pair * pairs + self.byte * num_bytes


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What decides the bytes and operations of a model's tokens."""

    name: str
    num_parameters: float
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16

    def layers(self, kv_format: str) -> list[LayerSpec]:
        layer = LayerSpec(
            kv_format=resolve_format(kv_format),
            num_kv_heads=self.num_kv_heads,
            key_dim=self.head_dim,
            value_dim=self.head_dim,
        )
        return [layer] * self.num_layers

    @property
    def weight_bytes(self) -> float:
        return self.num_parameters * self.dtype.itemsize

    @property
    def token_operations(self) -> float:
        """Floating-point operations of a token, but for attention."""
        return 2 * self.num_parameters

    @property
    def pair_operations(self) -> float:
        """Of a token and one that it sees: a product with its key and one with its value."""
        return 4 * self.num_layers * self.num_heads * self.head_dim


# Dubey et al. 2024, "The Llama 3 Herd of Models" (arXiv:2407.21783), table 3, and its config.json.
LLAMA_3_8B: Final = ModelShape(
    name="Llama-3-8B",
    num_parameters=8.03e9,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
)


class Assumed(NamedTuple):
    """What no data sheet says, of every GPU alike."""

    reached_bandwidth: float = 0.8  # of the published memory bandwidth
    reached_operations: float = 0.5  # of the published operations a second
    usable_memory: float = 0.9  # of the card's
    work_bytes: float = 1e9  # activations and what the runtime takes
    host_seconds: float = 2e-3  # of each step


ASSUMED: Final = Assumed()


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU as its data sheet has it."""

    name: str
    source: str
    memory_bytes: float
    bytes_per_second: float
    operations_per_second: float  # dense, of 16 bits

    def kv_bytes(self, shape: ModelShape, assumed: Assumed = ASSUMED) -> int:
        """What weights and work leave for keys and values."""
        usable = self.memory_bytes * assumed.usable_memory
        return int(usable - shape.weight_bytes - assumed.work_bytes)

    def step_time(self, shape: ModelShape, assumed: Assumed = ASSUMED) -> StepTime:
        bandwidth = self.bytes_per_second * assumed.reached_bandwidth
        operations = self.operations_per_second * assumed.reached_operations
        return StepTime(
            step=assumed.host_seconds + shape.weight_bytes / bandwidth,
            token=shape.token_operations / operations,
            pair=shape.pair_operations / operations,
            byte=1 / bandwidth,
        )


L4: Final = Card(
    name="L4",
    source="NVIDIA L4 Tensor Core GPU data sheet: 24 GB, 300 GB/s, 121 TFLOPS (242 sparse)",
    memory_bytes=24e9,
    bytes_per_second=300e9,
    operations_per_second=121e12,
)
H100: Final = Card(
    name="H100",
    source="NVIDIA H100 data sheet, SXM: 80 GB, 3.35 TB/s, 989.5 TFLOPS (1979 sparse)",
    memory_bytes=80e9,
    bytes_per_second=3.35e12,
    operations_per_second=989.5e12,
)
CARDS: Final = {card.name: card for card in (L4, H100)}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a replica runs on, with one KV format."""

    name: str
    geometry: BlockGeometry
    num_blocks: int
    block_bytes: int
    step_time: StepTime
    token_budget: int = 512
    max_num_seqs: int = 256
    max_model_len: int = 16384

    @property
    def kv_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    def reading_like(self, other: Machine) -> Machine:
        """The same memory, but a stored token takes as long to read as in the other's format."""
        mine, theirs = (m.block_bytes / m.geometry.block_size for m in (self, other))
        byte = other.step_time.byte * theirs / mine
        return replace(self, step_time=self.step_time._replace(byte=byte))


def machine_of(
    card: Card,
    kv_format: str,
    shape: ModelShape = LLAMA_3_8B,
    assumed: Assumed = ASSUMED,
    token_budget: int = 512,
) -> Machine:
    """A card that serves a model with keys and values in this format."""
    layers = shape.layers(kv_format)
    return Machine(
        name=f"{card.name}, {kv_format}",
        geometry=cache_geometry(layers, shape.dtype),
        num_blocks=num_blocks_for(card.kv_bytes(shape, assumed), layers, shape.dtype),
        block_bytes=block_bytes(layers, shape.dtype),
        step_time=card.step_time(shape, assumed),
        token_budget=token_budget,
    )
