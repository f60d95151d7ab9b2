"""A fingerprint of all of a model: every weight to the last bit, what it is set to, its code.

Knows transformers' models, never what the fingerprint is for. What stays within a process is told
apart by samples of the weights (`fingerprint_of`); what outlives it meets models that differ in a
single row.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Final

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from .adapters import state_of
from .wrapped_weights import stored_tensors

# Of a configuration: where it is from, and who wrote it.
NOT_DECISIVE: Final = ("_name_or_path", "transformers_version")


def whole_fingerprint(model: PreTrainedModel) -> bytes:
    """32 bytes that are equal in every process for the same model alone, as it is now.

    Reads all weights once, on all cores.
    """
    settings = {
        name: value for name, value in model.config.to_dict().items() if name not in NOT_DECISIVE
    }
    digest = sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    digest.update(f"{type(model).__qualname__} {transformers.__version__}".encode())
    digest.update(code_of(model))
    with ThreadPoolExecutor() as threads:
        for each in threads.map(tensor_digest, named_tensors(model)):
            digest.update(each)
    for state in state_of(model):
        digest.update(state)
    return digest.digest()


def named_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Weights, and buffers that no checkpoint has."""
    known = model.state_dict()
    others = {name: buffer for name, buffer in model.named_buffers() if name not in known}
    for name, weight in [*known.items(), *others.items()]:
        for tensor in stored_tensors(weight):
            yield name, tensor


def tensor_digest(named: tuple[str, Tensor]) -> bytes:
    name, tensor = named
    about = f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode()
    flat = tensor.detach().reshape(-1).cpu().contiguous()
    return sha256(about + sha256(flat.view(torch.uint8).numpy().data).digest()).digest()


def code_of(model: PreTrainedModel) -> bytes:
    """The file that defines the model's class, which may have come with its weights."""
    file = getattr(sys.modules.get(type(model).__module__), "__file__", None)
    return b"" if file is None else Path(file).read_bytes()
