"""Which replica gets a request: policies, of what a router can know. Knows no steps or times.

A router knows which replicas are alive and how many requests it has given to each that are not
over. Where it follows events it also knows which blocks each has, as of the last step's end.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Final, NamedTuple, Protocol

import numpy as np

from ...blocks.events import BlockStored, CacheCleared, CacheEvent
from ...blocks.geometry import BlockGeometry
from ...blocks.token_chain import TokenChain, root_hash
from .replica import Job, Replica

RING_POINTS: Final = 64  # of each replica
MOST_LOAD: Final = 1.25  # times the mean, above which the next on the ring takes a request
AFFINITY_TOKENS: Final = 256  # of a prompt, by which a prefix is known
# What an answer that has begun delays others by, in tokens of prompts: its own, and one for each so
# many of its prompt, which every step reads.
ANSWER_TOKENS: Final = 64
CONTEXT_PER_TOKEN: Final = 16


class Placed(NamedTuple):
    """What a request adds to the work of its replica."""

    num_tokens: int  # of its prompt, to be computed
    num_answering_tokens: int  # what it counts as when its answer has begun
    hashes: Sequence[bytes]  # of its blocks that can be shared


class Policy(Protocol):
    """Chooses among living replicas, of which there is at least one."""

    def choose(self, job: Job, alive: Sequence[Replica]) -> Replica: ...

    def ended(self, replica: Replica, job: Job) -> None:
        """A replica has answered it."""

    def follow(self, replica: Replica, events: Sequence[CacheEvent]) -> None:
        """What became of a replica's cached blocks."""

    def forget(self, replica: Replica) -> None:
        """It is dead, and its blocks are lost."""


class Blind:
    """What policies have in common that follow no events."""

    def ended(self, replica: Replica, job: Job) -> None:
        """Nothing."""

    def follow(self, replica: Replica, events: Sequence[CacheEvent]) -> None:
        """Nothing."""

    def forget(self, replica: Replica) -> None:
        """Nothing."""


class RoundRobin(Blind):
    """One after the other."""

    def __init__(self, seed: int) -> None:
        self._next = 0

    def choose(self, job: Job, alive: Sequence[Replica]) -> Replica:
        self._next += 1
        return alive[(self._next - 1) % len(alive)]


class RandomChoice(Blind):
    """Any."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng((seed, 2))

    def choose(self, job: Job, alive: Sequence[Replica]) -> Replica:
        return alive[int(self._rng.integers(len(alive)))]


class TwoChoices(RandomChoice):
    """The less loaded of two at random (Mitzenmacher 2001)."""

    def choose(self, job: Job, alive: Sequence[Replica]) -> Replica:
        one, other = super().choose(job, alive), super().choose(job, alive)
        return other if other.load < one.load else one


class HashRing(Blind):
    """Consistent hashing with bounded loads (Mirrokni et al. 2016, arXiv:1608.01350).

    The next replica on the ring takes what one cannot that has `MOST_LOAD` times the mean load.
    """

    def __init__(self, key_of: Callable[[Job], bytes]) -> None:
        self._key_of = key_of
        self._points: dict[int, list[int]] = {}

    def choose(self, job: Job, alive: Sequence[Replica]) -> Replica:
        ring = sorted((point, n) for n, each in enumerate(alive) for point in self._of(each))
        most = math.ceil(MOST_LOAD * (sum(each.load for each in alive) + 1) / len(alive))
        start = bisect.bisect(ring, (place(self._key_of(job)), -1))
        in_turn = (alive[n] for _, n in ring[start:] + ring[:start])
        return next(replica for replica in in_turn if replica.load < most)

    def _of(self, replica: Replica) -> list[int]:
        if replica.number not in self._points:
            names = (f"{replica.number} {point}".encode() for point in range(RING_POINTS))
            self._points[replica.number] = [place(name) for name in names]
        return self._points[replica.number]


def place(key: bytes) -> int:
    return int.from_bytes(sha256(key).digest()[:8], "little")


def conversation_key(job: Job) -> bytes:
    return f"conversation {job.conversation.number}".encode()


def prefix_key(job: Job) -> bytes:
    return job.prompt[:AFFINITY_TOKENS].tobytes()


class BlockAware:
    """The replica where the least is to be done, as `paged_kv.integrations.ray_serve` counts it.

    That is twice the prompt tokens that a request would have to compute there, those that others
    wait for there, and `ANSWER_TOKENS` and a `CONTEXT_PER_TOKEN`th of its prompt for each answer
    that has begun there. A replica has what events say of it and what requests that were sent
    there will compute. Of equal ones it is the one that was chosen least recently.
    """

    def __init__(self, seed: int) -> None:
        self._who: dict[bytes, int] = {}  # has a block: a bit of each replica
        self._promised: Counter[tuple[int, bytes]] = Counter()
        self._placed: dict[int, dict[Job, Placed]] = {}  # by replica
        self._last_chosen: Counter[int] = Counter()
        self._num_choices = 0

    def choose(self, job: Job, alive: Sequence[Replica]) -> Replica:
        geometry = alive[0].machine.geometry
        chain = TokenChain(job.known_tokens, root_hash(b""))
        chain.hash_links(geometry, chain.num_shareable_links(geometry))
        size = len(chain.token_ids)
        known = self._tokens_known(chain.hashes, geometry, alive)

        def work(replica: Replica) -> tuple[int, int]:
            there = sum(
                placed.num_answering_tokens if other.first is not None else placed.num_tokens
                for other, placed in self._placed.get(replica.number, {}).items()
            )
            to_compute = size - known[replica.number]
            return 2 * to_compute + there, self._last_chosen[replica.number]

        best = min(alive, key=work)
        self._num_choices += 1
        self._last_chosen[best.number] = self._num_choices
        its = self._placed.setdefault(best.number, {})
        its[job] = Placed(
            size - known[best.number], ANSWER_TOKENS + size // CONTEXT_PER_TOKEN, chain.hashes
        )
        self._promised.update((best.number, each) for each in chain.hashes)
        return best

    def _tokens_known(
        self, hashes: Sequence[bytes], geometry: BlockGeometry, alive: Sequence[Replica]
    ) -> dict[int, int]:
        """Tokens of a prompt that each replica has or will have, from its beginning."""
        known = {replica.number: 0 for replica in alive}
        left = list(known)
        for link, block_hash in enumerate(hashes, 1):
            who = self._who.get(block_hash, 0)
            left = [n for n in left if who >> n & 1 or (n, block_hash) in self._promised]
            if not left:
                break
            for number in left:
                known[number] = link
        return {number: geometry.link_end(link) for number, link in known.items()}

    def ended(self, replica: Replica, job: Job) -> None:
        placed = self._placed[replica.number].pop(job)
        for each in placed.hashes:
            key = replica.number, each
            self._promised[key] -= 1
            if not self._promised[key]:
                del self._promised[key]

    def follow(self, replica: Replica, events: Sequence[CacheEvent]) -> None:
        bit, who = 1 << replica.number, self._who
        for event in events:
            assert not isinstance(event, CacheCleared), "a replica that dies is forgotten"
            known = who.get(event.block_hash, 0)
            if isinstance(event, BlockStored):
                who[event.block_hash] = known | bit
            elif known == bit:
                del who[event.block_hash]
            else:
                who[event.block_hash] = known & ~bit

    def forget(self, replica: Replica) -> None:
        for job in list(self._placed.get(replica.number, {})):
            self.ended(replica, job)
        del self._last_chosen[replica.number]
        bit = 1 << replica.number
        self._who = {key: its & ~bit for key, its in self._who.items() if its & ~bit}


POLICIES: Final[dict[str, Callable[[int], Policy]]] = {
    "round robin": RoundRobin,
    "random": RandomChoice,
    "two choices": TwoChoices,
    "session affinity": lambda seed: HashRing(conversation_key),
    "prefix affinity": lambda seed: HashRing(prefix_key),
    "KV-aware": BlockAware,
}
