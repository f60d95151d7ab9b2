"""What is known of each sequence: its tokens and limits. Knows counts, never blocks.

`state[seq_id]` is one sequence: a fork copies it, and a sequence that ends leaves zeros. What every
step reads of all its sequences are arrays of their own instead: beside each other they are
gathered in half the time. What is stored of them, and where, is for `BlockTables` to know.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InvalidStepError, OutOfBlocksError
from ..validation import is_integer
from .geometry import BlockGeometry, IntArray, ragged_arange
from .retention import UNLIMITED
from .token_chain import TokenChain, TokenIds

StateArray = NDArray[np.void]

SEQUENCE: Final = np.dtype(
    [
        ("is_living", np.bool_),
        ("length_limit", np.int64),  # tokens that it may have
        # Where prefixes are shared:
        ("link_limit", np.int64),  # links that others may ever find
        ("num_expected", np.int64),  # links of its first tokens: others may wait for these
    ],
    align=True,
)
NO_ROWS: Final[IntArray] = np.empty(0, dtype=np.int64)
FIRST_ROWS: Final = 64  # sequences
FIRST_WIDTH: Final = 512  # tokens


def grown(size: int, needed: int, usual_limit: int) -> int:
    """At least `needed`; where that is more than `size`, twice as much unless `usual_limit` will
    do."""
    if needed <= size:
        return size
    return max(needed, min(2 * size, usual_limit) if needed <= usual_limit else 2 * size)


def integer_array(name: str, values: ArrayLike) -> IntArray:
    """An array of integers as int64; anything else is refused by name."""
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise InvalidStepError(f"{name} must be integers, got {values!r}")
    return array.astype(np.int64)


class Sequences:
    """Up to `max_num_seqs` sequences of up to `max_model_len` tokens, windowed ones of any length.

    A sequence is named by its `seq_id`, from 0 up; ids of ended sequences are given out again.
    """

    def __init__(self, geometry: BlockGeometry, *, max_num_seqs: int, max_model_len: int) -> None:
        self.geometry = geometry
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.state: StateArray = np.zeros(max_num_seqs, dtype=SEQUENCE)
        self.num_tokens: IntArray = np.zeros(max_num_seqs, dtype=np.int64)  # known
        # Tokens that it can be told before more is to do: hash a link, or refuse.
        self.token_capacity: IntArray = np.zeros(max_num_seqs, dtype=np.int64)
        # For as many sequences, and as long ones, as there were so far, or up to twice that.
        shape = min(max_num_seqs, FIRST_ROWS), min(max_model_len, FIRST_WIDTH)
        self.token_ids: TokenIds = np.zeros(shape, dtype=np.int32)
        self._length_bound = 0  # no sequence has more tokens
        # The last of them, beside each other: what most steps compute.
        self.last_token_ids: TokenIds = np.zeros(max_num_seqs, dtype=np.int32)
        self._arrays = (
            self.state,
            self.num_tokens,
            self.token_capacity,
            self.last_token_ids,
        )
        # Their hashes, root and window; None where no sequence is.
        self.chains: list[TokenChain | None] = [None] * max_num_seqs
        self.num_windowed: int = 0
        self._free_seq_ids = list(range(max_num_seqs - 1, -1, -1))
        self._distinct: IntArray | None = None  # a read-only array once found to be distinct

    @property
    def num_free(self) -> int:
        return len(self._free_seq_ids)

    @property
    def living(self) -> IntArray:
        """Ids of the living sequences, ascending."""
        return np.flatnonzero(self.state["is_living"])

    def chain(self, seq_id: int) -> TokenChain:
        """The tokens of a living sequence with their hashes."""
        chain = self.chains[seq_id]
        assert chain is not None
        return chain

    # -- beginning and end ----------------------------------------------------------------------

    def check_length(self, tokens: TokenChain) -> None:
        """Raise `InvalidStepError` for too many tokens; a windowed sequence may have any number."""
        if tokens.sink_window is None and len(tokens.token_ids) > self.max_model_len:
            raise InvalidStepError(
                f"a sequence of {len(tokens.token_ids)} tokens exceeds max_model_len "
                f"{self.max_model_len}"
            )

    def require_free(self) -> None:
        """Raise `OutOfBlocksError` where no sequence can begin."""
        if not self._free_seq_ids:
            raise OutOfBlocksError(f"all {self.max_num_seqs} sequences are in use (max_num_seqs)")

    def start(self, tokens: TokenChain) -> int:
        """The id of a new sequence that stores nothing yet; there has to be a free one.

        Its `token_capacity` is its length limit.
        """
        length, sink_window = len(tokens.token_ids), tokens.sink_window
        self._make_room(self._free_seq_ids[-1], length)
        self._length_bound = max(self._length_bound, length)
        seq_id = self._free_seq_ids.pop()
        self.token_ids[seq_id, :length] = tokens.token_ids
        if length:
            self.last_token_ids[seq_id] = tokens.token_ids[-1]
        self.num_tokens[seq_id] = length
        self.chains[seq_id] = tokens.with_tokens(self.token_ids[seq_id])
        state = self.state[seq_id]
        state["is_living"] = True
        state["length_limit"] = self.max_model_len if sink_window is None else UNLIMITED
        link_limit = tokens.link_limit(self.geometry)
        state["link_limit"] = UNLIMITED if link_limit is None else link_limit
        self.num_windowed += sink_window is not None
        self.token_capacity[seq_id] = state["length_limit"]
        return seq_id

    def fork(self, seq_id: int) -> int:
        """The id of a copy of a sequence."""
        self._make_room(self._free_seq_ids[-1], 0)
        child = self._free_seq_ids.pop()
        length = int(self.num_tokens[seq_id])
        for array in self._arrays:
            array[child] = array[seq_id]
        self.token_ids[child, :length] = self.token_ids[seq_id, :length]
        chain = self.chain(seq_id)
        self.chains[child] = chain.with_tokens(self.token_ids[child])
        self.num_windowed += chain.sink_window is not None
        return child

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        """Know the first tokens of a sequence only."""
        self.num_tokens[seq_id] = min(self.num_tokens[seq_id], num_tokens)
        if num_known := int(self.num_tokens[seq_id]):
            self.last_token_ids[seq_id] = self.token_ids[seq_id, num_known - 1]

    def end(self, seq_id: int) -> None:
        """Forget a sequence; its id is the next to be given out."""
        self.num_windowed -= self.chain(seq_id).sink_window is not None
        self.chains[seq_id] = None
        for array in self._arrays:
            array[seq_id] = 0
        self._free_seq_ids.append(seq_id)

    # -- tokens ---------------------------------------------------------------------------------

    def _make_room(self, seq_id: int, num_tokens: int) -> None:
        """Grow the matrix of token ids to a sequence of that id and to one of so many tokens."""
        old = self.token_ids
        if seq_id < len(old) and num_tokens <= old.shape[1]:
            return
        rows = grown(len(old), seq_id + 1, self.max_num_seqs)
        width = grown(old.shape[1], num_tokens, self.max_model_len)
        token_ids: TokenIds = np.zeros((rows, width), dtype=np.int32)
        chains = self.chains.copy()
        for seq_id in self.living.tolist():
            length = self.num_tokens[seq_id]
            token_ids[seq_id, :length] = old[seq_id, :length]
            chains[seq_id] = self.chain(seq_id).with_tokens(token_ids[seq_id])
        self.token_ids, self.chains = token_ids, chains  # at once, or not at all

    def _make_room_behind(self, new_lengths: IntArray, counts: IntArray | None) -> None:
        """Widen the rows of token ids where sequences of these lengths need it.

        Most steps add one token to each, so that a bound on all lengths says that there is room.
        """
        width = self.token_ids.shape[1]
        if width >= self.max_model_len and not self.num_windowed:
            return
        bound = self._length_bound + 1
        if counts is not None or bound > width:
            bound = max(int(self.num_tokens.max()), int(new_lengths.max(initial=0)))
            self._make_room(0, bound)
        self._length_bound = bound

    def write_tokens(
        self,
        seq_ids: IntArray,
        lengths: IntArray,
        new_lengths: IntArray,
        token_ids: TokenIds,
        counts: IntArray | None,
    ) -> None:
        """Tokens behind the first `lengths` [M]: one for each sequence, or so many (`counts`)."""
        self._make_room_behind(new_lengths, counts)
        if counts is None:
            self.token_ids[seq_ids, lengths] = token_ids
            self.last_token_ids[seq_ids] = token_ids
        else:
            rows, offsets = ragged_arange(counts)
            self.token_ids[seq_ids[rows], lengths[rows] + offsets] = token_ids
            self.last_token_ids[seq_ids] = self.token_ids[seq_ids, np.maximum(new_lengths - 1, 0)]
        self.num_tokens[seq_ids] = new_lengths

    # -- checks ---------------------------------------------------------------------------------

    def distinct(self, seq_ids: ArrayLike) -> IntArray:
        """Distinct ids as an array; whether these sequences live is for the caller to check.

        A read-only array that owns its data is taken not to change: the same one is checked once.
        """
        if self._distinct is not None and seq_ids is self._distinct:
            return self._distinct
        checked = integer_array("seq_ids", seq_ids)
        if checked.ndim != 1:
            raise InvalidStepError(f"seq_ids must be one-dimensional, got shape {checked.shape}")
        if len(checked):
            if checked.min() < 0 or checked.max() >= self.max_num_seqs:
                raise InvalidStepError(f"seq_ids {checked.tolist()} are not all living sequences")
            if np.count_nonzero(np.bincount(checked)) < len(checked):
                raise InvalidStepError(f"seq_ids {checked.tolist()} name a sequence twice")
        if isinstance(seq_ids, np.ndarray) and seq_ids.dtype == np.int64:
            is_read_only = not seq_ids.flags.writeable and seq_ids.base is None
            self._distinct = seq_ids if is_read_only else self._distinct
        return checked

    def is_living(self, seq_id: int) -> bool:
        is_id = is_integer(seq_id) and 0 <= seq_id < self.max_num_seqs
        return is_id and self.chains[seq_id] is not None

    def require(self, seq_id: int) -> None:
        """Raise `InvalidStepError` where no sequence is."""
        if not self.is_living(seq_id):
            raise InvalidStepError(f"seq_id {seq_id} holds no sequence")

    def require_living(self, seq_ids: IntArray) -> None:
        if not self.state["is_living"][seq_ids].all():
            raise InvalidStepError(f"seq_ids {seq_ids.tolist()} are not all living sequences")

    def check_new_lengths(self, seq_ids: IntArray, lengths: IntArray) -> None:
        """Raise `InvalidStepError` unless these sequences live and may have so many tokens."""
        if np.count_nonzero(lengths > self.state["length_limit"][seq_ids]):
            self.require_living(seq_ids)
            raise InvalidStepError(
                f"a sequence would have {lengths.max()} tokens; max_model_len is "
                f"{self.max_model_len}"
            )

    def check_integrity(self) -> None:
        """Assert that what is known of sequences agrees, and nothing of those that are not."""
        living = self.living
        idle = np.setdiff1d(np.arange(self.max_num_seqs), living)
        assert sorted(self._free_seq_ids) == idle.tolist()
        assert [seq_id for seq_id, chain in enumerate(self.chains) if chain] == living.tolist()
        for array in self._arrays:
            assert (array[idle] == np.zeros(1, dtype=array.dtype)).all()
        windowed = [seq_id for seq_id in living.tolist() if self.chain(seq_id).sink_window]
        assert self.num_windowed == len(windowed)
