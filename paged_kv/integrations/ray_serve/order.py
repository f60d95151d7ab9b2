"""What goes between the endpoint and a replica: orders one way, replies the other. Plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ...engine.live_request import GivenTokens
from ...engine.sampling_params import SamplingParams
from ...entrypoints.outputs import StreamEvent
from ...errors import PagedKVError


class PromptBlocks(NamedTuple):
    """Blocks of a prompt that can be shared: chained hashes, and tokens up to each one's end."""

    num_tokens: int
    hashes: Sequence[bytes] = ()
    ends: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True)
class Order:
    """One attempt at a request, on whatever replica.

    With `given` other replicas have begun it. `known` are the numbers up to which the caller knows
    what each replica has cached. `blocks`, `session` and `failed_on`, the replicas where the
    request has failed, are for whoever chooses the replica, and stay here.
    """

    number: int
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    given: GivenTokens | None = None
    known: Mapping[str, int]
    blocks: PromptBlocks | None
    session: str | None = None
    failed_on: frozenset[str] = frozenset()

    def __reduce__(self) -> tuple[Any, ...]:
        return order_of, (vars(replace(self, blocks=None, session=None, failed_on=frozenset())),)


def order_of(fields: Mapping[str, Any]) -> Order:
    return Order(**fields)


class BlockChanges(NamedTuple):
    """What has changed of a replica's cached blocks between two numbers.

    With `first` 0 `stored` is all that there is.
    """

    first: int
    last: int
    stored: Sequence[bytes]
    removed: Sequence[bytes]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """Some events of a request, the first without any: it was accepted, or `refusal` says why not.

    `changes` of what is cached come with the first token and with the end.
    """

    replica: str
    events: Sequence[StreamEvent] = ()
    num_cached_tokens: int = 0
    changes: BlockChanges | None = None
    refusal: PagedKVError | None = None


class ReplicaLostError(PagedKVError, ConnectionError):
    """A replica is gone, or cannot be reached: what it was asked for may be asked of another."""
