"""How many tokens it is worth to guess, by what became of earlier guesses. Knows counts only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

FIRST_LENGTH: Final = 4
LONGEST_PAUSE: Final = 32  # steps


@dataclass(eq=False)
class DraftLength:
    """Of one request. It follows from what was tried before alone, so that a run can be repeated.

    Twice as many after all were right, as many as were right and one more after some, and none for
    a while after none: for twice as long each time.
    """

    num_tokens: int = FIRST_LENGTH
    num_pauses_left: int = 0  # steps in which nothing is tried
    next_pause: int = 1

    def take(self) -> int:
        """For the next step."""
        if self.num_pauses_left:
            self.num_pauses_left -= 1
            return 0
        return self.num_tokens

    def learn(self, num_tried: int, num_accepted: int) -> None:
        """What became of the last."""
        if not num_tried:
            return
        if num_accepted:
            self.next_pause = 1
            all_right = num_accepted == num_tried
            self.num_tokens = max(2 * num_tried, self.num_tokens) if all_right else num_accepted + 1
        else:
            self.num_tokens = max(self.num_tokens // 2, 1)
            self.num_pauses_left = self.next_pause
            self.next_pause = min(2 * self.next_pause, LONGEST_PAUSE)
