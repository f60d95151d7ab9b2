"""A model of hashes on simulated blocks, in place of a `ModelRunner`, and what it gives alone.

Its logits follow from what it reads through the block tables: a block that is lost, stale or shared
by mistake changes tokens. The reference never sees a block: it knows the history of one request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paged_kv.blocks.geometry import IntArray
from paged_kv.blocks.sink_window import SinkWindow
from paged_kv.blocks.step_plan import StepPlan
from paged_kv.cache.decode_tables import Drawn
from paged_kv.engine.beam_search import BeamSearch, BeamSearchParams
from paged_kv.engine.sampler import Shortlist, uniform_numbers
from paged_kv.engine.sampling_params import SamplingParams
from paged_kv.scheduler.request import Request
from paged_kv.scheduler.scheduler import Scheduler
from paged_kv.scheduler.step import BlockCopy
from tests.support.block_contents import MODULUS, BlockContents

VOCAB_SIZE: Final = 48
SPOILT: Final = -9  # what a token that is not finite leaves in its block
SPREAD: Final = 6.0  # of logits
FACTOR, GAMMA, MASK = 0xBF58476D1CE4E5B9, 0x9E3779B97F4A7C15, (1 << 64) - 1
Digests = NDArray[np.uint64]


def next_value(value: int, token_id: int) -> int:
    """What a token leaves in its block, after a token that left `value` in its own."""
    return (value * 48_271 + token_id + 1) % MODULUS


def first_value(salt: str | None) -> int:
    """What stands before the first token: sequences of different salts hold nothing in common."""
    return 1 + (0 if salt is None else 7 * int(salt) + 7)


def digest_of(values: NDArray[np.int64]) -> int:
    """One number that depends on everything that a token sees, in 64 bits."""
    mixed = values.astype(np.uint64) * np.uint64(FACTOR)
    mixed ^= mixed >> np.uint64(29)
    return int(mixed.sum(dtype=np.uint64))


def mixed_value(value: int) -> int:
    """Of `digest_of`, the part of one value."""
    mixed = value * FACTOR & MASK
    return mixed ^ mixed >> 29


def logits_of(digests: Sequence[int]) -> NDArray[np.float32]:
    """[M, V] logits of tokens that see what these numbers stand for."""
    numbers = np.array([digest & MASK for digest in digests], dtype=np.uint64)[:, None]
    numbers = numbers + np.arange(1, VOCAB_SIZE + 1, dtype=np.uint64) * np.uint64(GAMMA)
    numbers = (numbers ^ (numbers >> np.uint64(31))) * np.uint64(FACTOR)
    numbers ^= numbers >> np.uint64(29)
    fractions = (numbers >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    return fractions * np.float32(SPREAD)


class SimulatedModel:
    """What an engine asks of a model."""

    vocab_size = VOCAB_SIZE
    keeps_states = False
    rotations: Mapping[int, object] = {}

    def adapters_for(self, name: str | None) -> tuple[str, ...]:
        return () if name is None else (name,)


class SimulatedRunner:
    """Computes plans on `BlockContents`.

    `on_run(requests)` is called with the requests of every step before anything is read; it may
    raise, and returns the row whose new tokens are not finite, if any. `after_run()` is called when
    everything is written, and may raise; so may `on_copy()`, between two copies.
    """

    def __init__(self, scheduler: Scheduler, *, runs_ahead: bool = False) -> None:
        self.runs_ahead = runs_ahead
        self.model = SimulatedModel()
        self.cache = None
        self.scheduler = scheduler
        self.contents = BlockContents(scheduler.manager)
        self.on_run: Callable[[list[Request]], int | None] = lambda requests: None
        self.after_run: Callable[[], None] = lambda: None
        self.on_copy: Callable[[], None] = lambda: None

    def copy_swapped(self, swap_outs: Sequence[BlockCopy], swap_ins: Sequence[BlockCopy]) -> None:
        for copy in swap_outs:
            self.contents.swap_out(copy.device_block_ids, copy.host_block_ids)
            self.on_copy()
        for copy in swap_ins:
            self.contents.swap_in(copy.device_block_ids, copy.host_block_ids)
            self.on_copy()

    def takes_drawn(
        self, plan: StepPlan, logit_tokens: IntArray, adapters: Sequence[tuple[str, ...]]
    ) -> bool:
        """As `ModelRunner.takes_drawn`; some of the plans could not be captured."""
        return plan.is_decode and len(logit_tokens) == plan.num_tokens and plan.number % 5 < 4

    def run(
        self,
        plan: StepPlan,
        token_ids: IntArray,
        logit_tokens: IntArray,
        extra: Mapping[str, NDArray[Any]],
        drawn: Drawn | None = None,
        adapters: Sequence[tuple[str, ...]] = (),
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `ModelRunner.run`."""
        if drawn is not None:
            assert self.takes_drawn(plan, logit_tokens, adapters)
            is_drawn = drawn.sources >= 0
            token_ids[is_drawn] = drawn.token_ids.numpy()[drawn.sources[is_drawn]]
        self.contents.poison_free(kept=plan.copy_sources)
        requests: list[Request] = self.scheduler._running.by_seq_id[plan.seq_ids].tolist()
        assert adapters == [request.adapters for request in requests]
        spoilt_row = self.on_run(requests)
        arrays = self.contents.begin(plan)
        rows = []
        for row, request in enumerate(requests):
            start, end = plan.query_start_loc[row : row + 2].tolist()
            salt = request.extra_keys[0] if request.extra_keys else None
            rows.append(
                _Row.of(
                    self.contents.context(arrays, row),
                    token_ids[start:end].tolist(),
                    first_value(salt),  # type: ignore[arg-type]
                    _window_of(plan, row),
                    is_spoilt=row == spoilt_row,
                )
            )
        self.contents.store(plan, arrays, np.concatenate([row.new_values for row in rows]))
        self.after_run()
        seen = []
        for token in logit_tokens.tolist():
            row = int(plan.token_rows[token])
            seen.append(rows[row].seen_by(token - int(plan.query_start_loc[row])))
        logits = logits_of([digest_of(values) for values in seen])
        logits[[bool((values == SPOILT).any()) for values in seen]] = np.nan
        return torch.from_numpy(logits), {name: torch.from_numpy(a) for name, a in extra.items()}


def _window_of(plan: StepPlan, row: int) -> SinkWindow | None:
    if plan.window_sizes is None or plan.num_sink_tokens is None or not plan.window_sizes[row]:
        return None
    return SinkWindow(int(plan.num_sink_tokens[row]), int(plan.window_sizes[row]))


class _Row(NamedTuple):
    """A sequence in a step: what its blocks held before it, and what its new tokens leave."""

    values: NDArray[np.int64]  # [context_len + query_len]
    context_len: int
    window: SinkWindow | None

    @classmethod
    def of(
        cls,
        context: NDArray[np.int64],
        token_ids: Sequence[int],
        first: int,
        window: SinkWindow | None,
        *,
        is_spoilt: bool,
    ) -> _Row:
        value, new = int(context[-1]) if len(context) else first, []
        for token_id in token_ids:
            value = next_value(value, token_id)
            new.append(value)
        row = cls(np.concatenate([context, np.array(new, dtype=np.int64)]), len(context), window)
        if is_spoilt:
            row.new_values[len(token_ids) // 2 :] = SPOILT
        elif (context == SPOILT).any():
            for index in range(len(token_ids)):
                if (row.seen_by(index) == SPOILT).any():
                    row.new_values[index] = SPOILT
        return row

    @property
    def new_values(self) -> NDArray[np.int64]:
        return self.values[self.context_len :]

    def seen_by(self, index: int) -> NDArray[np.int64]:
        """What a new token sees, itself included."""
        values = self.values[: self.context_len + index + 1]
        if self.window is None or len(values) <= self.window.num_visible_tokens:
            return values
        sinks, size = self.window.num_sink_tokens, self.window.window_size
        return np.concatenate([values[:sinks], values[len(values) - size :]])


# -- one request alone ----------------------------------------------------------------------------


class History:
    """The tokens of one request, and the logits after them."""

    def __init__(self, token_ids: Sequence[int], salt: str | None, window: SinkWindow | None):
        self._value, self._window = first_value(salt), window
        self._mixed: list[int] = []
        self._total = 0
        for token_id in token_ids:
            self.append(token_id)

    def append(self, token_id: int) -> None:
        self._value = next_value(self._value, token_id)
        mixed = mixed_value(self._value)
        self._total += mixed
        if self._window is None:
            return
        self._mixed.append(mixed)
        if len(self._mixed) > self._window.num_visible_tokens:
            self._total -= self._mixed.pop(self._window.num_sink_tokens)

    def logits(self) -> NDArray[np.float32]:
        """[V] of the next token."""
        return logits_of([self._total])[0]


def expected_tokens(
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    max_tokens: int | None,
    sample_index: int,
    end_token_ids: frozenset[int],
    window: SinkWindow | None,
    count: int,
) -> list[int]:
    """The output of one request, at most `count` tokens of it."""
    history, output = History(prompt, params.cache_salt, window), list[int]()
    while len(output) < count and len(output) != max_tokens:
        logits = history.logits()
        if len(output) < params.least_tokens:
            logits[list(end_token_ids)] = -np.inf
        if params.is_greedy:
            token_id = int(logits.argmax())
        else:
            assert params.seed is not None
            uniform = uniform_numbers([params.seed], [sample_index], [len(output)])[0]
            scaled = logits.astype(np.float64)
            weights = np.exp((scaled - scaled.max()) / params.temperature)
            cumulative = (weights / weights.sum()).cumsum()
            token_id = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
        output.append(token_id)
        history.append(token_id)
        if token_id in end_token_ids and len(output) >= params.least_tokens:
            break
    return output


def expected_beams(
    prompt: Sequence[int],
    params: BeamSearchParams,
    *,
    max_tokens: int,
    end_token_ids: frozenset[int],
) -> list[list[int]]:
    """What a beam search finds, every beam computed anew from its tokens."""
    request: Any = SimpleNamespace(num_prompt_tokens=len(prompt), num_tokens=len(prompt))
    search = BeamSearch(
        params=params, request=request, max_tokens=max_tokens, end_token_ids=end_token_ids
    )
    while not search.is_over:
        for beam in search.beams:
            history = History([*prompt, *beam.token_ids], params.cache_salt, None)
            likelihoods = torch.from_numpy(history.logits()).log_softmax(-1)
            values, ids = likelihoods.topk(min(search.num_candidates, VOCAB_SIZE))
            beam.shortlist = Shortlist(
                row=0,
                count=search.num_candidates,
                token_ids=ids.tolist(),
                log_probabilities=values.tolist(),
            )
        search.advance()
        request.num_tokens = len(prompt) + search.num_generated
    return [hypothesis.token_ids for hypothesis in search.output.hypotheses]
