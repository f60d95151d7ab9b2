"""Guesses out of a sequence's own tokens: what followed the last time. Knows tokens, no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from ..blocks.token_chain import TokenIds
from ..validation import require_count

MOST_TOKENS: Final = 64
NO_TOKENS: Final[TokenIds] = np.empty(0, dtype=np.int32)


@dataclass(frozen=True, kw_only=True)
class PromptLookup:
    """Speculate that what follows is what followed the same few tokens before.

    It costs nothing but the looking, and gains where outputs repeat what stands in the prompt or
    in themselves: summaries, edits, code, answers that quote. The longest of the last `max_ngram`
    to `min_ngram` tokens that was there before decides, where it came last. A step tries at most
    `num_tokens` (1 to 64) of a sequence, and only as long as the step computes no more than
    `max_step_tokens` tokens in all: beyond, more tokens take more time.
    """

    num_tokens: int = 16
    max_ngram: int = 4
    min_ngram: int = 2
    max_step_tokens: int = 64

    def __post_init__(self) -> None:
        require_count("num_tokens", self.num_tokens, most=MOST_TOKENS)
        require_count("min_ngram", self.min_ngram)
        require_count("max_ngram", self.max_ngram, least=self.min_ngram)
        require_count("max_step_tokens", self.max_step_tokens, least=2)

    def guess(
        self, contexts: Mapping[str, TokenIds], counts: Mapping[str, int]
    ) -> dict[str, TokenIds]:
        """So many tokens after each of these, by request id; none where nothing is known."""
        guesses = {name: self.look_up(contexts[name], count) for name, count in counts.items()}
        return {name: guess for name, guess in guesses.items() if len(guess)}

    def look_up(self, token_ids: TokenIds, count: int) -> TokenIds:
        """The tokens [count] that followed the last ones, or none; what repeats goes on so."""
        length = len(token_ids)
        for size in range(min(self.max_ngram, length - 1), self.min_ngram - 1, -1):
            ends = (token_ids[size - 1 : -1] == token_ids[-1]).nonzero()[0] + size
            for distance in range(2, size + 1):
                ends = ends[token_ids[ends - distance] == token_ids[-distance]]
            if len(ends):
                start = int(ends[-1])
                follow: TokenIds = token_ids[start + np.arange(count) % (length - start)]
                return follow
        return NO_TOKENS

    def close(self) -> None:
        """There is nothing to give back."""
