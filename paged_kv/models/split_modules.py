"""Modules of a model that several processes compute together: what is summed, and what gathered.

Knows tensors and the process group, never models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Place(NamedTuple):
    """Which of how many processes this is."""

    rank: int
    size: int

    def of(self, count: int) -> slice:
        """Its own among `count` heads, or rows."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)


class SummedLinear(nn.Module):
    """A linear layer whose input channels are split: what each process computes is summed."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias: nn.Parameter | None = linear.bias  # is added once
        linear.register_parameter("bias", None)
        self.linear = linear

    def forward(self, input: Tensor) -> Tensor:
        return self.finished(self.linear(input))

    def finished(self, output: Tensor) -> Tensor:
        """The layer's output, from what this process has computed of it."""
        output = summed(output)
        return output if self.bias is None else output + self.bias


class SummedEmbedding(nn.Module):
    """An embedding whose rows are split: each token's is in one process, the others give zeros."""

    def __init__(self, embedding: nn.Embedding, place: Place) -> None:
        super().__init__()
        embedding.padding_idx = None  # it may be in another process, and is as good as any
        self.embedding = embedding
        self.first: int = place.rank * -(-embedding.num_embeddings // place.size)

    def forward(self, input: Tensor) -> Tensor:
        rows = input - self.first
        is_own = (rows >= 0) & (rows < len(self.embedding.weight))
        output = self.embedding(torch.where(is_own, rows, 0))
        return summed(torch.where(is_own[..., None], output, 0))


class GatheredLinear(nn.Module):
    """A linear layer whose outputs are split, and wanted by rank 0 alone; others give zeros."""

    def __init__(self, linear: nn.Linear, place: Place) -> None:
        super().__init__()
        self.linear = linear
        self.place = place

    def forward(self, input: Tensor) -> Tensor:
        own: Tensor = self.linear(input).contiguous()
        if self.place.rank:
            torch.distributed.gather(own, dst=0)
            return own.new_zeros(*own.shape[:-1], self.linear.out_features)
        parts = [torch.empty_like(own) for _ in range(self.place.size)]
        torch.distributed.gather(own, parts, dst=0)
        return torch.cat(parts, dim=-1)


def summed(output: Tensor) -> Tensor:
    """The sum of what all processes have, in place of this one's."""
    output = output.contiguous()
    torch.distributed.all_reduce(output)
    return output


def summing(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def summed_forward(*arguments: Any, **options: Any) -> Tensor:
        return summed(forward(*arguments, **options))

    return summed_forward


def inner_linear(module: Any) -> Any:
    """The linear layer that computes what there is to sum; other modules are their own."""
    return module.linear if type(module) is SummedLinear else module


def finished(module: Any, output: Tensor) -> Tensor:
    """A module's output, from that of its `inner_linear`."""
    if not isinstance(module, SummedLinear):
        return output
    return module.finished(output)
