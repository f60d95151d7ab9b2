"""Which requests try guesses of their next tokens, and how many. Knows requests, never logits."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from ..blocks.token_chain import TokenIds
from ..scheduler.drafts import NO_DRAFTS, Drafts
from .draft_length import DraftPauses
from .live_request import LiveRequest, TokenDraw


class DraftSource(Protocol):
    """Whoever guesses."""

    def guess(
        self, contexts: Mapping[str, TokenIds], counts: Mapping[str, int]
    ) -> dict[str, TokenIds]:
        """At most so many tokens after each of these, by request id; some may have none."""
        ...

    def close(self) -> None:
        """Nobody asks again."""
        ...


class Speculation:
    """Drafts for the requests that decode.

    `num_tokens` are the most that one tries in a step, `max_step_tokens` what a step may compute in
    all. A source that fails is asked no more: the tokens are the same without it.
    """

    def __init__(self, source: DraftSource, num_tokens: int, max_step_tokens: int) -> None:
        self._source: DraftSource | None = source
        self.num_tokens = num_tokens
        self.max_step_tokens = max_step_tokens
        self._pauses = DraftPauses()

    def drafts_for(self, lives: Iterable[LiveRequest]) -> Drafts:
        """What the next step may try."""
        running = [live for live in lives if live.request.seq_ids]
        room = self.max_step_tokens - len(running)
        ready = [live for live in running if live.may_try_drafts]
        if self._source is None or not ready or room < len(ready):
            return NO_DRAFTS
        if not self._pauses.begin_step():
            return NO_DRAFTS
        most = min(self.num_tokens, room // len(ready))
        counts = {live.request_id: min(live.draft_length.num_tokens, most) for live in ready}
        contexts = {live.request_id: live.request.known_tokens for live in ready}
        try:
            return self._source.guess(contexts, counts)
        except MemoryError:
            raise  # nobody's fault: it is asked again
        except Exception as error:
            warnings.warn(f"speculation is off from here on: {error!r}", stacklevel=2)
            self.close()
            return NO_DRAFTS

    def learn(self, draws: Sequence[TokenDraw]) -> None:
        """What became of the guesses of a step, whose tokens its requests have got."""
        tried = [draw for draw in draws if draw.drafts]
        for draw in tried:
            draw.live.draft_length.learn(len(draw.drafts), draw.num_accepted)
        if tried:
            num_seqs = sum(draw.leader is None for draw in draws)
            self._pauses.learn(num_seqs, sum(draw.num_accepted for draw in tried))

    def close(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            source.close()
