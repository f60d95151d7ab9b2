"""A batch of sequences in blocks, as an engine without a scheduler has it: all rows go on together.

Knows blocks and one layer's keys and values [N, H, L, D]; never a model, nor how positions are
masked. Padding is counted as positions, and stored nowhere.

Many arguments because those of `attend` are what layers differ in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..blocks.geometry import IntArray
from ..blocks.step_plan import StepPlan
from ..cache.attention import paged_attention, store_tokens
from ..cache.kv_cache import Step
from ..cache.stored_context import StoredContext, read_blocks
from ..errors import InvalidRequestError, OutOfBlocksError, UnsupportedModelError
from ..models.active_step import expect_call
from .sequence_pool import PoolSettings, SequencePool

Mask = NDArray[np.bool_]
NO_ROWS: Final[IntArray] = np.empty(0, dtype=np.int64)
NO_POSITIONS: Final[Mask] = np.empty((0, 0), dtype=np.bool_)


class LayerTokens(NamedTuple):
    """New keys and values [N, H, L, D] of a layer."""

    layer: int
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class BatchStep:
    """A forward pass over N sequences and L new positions, which stores T tokens."""

    plan: StepPlan
    step: Step
    is_token: Mask  # [N, L] all others are padding
    num_drafts: IntArray  # [R] last tokens of each sequence in the plan that may go again
    token_places: Tensor | None  # [T] of tokens among N * L; None where there is no padding
    context: StoredContext | None  # what is read before attention

    @property
    def num_positions(self) -> int:
        """L."""
        return int(self.is_token.shape[1])

    @property
    def rows(self) -> IntArray:
        """[R] those that have tokens, in the order of the plan."""
        return np.flatnonzero(self.is_token.any(axis=1))

    def num_last_tokens(self, num_positions: int) -> IntArray:
        """[R] tokens among the last so many positions."""
        counts: IntArray = self.is_token[self.rows, self.num_positions - num_positions :].sum(1)
        return counts

    def tokens(self, states: Tensor) -> Tensor:
        """Keys or values [N, H, L, D] of the tokens alone: [T, H, D]."""
        rows = states.transpose(1, 2).reshape(-1, states.shape[1], states.shape[3])
        return rows if self.token_places is None else rows[self.token_places]


class CachedBatch:
    """Sequences of one length, of which each has stored those positions that are no padding.

    A step begins with the first layer that is given new tokens and is over with the last. One that
    did not end changes nothing. With `keeps_drafts` its last tokens can be taken back by `crop` as
    if they had never been: until then they are not sealed.

    A batch that `attends` leaves new keys and values as they are, for the attention call that
    follows `update`, which reads the others in their blocks.
    """

    def __init__(self, settings: PoolSettings, *, attends: bool = False) -> None:
        self.settings = settings
        self.attends = attends
        self.keeps_drafts = False
        self.pool: SequencePool | None = None
        self._seq_ids = NO_ROWS  # [N]
        self._is_stored = NO_POSITIONS  # [N, length]
        self._step: BatchStep | None = None
        self._call: LayerTokens | None = None  # where it attends: what is to be attended to next
        self._mask: Tensor | None = None  # what the next step is told of padding

    def __deepcopy__(self, memo: dict[int, object]) -> CachedBatch:
        """A batch that goes on by itself, on a pool of its own."""
        self._end_step()
        copied = CachedBatch(self.settings, attends=self.attends)
        copied.keeps_drafts = self.keeps_drafts
        if self.pool is not None:
            cache, manager = self.pool.cache.duplicate(self.pool.manager)
            copied.pool = SequencePool(cache, manager, self.pool.batch_size)
        copied._seq_ids, copied._is_stored = self._seq_ids.copy(), self._is_stored.copy()
        return copied

    # -- what it holds --------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """N; 0 before anything was stored."""
        return len(self._seq_ids)

    @property
    def length(self) -> int:
        """Positions that all layers were given, padding included."""
        step = self._step
        num_ahead = step.num_positions if step is not None and self._is_whole(step) else 0
        return int(self._is_stored.shape[1]) + num_ahead

    @property
    def max_length(self) -> int:
        return self.settings.max_cache_len

    # -- steps ----------------------------------------------------------------------------------

    def expect(self, attention_mask: Tensor | None) -> None:
        """A forward pass begins: `attention_mask` [N, length and new positions] is 0 at padding."""
        if self._step is not None and not self._is_whole(self._step):
            self._end_step()
        self._mask, self._call = attention_mask, None

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values [N, H, L, D]; returns them behind all that were stored before.

        Older tokens come as they are read from blocks, padding as zeros. Raises, with the batch as
        it was before the step, `InvalidRequestError` for what does not go on with it and
        `OutOfBlocksError` where the pool is too small.
        """
        try:
            step = self._step_for(layer, key)
            if self.attends:
                self._call = LayerTokens(layer, key, value)
                expect_call(self)
                return key, value
            cache = self._pool.cache
            store_tokens(step.tokens(key), step.tokens(value), cache, layer, step.step)
            joined = self._joined(step, layer, key, value)  # a step writes to nothing of these
        except BaseException:
            self._abandon()
            raise
        self._end_whole_step(step)
        return joined

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None,
        softcap: float | None,
        sliding_window: int | None,
        attention_chunk: int | None,
        sink_logits: Tensor | None,
    ) -> Tensor:
        """Attention [N, L, heads, value_dim] of what the last `update` was given, which it stores.

        Arguments as of `paged_attention`, but [N, heads, L, dim]. At padding it is 0.
        """
        call, step, self._call = self._call, self._step, None
        try:
            if call is None or step is None or key is not call.key or value is not call.value:
                raise UnsupportedModelError("attention was called with other keys than were cached")
            query_tokens, sink_query = step.tokens(query), None
            if step.step.head_shifts is not None:  # sinks are seen as near as they would be
                assert self.settings.rotations is not None
                rotation = self.settings.rotations[call.layer]
                phases = rotation.phases(-step.step.head_shifts)
                sink_query = rotation.turn(query_tokens, phases)
            output = paged_attention(
                query_tokens,
                step.tokens(key),
                step.tokens(value),
                self._pool.cache,
                call.layer,
                step.step,
                scale=scale,
                softcap=softcap,
                sliding_window=sliding_window,
                attention_chunk=attention_chunk,
                sink_logits=sink_logits,
                sink_query=sink_query,
            )
        except BaseException:
            self._abandon()
            raise
        shape = (*query.shape[0:3:2], *output.shape[1:])
        self._end_whole_step(step)
        if step.token_places is None:
            return output.view(shape)
        padded = output.new_zeros(shape)
        padded.view(-1, *output.shape[1:])[step.token_places] = output
        return padded

    def _end_whole_step(self, step: BatchStep) -> None:
        if self._is_whole(step) and not self.keeps_drafts:
            self._end_step()

    def _step_for(self, layer: int, key: Tensor) -> BatchStep:
        """The step that this layer's new keys belong to, or a new one."""
        if self._step is None or layer in self._step.step.stored_layers:
            self._end_step()
            self._step = self._begin(key.shape[0], key.shape[2])
        if self._step.is_token.shape != (key.shape[0], key.shape[2]):
            raise InvalidRequestError(
                f"layer {layer} was given keys for {key.shape[0]} sequences and {key.shape[2]} "
                f"positions, layers before it for {self._step.is_token.shape}"
            )
        return self._step

    def _begin(self, batch_size: int, num_new: int) -> BatchStep:
        if not self.batch_size:
            self._start(batch_size)
        elif batch_size != self.batch_size:
            raise InvalidRequestError(
                f"{batch_size} sequences cannot go on in a cache that holds {self.batch_size}: "
                "reset() it before another batch"
            )
        is_token = self._tokens_among(num_new)
        rows = np.flatnonzero(is_token.any(axis=1))
        seq_ids, counts = self._seq_ids[rows], is_token[rows].sum(1)
        self._check_lengths(seq_ids, counts)
        cache, manager = self._pool.cache, self._pool.manager
        context = None
        if not self.attends:
            context = StoredContext.of(
                manager, self._seq_ids, positions_of(self._is_stored), cache.device
            )
        most_drafts = cache.geometry.block_size if self.keeps_drafts else 0
        num_drafts = np.minimum(counts - 1, most_drafts)
        plan = manager.reserve(seq_ids, counts, num_drafts if num_drafts.any() else None)
        if plan is None:
            raise self._out_of_blocks(int(manager.blocks_needed(seq_ids, counts).sum()))
        try:
            step = cache.begin(plan)
        except BaseException:
            manager.rollback(plan)
            raise
        places = None
        if not is_token.all():
            places = torch.from_numpy(is_token.reshape(-1).nonzero()[0]).to(cache.device)
        return BatchStep(plan, step, is_token, num_drafts, places, context)

    def _start(self, batch_size: int) -> None:
        """Sequences that store nothing yet."""
        pool = self.pool
        if pool is None or pool.batch_size < batch_size:
            self.pool = None  # before there is another
            self.pool = self.settings.new_pool(batch_size)
        manager = self._pool.manager
        window = self.settings.sink_window
        chains = [manager.chain_tokens((), sink_window=window) for _ in range(batch_size)]
        self._seq_ids = np.array([manager.add_sequence(chain) for chain in chains])
        self._is_stored = np.zeros((batch_size, 0), dtype=np.bool_)

    def _tokens_among(self, num_new: int) -> Mask:
        """[N, num_new] which new positions are tokens, as far as was told."""
        length, mask = self._is_stored.shape[1], self._mask
        self._mask = None
        everything = np.ones((self.batch_size, num_new), dtype=np.bool_)
        if mask is None or mask.shape != (self.batch_size, length + num_new):
            return everything
        is_seen: Mask = mask.detach().bool().cpu().numpy()
        lost = is_seen[:, :length] & ~self._is_stored
        if lost.any():
            row, position = np.argwhere(lost)[0]
            raise InvalidRequestError(
                f"attention_mask[{row}, {position}] is 1, but that position was given as padding "
                "before, and padding is not stored"
            )
        if self.attends and (self._is_stored & ~is_seen[:, :length]).any():
            raise InvalidRequestError(
                "attention_mask hides tokens that are stored, which only a model with attention of "
                "its own can leave out; generate() makes a mask of pad tokens where none is given"
            )
        is_token = is_seen[:, length:]
        return is_token.copy() if is_token.any() else everything

    def _check_lengths(self, seq_ids: IntArray, counts: IntArray) -> None:
        manager = self._pool.manager
        after = manager.num_computed_tokens[seq_ids] + counts
        if self.settings.sink_window is not None:
            excess = int((after - manager.tables.num_storable(seq_ids)).max())
            if excess > 0:
                raise InvalidRequestError(
                    f"{counts.max()} tokens at once are {excess} more than there is room for in "
                    f"{self.settings.sink_window}: give generate() a prefill_chunk_size"
                )
            return
        longest = int(after.max())
        if longest > self.settings.max_cache_len:
            raise InvalidRequestError(
                f"a sequence of {longest} tokens exceeds max_cache_len "
                f"{self.settings.max_cache_len}"
            )

    def _out_of_blocks(self, num_needed: int) -> OutOfBlocksError:
        pool = self._pool.manager.pool
        return OutOfBlocksError(
            f"{num_needed} more blocks are needed, {pool.num_free} of {pool.num_blocks} are free: "
            "give the cache more by num_blocks or kv_memory, or compute fewer sequences at once"
        )

    def _joined(
        self, step: BatchStep, layer: int, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the layer has stored, and then its new keys and values."""
        length = self._is_stored.shape[1]
        if not length or step.context is None:
            return key, value
        is_padded = not self._is_stored.all()
        new = key, value
        return step.context.joined(self._pool.cache, layer, new, length, is_padded=is_padded)

    def _is_whole(self, step: BatchStep) -> bool:
        return len(step.step.stored_layers) == len(self.settings.layers)

    def _end_step(self, num_dropped: int = 0) -> None:
        """Commit the step, less its last positions, or undo it where layers are missing."""
        step = self._step
        if step is None:
            return
        self._step, manager = None, self._pool.manager
        if not self._is_whole(step):
            manager.rollback(step.plan)
            return
        num_kept = step.num_positions - num_dropped
        kept = step.is_token[:, :num_kept]
        manager.commit(step.plan, kept[step.rows].sum(1) if num_dropped else None)
        self._is_stored = np.concatenate([self._is_stored, kept], 1)

    def _abandon(self) -> None:
        """Go back to before the step, and to nothing where that was the first."""
        step, self._step, self._call = self._step, None, None
        if step is not None:
            self._pool.manager.rollback(step.plan)
        if self.pool is not None and not self._is_stored.shape[1]:
            self.reset()

    @property
    def _pool(self) -> SequencePool:
        assert self.pool is not None, "a batch has a pool once it began"
        return self.pool

    # -- other rows, fewer positions ------------------------------------------------------------

    def reset(self) -> None:
        """Forget every sequence; the pool stays. Also after an exception cut off a change."""
        self._step = self._mask = self._call = None
        self._seq_ids, self._is_stored = NO_ROWS, NO_POSITIONS
        if self.pool is not None:
            self.pool.manager.recover()

    def select(self, rows: Sequence[int]) -> None:
        """Let row i of the batch be what row `rows[i]` was; rows named twice share their blocks."""
        self._end_step()
        if not self.batch_size:
            return
        wrong = [row for row in rows if not -self.batch_size <= row < self.batch_size]
        manager = self._pool.manager
        if wrong or not 0 < len(rows) <= manager.max_num_seqs:
            raise InvalidRequestError(
                f"a batch of {self.batch_size} rows cannot become {len(rows)}"
                + (f": there is no row {wrong[0]}" if wrong else "")
            )
        places = np.asarray(rows, dtype=np.int64) % self.batch_size
        old, self._is_stored = self._seq_ids, self._is_stored[places]
        for row in np.setdiff1d(np.arange(len(old)), places).tolist():
            manager.remove_sequence(int(old[row]))
        taken: set[int] = set()
        seq_ids = []
        for row in places.tolist():
            seq_ids.append(manager.fork(int(old[row])) if row in taken else int(old[row]))
            taken.add(row)
        self._seq_ids = np.array(seq_ids)

    def crop(self, num_removed: int) -> None:
        """Take back the last positions.

        Where a sequence then ends within a sealed block, what stays of that is read back, and
        stored once more by the next tokens' step. Raises `OutOfBlocksError`, changing nothing, in
        the rare case that blocks that others share leave no room for it.
        """
        step = self._step
        if step is not None and self._is_whole(step):
            if num_removed >= step.num_positions:  # nothing of it stays
                self._step = None
                self._pool.manager.rollback(step.plan)
                num_removed -= step.num_positions
            elif (step.num_last_tokens(num_removed) <= step.num_drafts).all():
                self._end_step(num_removed)
                return
        if num_removed and self.settings.sink_window is not None:
            raise InvalidRequestError(
                f"{num_removed} tokens cannot be taken back: {self.settings.sink_window} may have "
                "let go of what they saw"
            )
        self._end_step()
        length = max(self._is_stored.shape[1] - num_removed, 0)
        if self.batch_size and length < self._is_stored.shape[1]:
            self._truncate(self._is_stored[:, :length].sum(1))
            self._is_stored = self._is_stored[:, :length]

    def _truncate(self, lengths: IntArray) -> None:
        """Keep the first `lengths` [N] tokens of each sequence."""
        cache, manager = self._pool.cache, self._pool.manager
        geometry, seq_ids = cache.geometry, self._seq_ids
        num_sealed = manager.num_sealed[seq_ids]
        in_body = np.maximum(lengths - geometry.num_head_tokens, 0)
        num_whole = np.minimum(in_body // geometry.block_size, num_sealed)
        num_left = np.where(num_whole < num_sealed, in_body % geometry.block_size, 0)
        cut = num_left.nonzero()[0]
        self._check_room_to_reopen(lengths - num_left, num_whole, num_left)
        ids = manager.tables.ids[seq_ids[cut], geometry.body_places(num_whole[cut])]
        reopened = self._read_starts(ids.astype(np.int64), num_left[cut])
        for seq_id, length in zip(seq_ids.tolist(), (lengths - num_left).tolist(), strict=True):
            manager.truncate(seq_id, length)
        if not len(cut):
            return
        plan = manager.reserve(seq_ids[cut], num_left[cut])
        assert plan is not None, "room was counted before"
        step = cache.begin(plan)
        for layer, (keys, values) in enumerate(reopened):
            store_tokens(keys, values, cache, layer, step)
        manager.commit(plan)

    def _check_room_to_reopen(
        self, lengths: IntArray, num_sealed: IntArray, num_left: IntArray
    ) -> None:
        """Raise `OutOfBlocksError` unless what is let go makes room for what is stored again."""
        manager, geometry = self._pool.manager, self._pool.cache.geometry
        dropped = [
            manager.tables.block_ids(seq_id)[geometry.count_blocks(length, sealed) :]
            for seq_id, length, sealed in zip(
                self._seq_ids.tolist(), lengths.tolist(), num_sealed.tolist(), strict=True
            )
        ]
        block_ids, num_users = np.unique(np.concatenate(dropped), return_counts=True)
        num_freed = int((manager.pool.ref_counts[block_ids] == num_users).sum())
        num_needed = int((-(-num_left // geometry.open_block_size)).sum())
        if num_needed > manager.pool.num_free + num_freed:
            raise self._out_of_blocks(num_needed)

    def _read_starts(self, block_ids: IntArray, counts: IntArray) -> list[tuple[Tensor, Tensor]]:
        """Of each layer the first `counts` [M] keys and values of sealed blocks: [T, H, D]."""
        if not len(block_ids):
            return []
        cache = self._pool.cache
        is_read = torch.arange(cache.geometry.block_size) < torch.from_numpy(counts)[:, None]
        is_read, ids = is_read.to(cache.device), torch.from_numpy(block_ids).to(cache.device)
        return [
            (keys[is_read], values[is_read])
            for keys, values in (
                read_blocks(cache, layer, ids, cache.dtype) for layer in range(len(cache.layers))
            )
        ]


def positions_of(is_stored: Mask) -> IntArray:
    """[N, most tokens of a row] the positions of each row's tokens, in order; then zeros."""
    rows, positions = is_stored.nonzero()
    counts = is_stored.sum(1)
    columns = np.zeros((len(is_stored), int(counts.max(initial=0))), dtype=np.int64)
    columns[rows, np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows]] = positions
    return columns
