"""How much a KV format changes what a model says, measured by teacher forcing.

All formats are fed the same tokens in lockstep; each step's distributions over the next token are
compared with those of the first format and with the token that really follows. Knows sequences and
logits, never requests, sampling or text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..blocks.geometry import IntArray
from ..cache.formats import KVFormat
from ..cache.kv_cache import PagedKVCache
from ..cache.layer_spec import cache_geometry
from ..models.huggingface import PagedModel
from .model_runner import ModelRunner


@dataclass
class Quality:
    """Sums over predicted tokens; perplexity, divergence in nats, share of equal first choices."""

    num_tokens: int = 0
    sum_loss: float = 0.0
    sum_divergence: float = 0.0
    num_agreements: int = 0

    @property
    def perplexity(self) -> float:
        return math.exp(self.sum_loss / self.num_tokens)

    @property
    def divergence(self) -> float:
        """Mean Kullback-Leibler divergence of the format from the first one, in nats."""
        return self.sum_divergence / self.num_tokens

    @property
    def agreement(self) -> float:
        return self.num_agreements / self.num_tokens


class TeacherForcing:
    """Equally long windows of tokens run through one format, some tokens a step."""

    def __init__(self, model: PagedModel, kv_format: KVFormat, windows: IntArray) -> None:
        layers = model.layers(kv_format)
        geometry = cache_geometry(layers, model.dtype)
        num_windows, length = windows.shape
        # Twice what a sequence holds: a chunk may take new blocks before its old ones are freed.
        num_blocks = num_windows * 2 * geometry.max_blocks(length)
        self._windows = windows
        cache = PagedKVCache(layers, num_blocks=num_blocks, dtype=model.dtype, device=model.device)
        self._runner = ModelRunner(model, cache)
        self._manager = cache.new_manager(max_num_seqs=num_windows, max_model_len=length)
        self._seq_ids = np.array([self._manager.add_sequence() for _ in windows])

    @torch.inference_mode()
    def advance(self, start: int, end: int) -> Tensor:
        """Compute tokens start:end of every window; log-probabilities [windows, end - start, V]."""
        plan = self._manager.reserve(self._seq_ids, np.full(len(self._seq_ids), end - start))
        assert plan is not None
        token_ids = self._windows[:, start:end].reshape(-1).astype(np.int64)
        logits, _ = self._runner.run(plan, token_ids, np.arange(len(token_ids)))
        self._manager.commit(plan)
        return logits.log_softmax(-1).reshape(len(self._seq_ids), end - start, -1)


def compare_formats(
    model: PagedModel,
    kv_formats: Sequence[KVFormat],
    windows: IntArray,
    *,
    tokens_per_step: int = 1,
) -> list[Quality]:
    """Quality of each format on token windows [W, L]; the first format is the reference.

    One token a step is what decoding does. More are faster and see the newest blocks sealed up to
    that many tokens later.
    """
    runs = [TeacherForcing(model, kv_format, windows) for kv_format in kv_formats]
    results = [Quality() for _ in runs]
    length = windows.shape[1] - 1
    for start in range(0, length, tokens_per_step):
        end = min(start + tokens_per_step, length)
        targets = torch.from_numpy(windows[:, start + 1 : end + 1, None])
        reference: Tensor | None = None
        for run, result in zip(runs, results, strict=True):
            log_probs = run.advance(start, end).cpu()
            reference = log_probs if reference is None else reference
            losses = -log_probs.gather(-1, targets)
            result.num_tokens += losses.numel()
            result.sum_loss += float(losses.double().sum())
            result.sum_divergence += float(
                (reference.exp() * (reference - log_probs)).double().sum()
            )
            result.num_agreements += int((reference.argmax(-1) == log_probs.argmax(-1)).sum())
    return results
