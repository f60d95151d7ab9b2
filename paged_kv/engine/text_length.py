"""How few tokens a text can be, from its length alone. Knows tokenizers' parts, never texts.

Only of tokenizers that keep every character: byte-level BPE, and BPE that falls back to bytes. Of
all others, which may drop white space or accents, or make one unknown token of any length, nothing
is said.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final, cast

from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

# Characters that a normalizer may make one of; canonical composition joins at most four.
SHRINKING: Final = {"ByteLevel": 1, "NFC": 4, "NFKC": 4, "Prepend": 1}
KEEPING_SPLITTERS: Final = ("ByteLevel", "Digits", "Metaspace", "Split")


def least_tokens(num_characters: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """No text of so many characters has fewer tokens; 0 where nothing is known."""
    backend = tokenizer.backend_tokenizer
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if not isinstance(backend.model, BPE):
        return 0
    if any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values()):
        return 0
    shrinks, splitters = 1, list(parts_of(backend.pre_tokenizer, "pretokenizers"))
    parts = list(parts_of(backend.normalizer, "normalizers"))
    for part in parts:
        shrinks *= shrinking(part)
    is_byte_level = any(part["type"] == "ByteLevel" for part in (*parts, *splitters))
    letters: list[str] = list(cast(Any, bytes_to_unicode)().values())
    if not is_byte_level:
        letters = [f"<0x{byte:02X}>" for byte in range(256)] if backend.model.byte_fallback else []
    keeps_all = bool(letters) and all(letter in vocabulary for letter in letters)
    if not (shrinks and keeps_all and all(map(is_keeping, splitters))):
        return 0
    return num_characters // (shrinks * max(map(len, vocabulary)))


def parts_of(component: Any, name: str) -> Iterator[dict[str, Any]]:
    """What a normalizer or a pre-tokenizer is made of, as its file says it."""
    if component is None:
        return
    description = json.loads(component.__getstate__())
    yield from description[name] if description["type"] == "Sequence" else [description]


def shrinking(part: dict[str, Any]) -> int:
    """Characters that may become one; 0 where there is no limit."""
    if part["type"] == "Replace":
        old = part["pattern"].get("String", "")
        return 1 if old and len(part["content"]) >= len(old) else 0
    return SHRINKING.get(part["type"], 0)


def is_keeping(part: dict[str, Any]) -> bool:
    return part["type"] in KEEPING_SPLITTERS and part.get("behavior") != "Removed"
