"""Attention over paged, quantized blocks beside torch's attention over contiguous K/V, in turn.

Knows cases and times; never options. `bench/bench_attention.py` says what is measured and how.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from ..errors import ConfigError
from .attention_cases import Case, Contents, fastest_contiguous, per_sequence_attention
from .paged_cases import (
    FORMATS,
    Paged,
    attention_error,
    fill,
    needed_bytes,
    new_cache,
    relative_error,
    stored_tokens,
)
from .report import Row
from .turns import OfLayer, Sampling, Tell, Timing, report_timings, take_turns

OURS, PER_SEQUENCE = "ours", "per-sequence SDPA"
TORCH, READS, COPY = "torch backend", "random 16 KB reads", "contiguous fp32 copy"
ALONE = "ours, without storing"
READ_BYTES: Final = 1 << 27  # of one sample of random reads


def on_other_layers(function: OfLayer, num_layers: int) -> OfLayer:
    """So that it does not find in the caches what the other side has just read."""
    return lambda layer: function((layer + num_layers // 2) % num_layers)


def longer_by(whole: Timing, part: Timing) -> Timing:
    """What a call takes longer than another that it contains."""
    return Timing(
        seconds=whole.seconds - part.seconds,
        num_undisturbed=min(whole.num_undisturbed, part.num_undisturbed),
        num_taken=min(whole.num_taken, part.num_taken),
        is_undisturbed=whole.is_undisturbed and part.is_undisturbed,
    )


def time_rows(
    case: str, metric: str, timings: dict[str, Timing], baselines: dict[str, str]
) -> list[Row]:
    """Our microseconds beside each baseline's; `baselines` maps timings to the names they go by."""
    ours = timings[OURS]
    rows = []
    for key, name in baselines.items():
        is_undisturbed = ours.is_undisturbed and timings[key].is_undisturbed
        row = Row(
            case=case if is_undisturbed else f"{case} (disturbed)",
            metric=metric,
            value=ours.seconds * 1e6,
            unit="us",
            baseline=name,
            baseline_value=timings[key].seconds * 1e6,
            ratio=timings[key].seconds / ours.seconds,
        )
        rows.append(row)
    return rows


def bandwidth_row(case: str, num_bytes: int, timings: dict[str, Timing]) -> Row:
    """What our attention has to read over its time, as a share of what reading alone does."""
    ours, reads = timings[OURS], timings[READS]
    is_undisturbed = ours.is_undisturbed and reads.is_undisturbed
    value, limit = num_bytes / ours.seconds / 1e9, READ_BYTES / reads.seconds / 1e9
    return Row(
        case=case if is_undisturbed else f"{case} (disturbed)",
        metric="needed bytes read",
        value=value,
        unit="GB/s",
        baseline=READS,
        baseline_value=limit,
        ratio=value / limit,
    )


@dataclass(frozen=True)
class Bench:
    """What all cases share."""

    labels: list[str]
    sampling: Sampling
    read_next: OfLayer | None = None  # how fast the threads can read
    tell: Tell = report_timings

    def attention_rows(self, name: str, case: Case) -> list[Row]:
        contents = Contents.random(case)
        variant, contiguous = fastest_contiguous(name, case, contents, self.sampling, self.tell)
        functions: dict[str, OfLayer] = {case.contiguous: contiguous}
        baselines = {case.contiguous: f"{case.contiguous}, {variant}", TORCH: TORCH}
        if case.kind == "decode":
            functions[PER_SEQUENCE] = per_sequence_attention(case, contents)
            baselines[PER_SEQUENCE] = PER_SEQUENCE
            if self.read_next is not None:
                functions[READS] = self.read_next
        rows = []
        for label in self.labels:
            ours, fallback = self.fill(case, contents, label)
            if label == "native fp32":
                case.assert_close(ours.attend(0), contiguous(0))
            sides = {OURS: ours.attend, **functions, TORCH: fallback.attend}
            timings = take_turns(sides, case.num_layers, self.sampling)
            title = f"{name}, {label}"
            self.tell(title, timings)
            rows += time_rows(title, f"{case.kind} us", timings, baselines)
            if READS in timings:
                rows.append(bandwidth_row(title, needed_bytes(ours), timings))
            error = attention_error(ours) * 1e6
            rows.append(Row(case=title, metric="relative error", value=error, unit="ppm"))
        return rows

    def store_rows(self, name: str, case: Case) -> list[Row]:
        contents = Contents.random(case)
        rows = []
        for label in self.labels:
            if case.kind == "seal" and FORMATS[label][0].is_native:
                continue
            ours, fallback = self.fill(case, contents, label)
            sides: dict[str, OfLayer] = {OURS: ours.store, TORCH: fallback.store}
            if case.kind == "append":
                sides[OURS] = ours.attend_and_store
                sides[ALONE] = on_other_layers(ours.attend, case.num_layers)
                sides[COPY] = contiguous_copy(case, ours)
            timings = take_turns(sides, case.num_layers, self.sampling)
            title = f"{name}, {label}"
            self.tell(title, timings)
            if case.kind == "append":
                timings[OURS] = longer_by(timings[OURS], timings.pop(ALONE))
            baselines = {side: side for side in timings if side != OURS}
            rows += time_rows(title, f"{case.kind} us", timings, baselines)
            error = relative_error(stored_tokens(ours), stored_tokens(fallback)) * 1e6
            metric = f"difference from {TORCH}"
            rows.append(Row(case=title, metric=metric, value=error, unit="ppm"))
        return rows

    def fill(self, case: Case, contents: Contents, label: str) -> list[Paged]:
        """The CPU backend's cache and the torch backend's, with the same contents."""
        caches = [new_cache(case, label, backend) for backend in ("cpu", "torch")]
        return fill(case, contents, caches)

    def rows(self, name: str, case: Case) -> list[Row]:
        if case.kind in ("append", "seal"):
            return self.store_rows(name, case)
        return self.attention_rows(name, case)


def contiguous_copy(case: Case, paged: Paged) -> OfLayer:
    """Writes the step's new tokens where they belong in the contiguous K/V."""
    rows = torch.arange(len(case.lengths))
    positions = paged.step.inputs.cache_positions
    contents = paged.contents

    def copy(layer: int) -> None:
        contents.keys[layer][rows, :, positions] = paged.new_keys[layer]
        contents.values[layer][rows, :, positions] = paged.new_values[layer]

    return copy


def chosen(label: str, names: Collection[str], terms: Sequence[str] | None) -> list[str]:
    """The names that contain any of these terms; all of them without terms.

    Raises `ConfigError`, which begins with the label, for a term that is in no name.
    """
    if terms is None:
        return list(names)
    for term in terms:
        if not term or not any(term in name for name in names):
            raise ConfigError(f"{label} {term!r} is no part of any of {', '.join(names)}")
    return [name for name in names if any(term in name for term in terms)]
