"""Triton's kernels on an emulated GPU: compiled ahead of time as far as PTX, and run there.

Knows Triton and torch, and of paged_kv only where it asks for a GPU. Kernels must have been
imported with TRITON_INTERPRET=0.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource, make_backend
from triton.runtime import cache as triton_cache
from triton.runtime.jit import JITFunction, create_function_from_signature

from paged_kv.kernels.triton import launch as triton_launch
from tests.support.ptx.batch import Launch
from tests.support.ptx.errors import PtxError
from tests.support.ptx.global_memory import GlobalMemory
from tests.support.ptx.machine import run_launch
from tests.support.ptx.program import Program, parse
from tests.support.ptx.settings import Settings

Edit = Callable[[str, str], str]  # a kernel's name and its PTX, to what is run instead


class EmulatedGpu:
    """Stands in for Triton's launcher; counts launches by kernel."""

    def __init__(self, arch: int, settings: Settings, edit: Edit | None) -> None:
        self.arch, self.settings, self.edit = arch, settings, edit
        self.backend = make_backend(GPUTarget("cuda", arch, 32))
        self.launches: Counter[str] = Counter()
        self.compiled: dict[Any, tuple[Program, int]] = {}

    def run(self, kernel: Any, *values: Any, grid: Any, warmup: bool = False, **named: Any) -> None:
        bind = create_function_from_signature(kernel.signature, kernel.params, self.backend)
        bound, specialization, options = bind(*values, **named)
        memory = GlobalMemory()
        signature = [kind for kind, _ in specialization]
        parameters = list(raw_parameters(signature, list(bound.values()), memory, kernel.arg_names))
        program, shared_bytes = self.compile(kernel, bound, specialization, named | options)
        scratch = [0] * (len(program.parameters) - len(parameters))  # Triton's own, unused here
        sizes = (*(grid(bound) if callable(grid) else grid), 1, 1)[:3]
        name = kernel.fn.__name__
        self.launches[name] += 1
        try:
            run_launch(
                Launch(program, sizes, parameters + scratch, shared_bytes, memory, self.settings)
            )
        except PtxError as error:
            raise PtxError(f"{name} (sm_{self.arch}, {options}): {error}") from None

    def compile(
        self, kernel: Any, bound: Any, specialization: list[Any], options: dict[str, Any]
    ) -> tuple[Program, int]:
        """By Triton's own code, which looks at values too."""
        options = {name: value for name, value in options.items() if name not in kernel.arg_names}
        key = kernel, str(specialization), str(options)
        if key not in self.compiled:
            chosen, signature, constants, attributes = kernel._pack_args(
                self.backend, options, bound, specialization, options
            )
            source = ASTSource(kernel, signature, constants, attributes)
            made = triton.compile(source, target=self.backend.target, options=chosen.__dict__)
            ptx = made.asm["ptx"]
            if self.edit is not None:
                ptx = self.edit(kernel.fn.__name__, ptx)
            self.compiled[key] = parse(ptx), made.metadata.shared
        return self.compiled[key]


def raw_parameters(
    signature: Any, values: Any, memory: GlobalMemory, names: list[str]
) -> Iterator[int]:
    """Bits of the parameters that are left in a compiled kernel, groups taken apart."""
    for kind, value, name in zip(signature, values, names, strict=True):
        if isinstance(kind, tuple):
            fields = [f"{name}.{field}" for field in getattr(value, "_fields", range(len(value)))]
            yield from raw_parameters(kind, value, memory, fields)
        elif kind == "constexpr":
            continue
        elif isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            base = memory.add(storage.data_ptr(), storage.nbytes(), name)
            yield base + value.storage_offset() * value.element_size() if base else 0
        elif isinstance(value, float):
            yield struct.unpack("<I", struct.pack("<f", value))[0]
        else:
            yield value & 0xFFFFFFFFFFFFFFFF


@contextmanager
def emulated_gpu(
    arch: int, cache_folder: Path, settings: Settings | None = None, edit: Edit | None = None
) -> Iterator[EmulatedGpu]:
    """As long as this lives, kernels run on an emulated GPU of `arch`.

    In the folder, which is Triton's cache for that time, kernels have no machine code: assembling
    it takes as long as all before.
    """
    gpu = EmulatedGpu(arch, settings or Settings(), edit)

    def run(kernel: Any, *values: Any, **named: Any) -> None:
        gpu.run(kernel, *values, **named)

    replaced = [
        (JITFunction, "run", run),
        (CUDABackend, "make_cubin", lambda *arguments: b""),
        # Triton hashes all of itself in each process, and asks the assembler for its version.
        (triton_cache, "triton_key", lambda: triton.__version__),
        (CUDABackend, "hash", lambda backend: f"no assembler-{backend.target.arch}"),
        (triton_launch, "is_hopper", lambda device: arch >= 90),
    ]
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(patch.object(owner, name, value))
        stack.enter_context(triton.knobs.cache.scope())
        triton.knobs.cache.dir = str(cache_folder)
        yield gpu
