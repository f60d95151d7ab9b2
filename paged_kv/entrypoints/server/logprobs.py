"""Log-probabilities in OpenAI's two forms. Knows tokens, never where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from ...engine.token_logprob import TokenLogprob
from .token_texts import TokenTexts

LEAST_LOGPROB: Final = -9999.0  # JSON knows no infinity


def number(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def chat_logprobs(found: Sequence[TokenLogprob], texts: TokenTexts) -> dict[str, Any]:
    """Of a chat: tokens in order, each with the likeliest ones in its place."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": texts.text(token_id),
            "logprob": number(logprob),
            "bytes": texts.utf8(token_id),
        }

    content = [
        {
            **entry(each.token_id, each.logprob),
            "top_logprobs": [entry(*likely) for likely in each.likeliest],
        }
        for each in found
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """Of a completion: four lists, of tokens that follow what came before."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._num_characters = 0  # of the tokens so far

    def next(
        self, token_ids: Sequence[int], found: Sequence[TokenLogprob | None]
    ) -> dict[str, list[Any]]:
        """Of the next tokens; nothing is known of a prompt's first (None)."""
        offsets = []
        for token_id in token_ids:
            offsets.append(self._num_characters)
            self._num_characters += self._texts.length(token_id)
        return {
            "tokens": [self._texts.text(token_id) for token_id in token_ids],
            "token_logprobs": [None if each is None else number(each.logprob) for each in found],
            "top_logprobs": [None if each is None else self._likeliest(each) for each in found],
            "text_offset": offsets,
        }

    def _likeliest(self, found: TokenLogprob) -> dict[str, float]:
        """The token itself too. Of tokens with the same text the likeliest counts."""
        pairs = [(found.token_id, found.logprob), *reversed(found.likeliest)]
        return {self._texts.text(token_id): number(logprob) for token_id, logprob in pairs}
