"""What owners of a model change in it while they use it, and give back: counted, once for all.

Knows models and what they were before, never steps.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from .replacements import Replacements
from .widening import WidenedModel


@dataclass
class Attachment:
    """How many `AttachedModel`s use a model, and what to go back to after the last one."""

    count: int
    implementation: str
    training: list[nn.Module]  # parts that were in training mode
    dtype: torch.dtype
    fingerprint: bytes | None = None  # of the model before it was widened
    widened: WidenedModel | None = None
    fused: Replacements | None = None


attachments: weakref.WeakKeyDictionary[PreTrainedModel, Attachment] = weakref.WeakKeyDictionary()

# Held while a model is attached: nobody else finds it half replaced.
attaching: Final = threading.RLock()


def attach(model: PreTrainedModel, implementation: str | None) -> None:
    """Switch a model's attention; counts, so that several owners may share a model.

    None leaves its attention as it is.
    """
    own, name = model.config._attn_implementation, type(model).__name__
    wanted = own if implementation is None else implementation
    if model not in attachments:
        module = cast(nn.Module, model)
        training = [part for part in module.modules() if part.training]
        before = Attachment(0, own, training, model.dtype)
        if wanted != own and model._can_set_attn_implementation():  # or it warns, and sets parts
            model.set_attn_implementation(wanted)
        if model.config._attn_implementation != wanted:
            raise UnsupportedModelError(f"{name} never calls transformers' attention interface")
        model.train(False)
        attachments[model] = before
    elif own != wanted:
        raise UnsupportedModelError(f"{name} is in use with attention of its own")
    attachments[model].count += 1


def widen_once(model: PreTrainedModel, fingerprint: bytes) -> None:
    """Let an attached model compute in float32 until it is detached."""
    attachment = attachments[model]
    if attachment.widened is None and attachment.fused is None:
        attachment.fingerprint = fingerprint
        attachment.widened = WidenedModel(model)


def fuse_once(
    model: PreTrainedModel, run: Callable[[], object], attend: Callable[..., Tensor]
) -> None:
    """Let an attached model compute faster where that can be, until it is detached."""
    try:
        from .fusing import fuse
    except ImportError:  # numba is missing
        return
    attachment = attachments[model]
    if attachment.fused is None:
        attachment.fused = fuse(model, run, attend)


def detach(model: PreTrainedModel) -> None:
    """Undo one `attach`."""
    with attaching:
        attachment = attachments[model]
        attachment.count -= 1
        if attachment.count:
            return
        del attachments[model]
        for change in (attachment.fused, attachment.widened):
            if change is not None:
                change.undo()
        if model.config._attn_implementation != attachment.implementation:
            model.set_attn_implementation(attachment.implementation)
        for part in attachment.training:
            part.training = True
