"""Random operations on the block manager, each compared with the reference model of the tests.

    make soak        or, from the checkout:
    PYTHONPATH=bench python -m tests.soak.soak_block_manager --steps 1000000 --json soak.json

Every operation is one step: the manager and `tests/support/reference_manager` do it, then
`check_integrity` runs and all that can be observed is compared, block ids and contents included.
Turns of 1000 steps go round all geometries, with prefix caching and without, of one group of layers
that keeps all and of several that do not. A mismatch is printed with how to repeat it, ends its
turn, and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter
from itertools import product
from pathlib import Path

from report import Row, write_report

from tests.support.manager_driver import GEOMETRIES, RandomDriver

TURN = 1000  # steps
EPISODE = 500  # operations on one manager
SECONDS_BETWEEN_LINES = 10.0
# Names of the tallies in the report.
EVENTS = {
    "hits": "prefix hits",
    "evictions": "evictions",
    "forks": "forks",
    "copies": "copies on write",
    "sealed blocks": "sealed blocks",
    "let go": "blocks let go that no later token sees",
    "cuts": "cut sequences",
    "swaps": "swaps",
    "placed": "placed sequences",
    "failed reservations": "failed reservations",
    "no seq_id": "refusals for lack of a seq_id",
    "kept drafts": "kept drafts",
    "dropped drafts": "dropped drafts",
}


class Soak:
    """Turns of seeded drivers, and what happened in them."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.num_turns = 0
        self.num_mismatches = 0
        self.operations: Counter[str] = Counter()
        self.events: Counter[str] = Counter()
        self.num_steps_with_groups = 0

    @property
    def num_steps(self) -> int:
        return self.operations.total()

    def turn(self, num_steps: int) -> None:
        cases = list(product(GEOMETRIES.values(), (True, False), (True, False)))
        shape, prefix_caching, has_groups = cases[self.num_turns % len(cases)]
        driver = RandomDriver(
            shape,
            prefix_caching=prefix_caching,
            seed=1_000_000 * self.seed + self.num_turns,
            episode=EPISODE,
            has_groups=has_groups,
        )
        self.num_turns += 1
        try:
            driver.run(num_steps)
        except AssertionError:
            self.num_mismatches += 1
            traceback.print_exc()
        self.operations += driver.operations
        self.num_steps_with_groups += has_groups * driver.operations.total()
        self.events += driver.tally

    def rows(self, seconds: float) -> list[Row]:
        counts = {
            "steps": self.num_steps,
            "steps with groups of layers": self.num_steps_with_groups,
            "mismatches": self.num_mismatches,
            **{name: self.events[key] for key, name in EVENTS.items()},
        }
        rows = [Row(case="soak", metric=name, value=n, unit="") for name, n in counts.items()]
        rows.append(Row(case="soak", metric="duration", value=seconds, unit="s"))
        return rows + [
            Row(case="operations", metric=name, value=count, unit="")
            for name, count in self.operations.most_common()
        ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    soak = Soak(arguments.seed)
    start = last_line = time.perf_counter()
    # A turn that ends early is not made up for: mismatches may be at its first step.
    for done in range(0, arguments.steps, TURN):
        soak.turn(min(TURN, arguments.steps - done))
        now = time.perf_counter()
        if now - last_line >= SECONDS_BETWEEN_LINES:
            last_line = now
            print(
                f"{soak.num_steps} steps in {now - start:.0f} s, "
                f"{soak.num_steps / (now - start):.0f} a second, {soak.num_mismatches} mismatches",
                flush=True,
            )
    seconds = time.perf_counter() - start
    write_report("soak_block_manager", soak.rows(seconds), arguments.json)
    return int(soak.num_mismatches > 0)


if __name__ == "__main__":
    sys.exit(main())
