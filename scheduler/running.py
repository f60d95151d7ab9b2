"""The requests that run and their sequences, best rank first. Knows ranks and limits, never blocks.

What a step reads of all of them are arrays by seq_id.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from paged_kv.blocks.geometry import IntArray
from paged_kv.blocks.retention import UNLIMITED
from paged_kv.blocks.sequences import NO_ROWS

from .request import Request, RequestStatus


class RunningRequests:
    """Each has one sequence, or as many as it has branches."""

    def __init__(self, max_num_seqs: int) -> None:
        self._seq_ids: IntArray = NO_ROWS  # by rank, read-only; those that left may still be there
        self._num_left = 0
        # By seq_id, as all others: the two parts of a rank.
        self._turn: IntArray = np.zeros(max_num_seqs, dtype=np.int64)
        self._arrival: IntArray = np.zeros(max_num_seqs, dtype=np.int64)
        # Its place in the row of those that take turns: whoever had one goes to the end.
        self._place_in_row: IntArray = np.zeros(max_num_seqs, dtype=np.int64)
        self._end_of_row = 0
        self._is_running: NDArray[np.bool_] = np.zeros(max_num_seqs, dtype=np.bool_)
        self.is_branch: NDArray[np.bool_] = np.zeros(max_num_seqs, dtype=np.bool_)
        self.max_tokens: IntArray = np.zeros(max_num_seqs, dtype=np.int64)  # prompt and output
        self.by_seq_id: NDArray[np.object_] = np.full(max_num_seqs, None, dtype=np.object_)
        self.branching: list[Request] = []
        self.paused: set[int] = set()  # seq_ids of requests that compute nothing for now

    def __len__(self) -> int:
        """Sequences."""
        return len(self._seq_ids) - self._num_left

    @property
    def seq_ids(self) -> IntArray:
        """Of all sequences by rank; the same read-only array until one comes or leaves."""
        if self._num_left:
            self._set(self._seq_ids[self._is_running[self._seq_ids]])
        return self._seq_ids

    def _set(self, seq_ids: IntArray) -> None:
        seq_ids.setflags(write=False)
        self._seq_ids, self._num_left = seq_ids, 0

    @property
    def worst(self) -> Request:
        """The one that is preempted first: one that is paused, if there is any."""
        if self.paused:
            requests: list[Request] = self.by_seq_id[list(self.paused)].tolist()
            return max(requests, key=lambda request: request.rank)
        request: Request = self.by_seq_id[self.seq_ids[-1]]
        return request

    @property
    def active_seq_ids(self) -> IntArray:
        """Of those that are not paused, by rank."""
        seq_ids = self.seq_ids
        return seq_ids[~np.isin(seq_ids, list(self.paused))] if self.paused else seq_ids

    @property
    def num_kept(self) -> int:
        """Sequences that nobody else may start: those that branching requests may still need."""
        num_kept = 0
        for request in self.branching:
            assert request.branching is not None
            num_kept += request.branching.max_seqs - len(request.seq_ids)
        return num_kept

    def begin(self, request: Request, seq_id: int) -> None:
        """A sequence of this request runs, once it has been entered."""
        if request.branching is not None and not request.seq_ids:
            self.branching.append(request)
        request.seq_ids.append(seq_id)
        request.status = RequestStatus.RUNNING
        self._turn[seq_id], self._arrival[seq_id] = request.rank
        self._place_in_row[seq_id] = self._end_of_row
        # The scheduler does not end branches: whoever makes them does.
        self.max_tokens[seq_id] = UNLIMITED
        if request.max_tokens is not None and request.branching is None:
            self.max_tokens[seq_id] = request.num_prompt_tokens + request.max_tokens
        self.by_seq_id[seq_id] = request
        self.is_branch[seq_id] = request.branching is not None
        if request.is_paused:
            self.paused.add(seq_id)

    def enter(self, seq_ids: Sequence[int] | IntArray) -> None:
        """Take sequences that have begun into the order of ranks."""
        running = np.concatenate([self.seq_ids, np.array(seq_ids, dtype=np.int64)])
        self._is_running[running] = True
        self._set(running[np.lexsort((self._arrival[running], self._turn[running]))])

    def whose_turn(self, seq_ids: IntArray, count: int) -> NDArray[np.bool_]:
        """Which of these, so many, have gone longest without a turn; of equals the best rank."""
        is_next = np.zeros(len(seq_ids), dtype=np.bool_)
        is_next[np.argsort(self._place_in_row[seq_ids], kind="stable")[:count]] = True
        return is_next

    def had_a_turn(self, seq_ids: IntArray) -> None:
        """These were computed in a step that had no token for others."""
        in_order = seq_ids[np.argsort(self._place_in_row[seq_ids], kind="stable")]
        self._place_in_row[in_order] = self._end_of_row + 1 + np.arange(len(in_order))
        self._end_of_row += len(in_order)

    def leave(self, seq_id: int) -> None:
        """A sequence is no longer its request's own; O(1)."""
        self.by_seq_id[seq_id] = None
        self.is_branch[seq_id] = self._is_running[seq_id] = False
        self.paused.discard(seq_id)
        self._num_left += 1

    def vacate(self, request: Request) -> None:
        """A request runs no more."""
        for seq_id in request.seq_ids:
            self.leave(seq_id)
        request.seq_ids = []
        if request.branching is not None:
            self.branching.remove(request)

    def check_integrity(self, living: IntArray) -> None:
        """Assert that the order is that of ranks, and that requests know their sequences."""
        assert np.array_equal(np.sort(self.seq_ids), living)
        assert np.array_equal(np.flatnonzero(self._is_running), living)
        requests = self.by_seq_id[self.seq_ids].tolist()
        assert self.paused == {n for n in living.tolist() if self.by_seq_id[n].is_paused}
        ranks = [request.rank for request in requests]
        assert ranks == sorted(ranks)
        for request, seq_id in zip(requests, self.seq_ids.tolist(), strict=True):
            assert seq_id in request.seq_ids
            is_branch = request.branching is not None
            assert self.is_branch[seq_id] == is_branch == (request in self.branching)


def seq_ids_of(requests: Sequence[Request]) -> IntArray:
    """The seq_ids of running requests."""
    return np.array([request.seq_id for request in requests], dtype=np.int64)
