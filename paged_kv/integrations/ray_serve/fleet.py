"""Replicas as whoever sends them requests knows them: what each has cached, what each has to do.

Knows hashes and counts, never Ray, nor how requests get there. Any thread may ask.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from threading import Lock
from typing import Final

from ...errors import ConfigError
from .order import BlockChanges, Order, PromptBlocks

BY_BLOCKS: Final = "prefix"
ROUND_ROBIN: Final = "round_robin"
POLICIES: Final = (BY_BLOCKS, ROUND_ROBIN)
# What a request that is being answered delays another one by, in prompt tokens: its own tokens, and
# one for each so many of its prompt, which every step reads.
TOKENS_PER_REQUEST: Final = 64
CONTEXT_PER_TOKEN: Final = 16
# What a session's own replica is ahead of others, where none has anything of a prompt.
TOKENS_PER_SESSION: Final = 256
FAILING_SECONDS: Final = 5.0  # that a replica which failed an order comes after all others
ENDED_KEPT: Final = 4096  # orders that are over, which a router may still be asking about


@dataclass(eq=False)
class Replica:
    """One replica, from here."""

    number: int = 0  # of the last change that is known
    cached: set[bytes] = field(default_factory=set)
    promised: Counter[bytes] = field(default_factory=Counter)  # by requests that are there
    num_waiting_tokens: int = 0  # of prompts whose answers have not begun
    num_answering_tokens: int = 0  # what requests whose answers have count as
    last_chosen: int = 0
    failing_until: float = 0.0  # by the monotonic clock

    def num_cached_tokens(self, blocks: PromptBlocks) -> int:
        """Tokens of a prompt that this replica has, or will have before it computes them."""
        num_tokens = 0
        for block_hash, end in zip(blocks.hashes, blocks.ends, strict=True):
            if block_hash not in self.cached and not self.promised[block_hash]:
                break
            num_tokens = end
        return num_tokens

    def work_for(self, blocks: PromptBlocks) -> int:
        """What a request adds here, twice because others wait for that too, to what is there."""
        to_compute = blocks.num_tokens - self.num_cached_tokens(blocks)
        return 2 * to_compute + self.num_waiting_tokens + self.num_answering_tokens


@dataclass(eq=False)
class Placement:
    """Where an order is, and what it adds to the work there."""

    replica: str
    blocks: PromptBlocks
    num_waiting_tokens: int
    has_begun: bool = False

    @property
    def num_answering_tokens(self) -> int:
        return TOKENS_PER_REQUEST + self.blocks.num_tokens // CONTEXT_PER_TOKEN


class Fleet:
    """Which replica an order goes to, and what follows from it.

    By "prefix" an order goes where the sum is least of twice the prompt tokens that it would have
    to compute there, because they are not cached, of those that orders wait for there, and of
    `TOKENS_PER_REQUEST` and a `CONTEXT_PER_TOKEN`th of its prompt for each order that is being
    answered there. Of equal ones it is the one that was chosen least recently. By "round_robin"
    they take turns. Either way those come last where it has failed, and before them those where
    any order has failed in the last `FAILING_SECONDS`: who fails at once is always idle.
    """

    def __init__(self, policy: str = BY_BLOCKS) -> None:
        if policy not in POLICIES:
            raise ConfigError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
        self.policy: Final = policy
        self._lock = Lock()  # of what follows
        self._replicas: dict[str, Replica] = {}
        self._placements: dict[int, Placement] = {}
        self._ended: dict[int, None] = {}
        self._num_choices = 0

    # -- replicas -------------------------------------------------------------------------------

    @property
    def known(self) -> dict[str, int]:
        """Up to which change it is known what each replica has cached."""
        with self._lock:
            return {name: replica.number for name, replica in self._replicas.items()}

    def learn(self, name: str, changes: BlockChanges) -> None:
        """Changes of what a replica has cached; what does not follow on what is known is left out.

        What changed since an earlier number is also true of what is known since then.
        """
        with self._lock:
            replica = self._replicas.setdefault(name, Replica())
            if changes.first and not changes.first <= replica.number <= changes.last:
                return
            if changes.first == 0:
                if changes.last < replica.number:
                    return
                replica.cached.clear()
            replica.cached.update(changes.stored)
            replica.cached.difference_update(changes.removed)
            replica.number = changes.last

    def forget(self, name: str) -> None:
        """A replica is gone, or may be another one when it comes back."""
        with self._lock:
            self._forget(name)

    def failed(self, name: str) -> None:
        """A replica, which may be there again, has failed an order."""
        with self._lock:
            replica = self._replicas.setdefault(name, Replica())
            replica.failing_until = time.monotonic() + FAILING_SECONDS

    def keep_only(self, names: Collection[str]) -> None:
        """All replicas that there are."""
        with self._lock:
            for name in self._replicas.keys() - set(names):
                self._forget(name)

    def _forget(self, name: str) -> None:
        self._replicas.pop(name, None)
        for number in [n for n, each in self._placements.items() if each.replica == name]:
            del self._placements[number]

    # -- orders ---------------------------------------------------------------------------------

    def choose(self, order: Order, names: Sequence[str]) -> list[str]:
        """These replicas, the best one for an order first, where it counts from now on."""
        blocks = order.blocks or PromptBlocks(len(order.prompt_token_ids))
        with self._lock:
            self._take_away(order.number)
            replicas = {name: self._replicas.setdefault(name, Replica()) for name in names}
            self._num_choices += 1
            if self.policy == ROUND_ROBIN:
                ranked = sorted(replicas, key=lambda name: replicas[name].last_chosen)
            else:
                ranked = self._by_work(order, blocks, replicas)
            now = time.monotonic()
            ranked.sort(
                key=lambda name: (name in order.failed_on, replicas[name].failing_until > now)
            )
            if ranked:
                self._place(order.number, ranked[0], blocks)
        return ranked

    def _by_work(
        self, order: Order, blocks: PromptBlocks, replicas: dict[str, Replica]
    ) -> list[str]:
        is_new = not any(each.num_cached_tokens(blocks) for each in replicas.values())
        home = home_of(order.session, replicas) if is_new and order.session is not None else None

        def rank(name: str) -> tuple[int, int]:
            replica = replicas[name]
            ahead = TOKENS_PER_SESSION if name == home else 0
            return replica.work_for(blocks) - ahead, replica.last_chosen

        return sorted(replicas, key=rank)

    def place(self, order: Order, name: str) -> None:
        """An order has gone to this replica, which need not be the one that was best."""
        with self._lock:
            placement = self._placements.get(order.number)
            if placement is None or placement.replica != name:
                self._take_away(order.number)
                self._place(
                    order.number, name, order.blocks or PromptBlocks(len(order.prompt_token_ids))
                )

    def begin(self, number: int) -> None:
        """The answer to an order has begun."""
        with self._lock:
            placement = self._placements.get(number)
            if placement is not None and not placement.has_begun:
                placement.has_begun = True
                replica = self._replicas[placement.replica]
                replica.num_waiting_tokens -= placement.num_waiting_tokens
                replica.num_answering_tokens += placement.num_answering_tokens

    def end(self, number: int) -> None:
        """An order is over, however it ended."""
        with self._lock:
            self._take_away(number)
            self._ended[number] = None
            if len(self._ended) > ENDED_KEPT:
                del self._ended[next(iter(self._ended))]

    def _place(self, number: int, name: str, blocks: PromptBlocks) -> None:
        if number in self._ended:  # its client has left while a router was waiting
            return
        replica = self._replicas.setdefault(name, Replica())
        replica.last_chosen = self._num_choices
        to_compute = blocks.num_tokens - replica.num_cached_tokens(blocks)
        self._placements[number] = Placement(name, blocks, to_compute)
        replica.num_waiting_tokens += to_compute
        replica.promised.update(blocks.hashes)

    def _take_away(self, number: int) -> None:
        placement = self._placements.pop(number, None)
        if placement is None:
            return
        replica = self._replicas[placement.replica]
        for block_hash in placement.blocks.hashes:
            replica.promised[block_hash] -= 1
            if not replica.promised[block_hash]:
                del replica.promised[block_hash]
        if placement.has_begun:
            replica.num_answering_tokens -= placement.num_answering_tokens
        else:
            replica.num_waiting_tokens -= placement.num_waiting_tokens


def home_of(session: str, names: Collection[str]) -> str:
    """The replica of a session: it moves only when its own replica goes (rendezvous hashing)."""
    return max(names, key=lambda name: sha256(f"{name}\0{session}".encode()).digest())


# A router is made by Ray Serve, in the process of whoever sends: they find each other by a name.
_fleets: dict[str, Fleet] = {}
_fleets_lock: Final = Lock()


def shared_fleet(name: str, policy: str) -> Fleet:
    """The fleet of this name in this process, made where there is none of this policy."""
    with _fleets_lock:
        fleet = _fleets.get(name)
        if fleet is None or fleet.policy != policy:
            fleet = _fleets[name] = Fleet(policy)
        return fleet
