"""Whoever guesses for the requests of an engine's traffic: right mostly, and wrong at random."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from paged_kv.blocks.token_chain import TokenIds
from paged_kv.engine.speculation import Speculation

if TYPE_CHECKING:
    from tests.support.engine_traffic import EngineTraffic


class Guesses:
    """A `DraftSource` that knows what each request gets alone."""

    def __init__(self, traffic: EngineTraffic) -> None:
        self._traffic = traffic
        self._random = traffic.random

    def new_speculation(self) -> Speculation:
        """Tries some in every step, whatever they gain."""
        choice = self._random.choice
        speculation = Speculation(self, choice([1, 3, 4]), choice([12, 32, 200]))
        speculation._pauses.begin_step = lambda: True  # type: ignore[method-assign]
        return speculation

    def guess(
        self, contexts: Mapping[str, TokenIds], counts: Mapping[str, int]
    ) -> dict[str, TokenIds]:
        """What comes next, mostly: some guesses are wrong, some short, some are not there."""
        guesses, chance = {}, self._random.random
        for name, count in counts.items():
            sent = self._traffic.sent[name]
            right = self._traffic.alone(sent, self._traffic.engine._live[name], 99)
            output = len(contexts[name]) - len(sent.prompt)
            guess = [token_id if chance() < 0.85 else 0 for token_id in right[output:][:count]]
            guess += [0] * self._random.choice([0, 0, count - len(guess)])  # behind the end
            if guess and chance() < 0.95:
                guesses[name] = np.array(guess, dtype=np.int32)
        return guesses

    def close(self) -> None:
        """An error has struck a guess: there will be others all the same."""
        self._traffic.engine.speculation = self.new_speculation()
