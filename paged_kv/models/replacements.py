"""Forwards that take the place of modules' own, and how they go again. Knows modules, not why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

Forward = Callable[..., Any]


class Replacement:
    """Takes the place of a module's forward."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        raise NotImplementedError


class Replacements:
    """What computes in place of modules; `undo` gives each the forward back that it had."""

    def __init__(self) -> None:
        self._replaced: list[tuple[nn.Module, Forward, Forward | None]] = []

    def replace(self, module: nn.Module, forward: Forward) -> None:
        self._replaced.append((module, forward, module.__dict__.get("forward")))
        module.forward = forward

    def undo(self) -> None:
        while self._replaced:
            module, forward, before = self._replaced.pop()
            if module.__dict__.get("forward") is not forward:
                continue  # somebody has set another since
            if before is None:
                del module.forward
            else:
                module.forward = before
