"""What a model says on a cache that is only emulated, in one pass over a whole text.

Decoding token by token on a cache of quantized tokens can be computed for all tokens at once: of
every layer keys and values are known, and so is what each query sees of them: copies as they are
read once they are quantized, copies as they are stored before, and itself as it is. Knows when
tokens are quantized, never how. Works through transformers' attention interface, for models whose
layers all have full attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from paged_kv.blocks.geometry import IntArray

IMPLEMENTATION = "paged_kv_emulation"
CHUNK = 256  # queries whose scores are held at once


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Keys and values of one layer [H, T, D] as a cache reads them, in float32.

    Tokens in front of `key_ends[t]` and `value_ends[t]` are quantized when query t reads them: its
    own, where the end is behind it. Tokens that stay as they are for ever are the same in both.
    """

    open_keys: Tensor
    sealed_keys: Tensor
    open_values: Tensor
    sealed_values: Tensor
    key_ends: IntArray
    value_ends: IntArray


class Storage(Protocol):
    """A cache to emulate."""

    def copies(self, layer: int, keys: Tensor, values: Tensor) -> Copies:
        """What a layer with these keys and values [H, T, D] reads."""
        ...


class Running:
    """The storage of the pass that is running; None reads everything as it is."""

    storage: Storage | None = None


def emulated_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for each layer: query, key and value are [1, heads, T, dim]."""
    if any(kwargs.get(name) is not None for name in ("sliding_window", "softcap", "s_aux")):
        raise SystemExit(f"{type(module).__name__} does more than full attention")
    keys, values = key[0].float(), value[0].float()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    queries = query[0].float().unflatten(0, (len(keys), -1)) * scale  # [H, G, T, D]
    copies = None
    if Running.storage is not None:
        copies = Running.storage.copies(cast(int, module.layer_idx), keys, values)
    output = torch.cat(
        [
            attend(queries, keys, values, copies, start, min(start + CHUNK, keys.shape[1]))
            for start in range(0, keys.shape[1], CHUNK)
        ],
        dim=2,
    )
    return output.flatten(0, 1).transpose(0, 1)[None].to(query.dtype), None


AttentionInterface.register(IMPLEMENTATION, emulated_attention)


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, copies: Copies | None, start: int, end: int
) -> Tensor:
    """Outputs [H, G, end - start, D] of the queries start:end."""
    mine = queries[:, :, start:end]
    num_rows = end - start
    rows = torch.arange(num_rows)
    if copies is None:
        scores = fold(mine, keys[:, :end].transpose(1, 2))
    else:
        scores = quantized_scores(mine, keys, copies, start, end)
    is_later = torch.arange(start, end)[None] > torch.arange(start, end)[:, None]
    scores[..., start:end].masked_fill_(is_later, -torch.inf)
    weights = scores.softmax(-1)
    if copies is None:
        return fold(weights, values[:, :end])
    ends = torch.from_numpy(copies.value_ends[start:end])
    low, high = int(ends[0]), int(ends[-1])
    read = torch.cat([copies.sealed_values[:, :high], copies.open_values[:, high:end]], 1)
    output = fold(weights, read)
    if high > low:  # some rows read these tokens before they were quantized
        is_open = torch.arange(low, high)[None] >= ends[:, None]
        change = copies.open_values[:, low:high] - copies.sealed_values[:, low:high]
        output += fold(weights[..., low:high] * is_open, change)
    own = weights[:, :, rows, rows + start] * (ends <= torch.arange(start, end))
    change = values[:, start:end] - copies.open_values[:, start:end]
    return output.add_(own[..., None] * change[:, None])


def quantized_scores(mine: Tensor, keys: Tensor, copies: Copies, start: int, end: int) -> Tensor:
    """Scores [H, G, end - start, end] before masking."""
    ends = torch.from_numpy(copies.key_ends[start:end])
    low, high = int(ends[0]), int(ends[-1])
    read = torch.cat([copies.sealed_keys[:, :high], copies.open_keys[:, high:end]], 1)
    scores = fold(mine, read.transpose(1, 2))
    if high > low:
        before = fold(mine, copies.open_keys[:, low:high].transpose(1, 2))
        is_sealed = torch.arange(low, high)[None] < ends[:, None]
        scores[..., low:high] = torch.where(is_sealed, scores[..., low:high], before)
    rows = torch.arange(end - start)
    own = (mine * keys[:, None, start:end]).sum(-1)
    is_open = ends <= torch.arange(start, end)
    scores[:, :, rows, rows + start] = torch.where(is_open, own, scores[:, :, rows, rows + start])
    return scores


def fold(rows: Tensor, matrix: Tensor) -> Tensor:
    """[H, G, n, a] times [H, a, b] without copies of the matrix for every query head."""
    return (rows.flatten(1, 2) @ matrix).unflatten(1, rows.shape[1:3])


class ParallelModel:
    """A causal language model whose attention reads an emulated cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        model.set_attn_implementation(IMPLEMENTATION)
        model.train(False)
        self._model = model

    @torch.inference_mode()
    def hidden_states(self, token_ids: IntArray, storage: Storage | None) -> Tensor:
        """[1, T, E] behind the last layer."""
        Running.storage = storage
        try:
            ids = torch.from_numpy(np.asarray(token_ids, dtype=np.int64))[None]
            positions = torch.arange(ids.shape[1])[None]
            base = cast(Any, self._model.base_model)
            output = base(input_ids=ids, position_ids=positions, use_cache=False)
        finally:
            Running.storage = None
        return cast(Tensor, output.last_hidden_state)

    @torch.inference_mode()
    def logits(self, hidden_states: Tensor) -> Tensor:
        """[n, V] in float32 of rows [1, n, E]: by the model itself, whatever it does to them."""
        with returning(self._model.base_model, hidden_states):
            ids = torch.zeros(hidden_states.shape[:2], dtype=torch.int64)
            logits = cast(Any, self._model)(input_ids=ids, use_cache=False).logits
        return cast(Tensor, logits[0].float())


@contextmanager
def returning(module: nn.Module, hidden_states: Tensor) -> Iterator[None]:
    """Let a module return these instead of computing anything."""
    output = BaseModelOutputWithPast(last_hidden_state=cast(Any, hidden_states))
    module.__dict__["forward"] = lambda *arguments, **keywords: output
    try:
        yield
    finally:
        del module.__dict__["forward"]
