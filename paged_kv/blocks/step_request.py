"""What a step is asked to compute, checked. Knows sequences and numbers of tokens, never blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..errors import InvalidStepError
from .block_tables import BlockTables
from .geometry import IntArray
from .sequences import Sequences, integer_array


class StepRequest(NamedTuple):
    """N distinct living sequences and the new tokens of each."""

    seq_ids: IntArray  # [N]
    num_new_tokens: IntArray  # [N] at least 1
    num_draft_tokens: IntArray | None  # [N] of these, last ones that commit may drop
    before: IntArray  # [N] tokens that the first group of layers stores
    after: IntArray  # [N] the same if all drafts are kept


def checked_request(
    sequences: Sequences,
    groups: Sequence[BlockTables],
    computable_tokens: IntArray,
    seq_ids: ArrayLike,
    num_new_tokens: ArrayLike,
    num_draft_tokens: ArrayLike | None,
) -> StepRequest:
    """A request that can be served if there are blocks; raises `InvalidStepError` otherwise.

    `computable_tokens`, by seq_id: tokens that may be computed, drafts aside.
    """
    seq_ids = sequences.distinct(seq_ids)
    num_new_tokens = _checked_counts(seq_ids, num_new_tokens, sequences.max_model_len)
    first = groups[0]
    before = first.num_stored[seq_ids]
    end = after = before + num_new_tokens
    if first.evicts:  # in the sequence, evicted tokens included
        end = after + first.state["num_evicted_tokens"][seq_ids]
    certain_end = end
    if num_draft_tokens is not None:
        num_draft_tokens = integer_array("num_draft_tokens", num_draft_tokens)
        _check_drafts(num_draft_tokens, num_new_tokens, sequences.geometry.block_size)
        certain_end = end - num_draft_tokens
    for tables in groups:
        rows = tables.windowed_rows(seq_ids)
        if len(rows):
            _check_room(sequences, tables, seq_ids[rows], num_new_tokens[rows])
    is_unknown = certain_end > computable_tokens[seq_ids]
    num_unknown = np.count_nonzero(is_unknown)
    if num_draft_tokens is not None or num_unknown:
        sequences.check_new_lengths(seq_ids, end)
    if num_unknown:
        row = int(is_unknown.argmax())
        raise InvalidStepError(
            f"seq_id {seq_ids[row]} would have {certain_end[row]} tokens computed, of which "
            f"{sequences.num_tokens[seq_ids[row]]} are known: append_tokens comes first"
        )
    return StepRequest(seq_ids, num_new_tokens, num_draft_tokens, before, after)


def _checked_counts(seq_ids: IntArray, num_new_tokens: ArrayLike, max_model_len: int) -> IntArray:
    """New tokens of each sequence, at least one."""
    counts = integer_array("num_new_tokens", num_new_tokens)
    if seq_ids.shape != counts.shape:
        raise InvalidStepError(
            f"seq_ids and num_new_tokens must be equally long, got shapes {seq_ids.shape} and "
            f"{counts.shape}"
        )
    if np.count_nonzero(counts > 0) < len(seq_ids):
        raise InvalidStepError(f"every sequence needs new tokens, got {counts.min()}")
    if np.count_nonzero(counts > max_model_len):
        raise InvalidStepError(f"{counts.max()} new tokens exceed max_model_len {max_model_len}")
    return counts


def _check_drafts(num_draft_tokens: IntArray, num_new_tokens: IntArray, block_size: int) -> None:
    """Drafts are fewer than the new tokens and at most a block."""
    fits = (
        num_draft_tokens.shape == num_new_tokens.shape
        and (
            (num_draft_tokens >= 0)
            & (num_draft_tokens < num_new_tokens)
            & (num_draft_tokens <= block_size)
        ).all()
    )
    if not fits:
        raise InvalidStepError(
            "num_draft_tokens must be from 0 to less than num_new_tokens and at most "
            f"{block_size}, got {num_draft_tokens.tolist()}"
        )


def _check_room(
    sequences: Sequences, tables: BlockTables, seq_ids: IntArray, num_new_tokens: IntArray
) -> None:
    """Windowed sequences have room for these tokens."""
    room = tables.num_storable(seq_ids) - tables.num_stored[seq_ids]
    if np.count_nonzero(num_new_tokens > room):
        row = int((num_new_tokens - room).argmax())
        raise InvalidStepError(
            f"seq_id {seq_ids[row]}, windowed by {sequences.chain(seq_ids[row]).sink_window}, has "
            f"room for {room[row]} new tokens in a step, got {num_new_tokens[row]}"
        )
