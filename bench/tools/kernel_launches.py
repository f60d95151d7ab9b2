"""What our host code would launch on a GPU, recorded on tensors without memory, and compiled.

So that tests and the tuner look at the very kernels that a GPU would run, where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton
from tools.machine_code import (
    MachineCode,
    Resources,
    disassemble,
    instructions_per_byte,
    read_resources,
)
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import create_function_from_signature

from paged_kv.cache.backend import choose_backend
from paged_kv.cache.block_views import layer_blocks
from paged_kv.cache.formats import KVFormat
from paged_kv.cache.key_calibration import KeyCalibration
from paged_kv.cache.layer_spec import LayerSpec, cache_geometry
from paged_kv.kernels.new_tokens import NewTokens
from paged_kv.kernels.rules import ScoreRules
from paged_kv.kernels.step_inputs import StepInputs
from paged_kv.kernels.triton import attention as triton_attention
from paged_kv.kernels.triton import decode_step as triton_decode_step
from paged_kv.kernels.triton import launch as triton_launch
from paged_kv.kernels.triton import rotation as triton_rotation
from paged_kv.kernels.triton import store as triton_store
from paged_kv.kernels.triton.plan import TritonPlan

META = torch.device("meta")
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
KERNELS = (
    (triton_attention, "attend_sealed"),
    (triton_attention, "attend_prefill"),
    (triton_attention, "attend_open"),
    (triton_attention, "merge_parts"),
    (triton_store, "seal_blocks_kernel"),
    (triton_rotation, "rotate_rows"),
    (triton_decode_step, "make_decode_inputs"),
)


@dataclass(frozen=True)
class Launch:
    """One call of a kernel: `arguments` by name, constants among them."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    def compile(
        self, arch: int, *, max_registers: int | None = None, **options: Any
    ) -> CompiledKernel:
        """As Triton's launcher would, by its own code, which looks at values too."""
        target = GPUTarget("cuda", arch, 32)
        backend = make_backend(target)
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        options = (
            {"num_warps": 4, "num_stages": 3, "maxnreg": max_registers} | self.options | options
        )
        bound, specialization, options = bind(**self.arguments, **options)
        chosen, signature, constants, attributes = self.kernel._pack_args(
            backend, options, bound, specialization, options
        )
        source = ASTSource(self.kernel, signature, constants, attributes)
        return triton.compile(source, target=target, options=chosen.__dict__)

    def machine_code(self, arch: int, **options: Any) -> MachineCode:
        return disassemble(self.compile(arch, **options))

    def resources(self, arch: int) -> Resources:
        return read_resources(self.compile(arch))


class Recorder:
    """Stands in for a kernel: `recorder[grid](...)` only notes what it was called with."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*values: Any, **named: Any) -> None:
            options = {name: named.pop(name) for name in OPTIONS if name in named}
            positional = dict(zip(self.kernel.arg_names, values, strict=False))
            self.launches.append(Launch(self.kernel, grid, positional | named, options))

        return launch


@contextmanager
def recorded_kernels(arch: int = 90) -> Iterator[list[Launch]]:
    """Kernels only note their launches, as on a GPU of `arch`, in the list that this gives."""
    launches: list[Launch] = []
    with ExitStack() as stack:
        for module, name in KERNELS:
            recorder = Recorder(getattr(module, name), launches)
            stack.enter_context(patch.object(module, name, recorder))
        stack.enter_context(patch.object(triton_launch, "is_hopper", lambda device: arch >= 90))
        yield launches


def record_launches(
    kv_format: KVFormat,
    *,
    head_dim: int = 128,
    value_dim: int | None = None,
    num_kv_heads: int = 8,
    group_size: int = 4,
    query_lens: Sequence[int] = (1,),
    dtype: torch.dtype = torch.bfloat16,
    arch: int = 90,
    has_windows: bool = False,
    is_calibrated: bool = False,
    **rules: Any,
) -> list[Launch]:
    """One layer's attention and storing, with one block to be sealed, on a GPU of `arch`."""
    value_dim = head_dim if value_dim is None else value_dim
    calibration = KeyCalibration(
        channel_order=np.tile(np.arange(head_dim, dtype=np.int16), (num_kv_heads, 1)),
        feedback=np.zeros((num_kv_heads, head_dim, head_dim), dtype=np.float16),
    )
    layer = LayerSpec(
        kv_format=kv_format,
        num_kv_heads=num_kv_heads,
        key_dim=head_dim,
        value_dim=value_dim,
        calibration=calibration if is_calibrated else None,
    )
    geometry = cache_geometry([layer], dtype)
    layout = layer.record_layout(dtype)
    arena = torch.empty(16, num_kv_heads, layout.record_bytes, dtype=torch.uint8, device=META)
    blocks = layer_blocks(arena, layer, dtype, geometry.open_block_size)

    def longs(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=META)

    count, num_tokens = len(query_lens), sum(query_lens)
    num_seals = 0 if kv_format.is_native else 1
    step = StepInputs(
        query_lens=np.array(query_lens, dtype=np.int64),
        context_lens_host=np.full(count, 1024),
        context_lens=longs(count),
        query_start_loc=longs(count + 1),
        cache_positions=longs(num_tokens),
        block_table=longs(count, 1024 // geometry.open_block_size),
        num_sealed=longs(count),
        stored_tokens=longs(num_tokens),
        stored_slots=longs(num_tokens),
        seal_block_ids=longs(num_seals),
        seal_sources=longs(num_seals, geometry.block_size),
        block_size=geometry.block_size,
        open_block_size=geometry.open_block_size,
        num_head_tokens=geometry.num_head_tokens,
        num_sink_tokens=longs(count) if has_windows else None,
        window_sizes=longs(count) if has_windows else None,
    )
    heads = (num_kv_heads * group_size, num_kv_heads, num_kv_heads)
    dims = (head_dim, head_dim, value_dim)
    query, key, value = (
        torch.empty(num_tokens, *shape, dtype=dtype, device=META)
        for shape in zip(heads, dims, strict=True)
    )
    rules = {"scale": head_dim**-0.5} | rules
    backend = choose_backend(torch.device("cuda"))
    with recorded_kernels(arch) as launches:
        if kv_format.rotates_values:
            value = backend.rotate(value)
        backend.attend_and_store(
            NewTokens(query, key, value), blocks, TritonPlan(step), ScoreRules(**rules)
        )
    return launches


def bytes_of_tile(launch: Launch) -> int:
    """K/V bytes that one turn of an attention kernel's loop reads, metadata included."""
    shape, layout = launch.arguments["SHAPE"], launch.arguments["LAYOUT"]
    tile = launch.arguments["SPLIT"].TILE
    if launch.name == "attend_open":
        itemsize = launch.arguments["open_blocks"].element_size()
        return int(tile * (shape.KEY_DIM + shape.VALUE_DIM) * itemsize)
    is_prefill = launch.name == "attend_prefill"  # whose tiles are of tokens, not of rows of codes
    tiled = layout.BLOCK_SIZE
    if not is_prefill:
        tiled = layout.BLOCK_SIZE * max(layout.LEAST_BITS, 2) // 8
    return int(layout.RECORD_SIZE * tile // tiled)


def context_loop_density(launch: Launch, code: MachineCode) -> float:
    """Warp-instructions for each K/V byte in the loop over context.

    It comes before the loop over new tokens, which `attend_open` also has.
    """
    loops = [loop for loop in code.loops if loop.num_mma]
    first = min(loops, key=lambda loop: (loop.start, -loop.end))
    innermost = min(
        (loop for loop in loops if loop.positions <= first.positions),
        key=lambda loop: loop.num_instructions,
    )
    return instructions_per_byte(innermost, launch.options["num_warps"], bytes_of_tile(launch))
