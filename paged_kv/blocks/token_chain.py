"""Chained hashes of a sequence's tokens: what prefix sharing trusts. Knows tokens, never blocks.

The hash of a link covers its tokens, the hash of the link before it, and through the first one the
*root*: the fingerprint of everything that decides what K/V the tokens become (model, format and
its parameters) and the sequence's own extra keys (adapter, media, salt). SHA-256, so that nobody
can make two prefixes that meet in one hash.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import sha256
from reprlib import repr as short_repr

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InvalidRequestError
from ..validation import MAX_COUNT, is_list_of
from .geometry import BlockGeometry
from .sink_window import SinkWindow

TokenIds = NDArray[np.int32]
ExtraKey = bytes | str | int


def as_token_ids(values: ArrayLike) -> TokenIds:
    """A flat sequence of 31-bit numbers as an array; raises `InvalidRequestError` otherwise."""
    try:
        if isinstance(values, list):  # twice as fast as numpy's own conversion, and as strict
            token_ids: TokenIds = np.frombuffer(array("i", values), dtype=np.int32)
            if token_ids.min(initial=0) >= 0:
                return token_ids
        else:
            converted = _converted(np.asarray(values))
            if converted is not None:
                return converted
    except (TypeError, ValueError, OverflowError):
        pass
    raise InvalidRequestError(
        f"token ids must be a flat list of integers from 0 to {MAX_COUNT}, got {short_repr(values)}"
    )


def _converted(values: NDArray[np.int64]) -> TokenIds | None:
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        return None
    token_ids = values.astype(np.int32)
    token_ids &= MAX_COUNT  # negative ones and those that are too large become others
    return None if np.count_nonzero(token_ids != values) else token_ids


def root_hash(fingerprint: bytes, extra_keys: Sequence[ExtraKey] = ()) -> bytes:
    """What a chain starts from. Types and lengths are hashed too: keys cannot run together."""
    if not is_list_of(extra_keys, lambda key: True):
        raise InvalidRequestError(f"extra_keys must be a list, got {short_repr(extra_keys)}")
    digest = sha256(b"paged_kv prefix 1")
    for key in (fingerprint, *extra_keys):
        if type(key) not in (bytes, str, int):  # whatever else may look the same and not be it
            raise InvalidRequestError(f"an extra key must be bytes, str or int, got {key!r}")
        data = key if isinstance(key, bytes) else str(key).encode(errors="surrogatepass")
        digest.update(f"{type(key).__name__}:{len(data)}:".encode() + data)
    return digest.digest()


def link_hash(parent: bytes, token_bytes: bytes) -> bytes:
    """Hash of a link whose token ids are `token_bytes`, 4 bytes each in little-endian order."""
    return sha256(parent + token_bytes).digest()


class TokenChain:
    """The tokens of a sequence, and the hash of each complete link as far as it was needed.

    The `extra_keys` are those that `root` was made of, for events to tell.
    With a `sink_window` they are a windowed sequence's, which shares only what comes before any
    eviction: K/V of later tokens depend on what they did not see.
    """

    __slots__ = ("extra_keys", "hashes", "root", "sink_window", "token_ids")

    def __init__(
        self,
        token_ids: TokenIds,
        root: bytes,
        sink_window: SinkWindow | None = None,
        extra_keys: tuple[ExtraKey, ...] = (),
    ) -> None:
        self.token_ids: TokenIds = token_ids
        self.root: bytes = root
        self.sink_window: SinkWindow | None = sink_window
        self.extra_keys: tuple[ExtraKey, ...] = extra_keys
        self.hashes: list[bytes] = []

    def with_tokens(self, token_ids: TokenIds) -> TokenChain:
        """The same hashes over an array that begins with the same tokens."""
        chain = TokenChain(token_ids, self.root, self.sink_window, self.extra_keys)
        chain.hashes = self.hashes.copy()
        return chain

    def num_shareable_links(self, geometry: BlockGeometry) -> int:
        """Links that a new sequence of these tokens may take over from others."""
        num_links = geometry.num_shareable_links(len(self.token_ids))
        limit = self.link_limit(geometry)
        return num_links if limit is None else min(num_links, limit)

    def link_limit(self, geometry: BlockGeometry) -> int | None:
        """Links of the sequence, however long it gets, that may be shared; None: all of them."""
        if self.sink_window is None:
            return None
        return geometry.num_links(self.sink_window.num_visible_tokens)

    def hash_links(self, geometry: BlockGeometry, num_links: int) -> None:
        """Extend the hashes to the first `num_links` links of `token_ids`."""
        hashes, known = self.hashes, len(self.hashes)
        if known >= num_links:
            return
        start, parent = geometry.link_end(known), hashes[-1] if hashes else self.root
        if known + 1 == num_links:  # what decoding completes
            end = start + geometry.link_size(known)
            hashes.append(link_hash(parent, self.token_ids[start:end].tobytes()))
            return
        data, position = self.token_ids[start : geometry.link_end(num_links)].tobytes(), 0
        for link in range(known, num_links):
            size = 4 * geometry.link_size(link)
            parent = link_hash(parent, data[position : position + size])
            position += size
            hashes.append(parent)
