"""A GPU that is not there: tensors that say they are on it, and what passes to and from the host.

Their numbers lie in host memory, and torch's operations and interpreted kernels compute them there.
What a GPU would do differently is checked or counted: copies in both directions, whatever makes the
host wait, and graphs, which run nothing while they are captured, must not wait then, and compute
all of it again from what their tensors hold at each replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.interpreter import GridExecutor

from paged_kv.engine import decode_graphs
from paged_kv.kernels.triton import plan

GPU = torch.device("cuda", 0)
ops = torch.ops.aten
INDEXED = (ops.index.Tensor, ops.index_put.default, ops.index_put_.default)
WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
ALIASES = (ops.detach.default, ops.alias.default, ops._unsafe_view.default)


class OnGpu(Tensor):
    """A tensor of the pretended GPU; `numbers` are where they really are."""

    numbers: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, numbers: Tensor) -> OnGpu:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device="meta",  # so that torch asks for every copy
        )
        made.numbers = numbers
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert _running, "a tensor of a GPU that is no longer pretended"
        return _running[-1].run(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGpu({self.numbers})"


@dataclass
class Traffic:
    """What passed between the host and the GPU, and why the host waited."""

    to_device: int = 0
    to_host: int = 0
    waits: list[str] = field(default_factory=list)


class PretendGraph:
    """What was launched between two points, to be launched again."""

    def __init__(self) -> None:
        self.launches: list[Callable[[], None]] = []
        self.num_replays = 0
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._new: dict[int, Tensor] = {}

    def replay(self) -> None:
        self.num_replays += 1
        for launch in self.launches:
            launch()

    def will_write(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._new:
                self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))

    def has_made(self, made: list[Tensor]) -> None:
        for tensor in made:
            self._new[tensor.untyped_storage().data_ptr()] = tensor

    def undo(self) -> None:
        """Nothing ran: what was there is there again, what is new holds no numbers."""
        for storage, before in self._before.values():
            storage.copy_(before)
        for tensor in self._new.values():
            tensor.fill_(torch.nan if tensor.is_floating_point() else 77)


class PretendEvent:
    """A point that the GPU comes to some time."""

    def __init__(self, gpu: PretendGpu) -> None:
        self.gpu = gpu

    def record(self, stream: None) -> None:
        self.number = sum(entry.startswith("launched") for entry in self.gpu.log)
        self.gpu.log.append(f"launched {self.number}")

    def synchronize(self) -> None:
        self.gpu.log.append(f"waited {self.number}")


class PretendGpu(TorchDispatchMode):
    """Runs what is asked of tensors on `GPU`, and counts the `traffic`."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()
        self.graphs: list[PretendGraph] = []
        self.log: list[str] = []  # "launched 5" where an event was recorded, "waited 5"
        self._captured: PretendGraph | None = None
        self._pinned: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func is ops.is_pinned.default:
            return tensors[0].untyped_storage().data_ptr() in self._pinned
        if func is ops._pin_memory.default or kwargs.get("pin_memory"):
            return self._pin(func, args, kwargs)
        is_on_gpu = any(isinstance(tensor, OnGpu) for tensor in tensors)
        with self:  # in inference mode composed operations arrive whole
            decomposed = func.decompose(*args, **kwargs)
        if decomposed is not NotImplemented:
            return decomposed
        to_gpu = is_on_gpu
        if kwargs.get("device") is not None:
            to_gpu = torch.device(kwargs["device"]).type == "cuda"
            kwargs = kwargs | {"device": torch.device("cpu")}
        if not is_on_gpu and not to_gpu:
            return func(*args, **kwargs)
        if func in (ops._to_copy.default, ops.copy_.default):
            self._count_copy(func, args, kwargs, to_gpu)
        else:
            self._count_waits(func, args, kwargs, tensors)
        return self._compute(func, args, kwargs, tensors, to_gpu)

    def _compute(
        self, func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor], to_gpu: bool
    ) -> Any:
        real_args, real_kwargs = tree_map(numbers_of, (args, kwargs))
        if self._captured is not None:
            self._captured.will_write(written(func, real_args, real_kwargs))
        result = func(*real_args, **real_kwargs)
        if self._captured is not None:
            self._captured.launches += launches_of(func, real_args, real_kwargs, result)
            if not is_view(func) and not func._schema.is_mutable:
                self._captured.has_made([x for x in tree_leaves(result) if isinstance(x, Tensor)])
        if func is ops.copy_.default or func._schema.name.endswith("_"):
            return args[0]
        # A view of what is no inference tensor must not be one.
        is_inference = torch.is_inference_mode_enabled() and not any(
            isinstance(tensor, OnGpu) and not tensor.is_inference() for tensor in tensors
        )
        with torch.inference_mode(is_inference):
            return tree_map(lambda x: OnGpu(x) if to_gpu and isinstance(x, Tensor) else x, result)

    def _pin(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        if func is ops._pin_memory.default:
            pinned: Tensor = args[0].clone()
        else:
            pinned = func(*args, **kwargs | {"pin_memory": False})
        self._pinned.add(pinned.untyped_storage().data_ptr())
        return pinned

    def _count_copy(self, func: Any, args: Any, kwargs: dict[str, Any], to_gpu: bool) -> None:
        source = args[1] if func is ops.copy_.default else args[0]
        target_on_gpu = isinstance(args[0], OnGpu) if func is ops.copy_.default else to_gpu
        if isinstance(source, OnGpu) == target_on_gpu:
            return
        self._must_not_capture(func)
        may_wait = not kwargs.get("non_blocking", args[2:3] == (True,))
        if target_on_gpu:
            self.traffic.to_device += 1
            if may_wait or source.untyped_storage().data_ptr() not in self._pinned:
                self.traffic.waits.append("a copy to the device")
        else:
            self.traffic.to_host += 1

    def _count_waits(
        self, func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> None:
        strangers = [t for t in tensors if not isinstance(t, OnGpu) and t.ndim > 0]
        waits = bool(WAITS & set(func.tags)) and kwargs.get("output_size") is None
        if func in INDEXED:
            indices = [index for index in args[1] if index is not None]
            waits = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
            self.traffic.to_device += len(strangers)
            waits |= bool(strangers)
        elif strangers:
            raise RuntimeError(f"{func} of tensors on the GPU and on the host")
        if waits:
            self._must_not_capture(func)
            self.traffic.waits.append(str(func))

    def _must_not_capture(self, func: Any) -> None:
        if self._captured is not None:
            raise RuntimeError(f"{func} is not permitted when a stream is capturing")

    def launch(self, run: Callable[..., None], args: Any, kwargs: dict[str, Any]) -> None:
        """A kernel of Triton's."""
        args, kwargs = tree_map(numbers_of, (args, kwargs))
        if self._captured is not None:
            self._captured.will_write([x for x in tree_leaves(args) if isinstance(x, Tensor)])
            self._captured.launches.append(lambda: run(*args, **kwargs))
        run(*args, **kwargs)

    def capture(self, run: Callable[[], Tensor]) -> tuple[PretendGraph, Tensor]:
        graph = PretendGraph()
        self._captured = graph
        try:
            output = run()
        finally:
            self._captured = None
            graph.undo()
        self.graphs.append(graph)
        return graph, output

    def event(self) -> PretendEvent:
        return PretendEvent(self)

    @contextmanager
    def watching(self) -> Iterator[Traffic]:
        """What passes meanwhile."""
        before, self.traffic = self.traffic, Traffic()
        try:
            yield self.traffic
        finally:
            self.traffic = before


_running: list[PretendGpu] = []


def numbers_of(leaf: Any) -> Any:
    return leaf.numbers if isinstance(leaf, OnGpu) else leaf


def is_view(func: Any) -> bool:
    returns = func._schema.returns
    is_alias = any(one.alias_info is not None and not one.alias_info.is_write for one in returns)
    return is_alias or func in ALIASES


def written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes to."""
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[place] if place < len(args) else kwargs[argument.name])
    return found


def launches_of(func: Any, args: Any, kwargs: Any, result: Any) -> list[Callable[[], None]]:
    """An operation once more, with its results where they were; nothing for a view."""
    if is_view(func):
        return []
    if func._schema.is_mutable:
        return [lambda: func(*args, **kwargs)]

    def launch() -> None:
        again = func(*args, **kwargs)
        for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
            if isinstance(old, Tensor):
                old.copy_(new)

    return [launch]


@contextmanager
def pretend_gpu() -> Iterator[PretendGpu]:
    """Tensors can be made on `GPU`, decode steps captured, and Triton's kernels interpreted."""
    gpu, launch = PretendGpu(), GridExecutor.__call__

    def launch_unwrapped(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
        gpu.launch(lambda *a, **k: launch(executor, *a, **k), args, kwargs)

    free = 1 << 34
    with ExitStack() as stack:
        for name, value in {
            "_lazy_init": lambda: None,
            "get_device_properties": lambda device: SimpleNamespace(multi_processor_count=1),
            "get_device_capability": lambda device: (9, 0),
            "mem_get_info": lambda device: (free, free),
            "memory_reserved": lambda device: 0,
            "memory_allocated": lambda device: 0,
            "current_stream": lambda device: None,
            "Event": gpu.event,
        }.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        # Contexts are not split: interpreted programs cost what they cost on no GPU.
        stack.enter_context(patch.object(plan, "PROGRAMS_PER_PROCESSOR", 1))
        stack.enter_context(patch.object(GridExecutor, "__call__", launch_unwrapped))
        stack.enter_context(patch.object(decode_graphs, "cuda_capture", lambda device: gpu.capture))
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` copies what it made on the host
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        stack.enter_context(gpu)
        _running.append(gpu)
        stack.callback(_running.remove, gpu)
        yield gpu


def move_to_gpu(model: nn.Module) -> None:
    """Parameters and buffers become tensors of the pretended GPU, with the same numbers."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                moved = nn.Parameter(OnGpu(parameter.data), requires_grad=False)
                module._parameters[name] = moved
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = OnGpu(buffer)
