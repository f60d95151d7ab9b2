"""How much a KV format changes what a model says, measured by teacher forcing.

All formats are fed the same tokens in lockstep; each step's distributions over the next token are
compared with those of the first format and with the token that really follows. Knows sequences and
logits, never requests, sampling or text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..blocks.geometry import IntArray
from ..cache.key_calibration import KeyCalibration
from ..cache.kv_cache import PagedKVCache
from ..cache.layer_formats import KVFormats
from ..cache.layer_groups import max_blocks
from ..cache.layer_spec import keeping_all, usual_kv_dtype
from ..errors import ConfigError
from ..models.attached_model import AttachedModel
from .model_runner import ModelRunner
from .recall import RecallContext

STRETCH: Final = 64  # neighbouring tokens, which err together: one observation
Report = Callable[[int], None]  # told how many tokens were computed


@dataclass(frozen=True, eq=False)
class Quality:
    """What a format says of every predicted token: arrays [windows, tokens]."""

    losses: NDArray[np.float32]  # of the token that follows, in nats
    divergences: NDArray[np.float32]  # Kullback-Leibler, of the format from the first one, in nats
    agreements: NDArray[np.bool_]  # whether both have the same first choice

    @classmethod
    def of(cls, reference: Tensor, log_probs: Tensor, targets: Tensor) -> Quality:
        """From log-probabilities [windows, tokens, V], and the tokens [windows, tokens] to come."""
        losses = -log_probs.gather(-1, targets[..., None])[..., 0]
        divergences = torch.linalg.vecdot(reference.exp(), reference - log_probs)
        agreements = reference.argmax(-1) == log_probs.argmax(-1)
        return cls(losses.cpu().numpy(), divergences.cpu().numpy(), agreements.cpu().numpy())

    @classmethod
    def joined(cls, parts: Sequence[Quality], axis: int = 0) -> Quality:
        """Of more windows (axis 0), or of more tokens of the same ones (axis 1)."""
        columns: list[Any] = [
            np.concatenate([getattr(part, field.name) for part in parts], axis)
            for field in fields(cls)
        ]
        return cls(*columns)

    @property
    def num_tokens(self) -> int:
        return int(self.losses.size)

    @property
    def perplexity(self) -> float:
        return math.exp(self.losses.mean(dtype=np.float64))

    @property
    def divergence(self) -> float:
        """The mean, in nats."""
        return float(self.divergences.mean(dtype=np.float64))

    @property
    def standard_error(self) -> float:
        """Of the mean divergence; not a number where the tokens are too few to tell."""
        length = min(STRETCH, self.divergences.shape[1])
        whole = self.divergences.shape[1] // length * length
        stretches = self.divergences[:, :whole].reshape(-1, length).mean(1, dtype=np.float64)
        if len(stretches) < 2:
            return math.nan
        return float(stretches.std(ddof=1) / math.sqrt(len(stretches)))

    @property
    def worst_percent(self) -> float:
        """The divergence that one token of a hundred exceeds, in nats."""
        return float(np.quantile(self.divergences, 0.99))

    @property
    def agreement(self) -> float:
        return float(self.agreements.mean())


class TeacherForcing:
    """Equally long windows of tokens run through one format, some tokens a step."""

    def __init__(
        self,
        model: AttachedModel,
        kv_format: KVFormats,
        windows: IntArray,
        calibration: Sequence[KeyCalibration] | None = None,
    ) -> None:
        layers = model.layers(kv_format, calibration)
        dtype = usual_kv_dtype(layers, model.dtype)
        num_windows, length = windows.shape
        # Twice what a sequence holds: a chunk may take new blocks before its old ones are freed.
        num_blocks = num_windows * 2 * max_blocks(keeping_all(layers), dtype, length)
        self._windows = windows
        cache = PagedKVCache(layers, num_blocks=num_blocks, dtype=dtype, device=model.device)
        self._runner = ModelRunner(model, cache)
        self._manager = cache.new_manager(max_num_seqs=num_windows, max_model_len=length)
        self._seq_ids = np.array([self._manager.add_sequence() for _ in windows])

    @torch.inference_mode()
    def advance(self, start: int, end: int, wanted: IntArray | None = None) -> Tensor:
        """Compute tokens start:end of every window; logits [windows, end - start, V].

        `wanted` chooses among those tokens, from 0 on, whose logits are computed.
        """
        num_windows, length = len(self._seq_ids), end - start
        plan = self._manager.reserve(self._seq_ids, np.full(num_windows, length))
        assert plan is not None
        token_ids = self._windows[:, start:end].reshape(-1).astype(np.int64)
        rows = np.arange(length) if wanted is None else wanted
        places = (np.arange(num_windows)[:, None] * length + rows).reshape(-1)
        logits, _ = self._runner.run(plan, token_ids, places)
        self._manager.commit(plan)
        return logits.reshape(num_windows, len(rows), -1)


def compare_formats(
    model: AttachedModel,
    kv_formats: Sequence[KVFormats],
    windows: IntArray,
    *,
    calibration: Sequence[KeyCalibration] | None = None,
    tokens_per_step: int = 1,
    report: Report | None = None,
) -> list[Quality]:
    """Quality of each format on token windows [W, L]; the first format is the reference.

    Open blocks have the precision that is usual for a model of that precision. One token a step is
    what decoding does. More are faster, but kinder: tokens of one step see each other in full
    precision, and the newest blocks sealed up to that many tokens later. Log-probabilities are held
    for one step of all windows, never for whole ones.
    """
    runs = [TeacherForcing(model, kv_format, windows, calibration) for kv_format in kv_formats]
    parts: list[list[Quality]] = [[] for _ in runs]
    length = windows.shape[1] - 1
    for start in range(0, length, tokens_per_step):
        end = min(start + tokens_per_step, length)
        targets = torch.from_numpy(windows[:, start + 1 : end + 1].astype(np.int64))
        reference: Tensor | None = None
        for run, mine in zip(runs, parts, strict=True):
            log_probs = run.advance(start, end).log_softmax(-1).cpu()
            reference = log_probs if reference is None else reference
            mine.append(Quality.of(reference, log_probs, targets))
            if report is not None:
                report(log_probs.shape[0] * log_probs.shape[1])
    return [Quality.joined(mine, axis=1) for mine in parts]


def count_recalled(
    model: AttachedModel,
    kv_format: KVFormats,
    contexts: Sequence[RecallContext],
    *,
    calibration: Sequence[KeyCalibration] | None = None,
    tokens_per_step: int = 64,
    report: Report | None = None,
) -> int:
    """How many of the answers in these contexts a greedy continuation finds."""
    num_recalled = 0
    for context in contexts:
        run = TeacherForcing(model, kv_format, context.token_ids[None], calibration)
        choices = np.full(len(context.token_ids), -1)  # of the token at each place
        for start in range(0, len(choices) - 1, tokens_per_step):
            end = min(start + tokens_per_step, len(choices) - 1)
            asked = context.answer_places[
                (context.answer_places > start) & (context.answer_places <= end)
            ]
            wanted = asked - 1 - start if len(asked) else np.zeros(1, dtype=np.int64)
            found = run.advance(start, end, wanted)[0].argmax(-1).cpu().numpy()
            choices[asked] = found[: len(asked)]
            if report is not None:
                report(end - start)
        num_recalled += context.num_recalled(choices)
    return num_recalled


def token_windows(token_ids: Sequence[int], length: int, first_token: int | None) -> IntArray:
    """Consecutive windows [W, length] of a text, each opened by `first_token` if there is one.

    Raises `ConfigError` where the text holds none.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    body = length - (first_token is not None)
    if body < 1 or len(ids) < body:
        raise ConfigError(f"a text of {len(ids)} tokens holds no window of {length}")
    windows = ids[: len(ids) // body * body].reshape(-1, body)
    return windows if first_token is None else np.insert(windows, 0, first_token, axis=1)
