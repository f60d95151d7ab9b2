"""The cache's parts for an engine with an allocator, a scheduler and block tables of its own.

Knows one layer and one step at a time, never who owns a block. The engine's unit of allocation is
a page of `open_block_size` tokens, one record of each kv head; see `StepArrays.from_block_table`
for what its tables say, and `BlockGeometry.is_place_needed` for the pages that it can take back.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

from ..blocks.geometry import BlockGeometry, BlockIds, IntArray
from ..blocks.step_arrays import StepArrays
from ..errors import ConfigError
from ..kernels.block_views import LayerBlocks
from ..kernels.new_tokens import NewTokens
from ..kernels.rules import ScoreRules
from ..kernels.step_inputs import KernelPlan, StepInputs
from ..validation import require
from .attention import attend_and_store, check_shapes, check_tensors
from .backend import Backend, choose_backend
from .block_views import layer_blocks
from .layer_spec import LayerSpec, cache_geometry
from .step_staging import step_arrays, step_inputs, to_device

# The border of kernels among them, for rooms that do not import kernels.
__all__ = [
    "EmbeddedLayer",
    "KernelPlan",
    "NewTokens",
    "ScoreRules",
    "step_from_block_table",
    "warm_up",
]


class EmbeddedLayer:
    """One attention layer on an arena that somebody else has allocated.

    `arena` is uint8 [num_blocks, num_kv_heads, record_bytes], contiguous and 16-byte aligned; it
    may be a part of a larger allocation. `geometry` is that of all layers which share block tables
    (`cache_geometry`), `dtype` the precision of open blocks. Raises `ConfigError` for an arena of
    another shape. Zero bytes need not be in it.
    """

    def __init__(
        self,
        arena: Tensor,
        layer: LayerSpec,
        dtype: torch.dtype,
        geometry: BlockGeometry,
        backend: Backend | None = None,
    ) -> None:
        layout = layer.record_layout(dtype)
        shape = (layer.num_kv_heads, layout.record_bytes)
        if arena.dtype is not torch.uint8 or arena.ndim != 3 or arena.shape[1:] != shape:
            raise ConfigError(
                f"an arena must be uint8 of shape (num_blocks, {shape[0]}, {shape[1]}), got "
                f"{arena.dtype} of {tuple(arena.shape)}"
            )
        if not arena.is_contiguous() or arena.data_ptr() % 16:
            raise ConfigError("an arena must be contiguous and start at a multiple of 16 bytes")
        own = cache_geometry([layer], dtype)
        if own.block_size != geometry.block_size or own.open_block_size < geometry.open_block_size:
            raise ConfigError(f"a layer of {own} cannot have blocks of {geometry}")
        self.layer: Final = layer
        self.geometry: Final = geometry
        self.backend: Final = choose_backend(arena.device) if backend is None else backend
        self.blocks: LayerBlocks = layer_blocks(arena, layer, dtype, geometry.open_block_size)

    def attend_and_store(
        self,
        new: NewTokens,
        plan: KernelPlan,
        rules: ScoreRules,
        out: Tensor | None = None,
    ) -> Tensor:
        """Attend from a step's new tokens to all earlier ones, then store their K/V.

        `plan` is `backend.plan` of the step, the same for all layers. Returns [T, Hq, value_dim] in
        the query's precision, written to `out` where that is given. Raises `ConfigError`, with
        nothing written, for tensors that are not of this layer and step.
        """
        check_tensors(new[:3], self.blocks.open_keys.device)
        check_shapes(*new[:3], self.layer, len(plan.step.cache_positions))
        shape = (*new.query.shape[:2], self.layer.value_dim)
        if out is not None and (out.shape != shape or out.dtype is not new.query.dtype):
            raise ConfigError(
                f"out must be {new.query.dtype} of shape {shape}, got {out.dtype} of "
                f"{tuple(out.shape)}"
            )
        output = attend_and_store(new, self.layer, self.blocks, plan, rules, self.backend)
        return output if out is None else out.copy_(output)


def step_from_block_table(
    geometry: BlockGeometry,
    query_start_loc: IntArray,
    seq_lens: IntArray,
    block_table: BlockIds | IntArray,
    device: torch.device,
    *,
    min_sealed: IntArray | None = None,
) -> StepInputs:
    """A step of N sequences by an engine's own numbers: see `StepArrays.from_block_table`.

    `query_start_loc` int64 [N + 1], `seq_lens` int64 [N] with the step's tokens, `block_table`
    [N, W] with places for all of them. Everything goes to `device` in one copy. Blocks are sealed
    in place. Raises `ConfigError` for a table that is too narrow and lengths that cannot be.
    """
    longest = int(seq_lens.max(initial=0))
    width = geometry.table_width(longest)
    if width > block_table.shape[1]:
        raise ConfigError(f"block tables of {block_table.shape[1]} places for {longest} tokens")
    query_lens = np.diff(query_start_loc)
    fits = len(query_lens) == len(seq_lens) and bool((query_lens >= 0).all())
    fits = fits and bool((query_lens <= seq_lens).all())
    require("query_start_loc", query_start_loc, fits, "ascending, no query longer than seq_lens")
    arrays = StepArrays.from_block_table(
        geometry, query_start_loc, seq_lens, block_table[:, :width], min_sealed
    )
    on_device = to_device(step_arrays(arrays), device)
    return step_inputs(geometry, arrays, on_device, seals_in_place=True)


def warm_up(layer: LayerSpec, dtype: torch.dtype, device: torch.device) -> None:
    """Compile what steps of such a layer would wait for, before there is an arena."""
    record_bytes = layer.record_layout(dtype).record_bytes
    arena = torch.zeros(1, layer.num_kv_heads, record_bytes, dtype=torch.uint8, device=device)
    embedded = EmbeddedLayer(arena, layer, dtype, cache_geometry([layer], dtype))
    embedded.backend.warm_up([embedded.blocks])
