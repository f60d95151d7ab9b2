"""Single tokens as text and as bytes, for log-probabilities. Knows a tokenizer's vocabulary."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Final

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

REPLACEMENT: Final = "\ufffd"
BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-F]{2})>")
BYTE_OF_LETTER: Final[dict[str, int]] = {
    letter: byte
    for byte, letter in bytes_to_unicode().items()  # type: ignore[no-untyped-call]
}
MAX_KEPT: Final = 1 << 16


class TokenTexts:
    """What tokens are, each by itself: a part of a character is a replacement character as text,
    and what it is as bytes. Without a tokenizer they have neither.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer
        self._has_byte_letters = tokenizer is not None and has_byte_letters(tokenizer)
        # Behind another token a word keeps the space that it loses at the beginning of a text.
        self._before = [] if tokenizer is None else tokenizer.encode("a", add_special_tokens=False)
        self._text_before = self._decode(self._before)
        self._special_ids = frozenset([] if tokenizer is None else tokenizer.all_special_ids)
        self.text: Callable[[int], str] = lru_cache(MAX_KEPT)(self._text)

    def _decode(self, token_ids: list[int]) -> str:
        if self._tokenizer is None:
            return ""
        return str(self._tokenizer.backend_tokenizer.decode(token_ids, skip_special_tokens=False))

    def _text(self, token_id: int) -> str:
        decoded = self._decode([*self._before, token_id])
        if decoded.startswith(self._text_before):
            return decoded[len(self._text_before) :]
        return self._decode([token_id])

    def length(self, token_id: int) -> int:
        """Characters of a text that are the token's: special tokens have none."""
        return 0 if token_id in self._special_ids else len(self.text(token_id))

    def utf8(self, token_id: int) -> list[int]:
        """The bytes that a token adds to a text."""
        text = self.text(token_id)
        token = None
        if REPLACEMENT in text and self._tokenizer is not None:
            token = self._tokenizer.backend_tokenizer.id_to_token(token_id)
        if token is None:
            return list(text.encode())
        byte = BYTE_TOKEN.fullmatch(token)
        if byte is not None:
            return [int(byte[1], 16)]
        if self._has_byte_letters and all(letter in BYTE_OF_LETTER for letter in token):
            return [BYTE_OF_LETTER[letter] for letter in token]
        return list(text.encode())


def has_byte_letters(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether each letter of the vocabulary stands for a byte, as in GPT-2's."""
    return "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder)
