"""Random operations of a block manager beside the reference. Needs no test framework."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

from paged_kv.blocks.prefix_sharing import PrefixSharing
from tests.support.manager_pair import EXTRA_KEYS, ManagerPair, Settings, Wanted
from tests.support.manager_refusals import refuse, refuse_under_way
from tests.support.reference_manager import KEEPS_ALL, Rule, Shape, layout, num_sealable

GEOMETRIES = {
    "native": Shape(4, 4, 0, 0),
    "native with a head": Shape(4, 4, 4, 0),
    "int8-like": Shape(8, 4, 4, 0),
    "int2-like": Shape(16, 2, 4, 5),
    "no head": Shape(16, 4, 0, 6),
    "no head, no tail": Shape(8, 2, 0, 0),
    "tail longer than a block": Shape(4, 2, 2, 9),
    "one token a block": Shape(4, 1, 0, 0),
    "long head": Shape(6, 3, 9, 2),
}


def rules_of(shape: Shape) -> list[Rule]:
    """What layers may see beside blocks of this shape: less than a block, as much, and more."""
    size = shape.block_size
    windows = [1, 2, size - 1, size, size + 1, 2 * size + 1, 4 * size]
    chunks = [1, 3, size // 2, size, size + 2, 2 * size]
    rules = [Rule(window=window) for window in windows if window > 0]
    rules += [Rule(chunk=chunk) for chunk in chunks if chunk > 0]
    return [KEEPS_ALL, *rules, Rule(window=size + 1, chunk=2 * size), Rule(window=2, chunk=5)]


def as_groups(rules: list[Rule]) -> tuple[Rule, ...]:
    """In an order that a manager takes."""
    return tuple(sorted(rules, key=lambda rule: -rule.reach))


class RandomDriver:
    """Random operations on managers of random sizes; the same seed makes the same choices."""

    def __init__(
        self,
        shape: Shape,
        *,
        prefix_caching: bool,
        seed: int,
        episode: int = 150,
        has_groups: bool = False,
    ) -> None:
        self.shape = shape
        self.has_groups = has_groups  # of layers, else one that keeps all
        self.prefix_caching = prefix_caching
        self.seed = seed
        self.episode = episode  # operations on one manager
        self.random = random.Random(seed)
        self.operations: Counter[str] = Counter()
        self.tally: Counter[str] = Counter()
        # Rules and how often each is chosen.
        self.rules: dict[Callable[[ManagerPair], None], int] = {
            self.step: 40,
            self.decode: 12,
            self.add: 13,
            self.add_parked: 4,
            self.append: 4,
            self.fork: 5,
            self.fan_out: 3,
            self.truncate: 1 if prefix_caching else 4,  # it refuses all with a cache
            self.remove: 7,
            self.preempt: 4,
            self.swap_out: 4,
            self.swap_in: 5,
            self.place: 3,
            self.discard_swapped: 1,
            self.reset_cache: 1,
            self.remove_all: 1,
            self.recover: 1,
            self.take_events: 3,
            self.refuse: 1,
        }

    def run(self, num_steps: int) -> None:
        """So many operations, each checked; where one fails the error says how to repeat it."""
        rules, weights = list(self.rules), list(self.rules.values())
        for start in range(0, num_steps, self.episode):
            pair = self._new_pair()
            for number in range(start, min(start + self.episode, num_steps)):
                (rule,) = self.random.choices(rules, weights)
                self._do(rule, pair, number)
                self.operations[rule.__name__] += 1
            self._do(self.drain, pair, number)
            self.tally += pair.tally

    def _do(self, rule: Callable[[ManagerPair], None], pair: ManagerPair, number: int) -> None:
        try:
            rule(pair)
            pair.check()
        except Exception as error:
            raise AssertionError(
                f"{self.shape}, prefix_caching={self.prefix_caching}, "
                f"has_groups={self.has_groups}, seed {self.seed}, episode {self.episode}: "
                f"operation {number} ({rule.__name__}) on {pair.settings}"
            ) from error

    def _new_pair(self) -> ManagerPair:
        """Pools of less than one long sequence up to five."""
        choice, shape = self.random.choice, self.shape
        max_len = choice([5, 8]) * shape.block_size + shape.num_head + choice([0, 1, 3])
        rules = self._rules()
        enough = len(layout(shape, max_len, num_sealable(shape, max_len))) * len(rules)
        pair = ManagerPair(
            Settings(
                shape,
                num_blocks=int(choice([0.8, 1.5, 2, 3, 5]) * enough) + 1,
                max_num_seqs=choice([1, 3, 4, 6, 8, 8]),
                max_model_len=max_len,
                prefix_caching=self.prefix_caching,
                num_host_blocks=choice([0, enough // 2, 2 * enough]),
                record_events=self.random.random() < 0.8,
                rules=rules,
            )
        )
        if choice([True, False]):  # some links have to wait for room
            sharing = pair.manager._sharing
            if isinstance(sharing, PrefixSharing):
                sharing._complete_links = sharing._complete_links[:2]
        return pair

    def _rules(self) -> tuple[Rule, ...]:
        """Of one to four groups; often the first keeps all, or several are alike."""
        if not self.has_groups:
            return (KEEPS_ALL,)
        choice = self.random.choice
        rules = [choice(rules_of(self.shape)) for _ in range(choice([1, 2, 2, 3]))]
        rules += choice([[], [], [KEEPS_ALL], rules[:1]])
        return as_groups(rules)

    # -- choices --------------------------------------------------------------------------------

    def _which(self) -> int:
        return self.random.randrange(12)

    def _branch(self) -> int | None:
        return self.random.choice([None, None, None, 0, 1, 2])

    def _wanted(self, which: int, sizes: list[int]) -> Wanted:
        size, choice = self.shape.block_size, self.random.choice
        return Wanted(
            which=which,
            num_new=choice(sizes),
            num_drafts=choice([0, 0, 1, 2, 3, size]),
            num_kept=choice([0, 1, 2, size, size]),
            branch=self._branch(),
        )

    def step(self, pair: ManagerPair) -> None:
        size, choice = self.shape.block_size, self.random.choice
        sizes = [1, 1, 1, 2, 3, self.shape.open_block_size, size, 2 * size + 1]
        rows = [self._wanted(self._which(), sizes) for _ in range(choice([1, 1, 2, 3, 4]))]
        others = [self.add, self.add_parked, self.refuse_under_way]
        other = choice([None] * 8 + others)
        fits = pair.step(
            rows,
            commits=self.random.random() < 0.8,
            meanwhile=None if other is None else lambda: other(pair),
            seq_ids_as=choice([0, 1, 2]),
            with_drafts=choice([False, True]),
            tells=choice(["each", "all", "later"]),
        )
        if not fits:
            self._make_room(pair)

    def decode(self, pair: ManagerPair) -> None:
        """A token for every sequence, perhaps with drafts."""
        order = list(range(len(pair.living)))
        self.random.shuffle(order)
        fits = pair.step(
            [self._wanted(which, [1]) for which in order],
            seq_ids_as=2,
            with_drafts=self.random.random() < 0.3,
            tells=self.random.choice(["each", "all", "later"]),
        )
        if not fits:
            self._make_room(pair)

    def _make_room(self, pair: ManagerPair) -> None:
        """What a scheduler would do; not always, so that full pools are met too."""
        if self.random.random() < 0.7:
            pair.check()
            self.random.choice([self.remove, self.preempt, self.swap_out])(pair)

    def add(self, pair: ManagerPair) -> None:
        length = self.random.randrange(pair.settings.max_model_len + 1)
        turn = self.random.choice([length, self.random.randrange(length + 1)])
        keys = max(self.random.randrange(-12, len(EXTRA_KEYS)), 0)
        pair.add(length, turn, self.random.randrange(3), keys, as_list=bool(length % 2))

    def add_parked(self, pair: ManagerPair) -> None:
        pair.add_parked(self._which())

    def append(self, pair: ManagerPair) -> None:
        choice = self.random.choice
        count, at_once = choice([0, 1, 1, 2, 5]), choice([False, True])
        pair.append(self.random.randrange(64), self._branch(), count, at_once=at_once)

    def fork(self, pair: ManagerPair) -> None:
        pair.fork(self._which())

    def fan_out(self, pair: ManagerPair) -> None:
        """Several forks of one sequence, and a step of all."""
        which = self._which()
        for _ in range(self.random.choice([1, 2, 3])):
            pair.fork(which)
            pair.check()
        self.decode(pair)

    def truncate(self, pair: ManagerPair) -> None:
        pair.truncate(self._which(), self.random.randrange(1000))

    def recover(self, pair: ManagerPair) -> None:
        pair.recover()

    def remove(self, pair: ManagerPair) -> None:
        pair.remove(self._which())

    def preempt(self, pair: ManagerPair) -> None:
        pair.preempt(self._which())

    def swap_out(self, pair: ManagerPair) -> None:
        pair.swap_out(self._which())

    def swap_in(self, pair: ManagerPair) -> None:
        pair.swap_in(self._which())

    def place(self, pair: ManagerPair) -> None:
        pair.place(self._which(), publishes=self.random.choice([False, True]))

    def discard_swapped(self, pair: ManagerPair) -> None:
        pair.discard_swapped(self._which())

    def reset_cache(self, pair: ManagerPair) -> None:
        pair.reset_cache()

    def remove_all(self, pair: ManagerPair) -> None:
        pair.remove_all(reset=self.random.random() < 0.3)

    def take_events(self, pair: ManagerPair) -> None:
        pair.take_events()

    def drain(self, pair: ManagerPair) -> None:
        pair.drain()

    def refuse(self, pair: ManagerPair) -> None:
        refuse(pair, self._which())

    def refuse_under_way(self, pair: ManagerPair) -> None:
        refuse_under_way(pair, self._which())
