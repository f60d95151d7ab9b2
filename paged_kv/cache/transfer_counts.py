"""How many tokens and blocks an exported sequence says it has. Knows a header, never its records.

Nobody has checked the header: what a manager here could never have is refused.
"""

from __future__ import annotations

from reprlib import repr as short_repr

import numpy as np

from ..blocks.block_manager import BlockManager
from ..blocks.geometry import BlockGeometry
from ..errors import TransferError

JsonObject = dict[str, object]


def read_counts(header: JsonObject, manager: BlockManager) -> tuple[int, int, int]:
    """Computed tokens, known tokens and sealed blocks, as a sequence here could have them."""
    num_computed = read_count(header, "num_computed_tokens")
    num_known = read_count(header, "num_known_tokens")
    num_sealed = read_count(header, "num_sealed")
    longest = max(num_computed, num_known)
    if longest > manager.max_model_len:
        raise TransferError(
            f"the sequence has {short_repr(longest)} tokens; max_model_len is "
            f"{manager.max_model_len} here"
        )
    if manager.prefix_cache is not None and num_known < num_computed:
        raise TransferError(
            f"of {num_computed} computed tokens {num_known} are known; prefix caching needs all"
        )
    possible = possible_num_sealed(manager.geometry, num_computed, longest)
    if num_sealed not in possible:
        raise TransferError(
            f"header.num_sealed is {short_repr(num_sealed)}; with {num_computed} of {longest} "
            f"tokens computed it is {possible.start} to {possible.stop - 1}"
        )
    return num_computed, num_known, num_sealed


def read_count(header: JsonObject, name: str) -> int:
    value = header.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TransferError(f"header.{name} must be a count, got {short_repr(value)}")
    return value


def read_evicted(
    header: JsonObject, manager: BlockManager, num_computed: int, num_sealed: int
) -> tuple[int, ...]:
    """Tokens that each group of layers has let go, as a sequence here could have."""
    geometry, retentions = manager.geometry, manager.source.retentions
    found = header.get("num_evicted_tokens", [0] * len(retentions))
    name = f"header.num_evicted_tokens is {short_repr(found)}"
    if not isinstance(found, list) or len(found) != len(retentions):
        raise TransferError(f"{name}, which is not one number for each of {len(retentions)} groups")
    for value, retention in zip(found, retentions, strict=True):
        most = retention.num_evicted(geometry, num_computed)
        if geometry.seals:
            most = min(most, num_sealed * geometry.block_size)
        is_count = isinstance(value, int) and not isinstance(value, bool)
        if not (is_count and 0 <= value <= most and value % retention.step(geometry) == 0):
            raise TransferError(
                f"{name}; of {num_computed} tokens a group that keeps {retention} lets go of up "
                f"to {most}, by {retention.step(geometry)}"
            )
    return tuple(found)


def possible_num_sealed(geometry: BlockGeometry, num_computed: int, num_tokens: int) -> range:
    """How many body blocks a sequence can have, of whose `num_tokens` so many are computed.

    Draft tokens that were kept can leave one block unsealed; shared blocks can be more than the
    computed tokens alone would have sealed, but not more than all its tokens would.
    """
    if not geometry.seals:
        return range(1)
    usual, most = geometry.num_sealed_blocks(np.array([num_computed, num_tokens])).tolist()
    complete = (num_computed - geometry.num_head_tokens) // geometry.block_size
    return range(max(usual - 1, 0), max(min(most, complete), 0) + 1)
