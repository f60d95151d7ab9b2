"""Layers that see a window: pages that no later token sees are given back. Knows no tensors.

A body block is let go once it is sealed and all of its tokens are behind the window of the next
token, as in our own cache (`Retention`); the head stays. Scheduler and worker both tell that from
a sequence's length, and kernels are shown tables without such blocks, as if their tokens had never
been: what is in a page that was given back is never read. The scheduler counts the tokens that
steps have computed, a worker those before its step, never fewer.

Many arguments because vLLM calls with them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from vllm.utils.math_utils import cdiv

from ...blocks.geometry import BlockGeometry, BlockIds, IntArray
from .manager import PagedKVManager, logger


def num_let_go(
    geometry: BlockGeometry, window: int, num_tokens: IntArray, num_sealed: IntArray
) -> IntArray:
    """[N] body blocks that the token behind the first `num_tokens` [N], and later ones, never see.

    In the native format, where nothing seals, these are full blocks.
    """
    num_hidden = num_tokens - window + 1 - geometry.num_head_tokens
    blocks: IntArray = np.maximum(num_hidden // geometry.block_size, 0)
    return np.minimum(blocks, num_sealed) if geometry.seals else blocks


class WindowTables(NamedTuple):
    """A step of N sequences, without the tokens and pages that were let go."""

    seq_lens: IntArray  # [N]
    block_table: BlockIds  # [N, W]
    min_sealed: IntArray | None  # [N]

    def behind(self, geometry: BlockGeometry, window: int, query_lens: IntArray) -> WindowTables:
        """The same step as layers with that window are shown it.

        Tokens move to the front by whole blocks, queries and keys alike, so that a mask of
        positions says what it said before; and a query is then too far behind to see the head.
        """
        context_lens = self.seq_lens - query_lens
        num_sealed = geometry.num_sealed_blocks(context_lens)
        if self.min_sealed is not None:
            num_sealed = np.maximum(num_sealed, self.min_sealed)
        gone = num_let_go(geometry, window, context_lens, num_sealed)
        if not gone.any():
            return self
        seq_lens = self.seq_lens - gone * geometry.block_size
        places = np.arange(geometry.table_width(int(seq_lens.max())))
        moved = (gone * geometry.open_blocks_per_block)[:, None] * (
            places >= geometry.num_head_blocks
        )
        places = np.minimum(places + moved, self.block_table.shape[1] - 1)
        table = np.take_along_axis(self.block_table, places, axis=1)
        return WindowTables(seq_lens, table, num_sealed - gone)


class PagedKVWindowManager(PagedKVManager):
    """Gives back the pages of body blocks behind the window."""

    def __init__(self, kv_cache_spec: Any, **settings: Any) -> None:
        super().__init__(kv_cache_spec, **settings)
        self.window: int = kv_cache_spec.sliding_window
        logger.info(
            "paged_kv: layers that see %d tokens keep at most %s pages of a request",
            self.window,
            self.max_admission_blocks_per_request,
        )
        self.let_go: dict[str, int] = {}  # body blocks that no table holds any more

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Give back what the next token does not see, for others to find in the prefix cache."""
        request = self.published.get(request_id)
        if request is not None:
            self._publish(request, processed_computed_tokens)
        super().remove_skipped_blocks(request_id, processed_computed_tokens)
        blocks = self.req_to_blocks.get(request_id)
        if blocks is None:
            return
        num_tokens = np.array([processed_computed_tokens])
        num_sealed = self.geometry.num_sealed_blocks(num_tokens)
        before = self.let_go.get(request_id, 0)
        now = max(before, int(num_let_go(self.geometry, self.window, num_tokens, num_sealed)[0]))
        places = self.geometry.body_places(np.arange(before, now)).tolist()
        held = [place for place in places if not blocks[place].is_null]  # not in a shared prefix
        self.block_pool.free_blocks([blocks[place] for place in reversed(held)])
        for place in held:
            blocks[place] = self._null_block
        self.let_go[request_id] = now

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        self.let_go.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        *alignment: Any,
        **options: Any,
    ) -> tuple[tuple[list[Any], ...], int]:
        """The most links of which the head and all that the next token sees are there.

        Another group may have found less than the request's length would allow: then `max_length`
        is a hit's, and what may be sealed follows from the number of hashes.
        """
        geometry, size = kv_cache_spec.geometry, kv_cache_spec.block_size
        num_seen = cdiv(kv_cache_spec.sliding_window - 1, geometry.block_size)  # of body links
        hits: dict[int, Any] = {}

        def is_found(link: int) -> bool:
            end = geometry.link_end(link + 1) // size
            if end <= len(block_hashes):
                hits[link] = block_pool.get_cached_block(block_hashes[end - 1], kv_cache_group_ids)
            return bool(hits.get(link))

        most = geometry.num_shareable_links(max(max_length + 1, len(block_hashes) * size))
        most = min(most, geometry.num_links(max_length))
        head = min(most, geometry.num_head_blocks)
        num_head = next((link for link in range(head) if not is_found(link)), head)
        past = most if num_head == geometry.num_head_blocks else num_head
        first = past
        while first > num_head and past - first < num_seen:
            first -= 1
            if not is_found(first):
                past = first
        found: tuple[list[Any], ...] = tuple([] for _ in kv_cache_group_ids)
        place = 0
        for link in range(past):
            end = geometry.link_end(link + 1) // size
            is_held = link < num_head or link >= first
            for index, blocks in enumerate(found):
                page = hits[link][index] if is_held else block_pool.null_block
                blocks.extend([page] + [block_pool.null_block] * (end - place - 1))
            place = end
        return found, place * size
