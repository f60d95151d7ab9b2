"""Whether a module is what it was: the same parts, the same weights, and nobody who listens.

Knows modules of torch, nothing of models.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class ModuleSnapshot:
    """A module and all in it, as they are now: forwards, hooks, and where parameters lie.

    Hooks of the module itself do not count, and what is written to a parameter where it lies is no
    change.
    """

    def __init__(self, root: nn.Module) -> None:
        self._held: list[tuple[dict[str, Any], str, object]] = []
        self._hooks: list[dict[Any, Any]] = []
        self._places: list[tuple[Tensor, int]] = []
        for module in root.modules():
            own: Any = module.__dict__
            self._held.append((own, "forward", own.get("forward")))
            for kind in ("_modules", "_parameters"):
                self._held += [(own[kind], name, held) for name, held in own[kind].items()]
            if module is not root:
                self._hooks += [module._forward_hooks, module._forward_pre_hooks]
            self._places += [
                (parameter, parameter.data_ptr())
                for parameter in module._parameters.values()
                if parameter is not None
            ]

    def holds(self) -> bool:
        """Whether all is as it was, and without hooks."""
        for place, name, held in self._held:
            if place.get(name) is not held:
                return False
        for parameter, address in self._places:
            if parameter.data_ptr() != address:
                return False
        return not any(self._hooks)
