"""What sequences of some lengths hold, beside what their model's arithmetic says.

Knows engines, no options.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..cache.layer_groups import sequence_bytes
from ..engine.engine import Engine
from ..engine.sampling_params import SamplingParams
from .report import Row

HELD, BOUND, PEAK = "held", "held, by arithmetic", "peak while it is stored"


def bound(engine: Engine, num_tokens: int) -> int:
    """Bytes of a sequence between steps, by what its layers and format are."""
    return sequence_bytes(engine.cache.layers, engine.cache.dtype, num_tokens)


def measured(engine: Engine, num_tokens: int) -> tuple[int, int]:
    """Bytes that one sequence holds when so many tokens are stored, and the most on the way.

    They are stored as prompts are, in chunks of the engine's budget of tokens: chunks that are
    sealed need blocks for what they seal and for the result at once.
    """
    engine.manager.reset_prefix_cache()
    pool, block_bytes = engine.manager.pool, engine.cache.block_bytes
    pool.peak_allocated = pool.num_allocated
    prompt = np.random.default_rng(0).integers(engine.model.vocab_size, size=num_tokens).tolist()
    engine.add_request("held", prompt, SamplingParams(max_tokens=2, ignore_eos=True))
    try:
        while not engine.step():
            pass
        return pool.num_allocated * block_bytes, pool.peak_allocated * block_bytes
    finally:
        engine.abort("held")


def held_rows(
    engines: Mapping[str, Engine],
    lengths: Sequence[int],
    advance: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Of each length and format, beside the first one of these."""
    rows = []
    for length in lengths:
        natives: dict[str, float] = {}
        for name, engine in engines.items():
            held, peak = measured(engine, length)
            found = {HELD: held, BOUND: bound(engine, length), PEAK: peak}
            for metric, num_bytes in found.items():
                natives.setdefault(metric, num_bytes)
                rows.append(size_row(f"{length} tokens, {name}", metric, num_bytes))
                if name != next(iter(engines)):
                    rows[-1] = beside(rows[-1], next(iter(engines)), natives[metric])
            advance()
    return rows


def size_row(case: str, metric: str, num_bytes: float) -> Row:
    return Row(case=case, metric=metric, value=num_bytes / 2**20, unit="MiB")


def beside(row: Row, baseline: str, num_bytes: float) -> Row:
    value = num_bytes / 2**20
    return replace(row, baseline=baseline, baseline_value=value, ratio=value / row.value)
