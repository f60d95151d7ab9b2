"""How many tokens it is worth to guess, by what became of earlier guesses. Knows counts only.

All of it follows from what was tried before, so that a run can be repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

FIRST_LENGTH: Final = 4
FIRST_PAUSE, LONGEST_PAUSE = 4, 64  # steps


@dataclass(eq=False)
class DraftLength:
    """Of one request: twice as many after all were right, else one more than were right."""

    num_tokens: int = FIRST_LENGTH

    def learn(self, num_tried: int, num_accepted: int) -> None:
        """What became of the last."""
        if num_accepted < num_tried:
            self.num_tokens = num_accepted + 1
        elif num_tried:
            self.num_tokens = max(2 * num_tried, self.num_tokens)


@dataclass(eq=False)
class DraftPauses:
    """Of all requests together: steps without guesses, after one that gained too little.

    A step that tries any takes longer for every sequence, nearly twice as long as plain decoding on
    a CPU and on a GPU: it gains where it brings a second token for each. After one that does not
    come a few plain steps, then more and more.
    """

    num_left: int = 0
    next_pause: int = FIRST_PAUSE

    def begin_step(self) -> bool:
        """Whether the next step may try any."""
        self.num_left -= self.num_left > 0
        return self.num_left == 0

    def learn(self, num_seqs: int, num_accepted: int) -> None:
        """What became of a step of so many sequences in which some tried guesses."""
        if num_accepted >= num_seqs:
            self.next_pause = FIRST_PAUSE
        else:
            self.num_left = self.next_pause + 1
            self.next_pause = min(4 * self.next_pause, LONGEST_PAUSE)
