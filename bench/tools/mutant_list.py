"""Faults of one line that a real mistake would make, and the tests that see them. Data only.

`mutants.py` plants them one at a time. Tests are named fast ones first; the old text stands in its
file exactly once, which `tests/test_mutants.py` checks, so that the list goes with the code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple


class Mutant(NamedTuple):
    """One fault: in the file `path`, `new` stands where `old` should."""

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]


class Fault(NamedTuple):
    """A mutant without what it has in common with others of its file."""

    name: str
    old: str
    new: str
    tests: str = ""  # instead of those of the file


def faults_in(path: str, tests: str, faults: Iterable[Fault]) -> Iterator[Mutant]:
    """Of one file; `tests` are names below `tests/`, without their ending."""
    for name, old, new, own_tests in faults:
        names = (own_tests or tests).split()
        yield Mutant(name, path, old, new, tuple(f"tests/{test}.py" for test in names))


MUTANTS: Final[tuple[Mutant, ...]] = (
    # -- blocks -----------------------------------------------------------------------------------
    *faults_in(
        "paged_kv/blocks/block_pool.py",
        "blocks/test_block_pool blocks/test_eviction blocks/test_all_or_nothing blocks/test_fork",
        [
            Fault(
                "pool-hands-out-views-of-its-stack",
                "self._free_stack[start : self._stack_size][::-1].copy()",
                "self._free_stack[start : self._stack_size][::-1]",
                "blocks/test_fork",
            ),
            Fault(
                "pool-drops-users-first-block-first",
                "range(len(block_ids) - 1, -1, -1)",
                "range(len(block_ids))",
            ),
            Fault(
                "pool-refuses-its-last-block",
                "if count > self.num_free:",
                "if count >= self.num_free:",
            ),
            Fault(
                "pool-forgets-repeated-users-that-leave",
                "np.subtract.at(self.ref_counts, block_ids, 1)",
                "self.ref_counts[block_ids] -= 1",
                "blocks/test_fork",
            ),
            Fault(
                "pool-frees-cached-blocks-at-once",
                "if is_cached[block_id]:",
                "if is_cached[block_id] and num_idle < 0:",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/blocks/prefix_cache.py",
        "blocks/test_eviction blocks/test_prefix_cache blocks/test_block_events "
        "blocks/test_manager_machine",
        [
            Fault(
                "cache-evicts-the-newest",
                "next_idle(last=False)",
                "next_idle(last=True)",
            ),
            Fault(
                "cache-keeps-the-mark-of-evicted-blocks",
                "        self.is_cached[block_ids] = False\n        if self._events is not None:",
                "        if self._events is not None:",
                "blocks/test_block_events",
            ),
            Fault(
                "cache-finds-links-behind-a-gap",
                "                break\n            found.append(block_id)",
                "                continue\n            found.append(block_id)",
                "blocks/test_manager_machine",
            ),
            Fault(
                "cache-stores-the-same-content-twice",
                "            if known not in self._idle:\n                return False\n",
                "",
            ),
            Fault(
                "cache-expects-for-one-of-two",
                "        if count:\n            self._pending",
                "        if count > 1:\n            self._pending",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/blocks/prefix_sharing.py",
        "blocks/test_prefix_cache blocks/test_block_events blocks/test_prefix_traffic "
        "engine/test_not_finite entrypoints/test_windowed_llm",
        [
            Fault(
                "sharing-waits-for-sequences-that-ended",
                "    def ended(self, seq_id: int) -> None:\n"
                "        self.cache.no_longer_expect(self._unpublished_hashes(seq_id))",
                "    def ended(self, seq_id: int) -> None:\n"
                "        self.cache.no_longer_expect([])",
            ),
            Fault(
                "sharing-publishes-what-a-spoilt-sequence-stores-later",
                "            self.stop(tables, seq_ids)\n",
                "",
                "engine/test_not_finite",
            ),
            Fault(
                "sharing-publishes-behind-a-gap",
                'tables.state["link_limit"][seq_ids] = tables.state["num_published"][seq_ids]\n',
                "pass\n",
                "engine/test_not_finite",
            ),
            Fault(
                "sharing-forgets-that-forks-store-too",
                "self.cache.expect(self._unpublished_hashes(child))",
                "self.cache.expect([])",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/blocks/token_chain.py",
        "blocks/test_token_chain blocks/test_prefix_cache blocks/test_windowed_machine "
        "entrypoints/test_windowed_llm",
        [
            Fault(
                "chain-begins-without-its-salt",
                "hashes[-1] if hashes else self.root",
                "hashes[-1] if hashes else bytes(32)",
            ),
            Fault(
                "chain-forgets-the-link-before",
                "sha256(parent + token_bytes)",
                "sha256(token_bytes)",
            ),
            Fault(
                "chain-runs-extra-keys-together",
                'f"{type(key).__name__}:{len(data)}:"',
                'f"{type(key).__name__}:"',
            ),
            Fault(
                "chain-copies-share-their-hashes",
                "chain.hashes = self.hashes.copy()",
                "chain.hashes = self.hashes",
                "blocks/test_token_chain",
            ),
            Fault(
                "chain-of-a-window-shares-past-its-gap",
                "return num_links if limit is None else min(num_links, limit)",
                "return num_links",
                "entrypoints/test_windowed_llm",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/blocks/geometry.py",
        "blocks/test_geometry blocks/test_prefix_cache blocks/test_block_manager",
        [
            Fault(
                "geometry-leaves-no-token-to-compute",
                "links = self.num_links(max(num_tokens - 1, 0))",
                "links = self.num_links(num_tokens)",
            ),
            Fault(
                "geometry-shares-into-the-least-tail",
                "        sealable = num_tokens - self.num_head_tokens - self.min_tail_tokens\n"
                "        return min(links",
                "        sealable = num_tokens - self.num_head_tokens\n        return min(links",
                "blocks/test_prefix_cache",
            ),
            Fault(
                "geometry-counts-sealed-blocks-without-the-least-tail",
                "        sealable = num_tokens - self.num_head_tokens - self.min_tail_tokens\n"
                "        return np.maximum",
                "        sealable = num_tokens - self.num_head_tokens\n        return np.maximum",
            ),
            Fault(
                "geometry-seals-without-the-least-tail",
                "self.num_head_tokens + self.min_tail_tokens,",
                "self.num_head_tokens,",
            ),
            Fault(
                "geometry-lets-head-blocks-leave",
                "max(num_open - self.num_head_blocks, 0)",
                "max(num_open, 0)",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/blocks/growth.py",
        "blocks/test_block_manager blocks/test_drafts blocks/test_fork "
        "blocks/test_windowed_machine blocks/test_prefix_cache blocks/test_manager_machine",
        [
            Fault(
                "growth-seals-drafts",
                "(certain[row] - min_unsealed) // block_size",
                "(after[row] - min_unsealed) // block_size",
                "blocks/test_drafts",
            ),
            Fault(
                "growth-writes-to-a-shared-block-of-the-head",
                "if (end <= num_head or end > body_end) and",
                "if end > body_end and",
                "blocks/test_fork",
            ),
            Fault(
                "growth-copies-only-where-three-share",
                "int(ref_counts[table[seq_id, end - 1]] > 1)",
                "int(ref_counts[table[seq_id, end - 1]] > 2)",
                "blocks/test_fork",
            ),
            Fault(
                "growth-copies-full-blocks-too",
                "length % open_block_size > 0:",
                "length > 0:",
                "blocks/test_fork",
            ),
            Fault(
                "growth-leaves-a-reader-without-its-copy",
                "from_end[num_writers == ref_counts[block_ids]]",
                "from_end[num_writers <= ref_counts[block_ids]]",
                "blocks/test_fork",
            ),
            Fault(
                "growth-seals-one-token-late",
                "* block_size + min_unsealed - 1)",
                "* block_size + min_unsealed)",
            ),
            Fault(
                "growth-finds-a-complete-block-a-step-late",
                "room -= 1",
                "room -= 0",
            ),
            Fault(
                "growth-places-an-open-block-where-the-body-begins",
                "if body_start <= place < body_end:",
                "if body_start < place < body_end:",
            ),
            Fault(
                "growth-evicts-a-block-that-is-seen-in-part",
                "count = (first_seen - start * open_block_size) // block_size",
                "count = -((start * open_block_size - first_seen) // block_size)",
                "blocks/test_windowed_machine",
            ),
            Fault(
                "growth-keeps-a-block-one-token-too-long",
                "length - window_sizes[seq_id] + 1  # by",
                "length - window_sizes[seq_id]  # by",
                "blocks/test_windowed_machine",
            ),
            Fault(
                "growth-keeps-the-capacity-from-before-an-eviction",
                "capacity[seq_id] -= count * block_size",
                "capacity[seq_id] -= 0",
                "blocks/test_windowed_machine",
            ),
            Fault(
                "growth-publishes-drafts-that-nobody-knows",
                "min(lengths[seq_id], known) // open_block_size",
                "lengths[seq_id] // open_block_size",
                "blocks/test_prefix_cache",
            ),
            Fault(
                "growth-publishes-the-wrong-block-of-the-body",
                "place = stored + max(stored - num_head, 0) * (per_block - 1)",
                "place = stored + max(stored - num_head, 0) * per_block",
                "blocks/test_prefix_cache",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/blocks/block_manager.py",
        "blocks/test_block_manager blocks/test_all_or_nothing blocks/test_drafts blocks/test_fork "
        "blocks/test_swap blocks/test_windowed_machine engine/test_not_finite "
        "entrypoints/test_windowed_llm",
        [
            Fault(
                "tables-widen-only-where-open-blocks-come",
                "            if growth.needs.num_new_blocks:",
                "            if growth.needs.num_opened:",
            ),
            Fault(
                "rollback-leaves-shared-blocks-without-a-user",
                "                self.pool.rejoin(part.copy_sources)\n",
                "",
            ),
            Fault(
                "commit-leaks-the-blocks-of-dropped-drafts",
                "for block_ids in (unused_ids, part.freed_block_ids):",
                "for block_ids in (part.freed_block_ids,):",
            ),
            Fault(
                "commit-withdraws-nothing-of-a-single-spoilt-sequence",
                "if len(spoilt_seq_ids):",
                "if len(spoilt_seq_ids) > 1:",
                "engine/test_not_finite",
            ),
            Fault(
                "needs-forget-copies",
                "counts[:, 0] + counts[:, 1] + counts[:, 3]",
                "counts[:, 0] + counts[:, 1]",
            ),
            Fault(
                "evicted-tokens-are-computed-again",
                "left -= self.num_evicted_tokens[seq_ids]",
                "left -= 0",
                "entrypoints/test_windowed_llm",
            ),
            Fault(
                "swapped-windows-publish-past-their-gap",
                'tables.state[seq_id]["link_limit"] = 0',
                "pass",
                "blocks/test_windowed_machine",
            ),
            Fault(
                "evicted-ids-are-written-over-by-the-next-step",
                "self._evicted_ids[:num_ids].copy()",
                "self._evicted_ids[:num_ids]",
                "blocks/test_windowed_machine",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/blocks/block_manager.py",
        "blocks/test_step_arrays blocks/test_storage_machine",
        [
            Fault(
                "rollback-does-not-tell-its-rows-again",
                "                tables.tell_later(part.seq_ids[part.changed_rows])\n",
                "",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/blocks/growth.py",
        "blocks/test_layer_groups blocks/test_manager_machine",
        [
            Fault(
                "windows-of-layers-are-one-token-short",
                "position - rule[0] + 1",
                "position - rule[0] + 2",
            ),
            Fault(
                "windows-of-layers-are-one-token-long",
                "position - rule[0] + 1",
                "position - rule[0]",
            ),
            Fault(
                "groups-let-go-of-half-a-chunk",
                "steps_of_rule, has_chunks = 0, rule[2] // block_size,",
                "steps_of_rule, has_chunks = 0, 1,",
            ),
            Fault(
                "groups-let-go-of-the-head",
                "        start = num_head\n",
                "        start = 0\n",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/blocks/prefix_sharing.py",
        "blocks/test_layer_groups blocks/test_manager_machine",
        [
            Fault(
                "hits-are-those-of-the-first-group",
                "            for tables in self._groups:\n                num_links",
                "            for tables in self._groups[:1]:\n                num_links",
            ),
            Fault(
                "hits-of-groups-are-compared-once",
                "while num_links != before:",
                "if num_links != before:",
            ),
            Fault(
                "a-group-needs-no-head",
                "self.geometry.num_head_blocks if gone else 0",
                "0",
            ),
            Fault(
                "hashes-name-no-group",
                "bytes([group]) for group in range(1, 256)",
                'b"" for group in range(1, 256)',
            ),
        ],
    ),
    *faults_in(
        "paged_kv/blocks/block_manager.py",
        "blocks/test_layer_groups blocks/test_manager_machine",
        [
            Fault(
                "rollback-forgets-the-second-group",
                "zip(self.groups, plan.parts, strict=True):\n                self.pool.release",
                "zip(self.groups[:1], plan.parts):\n                self.pool.release",
            ),
            Fault(
                "a-swapped-group-starts-where-the-first-does",
                "            start = end\n        self",
                "        self",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/blocks/prefix_cache.py",
        "blocks/test_layer_groups blocks/test_manager_machine",
        [
            Fault(
                "events-of-removed-blocks-name-no-group",
                "block_id=block_id, group=group)",
                "block_id=block_id)",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/blocks/holdings.py",
        "blocks/test_layer_groups blocks/test_manager_machine",
        [
            Fault(
                "a-chunk-of-many-blocks-is-never-let-go",
                "np.empty(max(SCRATCH, *at_once), dtype",
                "np.empty(SCRATCH, dtype",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/blocks/sequences.py",
        "blocks/test_fork blocks/test_prefix_cache blocks/test_windowed_machine "
        "blocks/test_manager_machine",
        [
            Fault(
                "last-token-is-the-first-of-several",
                "np.maximum(new_lengths - 1, 0)",
                "lengths",
                "blocks/test_prefix_cache",
            ),
            Fault(
                "hashes-read-the-tokens-from-before-they-moved",
                "chains[seq_id] = self.chain(seq_id).with_tokens(token_ids[seq_id])",
                "chains[seq_id] = self.chain(seq_id)",
                "test_free_memory",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/blocks/block_tables.py",
        "blocks/test_fork blocks/test_step_arrays",
        [
            Fault(
                "fork-keeps-the-capacity-of-its-parent",
                "self.capacity[[seq_id, child]] = self",
                "self.capacity[child] = self",
                "blocks/test_fork",
            ),
            Fault(
                "sinks-are-stored-one-token-late",
                "has_sinks = self.num_stored[seq_ids] >= sinks",
                "has_sinks = self.num_stored[seq_ids] > sinks",
                "blocks/test_windowed_machine",
            ),
            Fault(
                "tables-are-written-before-the-lengths",
                "        self.num_sealed[seq_id] = lengths.num_sealed\n",
                "        self.ids[seq_id, self._places(seq_id)] = block_ids\n"
                "        self.num_sealed[seq_id] = lengths.num_sealed\n",
                "blocks/test_prefix_cache",
            ),
            Fault(
                "swapped-windows-forget-what-they-evicted",
                'int(self.state[seq_id]["num_evicted_tokens"]),',
                "0,",
                "blocks/test_windowed_machine entrypoints/test_windowed_llm",
            ),
            Fault(
                "a-cut-forgets-that-the-head-stays",
                "self.retention.first_seen(num_tokens) < num_head + num_evicted",
                "self.retention.first_seen(num_tokens) < num_evicted",
                "blocks/test_layer_groups blocks/test_manager_machine",
            ),
            Fault(
                "forks-are-not-told",
                "        self.ids[child] = self.ids[seq_id]\n"
                "        self.tell_later(np.array([child]))",
                "        self.ids[child] = self.ids[seq_id]",
            ),
            Fault(
                "tables-are-told-without-their-last-block",
                "self.ids[seq_ids, : self.geometry.table_width(longest)]",
                "self.ids[seq_ids, : longest // self.geometry.open_block_size]",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/blocks/sink_window.py",
        "blocks/test_windowed_machine entrypoints/test_windowed_llm",
        [
            Fault(
                "sinks-are-rounded-down",
                "-(-self.num_sink_tokens // size) * size",
                "self.num_sink_tokens // size * size",
                "entrypoints/test_windowed_llm",
            ),
            Fault(
                "windows-keep-no-least-tail",
                "return head + max(self.window_size, geometry.min_tail_tokens)",
                "return head + self.window_size",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/blocks/step_plan.py",
        "blocks/test_drafts entrypoints/test_windowed_llm",
        [
            Fault(
                "sinks-are-one-token-too-far",
                "self.positions + 1 - num_visible[self.token_rows]",
                "self.positions - num_visible[self.token_rows]",
                "entrypoints/test_windowed_llm",
            ),
            Fault(
                "positions-leave-out-what-was-evicted",
                "return self.cache_positions + self.num_evicted_tokens[self.token_rows]",
                "return self.cache_positions",
                "entrypoints/test_windowed_llm",
            ),
            Fault(
                "all-drafts-may-not-be-dropped",
                "num_kept >= num_new - num_draft)",
                "num_kept > num_new - num_draft)",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/blocks/step_arrays.py",
        "blocks/test_block_manager blocks/test_step_arrays",
        [
            Fault(
                "a-prompt-that-seals-loses-its-head",
                "    is_stored |= positions < geometry.num_head_tokens\n",
                "",
            ),
            Fault(
                "tokens-that-are-sealed-are-stored-too",
                "first_places * geometry.open_block_size + geometry.block_size",
                "first_places * geometry.open_block_size + geometry.open_block_size",
            ),
            Fault(
                "seals-read-the-new-tokens-of-the-first-sequence",
                "query_start_loc[row] + place * size - context_lens[row]",
                "place * size - context_lens[row]",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/blocks/table_replica.py",
        "blocks/test_step_arrays blocks/test_storage_machine",
        [
            Fault(
                "a-step-that-was-rolled-back-seals",
                "if plan.number == self._num_applied:",
                "if plan.number <= self._num_applied:",
            ),
            Fault(
                "open-blocks-stand-where-sealed-ones-do",
                "open_ids = plan.new_block_ids[num_seals :",
                "open_ids = plan.new_block_ids[0 :",
            ),
        ],
    ),
    # -- scheduler --------------------------------------------------------------------------------
    *faults_in(
        "scheduler/admission.py",
        "scheduler/test_admission scheduler/test_scheduler scheduler/test_prefix_waiting "
        "scheduler/test_looking "
        "scheduler/test_branching scheduler/test_preemption scheduler/test_scheduler_machine "
        "entrypoints/test_windowed_llm",
        [
            Fault(
                "the-longest-request-is-refused",
                "if total > manager.max_model_len:",
                "if total >= manager.max_model_len:",
            ),
            Fault(
                "the-last-token-is-thought-to-be-stored",
                "manager.max_blocks(total - 1)",
                "manager.max_blocks(total)",
            ),
            Fault(
                "a-request-is-passed-once-too-often",
                "elif any(passed.times_passed >= MAX_TIMES_PASSED",
                "elif any(passed.times_passed > MAX_TIMES_PASSED",
            ),
            Fault(
                "admissions-eat-the-watermark-together",
                "self.blocks_later -= need.blocks_later",
                "self.blocks_later -= 0",
            ),
            Fault(
                "hits-on-idle-blocks-are-free",
                "lengths, taken = match.lengths, match.num_idle_blocks",
                "lengths, taken = match.lengths, 0",
                "scheduler/test_preemption",
            ),
            Fault(
                "swapped-windows-need-what-they-evicted",
                "length -= lengths[0].num_evicted",
                "length -= 0",
                "entrypoints/test_windowed_llm",
            ),
            Fault(
                "nobody-is-looked-at-when-a-link-has-come",
                "            and len(self._cache.awaited) == self._num_links\n",
                "",
                "scheduler/test_prefix_waiting",
            ),
            Fault(
                "a-better-rank-that-comes-is-not-looked-at",
                "request.rank <= self._last.rank:",
                "request.rank >= self._last.rank:",
                "scheduler/test_looking",
            ),
        ],
    ),
    *faults_in(
        "scheduler/waiting_queue.py",
        "scheduler/test_priorities scheduler/test_scheduler scheduler/test_admission",
        [
            Fault(
                "those-who-wait-stand-as-they-came",
                "insort(self._requests, request, key=lambda waiting: waiting.rank)",
                "self._requests.append(request)",
            ),
            Fault(
                "an-admission-skips-the-next-in-the-queue",
                "if place < len(self._requests) and self._requests[place] is request:",
                "if place < len(self._requests):",
            ),
        ],
    ),
    *faults_in(
        "scheduler/running.py",
        "scheduler/test_priorities scheduler/test_fairness scheduler/test_scheduler "
        "scheduler/test_branching scheduler/test_scheduler_machine entrypoints/test_neighbours",
        [
            Fault(
                "seq-ids-stand-for-ranks",
                "np.lexsort((self._arrival[running], self._turn[running]))",
                "np.argsort(running)",
            ),
            Fault(
                "arrivals-count-more-than-turns",
                "np.lexsort((self._arrival[running], self._turn[running]))",
                "np.lexsort((self._turn[running], self._arrival[running]))",
            ),
            Fault(
                "those-who-had-a-turn-stay-first",
                "self._place_in_row[in_order] = self._end_of_row + 1 + np.arange(len(in_order))",
                "self._place_in_row[in_order] = self._end_of_row - np.arange(len(in_order))",
            ),
            Fault(
                "a-seq-id-inherits-a-pause",
                "        self.paused.discard(seq_id)\n",
                "",
                "entrypoints/test_neighbours",
            ),
            Fault(
                "branches-are-counted-twice",
                "num_kept += request.branching.max_seqs - len(request.seq_ids)",
                "num_kept += request.branching.max_seqs",
            ),
        ],
    ),
    *faults_in(
        "scheduler/roster.py",
        "scheduler/test_preemption scheduler/test_abort scheduler/test_scheduler",
        [
            Fault(
                "a-swap-counts-one-way-only",
                "2 * num_blocks * self.swap_cost < num_computed",
                "num_blocks * self.swap_cost < num_computed",
            ),
            Fault(
                "host-blocks-of-an-aborted-request-leak",
                "self.manager.discard_swapped(request.swapped)",
                "self.manager.host_pool",
                "scheduler/test_abort",
            ),
            Fault(
                "a-request-ends-in-the-middle-of-its-step",
                "elif self._step is not None:",
                "elif self._step is None:",
            ),
        ],
    ),
    *faults_in(
        "scheduler/budget.py",
        "scheduler/test_fairness scheduler/test_scheduler",
        [
            Fault(
                "decodes-are-given-what-prompts-get-too",
                "budget_left = budget - num_decodes",
                "budget_left = budget",
            ),
            Fault(
                "a-prompt-loses-its-own-share-of-the-budget",
                "before = np.cumsum(of_prompts) - of_prompts",
                "before = np.cumsum(of_prompts)",
            ),
            Fault(
                "prompts-take-what-they-like-beside-decodes",
                "return min(token_budget, num_decodes + most_beside_decodes)",
                "return token_budget",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/engine/prefill_pace.py",
        "entrypoints/test_prefill_pace",
        [
            Fault(
                "overlapping-steps-count-twice",
                "max(began, self._last_end), perf_counter()",
                "began, perf_counter()",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/engine/step_costs.py",
        "entrypoints/test_prefill_pace",
        [
            Fault(
                "one-long-step-counts-in-full",
                "min(seconds, MOST_TIMES * expected) if expected > 0 else seconds",
                "seconds",
            ),
            Fault(
                "decodes-beside-prompts-cost-what-they-cost-alone",
                "is_mixed = num_decodes > 0 and num_prompt_tokens > 0",
                "is_mixed = False",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/engine/format_choice.py",
        "engine/test_format_choice",
        [
            Fault("budgets-are-overdrawn", "total <= budget + 1e-6", "total <= 1.1 * budget"),
            Fault("sums-are-kept-as-they-come", "if found[size][0] < least:", "if size:"),
        ],
    ),
    *faults_in(
        "kernels/full_precision.py",
        "cache/test_mixed_formats",
        [
            Fault("sealed-places-are-read-one-by-one", "gather(1, places - parts)", "clone()"),
            Fault(
                "new-tokens-go-to-blocks-of-others",
                "stored_slots=small_slots(step.stored_slots, step)",
                "stored_slots=step.stored_slots",
            ),
            Fault(
                "seals-read-blocks-of-others",
                "torch.where(sources < 0, sources, small_slots(sources, step))",
                "sources",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/entrypoints/async_llm.py",
        "entrypoints/test_async_llm",
        [
            Fault(
                "a-task-that-leaves-while-it-is-checked-keeps-its-place",
                "        except BaseException:\n            self._room.leave(num_places)",
                "        except Exception:\n            self._room.leave(num_places)",
            ),
            Fault(
                "those-who-wait-are-not-told-that-it-drains",
                """        self._room.dismiss(ClosedError("no more requests are taken"))\n""",
                "",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/entrypoints/engine_thread.py",
        "entrypoints/test_async_llm",
        [
            Fault(
                "an-order-that-fails-is-forgotten",
                "                    self._due[0]()\n                    self._due.popleft()",
                "                    self._due.popleft()()",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/entrypoints/waiting_room.py",
        "entrypoints/test_async_llm",
        [
            Fault(
                "a-place-is-lost-with-the-task-that-got-it",
                "                self.leave(num_places)  # it",
                "                pass  # it",
            ),
            Fault(
                "whoever-waited-behind-one-that-left-waits-on",
                "            self._let_in()  # others",
                "            pass  # others",
            ),
        ],
    ),
    *faults_in(
        "scheduler/scheduler.py",
        "scheduler/test_scheduler scheduler/test_fairness scheduler/test_admission "
        "scheduler/test_forks scheduler/test_cancel engine/test_not_finite",
        [
            Fault(
                "a-request-gets-one-token-too-many",
                "self.manager.num_tokens[seq_ids] >= self._running.max_tokens[seq_ids]",
                "self.manager.num_tokens[seq_ids] > self._running.max_tokens[seq_ids]",
            ),
            Fault(
                "a-fork-that-waits-loses-its-token",
                "chain.with_tokens(np.append(chain.token_ids, np.int32(fork.token_id)))",
                "chain.with_tokens(chain.token_ids)",
                "scheduler/test_forks",
            ),
            Fault(
                "an-admission-takes-what-running-ones-still-need",
                "            - int(to_catch_up.sum())\n",
                "",
                "scheduler/test_admission scheduler/test_scheduler",
            ),
            Fault(
                "the-watermark-is-not-kept",
                "            - self._watermark_blocks,",
                "            - 0,",
                "scheduler/test_admission",
            ),
            Fault(
                "a-request-samples-before-its-last-chunk",
                "sampled = (ends == self.manager.num_tokens[seq_ids]).nonzero()[0]",
                "sampled = (ends <= self.manager.num_tokens[seq_ids]).nonzero()[0]",
            ),
            Fault(
                "those-who-share-spoilt-blocks-go-on",
                "if np.isin(self.manager.block_ids(n), spoilt_ids).any()",
                "if np.isin(self.manager.block_ids(n), spoilt_ids).all()",
                "scheduler/test_prefix_waiting",
            ),
        ],
    ),
    # -- cache ------------------------------------------------------------------------------------
    *faults_in(
        "paged_kv/cache/kv_cache.py",
        "blocks/test_token_chain blocks/test_fork blocks/test_swap cache/test_cache",
        [
            Fault(
                "copies-go-the-wrong-way",
                "words[target_ids] = words[source_ids]",
                "words[source_ids] = words[target_ids]",
                "blocks/test_fork",
            ),
            Fault(
                "descending-host-blocks-are-one-run",
                "np.flatnonzero(np.diff(block_ids) != 1) + 1",
                "np.flatnonzero(np.diff(block_ids) > 1) + 1",
                "cache/test_cache",
            ),
            Fault(
                "caches-of-two-precisions-share-hashes",
                "repr((self.layers, self.dtype, self.geometry))",
                "repr((self.layers, self.geometry))",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/blocks/planning.py",
        "blocks/test_layer_groups blocks/test_manager_machine",
        [
            Fault(
                "second-groups-make-no-copies",
                "    if needs.num_copied:",
                "    if needs.num_copied and not tables.group:",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/cache/layer_groups.py",
        "cache/test_layer_groups",
        [
            Fault(
                "a-block-costs-what-one-kv-head-costs",
                "[layer.num_kv_heads * layer.record_layout(dtype).record_bytes",
                "[layer.record_layout(dtype).record_bytes",
                "cache/test_cache",
            ),
            Fault("layers-of-a-group-share-a-slot", "            free.remove(slot)\n", ""),
            Fault(
                "a-slot-keeps-the-size-of-its-first-record",
                "max(its_bytes, num_bytes), is_small",
                "its_bytes, is_small",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/cache/kv_cache.py",
        "cache/test_layer_groups",
        [
            Fault(
                "layers-read-the-first-groups-table",
                "found.append(plans[group])",
                "found.append(plans[0])",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/cache/attention.py",
        "cache/test_layer_groups",
        [
            Fault(
                "masks-may-show-what-is-not-kept",
                "if kept != UNLIMITED and (size is None or size > kept):",
                "if kept != UNLIMITED and size is None:",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/cache/transfer_counts.py",
        "cache/test_layer_groups cache/test_forged_exports",
        [
            Fault(
                "exports-may-lack-what-the-next-token-sees",
                "0 <= value <= most and",
                "0 <= value and",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/cache/formats.py",
        "cache/test_formats cache/test_cache cache/test_golden_bytes",
        [
            Fault(
                "the-largest-layer-sets-the-open-block-size",
                "open_block_size = min(layout.open_capacity for layout in layouts)",
                "open_block_size = max(layout.open_capacity for layout in layouts)",
            ),
            Fault(
                "the-head-is-rounded-down",
                "-(-first.num_sink_tokens // open_block_size)",
                "first.num_sink_tokens // open_block_size",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/cache/step_staging.py",
        "cache/test_step_staging kernels/test_windowed_attention entrypoints/test_windowed_llm",
        [
            Fault(
                "numbers-travel-as-integers",
                "array.reshape(-1).view(np.int64)",
                "array.reshape(-1).astype(np.int64)",
            ),
            Fault(
                "a-sequence-beside-a-windowed-one-sees-nothing",
                "np.where(part.window_sizes, part.window_sizes, NO_WINDOW)",
                "part.window_sizes",
                "kernels/test_windowed_attention",
            ),
            Fault(
                "the-model-is-told-places-instead-of-positions",
                'sent["positions"] = plan.positions',
                'sent["positions"] = plan.cache_positions',
                "entrypoints/test_windowed_llm",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/cache/transfer.py",
        "cache/test_transfer cache/test_transfer_refusals cache/test_record_order",
        [
            Fault(
                "an-import-that-fails-leaks",
                "        manager.remove_sequence(seq_id)\n        raise",
                "        raise",
                "cache/test_transfer_refusals",
            ),
            Fault(
                "an-import-is-not-findable",
                "    manager.publish_sequence(seq_id)\n",
                "",
                "cache/test_transfer",
            ),
            Fault(
                "a-checksum-is-not-looked-at",
                "if sha256(data[:-DIGEST_BYTES]).digest() != data[-DIGEST_BYTES:]:",
                "if sha256(data[:-DIGEST_BYTES]).digest() != data[-DIGEST_BYTES:] and not data:",
                "cache/test_transfer_refusals",
            ),
        ],
    ),
    # -- kernels ----------------------------------------------------------------------------------
    *faults_in(
        "kernels/rules.py",
        "kernels/test_naive kernels/test_attention kernels/test_windowed_attention",
        [
            Fault(
                "a-sliding-window-sees-one-token-more",
                "(key_positions > query_positions - self.sliding_window)",
                "(key_positions >= query_positions - self.sliding_window)",
                "kernels/test_naive kernels/test_attention",
            ),
            Fault(
                "a-windowed-sequence-sees-one-token-more",
                "(key_positions > query_positions - windows)",
                "(key_positions >= query_positions - windows)",
                "kernels/test_windowed_attention",
            ),
            Fault(
                "sinks-are-one-token-too-far-for-a-layers-window",
                "query_positions.minimum(num_sinks + windows - 1)",
                "query_positions.minimum(num_sinks + windows)",
                "kernels/test_windowed_attention",
            ),
        ],
    ),
    *faults_in(
        "kernels/step_inputs.py",
        "kernels/test_attention",
        [
            Fault(
                "the-first-tail-block-is-looked-up-in-the-head",
                "is_tail = columns >= self.num_head_tokens // self.open_block_size",
                "is_tail = columns > self.num_head_tokens // self.open_block_size",
            ),
        ],
    ),
    *faults_in(
        "kernels/eager/quantize.py",
        "kernels/test_quantize cache/test_golden_bytes",
        [
            Fault(
                "codes-are-made-for-a-scale-that-is-not-stored",
                "divide_or_zero(values - zero.float(), scale.float())",
                "divide_or_zero(values - zero.float(), 2 * half_range / top_code)",
            ),
            Fault(
                "scales-look-at-positive-values-only",
                "values.abs().amax(-1) / INT8_LIMIT",
                "values.amax(-1) / INT8_LIMIT",
            ),
            Fault(
                "planes-hold-neighbouring-tokens",
                "return torch.cat(planes, dim=-2)",
                "return torch.stack(planes, dim=-2).flatten(-3, -2)",
            ),
            Fault(
                "a-constant-group-divides-by-zero",
                "safe = torch.where(denominator == 0, torch.inf, denominator)",
                "safe = denominator",
                "kernels/test_cpu_store",
            ),
        ],
    ),
    *faults_in(
        "kernels/eager/store.py",
        "kernels/test_cpu_store",
        [
            Fault(
                "new-tokens-are-negated-instead-of-inverted",
                "new_tokens[(~sources).clamp(min=0)]",
                "new_tokens[(-sources).clamp(min=0)]",
            ),
            Fault(
                "values-are-clipped-like-keys",
                "bits, clip = layer.value_bits, layer.value_clip",
                "bits, clip = layer.value_bits, layer.key_clip",
            ),
            Fault(
                "sealed-tokens-from-a-chunk-are-not-rounded",
                "new_tokens[(~sources).clamp(min=0)].to(open_blocks.dtype)\n"
                "    slots = sources.clamp(min=0)\n"
                "    open_block_size = open_blocks.shape[2]\n"
                "    stored = open_blocks[slots // open_block_size, :, slots % open_block_size]",
                "new_tokens[(~sources).clamp(min=0)]\n"
                "    slots = sources.clamp(min=0)\n"
                "    open_block_size = open_blocks.shape[2]\n"
                "    stored = open_blocks[slots // open_block_size, :, slots % open_block_size]"
                ".to(tokens.dtype)",
            ),
        ],
    ),
    *faults_in(
        "kernels/eager/attention.py",
        "kernels/test_attention",
        [
            Fault(
                "padding-of-a-chunk-may-be-anything",
                "    joined[group.padding_rows, :, group.padding_columns] = 0.0\n",
                "",
            ),
            Fault(
                "the-tail-of-a-chunk-begins-one-token-late",
                "torch.where(entries < step.num_head_tokens, 0, body_tokens)",
                "torch.where(entries <= step.num_head_tokens, 0, body_tokens)",
            ),
        ],
    ),
    *faults_in(
        "kernels/eager/flat_attention.py",
        "kernels/test_attention kernels/test_windowed_attention",
        [
            Fault(
                "the-tail-of-a-decode-begins-one-token-late",
                "(entries >= step.num_head_tokens) * body_tokens",
                "(entries > step.num_head_tokens) * body_tokens",
            ),
            Fault(
                "sinks-logits-are-left-out-of-the-sum",
                "total = torch.zeros_like(top) if sink_logits is None else (sinks - top).exp_()",
                "total = torch.zeros_like(top)",
                "kernels/test_naive kernels/test_attention",
            ),
        ],
    ),
    *faults_in(
        "kernels/cpu/store.py",
        "kernels/test_cpu_store",
        [
            Fault(
                "cpu-seals-new-values-of-the-first-kv-head",
                "            value += kv_head * load_long(p, CALL.value_head_stride)\n"
                "        else:",
                "        else:",
            ),
            Fault(
                "cpu-drops-the-last-tokens-of-a-step",
                "num_units = num_sealed - (-num_stored // TOKENS_AT_ONCE)",
                "num_units = num_sealed + num_stored // TOKENS_AT_ONCE",
            ),
            Fault(
                "cpu-clips-values-like-keys",
                "value_scale, value_zero, clip + 8, upper_values)",
                "value_scale, value_zero, clip, upper_values)",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/cache/key_calibration.py",
        "models/test_calibration",
        [
            Fault(
                "channels-that-matter-least-are-wide",
                "np.argsort(-weights * key_variance",
                "np.argsort(weights * key_variance",
            ),
            Fault(
                "feedback-is-not-relative-to-the-diagonal",
                "rows = upper / np.diagonal(upper, axis1=1, axis2=2)[:, :, None]",
                "rows = upper",
            ),
        ],
    ),
    *faults_in(
        "kernels/eager/flat_attention.py",
        "kernels/test_naive",
        [
            Fault(
                "upper-codes-count-half",
                "of_wide(scale) * (1 << layer.key_bits)",
                "of_wide(scale) * 4",
            ),
            Fault(
                "third-bits-count-half",
                "worth = scale * (1 << bits)",
                "worth = scale * (1 << bits - 1)",
            ),
        ],
    ),
    *faults_in(
        "kernels/cpu/microkernels.py",
        "kernels/test_naive",
        [
            Fault(
                "cpu-shifts-centred-values-up",
                "shift = emitter.constant(-centre, lanes)",
                "shift = emitter.constant(centre, lanes)",
            ),
        ],
    ),
    *faults_in(
        "kernels/cpu/quantize.py",
        "kernels/test_cpu_store",
        [
            Fault(
                "cpu-adds-errors-that-it-should-take",
                "builder.fsub(builder.load(total), builder.fmul(error, weight)), total",
                "builder.fadd(builder.load(total), builder.fmul(error, weight)), total",
            ),
        ],
    ),
    *faults_in(
        "kernels/cpu/elements.py",
        "kernels/test_cpu_store",
        [
            Fault(
                "cpu-rounds-halves-up",
                "emitter.integers(0x7FFF, INT, lanes)",
                "emitter.integers(0x8000, INT, lanes)",
            ),
        ],
    ),
    *faults_in(
        "kernels/cpu/stages.py",
        "kernels/test_stages",
        [
            Fault(
                "cpu-stages-do-not-wait-for-each-other",
                "            meet(p, stage)",
                "            pass",
            ),
        ],
    ),
    *faults_in(
        "kernels/cpu/dense.py",
        "kernels/test_dense",
        [
            Fault(
                "cpu-second-weights-have-the-factors-of-the-first",
                "address_or_0(second and second.scale)",
                "address_or_0(scale)",
            ),
        ],
    ),
    *faults_in(
        "kernels/cpu/dense_worker.py",
        "kernels/test_dense",
        [
            Fault(
                "cpu-widened-codes-are-read-with-the-strides-of-codes",
                "count * row_bytes if widen else stride",
                "stride",
            ),
            Fault(
                "cpu-blocks-of-rows-begin-where-the-first-does",
                "(rows + row * row_stride, row_stride, count, weights",
                "(rows, row_stride, count, weights",
            ),
        ],
    ),
    *faults_in(
        "kernels/cpu/matrix_tiles.py",
        "kernels/test_dense",
        [
            Fault(
                "cpu-tiles-of-sums-start-from-zero-where-they-add",
                """        if adds:
            tile_call""",
                """        if not adds:
            tile_call""",
            ),
            Fault(
                "cpu-last-tile-of-rows-is-full",
                "    counts[-1] = emitter.builder.sub(",
                "    emitter.builder.sub(",
            ),
        ],
    ),
    *faults_in(
        "kernels/cpu/native_rows.py",
        "kernels/test_cpu_kernels kernels/test_cpu_threads kernels/test_windowed_attention",
        [
            Fault(
                "cpu-windowed-sequence-sees-one-token-more",
                "first = query_position - own_window + 1",
                "first = query_position - own_window",
                "kernels/test_windowed_attention",
            ),
            Fault(
                "cpu-parts-are-summed-without-their-weights",
                "total += weight * load_float(parts, start + PARTIAL_SUM)",
                "total += load_float(parts, start + PARTIAL_SUM)",
            ),
        ],
    ),
    *faults_in(
        "kernels/cpu/native_attention.py",
        "kernels/test_cpu_kernels kernels/test_cpu_threads",
        [
            Fault(
                "cpu-reads-values-behind-the-last-token",
                "count = min(num_tokens - index * piece, piece)",
                "count = piece",
            ),
        ],
    ),
    *faults_in(
        "kernels/cpu/native_plan.py",
        "kernels/test_cpu_threads kernels/test_cpu_kernels",
        [
            Fault(
                "cpu-parts-begin-in-the-head",
                "start = num_head_tokens + num_units * part // num_parts * unit_tokens",
                "start = num_units * part // num_parts * unit_tokens",
            ),
        ],
    ),
    # -- models -----------------------------------------------------------------------------------
    *faults_in(
        "paged_kv/models/rotary.py",
        "models/test_rotary entrypoints/test_windowed_llm",
        [
            Fault(
                "queries-are-turned-the-wrong-way-for-sinks",
                "self.turns - self.head_shifts",
                "self.turns + self.head_shifts",
            ),
            Fault(
                "angles-are-of-half-the-precision",
                "shifts.double()[:, None] * self.frequencies",
                "shifts.float()[:, None] * self.frequencies.float()",
            ),
            Fault(
                "layers-share-phases-of-another-purpose",
                "key = id(rotation.frequencies), purpose",
                'key = id(rotation.frequencies), ""',
            ),
        ],
    ),
    # -- engine -----------------------------------------------------------------------------------
    *faults_in(
        "paged_kv/engine/sampler.py",
        "engine/test_sampler entrypoints/test_samples entrypoints/test_sharing_llm",
        [
            Fault(
                "top-p-leaves-out-the-token-that-crosses-it",
                "likelier = probabilities.cumsum(-1) - probabilities",
                "likelier = probabilities.cumsum(-1)",
            ),
            Fault(
                "min-p-is-no-share-of-the-likeliest",
                "min_p * probabilities[:, :1]",
                "min_p",
            ),
            Fault(
                "top-p-counts-one-token-beyond-top-k",
                "masked_fill_(places >= top_k, 0.0)",
                "masked_fill_(places > top_k, 0.0)",
            ),
            Fault(
                "uniform-numbers-depend-on-the-row",
                "state = np.zeros(len(seeds), dtype=np.uint64)",
                "state = np.arange(len(seeds), dtype=np.uint64)",
            ),
            Fault(
                "equal-candidates-come-in-any-order",
                "ids = scaled.topk(count).indices.sort(dim=-1).values",
                "ids = scaled.topk(count).indices",
            ),
            Fault(
                "a-uniform-number-of-zero-draws-what-is-excluded",
                "torch.searchsorted(cumulative, threshold, right=True)",
                "torch.searchsorted(cumulative, threshold, right=False)",
            ),
            Fault(
                "top-k-of-more-than-the-candidates-is-cut",
                "is_open = is_kept[:, -1] |",
                "is_open =",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/engine/engine.py",
        "entrypoints/test_samples entrypoints/test_sharing_llm entrypoints/test_llm "
        "entrypoints/test_failures",
        [
            Fault(
                "a-failed-step-stays-scheduled",
                "self.scheduler.cancel(self.scheduler.step)",
                "self.scheduler.step",
                "entrypoints/test_failures",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/engine/engine.py",
        "engine/test_not_finite",
        [
            Fault(
                "one-of-the-spoilt-rows-is-shared",
                "is_spoilt[spoilt_rows] = True",
                "is_spoilt[spoilt_rows[1:]] = True",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/engine/token_rules.py",
        "entrypoints/test_generation_options",
        [
            Fault(
                "min-tokens-forbid-one-end-too-many",
                "if num_output < params.least_tokens:",
                "if num_output <= params.least_tokens:",
                "entrypoints/test_llm",
            ),
            Fault(
                "penalties-forget-the-prompt",
                "dict.fromkeys(map(int, prompt_token_ids))",
                "dict.fromkeys(map(int, prompt_token_ids[:0]))",
            ),
            Fault(
                "penalties-count-a-token-once",
                "self._generated[place] += 1",
                "self._generated[place] = 1",
            ),
            Fault(
                "a-bad-word-that-ends-is-bad",
                "if len(word) == 1 and word[0] not in model_ends",
                "if len(word) == 1",
            ),
            Fault(
                "limits-before-the-temperature",
                "found: list[Processor] = [TemperatureLogitsWarper(float(params.temperature))]",
                "found: list[Processor] = []",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/engine/sampler.py",
        "entrypoints/test_generation_options",
        [
            Fault(
                "negative-logits-are-penalized-upwards",
                "torch.where(kept < 0, kept * factors, kept / factors)",
                "kept / factors",
            ),
            Fault(
                "logprobs-after-the-options",
                "self._likelihoods.topk(count)",
                "(self._likelihoods * 2).topk(count)",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/engine/live_request.py",
        "entrypoints/test_samples entrypoints/test_llm engine/test_interrupts",
        [
            Fault(
                "a-token-that-was-cut-off-keeps-its-likelihood",
                "        del self.log_probabilities[len(self.token_ids) :]\n",
                "",
                "engine/test_text",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/engine/output_processor.py",
        "engine/test_text entrypoints/test_stream entrypoints/test_neighbours",
        [
            Fault(
                "a-stop-string-right-at-min-tokens-is-missed",
                "may_stop = index + 1 >= live.params.least_tokens",
                "may_stop = index + 1 > live.params.least_tokens",
                "engine/test_text",
            ),
            Fault(
                "every-token-that-waits-is-the-last",
                "if index + 1 == len(live.token_ids) and",
                "if",
                "engine/test_text",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/engine/text.py",
        "engine/test_text",
        [
            Fault(
                "stop-strings-across-two-tokens-are-missed",
                "max(length_before - len(stop) + 1, 0)",
                "length_before",
            ),
            Fault(
                "the-beginning-of-a-stop-string-is-sent",
                "max((len(stop) - 1 for stop in stop_strings), default=0)",
                "max((len(stop) - 2 for stop in stop_strings), default=0)",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/engine/beam_search.py",
        "engine/test_beam_search",
        [
            Fault(
                "beams-look-at-too-few-candidates",
                "return self.params.num_beams + len(self.end_token_ids)",
                "return self.params.num_beams",
            ),
            Fault(
                "a-candidate-beyond-the-beams-finishes",
                "elif rank < num_beams:",
                "elif rank <= num_beams:",
            ),
            Fault(
                "a-search-goes-on-for-the-best-it-has",
                "> self.hypotheses[-1].score",
                "> self.hypotheses[0].score",
            ),
            Fault(
                "a-length-penalty-is-a-factor",
                "log_probability / math.pow(length, self.length_penalty)",
                "log_probability / (length * self.length_penalty)",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/engine/live_request.py",
        "entrypoints/test_sharing_llm",
        [
            Fault(
                "samples-start-from-a-leader-that-is-gone",
                "self.live.is_unfinished and self.live.leader is self.leader",
                "self.live.is_unfinished",
                "engine/test_steps_ahead",
            ),
            Fault(
                "all-samples-draw-the-same-numbers",
                "[draw.live.sample_index for draw in random]",
                "[0 for draw in random]",
            ),
        ],
    ),
    # -- decode steps on a GPU --------------------------------------------------------------------
    *faults_in(
        "scheduler/scheduler.py",
        "engine/test_steps_ahead",
        [
            Fault(
                "a-step-begins-early-though-blocks-are-scarce",
                "and num_free >= most_new",
                "and num_free >= 0",
            ),
            Fault(
                "a-step-begins-early-beside-paused-requests",
                "and not (running.branching or running.paused)",
                "and not running.branching",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/blocks/table_replica.py",
        "cache/test_decode_tables",
        [
            Fault(
                "sealed-blocks-are-not-told-to-the-device",
                "self._note(seals.block_seq_ids, seals.places)",
                "pass",
            ),
            Fault(
                "copied-blocks-are-not-told-to-the-device",
                "self._note(seq_ids[is_copied], last_places)",
                "pass",
            ),
            Fault(
                "told-rows-are-not-told-to-the-device",
                "self._note(np.repeat(update.seq_ids, width), places)",
                "pass",
            ),
        ],
    ),
    *faults_in(
        "kernels/triton/decode_step.py",
        "cache/test_decode_tables",
        [
            Fault(
                "a-sealed-token-is-stored-too",
                "is_stored & ((context_len >= body_start + TABLES.BLOCK_SIZE) | (not seals))",
                "is_stored",
            ),
            Fault(
                "an-empty-row-stores-its-token",
                "is_stored = is_there",
                "is_stored = seq_id < (1 << 30)",
            ),
            Fault(
                "a-new-token-is-sealed-from-its-slot",
                "tl.where(is_old, slot, new_token)",
                "slot",
            ),
            Fault(
                "the-last-place-is-not-copied",
                "tl.cdiv(context_len + 1, OPEN_BLOCK_SIZE), 0)",
                "tl.cdiv(context_len, OPEN_BLOCK_SIZE), 0)",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/engine/decode_graphs.py",
        "engine/test_decode_graphs",
        [
            Fault(
                "a-graph-holds-no-inputs",
                "        batch.step.refresh()",
                "        if not batch.step.token_ids.any(): batch.step.refresh()",
            ),
            Fault(
                "steps-that-seal-replay-those-that-do-not",
                "seals=len(plan.seal_block_ids) > 0,",
                "seals=False,",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/engine/flight.py",
        "engine/test_steps_ahead",
        [
            Fault(
                "a-request-takes-the-token-of-one-that-ended",
                "places[self.scheduled.sampled_seq_ids[self.goes_on]] = self.goes_on.nonzero()[0]",
                "places[self.scheduled.sampled_seq_ids] = np.arange(len(self.goes_on))",
            ),
            Fault(
                "a-step-is-not-told-what-was-drawn",
                "following.token_ids[last] = self.token_ids[sources[is_ours]]",
                "pass",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/engine/live_request.py",
        "engine/test_engine_traffic",
        [
            Fault(
                "whatever-was-guessed-is-right",
                "is_right = token_id == draft and",
                "is_right =",
            ),
            Fault(
                "tokens-behind-guesses-are-drawn-by-the-first-number",
                "draw.live.request.num_output_tokens + draw.num_ahead for draw",
                "draw.live.request.num_output_tokens for draw",
            ),
            Fault(
                "guesses-go-on-behind-an-end",
                "if not is_right or self.live.end_with(token_id, num_before + len(taken)):",
                "if not is_right:",
            ),
        ],
    ),
    *faults_in(
        "scheduler/drafts.py",
        "scheduler/test_drafts",
        [
            Fault(
                "guesses-go-beyond-a-seal",
                "beside = np.minimum(beside, next_seals - 1 - stored - num_new)",
                "pass",
            ),
        ],
    ),
    *faults_in(
        "scheduler/step.py",
        "scheduler/test_drafts",
        [
            Fault(
                "no-guess-is-kept",
                "kept[plan.token_rows[self.sampled_token_index]] += num_accepted",
                "kept += 0",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/entrypoints/outputs.py",
        "entrypoints/test_sharing_llm",
        [
            Fault(
                "best-of-compares-sums",
                "(completion.log_probability or 0.0) / max(len(completion.token_ids), 1)",
                "completion.log_probability or 0.0",
            ),
        ],
    ),
    # -- blocks that travel -----------------------------------------------------------------------
    *faults_in(
        "paged_kv/stores/folder_store.py",
        "stores/test_stores",
        [
            Fault(
                "an-entry-appears-before-it-is-whole",
                'part = self.path / f".{key.hex()}.{os.getpid()}.{token_hex(4)}{PART_SUFFIX}"',
                "part = path",
            ),
            Fault(
                "a-full-disk-keeps-what-was-begun",
                "            part.unlink(missing_ok=True)\n            raise",
                "            raise",
            ),
            Fault(
                "what-was-read-goes-first",
                "            os.utime(path)\n",
                "            pass\n",
            ),
            Fault(
                "files-of-others-are-removed",
                "if not OURS.fullmatch(each.name):",
                "if False:",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/stores/size_limit.py",
        "stores/test_stores",
        [
            Fault(
                "what-is-new-does-not-count",
                "if total + num_new <= self.max_bytes:",
                "if total <= self.max_bytes:",
            ),
            Fault(
                "the-newest-entries-go",
                "entries = sorted(self._look())",
                "entries = sorted(self._look(), reverse=True)",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/stores/fsspec_store.py",
        "stores/test_stores",
        [
            Fault(
                "a-mistyped-bucket-is-made",
                "self._filesystem.mkdir(self._root, create_parents=False)",
                "self._filesystem.mkdir(self._root)",
            ),
            Fault(
                "a-bucket-is-a-folder",
                'if "/" in self._root.strip("/"):',
                "if True:",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/stores/redis_store.py",
        "stores/test_stores",
        [
            Fault(
                "an-entry-replaced-counts-twice",
                "        self.remove(key)\n        # The entry",
                "        # The entry",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/cache/block_entries.py",
        "engine/test_block_tier",
        [
            Fault(
                "entries-of-other-models-fit",
                "self._root = sha256(json.dumps(fields, sort_keys=True).encode()).digest()",
                'self._root = b""',
            ),
            Fault(
                "a-corrupt-entry-is-taken",
                "if sha256(memoryview(data)[:-DIGEST_BYTES]).digest() != data[-DIGEST_BYTES:]:",
                "if not data:",
            ),
            Fault(
                "a-renamed-entry-is-taken",
                "if data[:OPENING_BYTES] != opening:",
                "if data[: FRAME.size] != opening[: FRAME.size]:",
            ),
            Fault(
                "what-is-not-finite-is-stored",
                "self._framed(key, kind, payload) if is_finite else None",
                "self._framed(key, kind, payload)",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/engine/block_tier.py",
        "engine/test_block_tier engine/test_slow_stores",
        [
            Fault(
                "requests-with-a-salt-are-everybodys",
                "if is_nobody_elses(extra_keys):",
                "if False:",
            ),
            Fault(
                "entries-of-older-weights-are-taken",
                "if lookup.entries is not self._entries:  # of what the model was before",
                "if False:",
            ),
            Fault(
                "a-full-pool-takes-what-it-cannot-hold",
                "return match.num_idle_blocks + num_blocks <= manager.num_free_blocks",
                "return True",
            ),
            Fault(
                "each-of-many-alike-asks-for-itself",
                "if lacked[0] in lookup.lacked:",
                "if False:",
            ),
            Fault(
                "an-aborted-request-is-held-for-ever",
                "if lookup.is_over or not request.is_unfinished:",
                "if lookup.is_over:",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/engine/block_reader.py",
        "engine/test_block_tier engine/test_slow_stores",
        [
            Fault(
                "what-is-found-lands-in-other-blocks",
                "its = stack if rows == tuple(range(len(stack))) else stack[list(rows)]",
                "its = stack[: len(rows)]",
            ),
            Fault(
                "a-slow-store-is-waited-for",
                "timeout=max(lookup.deadline - time.monotonic(), 0)",
                "timeout=None",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/engine/handover.py",
        "entrypoints/test_prefilled",
        [
            Fault(
                "the-first-token-is-drawn-again",
                "request.bring([prompt.token_id], BroughtBlocks(read.lengths, read.records))",
                "request.bring([], BroughtBlocks(read.lengths, read.records))",
            ),
            Fault(
                "any-exported-sequence-is-a-prompt",
                "if not 0 < num_computed == len(tokens) - 1:",
                "if not 0 < num_computed:",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/integrations/chunk_codec.py",
        "models/test_chunk_codec",
        [
            Fault(
                "a-chunk-of-another-key-is-taken",
                'header = self._header_start | {"name": sha256(name).hexdigest()}',
                'header = self._header_start | {"name": ""}',
            ),
            Fault(
                "first-tokens-come-back-quantized",
                "kv[:, layer, self._num_sinks : size] = tokens[:, self._num_sinks :]",
                "kv[:, layer, :size] = tokens",
            ),
        ],
    ),
    # -- several processes ------------------------------------------------------------------------
    *faults_in(
        "paged_kv/models/split_modules.py",
        "entrypoints/test_tensor_parallel",
        [
            Fault(
                "a-bias-is-added-by-every-process",
                '        linear.register_parameter("bias", None)\n',
                "",
            ),
            Fault(
                "rows-of-others-are-looked-up",
                "return summed(torch.where(is_own[..., None], output, 0))",
                "return summed(output)",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/models/model_part.py",
        "entrypoints/test_tensor_parallel",
        [
            Fault(
                "every-process-has-the-first-heads-calibration",
                "own = place.of(calibration.num_kv_heads)",
                "own = place._replace(rank=0).of(calibration.num_kv_heads)",
            ),
            Fault(
                "experts-are-not-summed",
                'part.__dict__["forward"] = summing(part.forward)',
                "pass",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/engine/parallel_group.py",
        "entrypoints/test_tensor_parallel",
        [
            Fault(
                "swapped-blocks-are-copied-by-one",
                "with self.group.together(CopySwapped(swap_outs, swap_ins)):",
                "if True:",
            ),
            Fault(
                "an-interrupt-leaves-others-in-the-step",
                "if not is_main or not callable(before):",
                "if True:",
            ),
        ],
    ),
    # -- who is asked on Ray Serve ----------------------------------------------------------------
    *faults_in(
        "paged_kv/integrations/ray_serve/fleet.py",
        "entrypoints/test_fleet",
        [
            Fault(
                "answers-count-for-nothing",
                "self.num_waiting_tokens + self.num_answering_tokens",
                "self.num_waiting_tokens",
            ),
            Fault(
                "prompts-of-answers-count-for-nothing",
                "return TOKENS_PER_REQUEST + self.blocks.num_tokens // CONTEXT_PER_TOKEN",
                "return TOKENS_PER_REQUEST",
            ),
            Fault(
                "what-ended-is-promised-for-ever",
                "                del replica.promised[block_hash]\n",
                "                pass\n",
            ),
            Fault(
                "a-request-goes-back-to-where-it-failed",
                "(name in order.failed_on, replicas[name].failing_until > now)",
                "(False, replicas[name].failing_until > now)",
            ),
            Fault(
                "who-fails-at-once-draws-all",
                "(name in order.failed_on, replicas[name].failing_until > now)",
                "(name in order.failed_on, False)",
            ),
            Fault(
                "who-has-left-is-placed-again",
                "if number in self._ended:",
                "if False:",
            ),
            Fault(
                "an-answer-begins-with-each-reply",
                "if placement is not None and not placement.has_begun:",
                "if placement is not None:",
            ),
        ],
    ),
    # -- a fleet on paper -------------------------------------------------------------------------
    *faults_in(
        "paged_kv/benchmarks/fleet/routing.py",
        "benchmarks/test_fleet",
        [
            Fault(
                "who-waits-does-not-count",
                "return 2 * to_compute + there, self._last_chosen[replica.number]",
                "return 2 * to_compute, self._last_chosen[replica.number]",
            ),
            Fault(
                "prompts-of-answers-count-for-nothing-on-paper",
                "ANSWER_TOKENS + size // CONTEXT_PER_TOKEN",
                "ANSWER_TOKENS",
            ),
            Fault(
                "evicted-blocks-are-still-there",
                "                who[event.block_hash] = known & ~bit",
                "                pass",
            ),
            Fault(
                "a-dead-replica-has-its-blocks",
                "self._who = {key: its & ~bit for key, its in self._who.items() if its & ~bit}",
                "pass",
            ),
            Fault(
                "a-ring-knows-no-load",
                "next(replica for replica in in_turn if replica.load < most)",
                "next(in_turn)",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/benchmarks/fleet/simulation.py",
        "benchmarks/test_fleet",
        [
            Fault(
                "a-step-of-an-earlier-life-ends",
                "if replica.life != life:",
                "if False:",
            ),
            Fault(
                "a-dead-replicas-requests-are-lost",
                "        for job in lost:\n            self._place(job)\n\n",
                "\n",
            ),
        ],
    ),
    *faults_in(
        "paged_kv/benchmarks/fleet/replica.py",
        "benchmarks/test_fleet",
        [
            Fault(
                "an-answer-begins-again-elsewhere",
                "num_left = job.num_outputs - (len(tokens) - len(job.prompt))",
                "num_left = job.num_outputs",
            ),
            Fault(
                "hits-of-a-second-start-count",
                "if job.num_hit_tokens is None:",
                "if True:",
            ),
        ],
    ),
)
