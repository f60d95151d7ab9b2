"""Count what crosses between host and device, where there is no device: "meta" stands for one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def device_types(values: object) -> set[str]:
    return {leaf.device.type for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}


class TransferCounter(TorchDispatchMode):
    """Names of operations that copy from the host to "meta" and back; what comes back is zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.to_device: list[str] = []
        self.to_host: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with self:  # in inference mode composed operations arrive whole
            decomposed = func.decompose(*args, **kwargs)
        if decomposed is not NotImplemented:
            return decomposed
        target = kwargs.get("device")
        if func is torch.ops.aten._to_copy.default and target is not None:
            source, target = args[0].device.type, torch.device(target).type
            if source == "meta" and target == "cpu":
                self.to_host.append(str(func))
                dtype = kwargs.get("dtype") or args[0].dtype
                return torch.zeros(args[0].shape, dtype=dtype)
            if source == "cpu" and target == "meta":
                self.to_device.append(str(func))
        elif func is torch.ops.aten.copy_.default and device_types(args) == {"cpu", "meta"}:
            is_upload = args[0].device.type == "meta"
            (self.to_device if is_upload else self.to_host).append(str(func))
            return args[0]
        elif func is torch.ops.aten._local_scalar_dense.default and device_types(args) == {"meta"}:
            self.to_host.append(str(func))
            return 0
        return func(*args, **kwargs)
