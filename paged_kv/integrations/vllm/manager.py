"""Which pages a request of vLLM's scheduler holds. Knows pages and lengths, never tensors.

What is sealed follows from the number of stored tokens alone, so that scheduler and worker agree
without a message. The worker seals in place, into the first of a block's pages, and this manager
gives the others back a step later; where a prompt's chunk fills a whole block they are never taken,
and the table says null block there.

Many arguments because vLLM calls with them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from .events import tell_whole_link, tell_whole_removals

logger: Final = logging.getLogger("vllm.paged_kv")  # below vLLM's own, so that its handlers show it


class PagedKVManager(FullAttentionManager):  # type: ignore[misc]
    """Keeps of every sealed block its first page."""

    supports_fine_grained_hash_lookup = False

    def __init__(self, kv_cache_spec: Any, **settings: Any) -> None:
        super().__init__(kv_cache_spec, **settings)
        self.geometry: Final = kv_cache_spec.geometry
        self.num_returned: dict[str, int] = {}  # sealed blocks whose other pages are not held
        self.published: dict[str, Any] = {}  # requests whose blocks others may find
        if self.kv_cache_group_id == 0:
            log_capacity(kv_cache_spec, self.block_pool.num_gpu_blocks)

    def _needed(self, request_blocks: int, num_tokens: int) -> list[bool]:
        """Of each page behind the first `request_blocks`, whether it is needed."""
        places = np.arange(request_blocks, cdiv(num_tokens, self.block_size))
        needed: list[bool] = self.geometry.is_place_needed(places, num_tokens).tolist()
        return needed

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[Any],
        *lengths: Any,
        **options: Any,
    ) -> int:
        held = len(self.req_to_blocks.get(request_id, ()))
        if request_id not in self.num_cached_block:
            held += len(new_computed_blocks)
        evictable = self._get_num_evictable_blocks(new_computed_blocks)
        needed, most = sum(self._needed(held, num_tokens)), self.max_admission_blocks_per_request
        if most is not None and options.get("apply_admission_cap"):
            needed = min(needed, most)
        return needed + int(evictable)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[Any]:
        blocks = self.req_to_blocks[request_id]
        needed = self._needed(len(blocks), num_tokens)
        num_events = len(self.block_pool.kv_event_queue)
        pages = iter(self.block_pool.get_new_blocks(sum(needed)))
        if len(self.block_pool.kv_event_queue) > num_events:
            tell_whole_removals(self.block_pool, num_events)
        new_blocks = [next(pages) if is_needed else self._null_block for is_needed in needed]
        blocks.extend(new_blocks)
        return new_blocks

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Give back all but the first page of what was sealed by steps before."""
        blocks = self.req_to_blocks.get(request_id)
        if blocks is None:
            return
        before = self.num_returned.get(request_id, 0)
        num_sealed = self.geometry.num_sealed_blocks(np.array([processed_computed_tokens]))
        now = max(before, int(num_sealed[0]))
        returned = []
        for first in self.geometry.body_places(np.arange(before, now)).tolist():
            end = min(first + self.geometry.open_blocks_per_block, len(blocks))
            for place in range(first + 1, end):
                if not blocks[place].is_null:
                    returned.append(blocks[place])
                    blocks[place] = self._null_block
        self.num_returned[request_id] = now
        self.block_pool.free_blocks(returned)

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        self.num_returned.pop(request_id, None)
        request = self.published.pop(request_id, None)
        if request is not None:  # what its last step stored; whoever finds it reads it later
            self._publish(request, request.num_computed_tokens)
        blocks: list[Any] = super().pop_blocks_for_free(request_id)
        return blocks

    # -- prefix cache: a link (a head block, a sealed block) is found by the hash of its last tokens

    def cache_blocks(
        self,
        request: Any,
        num_tokens: int,
        retention_interval: int | None = None,
        **options: Any,
    ) -> None:
        """Publish what earlier steps have stored: attention reads before its step stores."""
        self.published[request.request_id] = request
        self._publish(request, min(num_tokens, request.num_computed_tokens))

    def _publish(self, request: Any, num_stored: int) -> None:
        """Let others find what is complete among the first `num_stored` tokens."""
        blocks = self.req_to_blocks[request.request_id]
        num_known = min(num_stored, len(request.block_hashes) * self.block_size)
        before = self.num_cached_block.get(request.request_id, 0)  # places
        done = max(before, self.geometry.num_done_places(num_known))
        first, past = (self.geometry.num_links(n * self.block_size) for n in (before, done))
        for link in range(first, past):
            place, end = (self.geometry.link_end(n) // self.block_size for n in (link, link + 1))
            self._publish_link(request, blocks[place], place, end)
        self.num_cached_block[request.request_id] = done

    def _publish_link(self, request: Any, page: Any, place: int, end: int) -> None:
        """The link in the places [place, end), under the hash of what ends before `end`."""
        if page.block_hash is not None:
            return
        blocks = [self._null_block] * (end - 1) + [page]
        self.block_pool.cache_full_blocks(
            request=request,
            blocks=blocks,
            num_cached_blocks=end - 1,
            num_full_blocks=end,
            block_size=self.block_size,
            kv_cache_group_id=self.kv_cache_group_id,
        )
        if self.block_pool.enable_kv_cache_events and not page.is_null:
            tell_whole_link(self.block_pool, request, place, end, self.block_size)

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
        """The longest run of links; no more are sealed than the request would have sealed."""
        geometry, size = kv_cache_spec.geometry, kv_cache_spec.block_size
        found: tuple[list[Any], ...] = tuple([] for _ in kv_cache_group_ids)
        place, num_links = 0, geometry.num_shareable_links(max_length + 1)
        for link in range(num_links):
            end = geometry.link_end(link + 1) // size
            hit = None
            if end <= len(block_hashes):
                hit = block_pool.get_cached_block(block_hashes[end - 1], kv_cache_group_ids)
            if not hit:
                break
            for blocks, block in zip(found, hit, strict=True):
                blocks.extend([block] + [block_pool.null_block] * (end - place - 1))
            place = end
        return found, place * size


def log_capacity(spec: Any, num_pages: int) -> None:
    """Say what these pages hold, beside what vLLM's own cache would in the same bytes."""
    layer, geometry = spec.layer, spec.geometry
    own = layer.num_kv_heads * (layer.key_dim + layer.value_dim) * spec.model_itemsize
    logger.info(
        "paged_kv: format %s, %.1f bytes a token and layer (%d in vLLM's own cache); pages for up "
        "to %s tokens (%s in vLLM's own cache) of one group of layers",
        layer.kv_format.name,
        spec.bytes_per_token(),
        own,
        f"{num_pages * geometry.block_size:,}",
        f"{int(num_pages * spec.page_size_bytes / own):,}",
    )
