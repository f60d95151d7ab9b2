"""What formats change in what a model says, measured on a text: a table and JSON.

Knows a model, formats and windows of tokens, and keeps each result; knows no command.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import transformers
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from ..blocks.geometry import IntArray
from ..cache.formats import NATIVE
from ..cache.layer_formats import LayerFormats
from ..cache.layer_groups import sequence_bytes
from ..cache.layer_spec import usual_kv_dtype
from ..engine.evaluate import Quality, compare_formats, count_recalled, token_windows
from ..engine.recall import RecallContext, recall_contexts
from ..errors import ConfigError
from ..models.attached_model import AttachedModel
from ..models.calibration import Calibration
from ..models.length_limit import find_length_limit
from .kept_results import KeptResults
from .progress import WorkBar

REFERENCE: Final = LayerFormats(NATIVE)
HEADINGS: Final = ("KL mnat", "±", "p99", "top-1", "ppl", "recall", "B/token", "held")


class Evaluation:
    """Formats beside the native one, on windows of a text and on pairs hidden in it."""

    def __init__(
        self,
        model: AttachedModel,
        tokenizer: PreTrainedTokenizerBase,
        kv_formats: Sequence[LayerFormats],
        kept: KeptResults,
        calibration: Calibration | None = None,
    ) -> None:
        self.kv_formats: list[LayerFormats] = [
            REFERENCE,
            *(each for each in kv_formats if each != REFERENCE),
        ]
        self._model, self._tokenizer, self._kept = model, tokenizer, kept
        self._known = None if calibration is None else calibration.layers
        self._windows: IntArray = np.zeros((0, 0), dtype=np.int64)
        self._contexts: list[RecallContext] = []
        self._tokens_per_step = 1

    def take_text(self, text: str, length: int, count: int | None, *, recall: bool) -> None:
        """Cut the first `count` windows of so many tokens, and hide pairs in the text."""
        most = find_length_limit(self._model.model).num_tokens
        if most is not None and length > most:
            raise ConfigError(f"windows may have at most {most} tokens, got {length}")
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        first = self._tokenizer.bos_token_id
        opening = None if first is None else int(first)
        self._windows = token_windows(ids, length, opening)[:count]
        if recall:
            longest = len(ids) if most is None else most
            self._contexts = recall_contexts(self._tokenizer, ids, max_length=longest)

    def run(self, tokens_per_step: int) -> None:
        """Measure what was not."""
        self._tokens_per_step = tokens_per_step
        total = len(self._windows) + len(self._contexts) * len(self.kv_formats)
        with WorkBar("measured", total) as bar:
            for window in self._windows:
                missing = [f for f in self.kv_formats if self._key(f, window) not in self._kept]
                if missing:
                    self._measure(window, missing)
                bar.advance()
            for kv_format in self.kv_formats:
                for context in self._contexts:
                    self._recall(kv_format, context)
                    bar.advance()

    def _measure(self, window: IntArray, kv_formats: list[LayerFormats]) -> None:
        formats = [REFERENCE, *(each for each in kv_formats if each != REFERENCE)]
        found = compare_formats(
            self._model,
            formats,
            window[None],
            calibration=self._known,
            tokens_per_step=self._tokens_per_step,
        )
        for kv_format, quality in zip(formats, found, strict=True):
            self._kept.keep(self._key(kv_format, window), to_json(quality))

    def _recall(self, kv_format: LayerFormats, context: RecallContext) -> None:
        key = self._key(kv_format, context.token_ids)
        if key not in self._kept:
            found = count_recalled(self._model, kv_format, [context], calibration=self._known)
            self._kept.keep(key, found)

    def _key(self, kv_format: LayerFormats, token_ids: IntArray) -> str:
        """Of everything that a result depends on."""
        content = sha256(self._model.fingerprint())
        content.update(repr((kv_format, self._known, self._tokens_per_step)).encode())
        content.update(f"{self._model.dtype}".encode() + token_ids.tobytes())
        return f"{kv_format.name} {len(token_ids)} {content.hexdigest()[:32]}"

    def quality(self, kv_format: LayerFormats) -> Quality:
        kept = (self._kept[self._key(kv_format, window)] for window in self._windows)
        return Quality.joined([from_json(each) for each in kept])

    def num_recalled(self, kv_format: LayerFormats) -> tuple[int, int]:
        """Of how many pairs."""
        keys = [self._key(kv_format, context.token_ids) for context in self._contexts]
        asked = sum(len(context.answers) for context in self._contexts)
        return sum(self._kept[key] for key in keys), asked

    def bytes_per_token(self, kv_format: LayerFormats) -> tuple[float, float]:
        """Of a token and kv head: sealed, and in a window with its head and tail."""
        layers, num_tokens = self._model.layers(kv_format), self._windows.shape[1]
        dtype = usual_kv_dtype(layers, self._model.dtype)
        num_heads = sum(layer.num_kv_heads for layer in layers)
        sealed = sum(
            layer.record_layout(dtype).bytes_per_token * layer.num_kv_heads for layer in layers
        )
        held = sequence_bytes(layers, dtype, num_tokens) / num_tokens
        return sealed / num_heads, held / num_heads

    def rows(self) -> list[dict[str, Any]]:
        """Of each format, what `HEADINGS` say."""
        rows = []
        for kv_format in self.kv_formats:
            quality, recall = self.quality(kv_format), self.num_recalled(kv_format)
            figures = (
                *(1000 * nats for nats in (quality.divergence, quality.standard_error)),
                1000 * quality.worst_percent,
                100 * quality.agreement,
                quality.perplexity,
                recall[0],
                *self.bytes_per_token(kv_format),
            )
            rows.append({"format": kv_format.name, **dict(zip(HEADINGS, figures, strict=True))})
        return rows

    def table(self) -> Table:
        num_windows, length = self._windows.shape
        asked = self.num_recalled(REFERENCE)[1] if self._contexts else 0
        table = Table(
            title=f"{num_windows} windows of {length} tokens; {asked} pairs to recall",
            caption="B/token: bytes of a sealed token and kv head; held: of such a window, with "
            "its head and tail in full precision. top-1 in percent.",
        )
        table.add_column("KV format", no_wrap=True)
        for heading in HEADINGS:
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self.rows():
            table.add_row(row["format"], *(f"{row[heading]:.3g}" for heading in HEADINGS))
        return table


def write_json(evaluation: Evaluation, path: Path) -> None:
    report = {
        "benchmark": "eval",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "rows": evaluation.rows(),
    }
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def to_json(quality: Quality) -> dict[str, Any]:
    """What `from_json` reads: to six digits."""
    return {
        "losses": rounded(quality.losses),
        "divergences": rounded(quality.divergences),
        "agreements": quality.agreements.astype(int).tolist(),
    }


def rounded(array: np.ndarray[Any, Any]) -> list[list[float]]:
    return [[float(f"{number:.6g}") for number in row] for row in array]


def from_json(kept: dict[str, Any]) -> Quality:
    return Quality(
        np.array(kept["losses"], dtype=np.float32),
        np.array(kept["divergences"], dtype=np.float32),
        np.array(kept["agreements"], dtype=np.bool_),
    )
